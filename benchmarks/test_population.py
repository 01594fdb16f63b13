"""Several seeds in one step against as many single runs, each taking its step in turn."""

from collections.abc import Callable
from itertools import cycle

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import hyperfunc as hf
from benchmarks.cases import STEPS_A_REPLAY, make_optimizer, make_training, pictures, with_engine
from benchmarks.measure import compare, median_seconds, rounds_of, time_rounds
from hyperfunc import capture, population, precision, training

ON_GPU = torch.cuda.is_available()
DEPTH, BATCH_SIZE = (40, 128) if ON_GPU else (10, 8)
STEPS = STEPS_A_REPLAY if ON_GPU else 1


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_seeds_in_one_step(benchmark: BenchmarkFixture, device: torch.device, count: int) -> None:
    torch._dynamo.reset()
    benchmark.group = f"training step of {DEPTH}-1, batch {BATCH_SIZE} a seed, by seeds in it"
    ours, theirs = trainings(count, device, together=True), trainings(count, device, together=False)
    repeat = rounds_of(ours, 0.2) if ON_GPU else 1
    time_rounds(benchmark, ours, repeat)
    if not benchmark.disabled:
        ratio = compare(ours, theirs, repeats=(repeat, repeat), rounds=20)
        info = benchmark.extra_info
        info |= {"case": f"{count} seed{'s' * (count > 1)}", "steps_per_round": repeat * STEPS}
        info["images_per_second"] = round(count * BATCH_SIZE * STEPS * repeat / median_seconds(benchmark))
        info |= ratio.noted


def trainings(count: int, device: torch.device, *, together: bool) -> Callable[[], object]:
    """A call that takes so many runs on by `STEPS`, by the engine that train.py takes on a GPU, else as it is."""
    model = hf.hyper_resnet(DEPTH)
    number_format = precision.choose("auto", device)
    given = pictures(device, STEPS * BATCH_SIZE)
    step, state = make_training(model, given, number_format)
    states, draws, stacked = [state] * count, given.draws, together and count > 1
    if stacked:
        load = population.make_load([given.images] * count, [given.normalization] * count)
        optimizer = make_optimizer(number_format)
        step = training.make_train_step(model, optimizer, load=load, precision=number_format)
        step = population.map_side_by_side(step)
        states = [population.stack(states)]
        draws = [population.side_by_side([draw] * count) for draw in draws]
    engine = "compiled" if ON_GPU else "eager"
    steps = with_engine(step, engine, states[0], draws[0], BATCH_SIZE, channels_last=not stacked)
    # Single runs are processes of their own in earnest, and each has its graph.
    running = [(capture.capture(steps, state, draws[0]), state, cycle(draws)) for state in states]

    def call() -> None:
        for index, (advance, state, rows) in enumerate(running):
            running[index] = advance, advance(state, next(rows))[0], rows

    return call
