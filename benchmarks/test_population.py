"""Several seeds in one step against as many single runs, each taking its step in turn."""

from collections.abc import Callable
from itertools import cycle

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import hyperfunc as hf
from benchmarks.cases import STEPS_A_REPLAY, make_optimizer, pictures
from benchmarks.measure import compare, median_seconds, rounds_of, time_rounds
from hyperfunc import capture, data, population, precision, training, tree

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
        info["times_faster"] = round(ratio.speedup, 2)


def trainings(count: int, device: torch.device, *, together: bool) -> Callable[[], object]:
    """A call that takes so many runs on by `STEPS`, by the engine that train.py takes on a GPU, else as it is."""
    model = hf.hyper_resnet(DEPTH)
    number_format = precision.choose("auto", device)
    optimizer = make_optimizer(number_format)
    given = pictures(device, STEPS * BATCH_SIZE)
    seeds = [data.seeded_generator("benchmark", seed) for seed in range(count)]
    states = [tree.to(training.init_state(model, optimizer, seed), device) for seed in seeds]

    if together and count > 1:
        load = population.make_load([given.images] * count, [given.normalization] * count)
        groups = [(population.stack(states), [population.side_by_side([draw] * count) for draw in given.draws])]
        step = population.map_step(training.make_train_step(model, optimizer, load=load, precision=number_format))
    else:
        load = data.make_train_load(given.images, given.normalization)
        groups = [(state, given.draws) for state in states]
        step = training.make_train_step(model, optimizer, load=load, precision=number_format)
    if ON_GPU:
        step = capture.compile_step(step, next(data.batches(groups[0][1][0], BATCH_SIZE)))
    steps = training.scan(step, BATCH_SIZE)
    # Single runs are processes of their own in earnest, and each has its graph.
    running = [(capture.capture(steps, state, rows[0]), state, cycle(rows)) for state, rows in groups]

    def call() -> None:
        for index, (advance, state, rows) in enumerate(running):
            running[index] = advance, advance(state, next(rows))[0], rows

    return call
