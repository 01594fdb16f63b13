from pathlib import Path

import pytest
from helpers import assert_compiled_run_equals_eager_one, make_folder, small

pytestmark = pytest.mark.slow


# In this order, in which the second finds what the first has compiled.
@pytest.mark.parametrize("devices", ["1", "cpu:2"])
def test_a_compiled_run_trains_the_same_network(devices: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pictures", train=25, test=7)
    assert_compiled_run_equals_eager_one(*small(folder), "--devices", devices, cwd=tmp_path)
