"""A whole training step, augmentation and Adam included, by engine, width and batch size."""

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import hyperfunc as hf
from benchmarks.cases import ENGINES, Engine, make_step, skip_reason
from benchmarks.conftest import device_name
from benchmarks.measure import ROUNDS, Ceilings, Ratio, compare, gate, median_seconds, seconds, work_per_image
from hyperfunc import data

ON_GPU = torch.cuda.is_available()
SIZES = [(1, 128), (2, 128), (1, 1024), (2, 1024)] if ON_GPU else [(1, 128), (1, 8), (2, 8)]

GATES: dict[str, dict[tuple[Engine, int, int], float]] = {
    "H100": {
        ("vmapped", 1, 128): 4,
        ("vmapped", 2, 128): 10,
        ("compiled-graph", 1, 128): 25,
        ("compiled-graph", 2, 128): 45,
    },
    "CPU": {("compiled", 1, 128): 1.4, ("compiled", 1, 8): 2.3},
}
"""By a part of the device's name: (engine, width, batch size) -> times faster than the looped baseline, at least."""

IMAGES_PER_SECOND: dict[str, dict[tuple[Engine, int, int], float]] = {
    "H100": {("compiled-graph", 1, 128): 100_000, ("compiled-graph", 2, 128): 70_000},
}


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("width", "batch_size"), SIZES)
@pytest.mark.parametrize("engine", ENGINES)
def test_step(
    benchmark: BenchmarkFixture, device: torch.device, ceilings: Ceilings, engine: Engine, width: int, batch_size: int
) -> None:
    if reason := skip_reason(engine, device):
        pytest.skip(reason)
    torch._dynamo.reset()
    benchmark.group = f"training step of 40-{width}, batch {batch_size}"
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    call = make_step(engine, 40, width, batch_size, device)
    first = seconds(call)
    # Rounds long enough that the clock and the last synchronisation do not count.
    repeat = max(1, round(0.2 / max(seconds(call), 1e-6))) if ON_GPU else 1

    def run() -> None:
        for _ in range(repeat):
            call()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, iterations=1, warmup_rounds=2)
    info: dict[str, Any] = benchmark.extra_info
    if benchmark.disabled:
        return
    step_seconds = median_seconds(benchmark) / repeat
    info |= {"case": engine, "width": width, "batch_size": batch_size, "steps_per_round": repeat}
    info["images_per_second"] = round(batch_size / step_seconds)
    info["first_step_seconds"] = round(first, 2)
    if ON_GPU:
        info["peak_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
    plain = hf.resnet(40, width)
    work = work_per_image(hf.materialize(plain, *plain.init(data.seeded_generator("work"))))
    info["share_of_flop_floor"] = round(work.flop * batch_size / ceilings.flop_per_second / step_seconds, 4)
    info["share_of_bytes_floor"] = round(work.bytes * batch_size / ceilings.bytes_per_second / step_seconds, 4)
    if engine == "looped":
        return

    looped = make_step("looped", 40, width, batch_size, device)
    case = (engine, width, batch_size)
    bounds = [gates[case] for named, gates in GATES.items() if named in device_name() and case in gates]

    def race() -> Ratio:
        return compare(call, looped, repeat=repeat, rounds=ROUNDS if bounds else 5)

    ratio = race()
    info["times_faster"] = round(ratio.speedup, 2)
    for bound in bounds:
        gate(ratio, bound, race)
    for named, floors in IMAGES_PER_SECOND.items():
        if named in device_name() and case in floors:
            assert info["images_per_second"] >= floors[case]
