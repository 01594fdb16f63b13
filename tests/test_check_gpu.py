import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from hyperfunc import check_gpu


def run(path_prefix: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ)
    if path_prefix is not None:
        env["PATH"] = f"{path_prefix}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", "hyperfunc.check_gpu"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_without_a_gpu_the_cpu_trains_a_step() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    for label in ("Python", "torch", "CUDA", "cuDNN", "driver", "GPUs"):
        assert label in done.stdout
    assert "one training step: loss " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a GPU that torch cannot use")
def test_a_gpu_that_torch_cannot_use_is_a_failure_with_a_remedy(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 470.57.02'\n")
    smi.chmod(0o755)
    done = run(tmp_path)
    assert done.returncode == 1
    assert "470.57.02" in done.stdout
    assert (
        "FAILED   1 NVIDIA GPU(s) present (NVIDIA H100 80GB HBM3, 470.57.02), but torch can use none: " in done.stdout
    )
    assert "CUDA" in done.stdout.split("can use none:")[1]


@pytest.mark.gpu
def test_with_a_gpu_each_trains_a_step() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("one training step") == torch.cuda.device_count()


def test_a_missing_program_is_no_gpu() -> None:
    assert check_gpu.nvidia_smi("--no-such-flag") == [] or torch.cuda.is_available()
