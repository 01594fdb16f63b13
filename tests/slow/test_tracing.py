import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

TESTS = ROOT / "tests"
FILES = sorted(path for path in TESTS.glob("test_*.py") if "mark.traced" in path.read_text())
LONGEST = TESTS / "test_capture.py"


# In two processes, of which neither takes much longer than the other. The compiler's start takes each ten seconds.
@pytest.mark.parametrize("files", [[LONGEST], [path for path in FILES if path != LONGEST]])
def test_what_is_traced_passes_without_shape_checks(files: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "traced", *map(str, files)],
        cwd=ROOT,
        env={**os.environ, "HYPERFUNC_SHAPE_CHECKS": "off"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
