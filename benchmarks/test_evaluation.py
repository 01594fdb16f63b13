"""Evaluation with a hypernetwork, whose kernels are generated once for it, against the materialized network."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import BATCHES, make_evaluation
from benchmarks.measure import compare, median_seconds

BATCH_SIZE = 1000 if torch.cuda.is_available() else 250


@pytest.mark.benchmark(group=f"evaluation of {BATCHES * BATCH_SIZE} pictures by 40-1")
@pytest.mark.parametrize("kind", ["hyper", "materialized"])
def test_evaluation(benchmark: BenchmarkFixture, device: torch.device, kind: str) -> None:
    benchmark.extra_info["case"] = kind
    call = make_evaluation("hyper" if kind == "hyper" else "materialized", BATCH_SIZE, device)
    benchmark.pedantic(call, rounds=5, iterations=1, warmup_rounds=1)
    if not benchmark.disabled:
        benchmark.extra_info["images_per_second"] = round(BATCHES * BATCH_SIZE / median_seconds(benchmark))
    if kind == "hyper":
        ratio = compare(call, make_evaluation("materialized", BATCH_SIZE, device), rounds=5)
        benchmark.extra_info |= ratio.noted
