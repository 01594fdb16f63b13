"""The training and evaluation steps: pure functions of a `TrainState` and a batch."""

# torch.compile cannot trace the evaluation of an annotation, and functions are defined inside of what it traces.
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hyperfunc import data, tree
from hyperfunc.conditions import Conditional
from hyperfunc.differentiate import Differentiate, Function, make_differentiate
from hyperfunc.model import BatchStats, Model, Params, check_model
from hyperfunc.optim import Optimizer, Scaled, check_optimizer
from hyperfunc.precision import LOW, Precision, autocast, check_precision
from hyperfunc.randomness import Seed, drawing_layers, fold_in
from hyperfunc.residual import ResNet

Decay = Literal["parameters", "generated"]

Load = Callable[[Any], tuple[Tensor, Tensor]]
"""Makes the model's input and the labels out of a batch, on the device: `data.make_train_load` for example."""


class TrainState(NamedTuple):
    """All that changes from step to step.

    Attributes:
        step: How many were done.
        params: The `Params` of a Model, or whatever else an objective for `make_step` takes.
        batch_stats: The buffers that go with them.
        opt_state: The optimizer's own.
    """

    step: Int[Tensor, ""]
    params: Any
    batch_stats: BatchStats
    opt_state: Any


class Metrics(NamedTuple):
    """Sums over examples, so that those of several batches, or ranks, simply add up.

    Attributes:
        loss: The sum of the losses.
        correct: How many were classified as they should be.
        total: How many there were.
    """

    loss: Float[Tensor, ""]
    correct: Int[Tensor, ""]
    total: Int[Tensor, ""]

    @property
    def mean_loss(self) -> Tensor:
        """The loss per example."""
        return self.loss / self.total

    @property
    def accuracy(self) -> Tensor:
        """The share of examples, 0 to 1, that were classified as they should be."""
        return self.correct / self.total


M = TypeVar("M")

Step = Callable[[TrainState, Any], tuple[TrainState, M]]
"""`step(state, batch) -> (new state, metrics)`."""

EvalStep = Callable[[tuple[dict[str, Tensor], BatchStats], Any], Metrics]

CalibrationStep = Callable[[tuple[dict[str, Tensor], BatchStats], Any], tuple[Any, tuple[()]]]

Reduce = Callable[[int, Params, BatchStats, Metrics], tuple[Params, BatchStats, Metrics]]
"""Brings together what ranks that share a batch found for their parts: `distributed.mean_over_ranks`. It is given the
pictures of the part and the gradients of their summed loss, and gives those of the mean over the whole batch."""


Objective = Callable[..., tuple[Tensor, tuple[BatchStats, Any]]]
"""`objective(params, batch_stats, batch) -> (loss, (new batch_stats, metrics))`; see `make_step`."""


def init_state(model: Model | Conditional, optimizer: Optimizer, generator: torch.Generator) -> TrainState:
    """A fresh state, on the generator's device, with the step at 0.

    Raises:
        ValueError: `model` is neither a Model nor a Conditional, or `optimizer` none of `optim`.
    """
    if not isinstance(model, Conditional):
        check_model(
            model,
            "hyperize makes one of a module; a Conditional will do, and for an Ensemble there is ensembles.init_state",
        )
    check_optimizer(optimizer)
    params, batch_stats = model.init(generator)
    step = torch.zeros((), dtype=torch.int64, device=generator.device)
    return TrainState(step, params, batch_stats, optimizer.init(params))


def pair(batch: Any) -> tuple[Any, Tensor]:
    """A batch that is (images, labels) itself.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        of = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
        raise ValueError(
            f"batch: got a {type(batch).__name__}{of}, expected a pair (images, labels); `load` makes it of another"
        )
    images, labels = batch
    return images, labels


def make_train_step(
    model: Model,
    optimizer: Optimizer,
    *,
    load: Load = pair,
    decay: Decay = "parameters",
    weight_decay: float = 0.0,
    precision: Precision = "fp32",
    seed: int | None = None,
    reduce: Reduce | None = None,
) -> Step[Metrics]:
    """Builds `step(state, batch) -> (new state, metrics)`; the arguments are never written.

    The loss is the mean cross-entropy of the batch. With decay="generated" half of `weight_decay` times the squared
    norm of the primary network's weights, generated and ordinary, is added to it, as in the paper; any further decay is
    up to the optimizer.

    Args:
        model: The network.
        optimizer: From `optim`. Under `optim.scaled` the gradients are those of the scaled loss, which keeps them
            within the range of fp16; the metrics show the loss itself.
        load: Makes (images, labels) out of a batch; by default a batch is that pair.
        decay: "generated", or "parameters", where this function leaves the decay to the optimizer.
        weight_decay: Used under decay="generated" alone.
        precision: What products are computed in. Under "bf16" and "fp16" a step runs under autocast, and its parameters
            should be float32. Whether a GPU takes float32 as TF32 is a setting of the program's, as which torch by
            default takes convolutions: "fp32" and "tf32" take effect once it calls `precision.set_float32_products`.
        seed: Seed of the model's own randomness, such as dropout, which becomes a function of it and of the step.
            Without one, modules with layers known to be random use 0, and anything else, such as a `functional.dropout`
            in a forward method, draws from torch's global generator. With one, a step costs the host slightly more, and
            what `randomness.Seeded` cannot seed is an error.
        reduce: For a batch whose pictures are divided over ranks; what `load` gives is then this rank's part.

    Raises:
        ValueError: `decay` or `precision` is unknown, or `weight_decay` is given where it would be ignored; or `model`
            is not a Model, or `optimizer` none of `optim`. The step raises one for a batch that is not such a pair, and
            for labels that are not class numbers of shape (n,).
    """
    check_model(
        model,
        "hyperize makes one of a module; for an Ensemble there is ensembles.map_step, for a Conditional or any other "
        "objective make_step",
    )
    check_optimizer(optimizer)
    check_precision(precision)
    gradient = _make_gradient(model, decay, weight_decay, precision, seed, summed=reduce is not None)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        _check_state(state)
        images, labels = _loaded(load, batch)
        grads, (loss, logits, batch_stats) = gradient(state, images, labels, _scale(state))
        metrics = _metrics(loss * len(labels), logits, labels)
        if reduce is not None:
            grads, batch_stats, metrics = reduce(len(labels), grads, batch_stats, metrics)
        return _updated(state, optimizer, grads, batch_stats), metrics

    return step


def make_step(objective: Objective, optimizer: Optimizer, *, seed: int | None = None) -> Step[Any]:
    """Builds `step(state, batch) -> (new state, metrics)` that descends an objective of the caller's own: any loss, any
    inputs, a `Conditional`.

        def objective(params, batch_stats, batch):
            task, images, targets = batch
            outputs, batch_stats = tasks.apply(params, batch_stats, task, images, train=True)
            loss = F.mse_loss(outputs, targets)
            return loss, (batch_stats, {"loss": loss})

        state = training.init_state(tasks, optimizer, generator)
        step = training.make_step(objective, optimizer)

    The arguments are never written. The step can be compiled, captured, mapped over members, and, where all leaves of
    a batch have the examples first, scanned, as that of `make_train_step`, if the objective can: it must be pure, and
    must not look at the values of tensors. What it differentiates itself, it should by `torch.func`; and no tensor that
    it closes over should require a gradient, which a compiled step would go on to keep the graph of. At the first step
    it may be called twice.

    Args:
        objective: `objective(params, batch_stats, batch) -> (loss, (new batch_stats, metrics))`, where `params` and
            `batch_stats` are the state's, the loss is a single number, and the metrics are tensors, in any pytree. For
            16 bits compute the network, but not the loss, under `precision.autocast`.
        optimizer: From `optim`. Under `optim.scaled` it is given the gradients of the scaled loss.
        seed: Seed of what the objective draws. With one it is called as `objective(..., seed=...)`, with a seed that is
            a function of this one and of the step, for the `seed` of an `apply`.

    Raises:
        ValueError: `objective` cannot be called, or `optimizer` is none of `optim`. The step raises one for an
            objective that returns something else.
    """
    if not callable(objective):
        raise ValueError(
            f"objective: got a {type(objective).__name__}, expected a function of (params, batch_stats, batch); for "
            "the cross-entropy of a Model there is make_train_step"
        )
    check_optimizer(optimizer)
    differentiate = make_differentiate()

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        _check_state(state)
        scale, drawn = _scale(state), {} if seed is None else {"seed": fold_in(seed, state.step)}

        def function(params: Any) -> tuple[Tensor, tuple[BatchStats, Any]]:
            loss, beside = _checked(objective(params, state.batch_stats, batch, **drawn), state.batch_stats)
            return loss if scale is None else loss * scale, beside

        depends_on = state, [leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor)]
        grads, (batch_stats, metrics) = differentiate(function, state.params, depends_on)
        return _updated(state, optimizer, grads, batch_stats), metrics

    return step


def scan(step: Step[M], batch_size: int) -> Step[M]:
    """`step` over the batches of `batch_size` rows that a longer batch consists of, one after the other, as one step.

    What is captured of it is several steps in one CUDA graph, between which the host has nothing to do.

    Args:
        step: A step of batches whose leaves all have the examples as first dimension.
        batch_size: Rows a step; the last step gets what is left.

    Returns:
        A step whose metrics have one row for each of the steps it consists of.
    """

    def steps(state: TrainState, rows: Any) -> tuple[TrainState, M]:
        metrics: list[M] = []
        for batch in data.batches(rows, batch_size):
            state, of_step = step(state, batch)
            metrics.append(of_step)
        return state, tree.stack(metrics)

    return steps


def make_gradients(
    model: Model,
    *,
    load: Load = pair,
    decay: Decay = "parameters",
    weight_decay: float = 0.0,
    precision: Precision = "fp32",
    seed: int | None = None,
    reduce: Reduce | None = None,
) -> Callable[[TrainState, Any], Params]:
    """Builds `gradients(state, batch) -> params`, what a train step of the same arguments gives to its optimizer, but
    for a scale of the loss."""
    check_model(model)
    check_precision(precision)
    gradient = _make_gradient(model, decay, weight_decay, precision, seed, summed=reduce is not None)

    def gradients(state: TrainState, batch: Any) -> Params:
        images, labels = _loaded(load, batch)
        grads, (loss, logits, batch_stats) = gradient(state, images, labels, None)
        if reduce is not None:
            grads, _, _ = reduce(len(labels), grads, batch_stats, _metrics(loss, logits, labels))
        return grads

    return gradients


def make_eval_step(model: Model, *, load: Load = pair, precision: Precision = "fp32") -> EvalStep:
    """Builds `eval_step((weights, batch_stats), batch) -> metrics`, under the running statistics.

    It takes the weights (`model.weights(params)`) and not the parameters, so that an evaluation over many batches
    generates the kernels once.
    """
    check_model(model)
    check_precision(precision)

    @torch.no_grad()
    def eval_step(network: tuple[dict[str, Tensor], BatchStats], batch: Any) -> Metrics:
        weights, batch_stats = network
        images, labels = _loaded(load, batch)
        with autocast(precision, images.device):
            logits, _ = model.forward(weights, batch_stats, images, train=False)
        logits = _loss_dtype(logits)
        return _metrics(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)

    return eval_step


def evaluate(
    model: Model,
    params: Params,
    batch_stats: BatchStats,
    batches: Iterable[Any],
    *,
    eval_step: EvalStep | None = None,
) -> Metrics:
    """The metrics over all batches.

    Args:
        model: The network.
        params: Its parameters, of which the kernels are generated once.
        batch_stats: Its running statistics.
        batches: What `eval_step` takes.
        eval_step: Of `make_eval_step`, as it is, compiled or captured; by default one for batches (images, labels).

    Raises:
        ValueError: There is no batch.
    """
    eval_step = eval_step or make_eval_step(model)
    with torch.no_grad():
        network = model.weights(params), batch_stats
    total: Metrics | None = None
    for batch in batches:
        metrics = eval_step(network, batch)
        total = metrics if total is None else tree.map(torch.add, total, metrics)
    if total is None:
        raise ValueError("batches: got none, expected at least one")
    return total


def make_calibration_step(model: Model, *, load: Load = pair, precision: Precision = "fp32") -> CalibrationStep:
    """Builds `step((weights, batch_stats), batch) -> ((weights, new batch_stats), ())`: the forward pass of training
    alone, in the form of a step, which can be compiled and captured as such.

    Layers known to be random, such as dropout, draw the same for each batch; what is random in a forward method draws
    from torch's global generator.
    """
    check_model(model)
    check_precision(precision)
    seed = 0 if drawing_layers(model.module) else None

    @torch.no_grad()
    def step(network: tuple[dict[str, Tensor], BatchStats], batch: Any) -> tuple[Any, tuple[()]]:
        weights, batch_stats = network
        images, _ = load(batch)
        with autocast(precision, images.device):
            _, new_stats = model.forward(weights, batch_stats, images, train=True, seed=seed)
        return (weights, new_stats), ()

    return step


def calibrate(
    model: Model,
    params: Params,
    batch_stats: BatchStats,
    batches: Iterable[Any],
    *,
    step: CalibrationStep | None = None,
) -> BatchStats:
    """The running statistics after so many more batches, with the parameters as they are.

    In training the statistics follow parameters that move: at any time they are means over steps that had others. The
    faster the parameters move, the worse an evaluation by such statistics is (Wu and Johnson 2021, arXiv 2105.07576,
    section 3, who take new means in place of the running ones). After 40 batches the old statistics count for 1.5 %
    under the usual momentum of 0.1. Batch norms with momentum=None, whose statistics are means over all batches since
    the first, hardly change.

    Args:
        model: The network.
        params: Its parameters, of which the kernels are generated once.
        batch_stats: Its running statistics; they are not changed.
        batches: What `step` takes: training data, in the random order and with the augmentation of training.
        step: Of `make_calibration_step`, as it is, compiled or captured; by default one for batches (images, labels).
    """
    step = step or make_calibration_step(model)
    with torch.no_grad():
        network = model.weights(params), batch_stats
    for batch in batches:
        network, _ = step(network, batch)
    # A captured step goes on to write into its own.
    return tree.clone(network[1])


def _check_state(state: Any) -> None:
    """Raises a ValueError where it is no state of a single network."""
    if not isinstance(state, TrainState) or not isinstance(state.step, Tensor):
        what = f"a {type(state).__name__}" if not isinstance(state, TrainState) else f"the step {state.step!r}"
        raise ValueError(
            f"state: got {what}, expected a TrainState whose step is a tensor, as init_state gives it; a step is "
            "called as step(state, batch)"
        )
    if state.step.dim():
        raise ValueError(
            f"state: got that of {len(state.step)} members, expected that of one network; map the step, by "
            "ensembles.map_step"
        )


def _scale(state: TrainState) -> Tensor | None:
    """What the loss is to be multiplied by before its gradient is taken."""
    return state.opt_state.scale if isinstance(state.opt_state, Scaled) else None


def _updated(state: TrainState, optimizer: Optimizer, grads: Any, batch_stats: BatchStats) -> TrainState:
    params, opt_state = optimizer.update(grads, state.opt_state, state.params, state.step)
    return TrainState(state.step + 1, params, batch_stats, opt_state)


def _checked(answer: Any, old_stats: BatchStats) -> tuple[Tensor, tuple[BatchStats, Any]]:
    """What an objective returned, when it is seen to be what one must return."""
    pairs = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], tuple) and len(answer[1]) == 2
    if not pairs or not isinstance(answer[0], Tensor):
        raise ValueError(f"objective: returned {_kinds(answer)}, expected (loss, (new batch_stats, metrics))")
    loss, beside = answer
    if loss.dim() or not loss.is_floating_point():
        raise ValueError(
            f"objective: returned a loss of {tree.describe(loss)}, expected a single number, such as the mean over the "
            "batch"
        )
    if not torch.compiler.is_compiling() and not loss.requires_grad:
        raise ValueError(
            "objective: returned a loss that does not depend on params, so that nothing would be learned; expected one "
            "that is computed from the params it is given, and neither detached nor under torch.no_grad"
        )
    if isinstance(old_stats, dict) and (not isinstance(beside[0], dict) or beside[0].keys() != old_stats.keys()):
        raise ValueError(
            "objective: returned other batch_stats than it was given, expected (loss, (new batch_stats, metrics)), "
            "with the statistics that apply returns"
        )
    for name, part in zip(("batch_stats", "metrics"), beside, strict=True):
        tree.check_tensors(f"objective's {name}", part)
    return loss, beside


def _kinds(value: Any) -> str:
    if type(value) is tuple:
        return f"({', '.join(_kinds(part) for part in value)})"
    return type(value).__name__


_Beside = tuple[Tensor, Tensor, BatchStats]
"""The loss, the logits and the new statistics."""


def _make_gradient(
    model: Model, decay: str, weight_decay: float, precision: Precision, seed: int | None, *, summed: bool
) -> Callable[[TrainState, Tensor, Tensor, Tensor | None], tuple[Params, _Beside]]:
    """Builds `gradient(state, images, labels, scale)`: of the mean loss over the batch, or (`summed`) of the sum."""
    if decay not in get_args(Decay):
        raise ValueError(f"decay: got {decay!r}, expected one of {', '.join(get_args(Decay))}")
    if decay == "parameters" and weight_decay:
        raise ValueError(
            f"weight_decay: got {weight_decay} with decay='parameters'; give it to the optimizer, "
            "or choose decay='generated'"
        )
    silent = _silent_biases(model)
    step_seed = _make_step_seed(model, seed)
    differentiate = make_differentiate()

    def gradient(state: TrainState, images: Tensor, labels: Tensor, scale: Tensor | None) -> tuple[Params, _Beside]:
        drawn = step_seed(state)

        # The batch is closed over: torch.func.grad would wrap arguments, and wrapped statistics are copied one by one.
        def function(params: Params) -> tuple[Tensor, _Beside]:
            with autocast(precision, images.device):
                weights = model.weights(params)
                # On these the loss depends by their decay alone.
                constant = {name: weights[name].detach() for name in silent}
                logits, batch_stats = model.forward(
                    {**weights, **constant}, state.batch_stats, images, train=True, seed=drawn
                )
            logits = _loss_dtype(logits)
            loss = F.cross_entropy(logits, labels)
            total = loss
            if weight_decay:
                # Generated weights may be of 16 bits, ordinary ones never are.
                wide = tree.to(weights, torch.float32) if precision in LOW else weights
                total = total + 0.5 * weight_decay * tree.ravel(wide)[0].square().sum()
            if summed:
                total = total * len(labels)
            if scale is not None:
                total = total * scale
            return total, (loss, logits, batch_stats)

        fixed = () if weight_decay else silent
        return _gradient(function, state.params, (state, images, labels), fixed, differentiate)

    return gradient


def _make_step_seed(model: Model, seed: int | None) -> Callable[[TrainState], Seed | None]:
    """Builds the seed of each step. It is None where none was given and nothing is known to draw, which would only run
    slower under one."""
    if seed is None and not drawing_layers(model.module):
        return lambda _state: None
    first = seed or 0
    return lambda state: fold_in(first, state.step)


def _silent_biases(model: Model) -> tuple[str, ...]:
    """The parameters whose gradient is zero in training, as the primary network itself says.

    It is zero but for rounding, which takes a pass over each activation's gradient to find, and of which Adam would
    make whole steps.
    """
    return model.module.biases_before_norms if isinstance(model.module, ResNet) else ()


def _gradient(
    function: Function, params: Params, depends_on: Any, constant: tuple[str, ...], differentiate: Differentiate
) -> tuple[Params, _Beside]:
    """As `torch.func.grad(function, has_aux=True)(params)`, which keeps all that the way forward has stored to the end,
    because its result may be differentiated again. Where nobody does that, by anything that it depends on, it is freed
    on the way back.

    Those named in `constant` get zeros, made at once and not one by one as torch.func would.
    """
    fixed: dict[str, Tensor] = {}
    if isinstance(params, Params):
        fixed = {name: value for name, value in params.primary.items() if name in constant}
    if not fixed:
        return differentiate(function, params, depends_on)

    def with_primary(params: Params, primary: dict[str, Tensor]) -> Params:
        # Not _replace, which torch.compile cannot trace in torch 2.7.
        return Params(params.generator, params.embeddings, primary)

    free = with_primary(params, {name: value for name, value in params.primary.items() if name not in fixed})
    gradients, aux = differentiate(
        lambda free: function(with_primary(free, {**free.primary, **fixed})), free, depends_on
    )
    found = {**gradients.primary, **_zeros_like(fixed, gradients.primary)}
    return with_primary(gradients, {name: found[name] for name in params.primary}), aux


def _zeros_like(values: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """A zero gradient for each of the values, beside those that were found for others."""
    if torch.compiler.is_compiling():
        # A tensor of zeros would be a kernel of its own for each bias, and so would a product by 0, which torch 2.11
        # folds into a constant; a difference is made along with what it is made of.
        by_shape = {gradient.shape: gradient for gradient in gradients.values()}
        like = {name: by_shape.get(value.shape, value) for name, value in values.items()}
        return {name: gradient - gradient for name, gradient in like.items()}
    sizes = [value.numel() for value in values.values()]
    parts = next(iter(values.values())).new_zeros(sum(sizes)).split(sizes)
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}


def _loss_dtype(logits: Any) -> Tensor:
    """A loss in 16 bits, of a model in them too, could not be added up: a sum of many stops growing."""
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"model: its output is a {type(logits).__name__}, expected one tensor of logits; a step that takes other "
            "outputs, as of networks with auxiliary classifiers, is made by make_step"
        )
    # Not `in LOW.values()`, which torch.compile cannot trace in torch 2.7.
    return logits.float() if logits.dtype in tuple(LOW.values()) else logits


def _loaded(load: Load, batch: Any) -> tuple[Any, Tensor]:
    """What `load` makes of a batch, when the labels are seen to be what accuracy and mean loss are defined for."""
    images, labels = load(batch)
    if labels.dim() != 1 or labels.dtype not in (torch.int64, torch.uint8):
        raise ValueError(
            f"labels: got {tree.describe(labels)}, expected the number of a class for each example, int64[n], "
            "as .long() makes it of other whole numbers; for another loss there is make_step"
        )
    return images, labels


def _metrics(loss: Tensor, logits: Tensor, labels: Tensor) -> Metrics:
    correct = (logits.argmax(dim=1) == labels).sum()
    return Metrics(loss.detach(), correct, torch.full_like(correct, len(labels)))
