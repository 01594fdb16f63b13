"""From the start of the process to the first report of training."""

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
FLAGS = ["--no-wandb", "--dataset", "synthetic", "--train-size", "1024", "--epochs", "1", "--report-every", "1"]


@pytest.mark.benchmark(group="from the start of train.py to the first trained step")
def test_startup(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    benchmark.extra_info["case"] = "train.py"

    def run() -> None:
        command = [sys.executable, str(TRAIN), *FLAGS, "--engine", "eager"]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert any(line.startswith("epoch 1/1  batch 1/") for line in process.stdout)
            process.kill()

    benchmark.pedantic(run, rounds=3, iterations=1)
