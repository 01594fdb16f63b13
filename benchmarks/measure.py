"""Timing, ratios and the limits of the machine."""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hyperfunc.precision import LOW

ROUNDS = 40
"""Pairs of measurements behind a ratio that has a bound, or half as many where a pair takes a second and more."""

ATTEMPTS = 3
"""How often a ratio may miss its gate before the gate fails: a shared machine loses a core now and then."""

Call = Callable[[], object]


def seconds(call: Call, repeat: int = 1) -> float:
    """Seconds a call: on a GPU between two events around `repeat` calls, else by the clock."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - started) / repeat
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeat


class Ratio(NamedTuple):
    """How much faster `ours` is than `theirs`, from pairs measured in turn; medians."""

    speedup: float
    ours: float
    theirs: float
    pairs: int

    @property
    def noted(self) -> dict[str, Any]:
        """As it stands in the json."""
        return {"times_faster": round(self.speedup, 2), "pairs": self.pairs}


def compare(ours: Call, theirs: Call, *, rounds: int | None = None, repeats: tuple[int, int] = (1, 1)) -> Ratio:
    """Measures the two in turn, so that what slows the machine down slows both, and takes the median of the ratios.

    Args:
        ours: A call of the one.
        theirs: A call of the other.
        rounds: Pairs of measurements; see `ROUNDS`.
        repeats: Calls a measurement, of the one and of the other; what is compared is a single call.
    """
    ours()
    theirs()

    def pair() -> tuple[float, float]:
        return seconds(ours, repeats[0]), seconds(theirs, repeats[1])

    pairs = [pair()]
    if rounds is None:
        whole = sum(one * repeat for one, repeat in zip(pairs[0], repeats, strict=True))
        rounds = ROUNDS if whole < 1 else ROUNDS // 2
    pairs += [pair() for _ in range(rounds - 1)]
    return Ratio(
        speedup=statistics.median(theirs / ours for ours, theirs in pairs),
        ours=statistics.median(ours for ours, _ in pairs),
        theirs=statistics.median(theirs for _, theirs in pairs),
        pairs=rounds,
    )


def in_steps(ratio: Ratio, steps: int) -> Ratio:
    """The ratio a step, where a call of ours makes `steps` and one of theirs a single one."""
    return ratio._replace(speedup=ratio.speedup * steps, ours=ratio.ours / steps)


def rounds_of(call: Call, at_least: float) -> int:
    """Calls that take so many seconds together: long enough that the clock and a last synchronisation do not count."""
    call()
    return max(1, round(at_least / max(seconds(call), 1e-6)))


class DeviceClock:
    """A clock for pytest-benchmark that reads CUDA events: seconds up to the end of what has been launched."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:
            # From one reading to the next, because the time between two events comes as a float32.
            self._seconds += self._last.elapsed_time(event) / 1000
        self._last = event
        return self._seconds


CLOCK = DeviceClock() if torch.cuda.is_available() else time.perf_counter
"""What all rounds are timed by, unless a benchmark has a clock of its own."""


def time_rounds(benchmark: BenchmarkFixture, call: Call, repeat: int) -> None:
    """Times `repeat` calls a round; of long rounds fewer."""

    def run() -> None:
        for _ in range(repeat):
            call()

    run()
    rounds = 10 if seconds(run) < 0.3 else 5
    benchmark.pedantic(run, rounds=rounds, iterations=1)


def median_seconds(benchmark: BenchmarkFixture) -> float:
    """The median of what the fixture measured; nan where measuring is off (--benchmark-disable)."""
    stats: Any = benchmark.stats
    return math.nan if stats is None else stats["median"]


def gate(first: Ratio, again: Callable[[], Ratio], *, speedup: float = 0, seconds: float = math.inf) -> None:
    """Fails if all attempts miss a bound, the least speedup or the most seconds of ours; shows all medians."""
    ratios = [first]

    def holds() -> bool:
        return ratios[-1].speedup >= speedup and ratios[-1].ours <= seconds

    while not holds() and len(ratios) < ATTEMPTS:
        ratios.append(again())
    attempts = "; ".join(
        f"{ratio.speedup:.2f} times faster, ours {ratio.ours:.3g} s, theirs {ratio.theirs:.3g} s" for ratio in ratios
    )
    assert holds(), f"expected {speedup} times faster, and at most {seconds:.3g} s; found in turn {attempts}"


def peak_memory(call: Call) -> int:
    """Bytes of the tensors made by a call that are alive at once, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    alive: dict[int, int] = {}
    most = total = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        # A tensor from before the call is none of its own, and its end does not count.
        total += size if size > 0 else -alive.pop(address, 0)
        if size > 0:
            alive[address] = size
        most = max(most, total)
    return most


class Ceilings(NamedTuple):
    """What the machine can do at most: bytes a second in a copy, and operations a second in a matrix product or, where
    that is faster, in a convolution, by dtype (None: float32)."""

    bytes_per_second: float
    flop_per_second: dict[torch.dtype | None, float]


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy too large for any cache, counting bytes read and written, and large products of random matrices.

    On the CPU a wide convolution as well: its library is another, which on some processors is twice as fast.
    """
    large = device.type == "cuda"
    source = torch.randn((2**30 if large else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    side = 8192 if large else 1536

    def best(call: Call) -> float:
        call()
        return min(seconds(call, 3) for _ in range(5))

    def product(dtype: torch.dtype | None) -> float:
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        rate = 2 * side**3 / best(lambda: left @ right)
        if large:
            return rate
        images = torch.randn(32, 128, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        kernel = torch.randn(128, 128, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        work = 2 * images.numel() * kernel[0].numel()
        return max(rate, work / best(lambda: F.conv2d(images, kernel, padding=1)))

    copied = 2 * source.nbytes / best(lambda: target.copy_(source))
    return Ceilings(copied, {dtype: product(dtype) for dtype in (None, *(LOW.values() if large else ()))})


class Work(NamedTuple):
    """What a training step must at least do for a picture."""

    flop: float
    bytes: float


def work_per_image(network: nn.Module, bytes_per_element: int = 4, batch_size: int = 4) -> Work:
    """Counted on the network itself: the operations of its forward and backward pass, and the bytes of its
    activations if everything between two convolutions were fused into them.

    A convolution reads its input and writes its output; backwards it reads the output's gradient twice and the input
    once, and writes the input's gradient.
    """
    elements = 0

    def count(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elements
        elements += 3 * inputs[0].numel() + 3 * output.numel()

    handles = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d)]
    images = torch.randn(batch_size, 3, 32, 32, device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    for handle in handles:
        handle.remove()
    return Work(counter.get_total_flops() / batch_size, elements * bytes_per_element / batch_size)
