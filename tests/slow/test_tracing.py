import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

FILES = (
    "capture",
    "check_gpu",
    "compiled_norms",
    "conditions",
    "ensembles",
    "gpu",
    "hyperize",
    "kernels",
    "optim",
    "randomness",
    "stateful",
    "vmap_rules",
)


# In two processes, of which neither takes much longer than the other. The compiler's start takes each ten seconds.
@pytest.mark.parametrize("files", [FILES[:1], FILES[1:]])
def test_what_is_traced_passes_without_shape_checks(files: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "traced", *(f"tests/test_{name}.py" for name in files)],
        cwd=ROOT,
        env={**os.environ, "HYPERFUNC_SHAPE_CHECKS": "off"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
