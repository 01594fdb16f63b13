"""Generating all kernels of 40-1 and 40-2, forward and backward: all at once against a loop over basic kernels."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import make_generation
from benchmarks.measure import compare, gate

AT_LEAST = 8.0
"""Gate on any machine: times faster than the loop."""


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("engine", ["looped", "vmapped"])
def test_generation(benchmark: BenchmarkFixture, device: torch.device, width: int, engine: str) -> None:
    benchmark.extra_info["case"] = engine
    benchmark.group = f"generation of 40-{width}, forward and backward"
    call = make_generation("looped" if engine == "looped" else "vmapped", width, device)
    benchmark.pedantic(call, rounds=10, iterations=1, warmup_rounds=2)
    if engine == "vmapped":
        looped = make_generation("looped", width, device)
        ratio = compare(call, looped)
        benchmark.extra_info |= ratio.noted
        gate(ratio, lambda: compare(call, looped), speedup=AT_LEAST)
