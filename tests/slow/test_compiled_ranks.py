from pathlib import Path

import pytest
from helpers import assert_compiled_run_equals_eager_one, make_folder, small

pytestmark = pytest.mark.slow


def test_a_compiled_run_on_two_ranks_trains_the_same_network(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pictures", train=25, test=7)
    assert_compiled_run_equals_eager_one(*small(folder), "--devices", "cpu:2", cwd=tmp_path)
