"""Fixtures of the benchmarks, and what is noted about the machine beside every result."""

import platform
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import hyperfunc as hf
from benchmarks.measure import Ceilings, measure_ceilings


def pytest_configure(config: pytest.Config) -> None:
    """On a GPU every benchmark waits for the device, whether it thinks of it or not, and cuDNN is told what train.py
    tells it."""
    if torch.cuda.is_available():
        config.option.benchmark_timer = "benchmarks.measure.CLOCK"
        torch.backends.cudnn.benchmark = True


def device_name() -> str:
    """The name of the GPU, or of the CPU with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU with {capability}, {torch.get_num_threads()} threads"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds to the json what a number means nothing without."""
    machine_info |= described()


def described() -> dict[str, Any]:
    """Device and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {"device": device_name(), "versions": versions | {"hyperfunc": hf.__version__}}


@pytest.fixture(autouse=True)
def _note_where(benchmark: BenchmarkFixture) -> None:
    """Beside every result as well, so that one taken out of its file still says where it is from."""
    benchmark.extra_info |= described()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ceilings(device: torch.device) -> Ceilings:
    """The machine's own limits, measured once."""
    return measure_ceilings(device)
