import os
from pathlib import Path

import pytest
from helpers import assert_compiled_run_equals_eager_one, make_folder, small

pytestmark = pytest.mark.slow

by_each_rank = pytest.mark.skipif(
    not os.environ.get("HYPERFUNC_COMPILED_RANKS"),
    reason="takes minutes, because each rank compiles; HYPERFUNC_COMPILED_RANKS=1 runs it",
)


@pytest.mark.parametrize("devices", ["1", pytest.param("cpu:2", marks=by_each_rank)])
def test_a_compiled_run_trains_the_same_network(devices: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pictures", train=25, test=7)
    assert_compiled_run_equals_eager_one(*small(folder), "--devices", devices, cwd=tmp_path)
