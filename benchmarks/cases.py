"""The networks and steps that the benchmarks race against each other."""

from collections.abc import Callable
from itertools import cycle
from typing import Any, Literal, NamedTuple, get_args

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
BATCHES = 4 if torch.cuda.is_available() else 2
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


def pictures(device: torch.device, batch_size: int, count: int | None = None) -> Pictures:
    """So many pictures, or enough for `BATCHES` batches, and an epoch's batches of them."""
    count = count or BATCHES * batch_size
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


def make_training(
    model: hf.Model,
    given: Pictures,
    number_format: Precision,
    *,
    part: Callable[[data.Draw], data.Draw] | None = None,
    reduce: training.Reduce | None = None,
) -> tuple[training.Step, training.TrainState]:
    """The step, for a batch of `given` or for this rank's part of it, and a fresh state beside the pictures; both as
    train.py has them."""
    optimizer = make_optimizer(number_format)
    whole = data.make_train_load(given.images, given.normalization)
    load = (lambda draw: whole(part(draw))) if part else whole
    step = training.make_train_step(model, optimizer, load=load, precision=number_format, reduce=reduce)
    state = training.init_state(model, optimizer, data.seeded_generator("benchmark"))
    return step, tree.to(state, given.images.labels.device)


def with_engine(
    step: training.Step, engine: str, state: Any, rows: Any, batch_size: int, *, channels_last: bool = True
) -> training.Step:
    """The step over all the batches that are in `rows`, by an engine of train.py."""
    if engine.startswith("compiled"):
        step = capture.compile_step(step, next(data.batches(rows, batch_size)), channels_last=channels_last)
    step = training.scan(step, batch_size)
    return capture.capture(step, state, rows) if "graph" in engine else step


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
    step, state = make_training(model, given, number_format or precision.choose("auto", device))
    step = with_engine(step, engine, state, given.draws[0], batch_size)
    draws = cycle(given.draws)

    def run() -> Tensor:
        nonlocal state
        state, metrics = step(state, next(draws))
        return metrics.loss

    return Race(run, steps)


def make_looped(depth: int, width: int, device: torch.device) -> tuple[LoopedHyperResNet, torch.optim.Optimizer]:
    """The rival, and its Adam."""
    params, _ = hf.hyper_resnet(depth, width).init(data.seeded_generator("benchmark"))
    network = with_params_of(LoopedHyperResNet(depth, width), params).to(device)
    return network, torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def _looped_step(depth: int, width: int, given: Pictures, device: torch.device) -> Callable[[], object]:
    network, optimizer = make_looped(depth, width, device)
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
    values, rebuild = tree.flatten(params._replace(primary={}))

    def generate() -> object:
        leaves = [value.detach().requires_grad_() for value in values]  # by autograd itself, as an eager step
        return torch.autograd.grad(list(model.kernels(rebuild(leaves)).values()), leaves, cotangents)

    return generate


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
