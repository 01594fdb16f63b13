"""The networks and steps that the benchmarks race against each other."""

from collections.abc import Callable
from itertools import cycle
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

import hyperfunc as hf
from benchmarks.baseline import LoopedHyperResNet, loader, train_step, with_params_of
from hyperfunc import capture, data, optim, precision, training, tree
from hyperfunc.precision import Precision

Engine = Literal["looped", "vmapped", "compiled", "graph", "compiled-graph", "plain"]
"""The rival; ours run eagerly, compiled, captured, or both; and the ordinary network, compiled and captured on a GPU
and run eagerly on a CPU."""

ENGINES: tuple[Engine, ...] = get_args(Engine)
LEARNING_RATE, WEIGHT_DECAY = 0.002, 0.0005
BATCHES = 4
"""Different batches that the inputs rotate through."""
STEPS_A_REPLAY = 10
"""As train.py has it."""


class Race(NamedTuple):
    """What is timed: a call that trains for so many steps."""

    call: Callable[[], object]
    steps: int = 1


class Pictures(NamedTuple):
    """Made-up pictures on the device, ready for both sides."""

    images: data.Images
    normalization: data.Normalization
    draws: list[data.Draw]


def pictures(device: torch.device, batch_size: int) -> Pictures:
    """Pictures enough for `BATCHES` batches, and those batches."""
    count = BATCHES * batch_size
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=data.seeded_generator("benchmark"))
    images = data.Images(pixels, torch.arange(count) % 10)
    normalization = data.measure(images)
    draw = tree.to(data.draw_epoch(0, 0, count), device)
    return Pictures(tree.to(images, device), tree.to(normalization, device), list(data.batches(draw, batch_size)))


def skip_reason(engine: Engine, width: int, device: torch.device) -> str | None:
    """Why an engine cannot run here, or None."""
    if device.type == "cuda":
        return None
    if "graph" in engine:
        return "a CUDA graph needs a GPU"
    if engine == "compiled" and width > 1:
        return "on the CPU only 40-1 is compiled, because compiling takes longer than all the rest"
    return None


def make_optimizer(number_format: Precision) -> optim.Optimizer:
    """As train.py has it, for 200 epochs of CIFAR-10."""
    optimizer = optim.adam(optim.multistep(LEARNING_RATE, 200, 391), weight_decay=WEIGHT_DECAY)
    return optim.scaled(optimizer) if number_format == "fp16" else optimizer


def make_step(
    engine: Engine,
    depth: int,
    width: int,
    batch_size: int,
    device: torch.device,
    number_format: Precision | None = None,
) -> Race:
    """Training by an engine, ours in the precision given or in the one that train.py takes on this device."""
    if engine == "looped":
        return Race(_looped_step(depth, width, pictures(device, batch_size), device))
    model = hf.resnet(depth, width) if engine == "plain" else hf.hyper_resnet(depth, width)
    if engine == "plain":
        engine = "compiled-graph" if device.type == "cuda" else "vmapped"
    steps = STEPS_A_REPLAY if "graph" in engine else 1
    given = pictures(device, steps * batch_size)
    number_format = number_format or precision.choose("auto", device)
    optimizer = make_optimizer(number_format)
    load = data.make_train_load(given.images, given.normalization)
    step = training.make_train_step(model, optimizer, load=load, precision=number_format)
    state = tree.to(training.init_state(model, optimizer, data.seeded_generator("benchmark")), device)
    if engine.startswith("compiled"):
        step = capture.compile_step(step, next(data.batches(given.draws[0], batch_size)))
    if "graph" in engine:
        step = capture.capture(training.scan(step, batch_size), state, given.draws[0])
    draws = cycle(given.draws)

    def run() -> Tensor:
        nonlocal state
        state, metrics = step(state, next(draws))
        return metrics.loss

    return Race(run, steps)


def _looped_step(depth: int, width: int, given: Pictures, device: torch.device) -> Callable[[], object]:
    params, _ = hf.hyper_resnet(depth, width).init(data.seeded_generator("benchmark"))
    network = with_params_of(LoopedHyperResNet(depth, width), params).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    pixels, labels = (column.cpu() for column in given.images)
    # Its workers make the next batch during a step of its own; where that is the longer of the two it is not idle while
    # another is timed, but then the device is a GPU.
    batches = iter(loader(pixels, labels, len(given.draws[0].picture), train=True, endless=True))

    def run() -> float:
        images, labels = next(batches)
        return train_step(
            network, optimizer, images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        )

    return run


def make_generation(engine: Literal["looped", "vmapped"], width: int, device: torch.device) -> Callable[[], object]:
    """A function that generates all kernels of depth 40 and runs back through them."""
    model = hf.hyper_resnet(40, width)
    params = tree.to(model.init(data.seeded_generator("benchmark"))[0], device)
    cotangents = [torch.ones_like(kernel) for kernel in model.kernels(params).values()]
    if engine == "looped":
        network = with_params_of(LoopedHyperResNet(40, width), params).to(device)
        leaves = [*network.generator.parameters(), *network.embeddings.parameters()]
        return lambda: torch.autograd.grad(network.kernels(), leaves, cotangents)
    generated = params._replace(primary={})

    def kernels(params: hf.Params) -> list[Tensor]:
        return list(model.kernels(params).values())

    return lambda: torch.func.vjp(kernels, generated)[1](cotangents)


def make_evaluation(
    kind: Literal["hyper", "materialized"], batch_size: int, device: torch.device
) -> Callable[[], object]:
    """A function that evaluates `BATCHES` batches with 40-1, generating the kernels once, or having them ready."""
    model = hf.hyper_resnet(40)
    params, batch_stats = tree.to(model.init(data.seeded_generator("benchmark")), device)
    given = pictures(device, batch_size)
    load = data.make_eval_load(given.normalization)
    batches = list(data.batches(given.images, batch_size))
    if kind == "hyper":
        eval_step = training.make_eval_step(model, load=load)
        return lambda: training.evaluate(model, params, batch_stats, batches, eval_step=eval_step)
    network = hf.materialize(model, params, batch_stats).eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run() -> object:
        return [F.cross_entropy(network(x), labels, reduction="sum") for x, labels in map(load, batches)]

    return run
