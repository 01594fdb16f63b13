"""A training step on one rank, on two, and so on: as many as there are GPUs, or two on the CPU."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import ranks
from benchmarks.measure import median_seconds

GPUS = torch.cuda.device_count()
BATCH_SIZE = 128 if GPUS else 32


class RankZeroClock:
    """A clock for pytest-benchmark that shows the seconds which rank 0 has measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = RankZeroClock()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("sync_bn", [False, True])
@pytest.mark.parametrize("count", ranks.numbers_of_ranks(GPUS))
def test_step_by_ranks(benchmark: BenchmarkFixture, count: int, sync_bn: bool) -> None:
    if sync_bn and count == 1:
        pytest.skip("one rank has nothing to synchronise")
    flags = ["--rounds", "5", "--batch-size", str(BATCH_SIZE), *["--sync-bn"] * sync_bn]
    program = ranks.parse(flags)
    benchmark.group = f"training step of 40-1, batch {BATCH_SIZE}, by ranks"
    found = ranks.measure(program, count)
    times = iter(found.pop("step"))

    def run() -> None:
        CLOCK.now += next(times)

    benchmark.pedantic(run, rounds=program.rounds, iterations=1)
    info = benchmark.extra_info
    info |= {"case": f"{count} rank{'s' * (count > 1)}{', synchronised batch norms' * sync_bn}", **found}
    if not benchmark.disabled:
        info["images_per_second"] = round(BATCH_SIZE / median_seconds(benchmark))
