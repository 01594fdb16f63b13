"""An epoch with its evaluation: train.py's way against the baseline's, with its DataLoader and worker processes."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import hyperfunc as hf
from benchmarks.baseline import accuracy, loader, train_epoch
from benchmarks.cases import BATCHES, STEPS_A_REPLAY, make_looped, make_training, pictures, with_engine
from benchmarks.conftest import device_name
from benchmarks.measure import compare, gate, median_seconds
from hyperfunc import capture, data, precision, training, tree

ON_GPU = torch.cuda.is_available()
BATCH_SIZE = 128
TRAIN, TEST = (50_000, 10_000) if ON_GPU else (BATCHES * BATCH_SIZE, BATCH_SIZE)

MINUTES_AT_MOST = {"H100": 2}
"""Gates by a part of the device's name: 200 epochs with their evaluations."""


def make_ours(device: torch.device) -> Callable[[], float]:
    """An epoch by the engine that train.py takes on a GPU; on a CPU uncompiled, because compiling takes longer than all
    the rest."""
    model = hf.hyper_resnet(40)
    number_format = precision.choose("auto", device)
    together = STEPS_A_REPLAY * BATCH_SIZE if ON_GPU else BATCH_SIZE
    train, test = pictures(device, together, TRAIN), pictures(device, TEST, TEST).images
    step, state = make_training(model, train, number_format)
    step = with_engine(step, "compiled-graph" if ON_GPU else "eager", state, train.draws[0], BATCH_SIZE)
    eval_step = training.make_eval_step(model, load=data.make_eval_load(train.normalization), precision=number_format)
    network, shown = (model.weights(state.params), state.batch_stats), next(data.batches(test, 1000))
    if ON_GPU:
        eval_step = capture.capture_evaluation(capture.compile_step(eval_step, shown), network, shown)
    epoch = 0

    def run() -> float:
        nonlocal state, epoch
        draw = tree.to(data.draw_epoch(0, epoch, TRAIN), device)
        for batch in data.batches(draw, together):
            state, _ = step(state, batch)
        epoch += 1
        batches = data.batches(test, 1000)
        metrics = training.evaluate(model, state.params, state.batch_stats, batches, eval_step=eval_step)
        return (metrics.correct / metrics.total).item()

    return run


def make_baseline(device: torch.device) -> Callable[[], float]:
    """An epoch as it is usually written."""
    network, optimizer = make_looped(40, 1, device)
    train, test = (pictures(torch.device("cpu"), count, count).images for count in (TRAIN, TEST))
    train, test = loader(*train, BATCH_SIZE, train=True), loader(*test, 1000, train=False)

    def run() -> float:
        train_epoch(network, optimizer, train, device)
        return accuracy(network, test, device)

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.benchmark(group=f"an epoch of 40-1 over {TRAIN} pictures, with evaluation over {TEST}")
@pytest.mark.parametrize("kind", ["hyperfunc", "baseline"])
def test_epoch(benchmark: BenchmarkFixture, device: torch.device, kind: str) -> None:
    benchmark.extra_info["case"] = kind
    run = (make_ours if kind == "hyperfunc" else make_baseline)(device)
    benchmark.pedantic(run, rounds=3, iterations=1, warmup_rounds=1)
    if benchmark.disabled:
        return
    epoch_seconds = median_seconds(benchmark)
    benchmark.extra_info["images_per_second"] = round(TRAIN / epoch_seconds)
    if kind == "baseline":
        return
    rival = make_baseline(device)
    ratio = compare(run, rival, rounds=3)
    benchmark.extra_info |= ratio.noted
    if ON_GPU:
        benchmark.extra_info["minutes_for_200_epochs"] = round(200 * epoch_seconds / 60, 2)
    for minutes in (most for name, most in MINUTES_AT_MOST.items() if name in device_name()):
        gate(ratio, lambda: compare(run, rival, rounds=3), seconds=60 * minutes / 200)
