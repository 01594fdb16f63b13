import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

FILES = ("capture", "compiled_norms", "conditions", "ensembles", "gpu", "hyperize", "kernels", "randomness")


# In three processes, of which none takes much longer than another.
@pytest.mark.parametrize("files", [FILES[:1], FILES[1:5], FILES[5:]])
def test_what_is_traced_passes_without_shape_checks(files: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "traced", *(f"tests/test_{name}.py" for name in files)],
        cwd=ROOT,
        env={**os.environ, "HYPERFUNC_SHAPE_CHECKS": "off"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
