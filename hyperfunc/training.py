"""The training and evaluation steps: pure functions of a `TrainState` and a batch."""

# torch.compile cannot trace the evaluation of an annotation, and functions are defined inside of what it traces.
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.nn import functional as F

from hyperfunc import tree
from hyperfunc.model import BatchStats, Model, Params
from hyperfunc.optim import Optimizer

Decay = Literal["parameters", "generated"]

Load = Callable[[Any], tuple[Tensor, Tensor]]
"""Makes the model's input and the labels out of a batch, on the device: `data.make_train_load` for example."""


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: Int[Tensor, ""]
    params: Params
    batch_stats: BatchStats
    opt_state: Any


class Metrics(NamedTuple):
    """Sums over examples, so that those of several batches, or ranks, simply add up."""

    loss: Float[Tensor, ""]
    correct: Int[Tensor, ""]
    total: Int[Tensor, ""]


Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]

Reduce = Callable[[int, Params, BatchStats, Metrics], tuple[Params, BatchStats, Metrics]]
"""Brings together what ranks that share a batch found for their parts: `distributed.mean_over_ranks`. It is given the
pictures of the part and the gradients of their summed loss, and gives those of the mean over the whole batch."""


def init_state(model: Model, optimizer: Optimizer, generator: torch.Generator) -> TrainState:
    """A fresh state, on the generator's device, with the step at 0."""
    params, batch_stats = model.init(generator)
    step = torch.zeros((), dtype=torch.int64, device=generator.device)
    return TrainState(step, params, batch_stats, optimizer.init(params))


def make_train_step(
    model: Model,
    optimizer: Optimizer,
    *,
    load: Load = tuple,
    decay: Decay = "parameters",
    weight_decay: float = 0.0,
    reduce: Reduce | None = None,
) -> Step:
    """Builds `step(state, batch) -> (new state, metrics)`; the arguments are never written.

    The loss is the mean cross-entropy of the batch. With decay="generated" half of `weight_decay` times the squared
    norm of the primary network's weights, generated and ordinary, is added to it, as in the paper; what the optimizer
    decays besides is the optimizer's own setting.

    Args:
        model: The network.
        optimizer: From `optim`.
        load: Makes (images, labels) out of a batch; by default a batch is that pair.
        decay: "generated", or "parameters", where this function leaves the decay to the optimizer.
        weight_decay: Used under decay="generated" alone.
        reduce: For a batch whose pictures are divided over ranks; what `load` gives is then this rank's part.

    Raises:
        ValueError: `decay` is unknown, or `weight_decay` is given where it would be ignored.
    """
    objective = _make_objective(model, decay, weight_decay, summed=reduce is not None)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        images, labels = load(batch)
        function = objective(state.batch_stats, images, labels)
        grads, (_, (loss, logits, batch_stats)) = grad_and_value(function, has_aux=True)(state.params)
        metrics = _metrics(loss * len(labels), logits, labels)
        if reduce is not None:
            grads, batch_stats, metrics = reduce(len(labels), grads, batch_stats, metrics)
        params, opt_state = optimizer.update(grads, state.opt_state, state.params, state.step)
        new_state = TrainState(state.step + 1, params, batch_stats, opt_state)
        return new_state, metrics

    return step


def make_gradients(
    model: Model,
    *,
    load: Load = tuple,
    decay: Decay = "parameters",
    weight_decay: float = 0.0,
    reduce: Reduce | None = None,
) -> Callable[[TrainState, Any], Params]:
    """Builds `gradients(state, batch) -> params`, what a train step of the same arguments gives to its optimizer."""
    objective = _make_objective(model, decay, weight_decay, summed=reduce is not None)

    def gradients(state: TrainState, batch: Any) -> Params:
        images, labels = load(batch)
        function = objective(state.batch_stats, images, labels)
        grads, (loss, logits, batch_stats) = grad(function, has_aux=True)(state.params)
        if reduce is not None:
            grads, _, _ = reduce(len(labels), grads, batch_stats, _metrics(loss, logits, labels))
        return grads

    return gradients


def make_eval_step(model: Model, *, load: Load = tuple) -> Callable[[dict[str, Tensor], BatchStats, Any], Metrics]:
    """Builds `eval_step(weights, batch_stats, batch) -> metrics`, under the running statistics.

    It takes the weights (`model.weights(params)`) and not the parameters, so that an evaluation over many batches
    generates the kernels once.
    """

    @torch.no_grad()
    def eval_step(weights: dict[str, Tensor], batch_stats: BatchStats, batch: Any) -> Metrics:
        images, labels = load(batch)
        logits, _ = model.forward(weights, batch_stats, images, train=False)
        return _metrics(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)

    return eval_step


def evaluate(
    model: Model, params: Params, batch_stats: BatchStats, batches: Iterable[Any], *, load: Load = tuple
) -> Metrics:
    """The metrics over all batches.

    Raises:
        ValueError: There is no batch.
    """
    eval_step = make_eval_step(model, load=load)
    with torch.no_grad():
        weights = model.weights(params)
    total: Metrics | None = None
    for batch in batches:
        metrics = eval_step(weights, batch_stats, batch)
        total = metrics if total is None else tree.map(torch.add, total, metrics)
    if total is None:
        raise ValueError("batches: got none, expected at least one")
    return total


Objective = Callable[[Params], tuple[Tensor, tuple[Tensor, Tensor, BatchStats]]]
"""What training descends, and beside it the loss, the logits and the new statistics."""


def _make_objective(
    model: Model, decay: str, weight_decay: float, *, summed: bool
) -> Callable[[BatchStats, Tensor, Tensor], Objective]:
    """Builds `objective(batch_stats, images, labels)`: the mean over that batch, or (`summed`) the sum."""
    if decay not in get_args(Decay):
        raise ValueError(f"decay: got {decay!r}, expected one of {', '.join(get_args(Decay))}")
    if decay == "parameters" and weight_decay:
        raise ValueError(
            f"weight_decay: got {weight_decay} with decay='parameters'; give it to the optimizer, "
            "or choose decay='generated'"
        )

    def objective(old_stats: BatchStats, images: Tensor, labels: Tensor) -> Objective:
        # The batch is closed over: torch.func.grad would wrap arguments, and wrapped statistics are copied one by one.
        def function(params: Params) -> tuple[Tensor, tuple[Tensor, Tensor, BatchStats]]:
            weights = model.weights(params)
            logits, batch_stats = model.forward(weights, old_stats, images, train=True)
            loss = F.cross_entropy(logits, labels)
            penalty = 0.5 * weight_decay * tree.ravel(weights)[0].square().sum() if weight_decay else 0.0
            whole = (loss + penalty) * len(labels) if summed else loss + penalty
            return whole, (loss, logits, batch_stats)

        return function

    return objective


def _metrics(loss: Tensor, logits: Tensor, labels: Tensor) -> Metrics:
    correct = (logits.argmax(dim=1) == labels).sum()
    return Metrics(loss.detach(), correct, torch.full_like(correct, len(labels)))
