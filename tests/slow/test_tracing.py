import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

FILES = [
    f"tests/test_{name}.py"
    for name in ("capture", "compiled_norms", "conditions", "ensembles", "hyperize", "randomness")
]


def test_what_is_traced_passes_without_shape_checks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "traced", *FILES],
        cwd=ROOT,
        env={**os.environ, "HYPERFUNC_SHAPE_CHECKS": "off"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
