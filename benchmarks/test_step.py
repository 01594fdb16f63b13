"""A whole training step, augmentation and Adam included, by engine, width and batch size."""

import functools
import gc
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import hyperfunc as hf
from benchmarks.cases import ENGINES, Engine, Race, make_step, skip_reason
from benchmarks.conftest import device_name
from benchmarks.measure import (
    Ceilings,
    Ratio,
    compare,
    gate,
    in_steps,
    median_seconds,
    peak_memory,
    rounds_of,
    time_rounds,
    work_per_image,
)
from hyperfunc import data, precision
from hyperfunc.precision import LOW, Precision

ON_GPU = torch.cuda.is_available()
SIZES = [(1, 128), (2, 128), (1, 1024), (2, 1024)] if ON_GPU else [(1, 128), (1, 8), (2, 8)]


class Gate(NamedTuple):
    """How many times faster than the looped baseline, and how many pictures a second, at least."""

    speedup: float
    images_per_second: float = 0


GATES: dict[str, dict[tuple[Engine, int, int], Gate]] = {
    "H100": {
        ("vmapped", 1, 128): Gate(4),
        ("vmapped", 2, 128): Gate(10),
        ("compiled-graph", 1, 128): Gate(25, 100_000),
        ("compiled-graph", 2, 128): Gate(45, 70_000),
    },
    "CPU": {("compiled", 1, 128): Gate(1.7), ("compiled", 1, 8): Gate(3)},
}
"""By a part of the device's name, by (engine, width, batch size)."""


Rival = Callable[[int, int], Race]


@pytest.fixture(scope="module")
def rival(device: torch.device) -> Rival:
    """The looped baseline of a width and a batch size; on the CPU made once for all that is compared with it, which on
    a GPU would count in the peak memory of the others."""

    def make(width: int, batch_size: int) -> Race:
        return make_step("looped", 40, width, batch_size, device)

    return make if ON_GPU else functools.cache(make)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("width", "batch_size"), SIZES)
@pytest.mark.parametrize("engine", ENGINES)
def test_step(
    benchmark: BenchmarkFixture,
    device: torch.device,
    ceilings: Ceilings,
    rival: Rival,
    engine: Engine,
    width: int,
    batch_size: int,
) -> None:
    if reason := skip_reason(engine, width, device):
        pytest.skip(reason)
    torch._dynamo.reset()
    benchmark.group = f"training step of 40-{width}, batch {batch_size}"
    started = time.perf_counter()
    race = rival(width, batch_size) if engine == "looped" else make_step(engine, 40, width, batch_size, device)
    race.call()
    if ON_GPU:
        torch.cuda.synchronize()
    first = time.perf_counter() - started
    if ON_GPU:
        # What was tried while compiling, or is left of an earlier case, is given back; what a graph needs is reserved
        # from its capture on.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    repeat = rounds_of(race.call, 0.2) if ON_GPU else 1
    time_rounds(benchmark, race.call, repeat)
    info: dict[str, Any] = benchmark.extra_info
    if benchmark.disabled:
        return
    step_seconds = median_seconds(benchmark) / repeat / race.steps
    info |= {"case": engine, "width": width, "batch_size": batch_size, "steps_per_round": repeat * race.steps}
    number_format = "fp32" if engine == "looped" else precision.choose("auto", device)
    # The rival leaves torch's settings as they are, by which cuDNN takes TF32.
    in_tf32 = engine == "looped" and ON_GPU and torch.backends.cudnn.allow_tf32
    info["precision"] = f"{number_format}{', convolutions in tf32' * in_tf32}"
    info["images_per_second"] = round(batch_size / step_seconds)
    info["seconds_to_first_step"] = round(first, 2)
    peak = torch.cuda.max_memory_reserved() if ON_GPU else peak_memory(race.call)
    info["peak_memory_mib"] = round(peak / 2**20)
    plain = hf.resnet(40, width)
    work = work_per_image(hf.materialize(plain, *plain.init(data.seeded_generator("work"))))
    low = LOW.get(number_format)
    work = work._replace(bytes=work.bytes / 2 if low else work.bytes)
    floors = ceilings.flop_per_second[low] / work.flop, ceilings.bytes_per_second / work.bytes
    info["flop_floor_images_per_second"], info["bytes_floor_images_per_second"] = map(round, floors)
    info["share_of_floor"] = round(info["images_per_second"] / min(floors), 4)
    if engine == "looped":
        return

    looped = rival(width, batch_size)
    case = (engine, width, batch_size)
    bounds = [gates[case] for named, gates in GATES.items() if named in device_name() and case in gates]

    def pairs() -> Ratio:
        repeats = (repeat, rounds_of(looped.call, 0.2) if ON_GPU else 1)
        return in_steps(compare(race.call, looped.call, repeats=repeats, rounds=None if bounds else 5), race.steps)

    ratio = pairs()
    info |= ratio.noted
    for bound in bounds:
        speed = bound.images_per_second
        gate(ratio, pairs, speedup=bound.speedup, seconds=batch_size / speed if speed else math.inf)


PRECISIONS: dict[str, list[Precision]] = {"cuda": ["fp32", "tf32", "bf16", "fp16"], "cpu": ["fp32", "bf16"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [128, 1024] if ON_GPU else [128])
@pytest.mark.parametrize("number_format", PRECISIONS["cuda" if ON_GPU else "cpu"])
def test_precision(
    benchmark: BenchmarkFixture, device: torch.device, number_format: Precision, batch_size: int
) -> None:
    """The fastest engine in every precision."""
    if not ON_GPU and "AVX512" not in device_name():
        pytest.skip("a CPU without AVX-512 has no products of 16 bits, and imitates them slowly")
    torch._dynamo.reset()
    benchmark.group = f"training step of 40-1, batch {batch_size}, by precision"
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    precision.set_float32_products(number_format)
    try:
        race = make_step("compiled-graph" if ON_GPU else "compiled", 40, 1, batch_size, device, number_format)
        repeat = rounds_of(race.call, 0.2) if ON_GPU else 1
        time_rounds(benchmark, race.call, repeat)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    if not benchmark.disabled:
        info: dict[str, Any] = benchmark.extra_info
        info |= {"case": number_format, "steps_per_round": repeat * race.steps}
        info["images_per_second"] = round(batch_size * race.steps * repeat / median_seconds(benchmark))
