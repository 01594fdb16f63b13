import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from hyperfunc import capture, check_gpu


def run() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "hyperfunc.check_gpu"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_without_a_gpu_the_cpu_trains_a_step() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    for label in ("Python", "torch", "CUDA", "cuDNN", "driver", "GPUs"):
        assert label in done.stdout
    assert "one training step: loss " in done.stdout
    # It takes as long to import as torch.
    assert "hyperfunc.training" in done.stderr
    assert "torch._dynamo" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a GPU that torch cannot use")
@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 470.57.02'", "NVIDIA H100 80GB HBM3"),
        ("echo 'Could not communicate with the NVIDIA driver.'; exit 9", "nvidia-smi says: Could not communicate"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_a_failure_with_a_remedy(
    script: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(check_gpu.__file__, run_name="__main__")
    assert ended.value.code == 1
    output = capsys.readouterr().out
    assert f"FAILED   an NVIDIA GPU is present ({found}" in output
    assert "CUDA" in output.split("but torch can use none:")[1]


@pytest.mark.gpu
def test_with_a_gpu_each_trains_a_step() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("one training step") == torch.cuda.device_count()


@pytest.mark.traced
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_is_compiled_as_a_proof(device: str) -> None:
    assert check_gpu.why_no_fast_step(torch.device(device)) == ""


def test_a_compiler_that_is_not_there_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(*_: object, **__: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    found = check_gpu.why_no_fast_step(torch.device("cpu"))
    assert found.startswith("no compiled step on cpu: no compiler; Triton needs")
    assert found.endswith("--engine graph of train.py does without")


def test_a_compiler_that_computes_something_else_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "compile_step", lambda _step, batch: lambda state, batch: (state, batch.sum()))
    found = check_gpu.why_no_fast_step(torch.device("cpu"))
    assert found.startswith("no compiled step on cpu: it gave (tensor([1., 1.")
    assert found.endswith("--engine graph of train.py does without")


def test_what_can_be_compiled_but_not_captured_has_another_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture_nothing(*_: object) -> None:
        raise RuntimeError("no graph")

    monkeypatch.setattr(capture, "compile_step", lambda step, _batch: step)
    monkeypatch.setattr(capture, "capture", capture_nothing)
    found = check_gpu.why_no_fast_step(torch.device("cpu"))
    assert found == "no captured step on cpu: no graph; --engine compiled of train.py does without"


def test_gpus_are_found_on_the_pci_bus(tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("01:00.0", "0x10de", "0x030200"),
        ("01:00.1", "0x10de", "0x040300"),
        ("02", "0x8086", "0x030000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    assert check_gpu.on_pci_bus(tmp_path) == "PCI 01:00.0"
    assert check_gpu.on_pci_bus(tmp_path / "nothing") == ""


def test_without_the_program_there_is_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_gpu.find_gpus()[1] == ""
