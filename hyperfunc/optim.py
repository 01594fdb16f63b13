"""Optimizers and learning-rate schedules as functions of the step.

An optimizer keeps its state as vectors over all parameters at once (`tree.ravel`), so that an update costs about a
dozen operations however many leaves there are. The step is a tensor, never a Python number: a number would be baked
into a compiled or captured step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperfunc import tree
from hyperfunc.arguments import matching, some

Names = str | Iterable[str] | Callable[[str], bool]
"""Leaves of a pytree: glob patterns of their paths, as `tree.named_leaves` gives them, or a predicate on a path."""

T = TypeVar("T")

Schedule = Callable[[Tensor], Tensor]
"""From the number of steps done, a 0-dimensional integer tensor, to the learning rate, 0-dimensional float64."""


class Moments(NamedTuple):
    """Adam's running means of the gradient (m) and of its square (v), over all parameters as one vector."""

    m: Float[Tensor, "params"]
    v: Float[Tensor, "params"]


class Momentum(NamedTuple):
    """The momentum buffer of SGD, over all parameters as one vector."""

    m: Float[Tensor, "params"]


class Averaged(NamedTuple):
    """The state of an optimizer under `averaged`.

    Attributes:
        mean: Of the parameters after each update so far, over all of them as one vector, of 32 bits at least.
        weight: The sum of what these count for.
        inner: The optimizer's own state.
    """

    mean: Float[Tensor, "params"]
    weight: Float[Tensor, ""]
    inner: Any


class Scaled(NamedTuple):
    """The state of an optimizer under `scaled`.

    Attributes:
        scale: What the loss is to be multiplied by before its gradient is taken.
        streak: Updates in turn whose gradients were finite, since the scale last changed.
        inner: The optimizer's own state.
    """

    scale: Float[Tensor, ""]
    streak: Int[Tensor, ""]
    inner: Any


class Optimizer(NamedTuple):
    """An optimizer as pure functions.

    Attributes:
        init: `init(params) -> opt_state`.
        update: `update(grads, opt_state, params, step) -> (new params, new opt_state)`, where `step` counts the
            updates done before this one.
        learning_rate: The schedule that `update` follows.
        elementwise: Whether it does not matter how the elements are divided into leaves, so that both functions may be
            given all of them as one vector in place of the tree.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, Tensor], tuple[Any, Any]]
    learning_rate: Schedule
    elementwise: bool = False


def adam(
    learning_rate: float | Schedule,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """Adam (Kingma and Ba 2014, arXiv 1412.6980), equal to `torch.optim.Adam`.

    Args:
        learning_rate: A number or a schedule.
        weight_decay: L2 penalty, added to the gradient.
        decoupled: Decays the parameters directly instead (AdamW, Loshchilov and Hutter 2017), equal to
            `torch.optim.AdamW`.
        betas: Decay rates of the two running means, in [0, 1).
        eps: Added to the denominator.

    Raises:
        ValueError: A number is negative, not finite, or out of its range.
    """
    schedule = _as_schedule(learning_rate)
    _check_rate("weight_decay", weight_decay)
    _check_rate("eps", eps)
    for beta in betas:
        _check_fraction("betas", beta)
    beta1, beta2 = betas

    def init(params: Any) -> Moments:
        vector, _ = tree.ravel(params)
        return Moments(torch.zeros_like(vector), torch.zeros_like(vector))

    def update(grads: Any, opt_state: Moments, params: Any, step: Int[Tensor, ""]) -> tuple[Any, Moments]:
        _check_step(step)
        g, _ = tree.ravel(grads)
        theta, unravel = tree.ravel(params)
        _check_state(opt_state, Moments, theta)
        lr = schedule(step)
        t = step.double() + 1
        if decoupled:
            theta = theta * (1 - lr * weight_decay)
        elif weight_decay:
            g = torch.add(g, theta, alpha=weight_decay)
        m = torch.lerp(opt_state.m, g, 1 - beta1)
        v = torch.addcmul(beta2 * opt_state.v, g, g, value=1 - beta2)
        step_size = lr / (1 - beta1**t)
        denominator = v.sqrt() / (1 - beta2**t).sqrt() + eps
        return unravel(theta - step_size * (m / denominator)), Moments(m, v)

    return Optimizer(init, update, schedule, elementwise=True)


def sgd(learning_rate: float | Schedule, *, momentum: float = 0.9, weight_decay: float = 0.0) -> Optimizer:
    """SGD with Nesterov momentum, the paper's choice for ordinary weights; equal to
    `torch.optim.SGD(nesterov=True)`.

    Args:
        learning_rate: A number or a schedule.
        momentum: In [0, 1).
        weight_decay: L2 penalty, added to the gradient.

    Raises:
        ValueError: A number is negative, not finite, or out of its range.
    """
    schedule = _as_schedule(learning_rate)
    _check_rate("weight_decay", weight_decay)
    _check_fraction("momentum", momentum)

    def init(params: Any) -> Momentum:
        vector, _ = tree.ravel(params)
        return Momentum(torch.zeros_like(vector))

    def update(grads: Any, opt_state: Momentum, params: Any, step: Int[Tensor, ""]) -> tuple[Any, Momentum]:
        _check_step(step)
        g, _ = tree.ravel(grads)
        theta, unravel = tree.ravel(params)
        _check_state(opt_state, Momentum, theta)
        if weight_decay:
            g = torch.add(g, theta, alpha=weight_decay)
        m = momentum * opt_state.m + g
        return unravel(theta - schedule(step) * (g + momentum * m)), Momentum(m)

    return Optimizer(init, update, schedule, elementwise=True)


def check_optimizer(optimizer: Any) -> None:
    """Raises a ValueError where it is another kind of object."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer: got a {type(optimizer).__name__}, expected an Optimizer of hyperfunc.optim, as adam(0.002)"
        )


def scaled(optimizer: Optimizer, *, first: float = 2.0**16, grow_after: int = 2000) -> Optimizer:
    """`optimizer` for gradients of a loss that was multiplied by `opt_state.scale`, which keeps small ones within the
    range of fp16 (Micikevicius et al. 2017, arXiv 1710.03740, section 3.2).

    Gradients that are not finite change nothing but the scale, which is halved; after `grow_after` finite ones in turn
    it is doubled. The rule is that of `torch.amp.GradScaler`, but as operations on tensors, so that no update waits for
    the device. An update that is left out still counts as a step, for the schedule and for Adam's correction of its
    means.

    Args:
        optimizer: What the gradients, divided by the scale again, go to.
        first: The scale at the start.
        grow_after: See above.

    Raises:
        ValueError: `optimizer` is none of this module's; `first` is not positive or not finite, or `grow_after` is not
            positive.
    """
    check_optimizer(optimizer)
    _check_positive("first", first)
    if grow_after < 1:
        raise ValueError(f"grow_after: got {grow_after}, expected at least 1")

    def init(params: Any) -> Scaled:
        device = tree.leaves(params)[0].device
        scale = torch.full((), first, dtype=torch.float32, device=device)
        inner = optimizer.init(tree.ravel(params)[0] if optimizer.elementwise else params)
        _check_not_scaled(inner, "whose gradients would be divided twice; leave one scaled out")
        return Scaled(scale, torch.zeros((), dtype=torch.int64, device=device), inner)

    def update(grads: Any, opt_state: Scaled, params: Any, step: Int[Tensor, ""]) -> tuple[Any, Scaled]:
        scale, streak, inner = opt_state
        g, _ = tree.ravel(grads)
        theta, unravel = tree.ravel(params)
        finite = g.isfinite().all()
        new_theta, new_inner = _update_vectors(optimizer, g / scale, inner, theta, step, unravel)
        streak = torch.where(finite, streak + 1, 0)
        grows = streak >= grow_after
        # A scale that is halved for ever would become 0, and one that is doubled for ever infinite.
        scale = torch.where(finite, torch.where(grows, scale * 2, scale), scale / 2).clamp(2.0**-14, 2.0**24)
        new_inner = tree.map(partial(torch.where, finite), new_inner, inner)
        new_state = Scaled(scale, torch.where(grows, 0, streak), new_inner)
        return unravel(torch.where(finite, new_theta, theta)), new_state

    return Optimizer(init, update, optimizer.learning_rate, optimizer.elementwise)


def clipped(optimizer: Optimizer, max_norm: float) -> Optimizer:
    """`optimizer` for gradients that are scaled down to the norm `max_norm`, over all leaves together, where theirs is
    larger (Pascanu, Mikolov and Bengio 2013, arXiv 1211.5063, section 3.2); equal to
    `torch.nn.utils.clip_grad_norm_`.

    The order of those that go around another is `scaled(averaged(frozen(clipped(adam(...), ...), ...)))`: the norm is
    then that of the gradients themselves, not scaled, and of those that count.

    Args:
        optimizer: What the gradients go to. Its own weight decay is not counted to their norm.
        max_norm: The greatest norm.

    Raises:
        ValueError: `optimizer` is none of this module's, or `max_norm` is not positive or not finite. Its `init` raises
            one where `optimizer` is a scaled one.
    """
    check_optimizer(optimizer)
    _check_positive("max_norm", max_norm)

    def init(params: Any) -> Any:
        opt_state = optimizer.init(params)
        _check_not_scaled(opt_state, "whose gradients are not those of the loss; expected scaled(clipped(...))")
        return opt_state

    def update(grads: Any, opt_state: Any, params: Any, step: Int[Tensor, ""]) -> tuple[Any, Any]:
        g, _ = tree.ravel(grads)
        theta, unravel = tree.ravel(params)
        g = g * (max_norm / (torch.linalg.vector_norm(g) + 1e-6)).clamp(max=1)
        new_theta, opt_state = _update_vectors(optimizer, g, opt_state, theta, step, unravel)
        return unravel(new_theta), opt_state

    return Optimizer(init, update, optimizer.learning_rate, optimizer.elementwise)


def averaged(optimizer: Optimizer, decay: float = 0.99) -> Optimizer:
    """`optimizer`, and beside it the exponential moving average (EMA) of the parameters, which `mean_params` gives.

    At a learning rate that is not yet small the parameters wander about what they would tend to, and their mean is a
    better network than any of them (Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407). The training
    itself is what it would be without. Of t updates the i-th counts for (1 - decay) decay^(t - i), over the sum of
    these, so that nothing is left of the parameters at the start; updates that `scaled` leaves out do not count.

    The running statistics of batch norms are those of the parameters of each step, and not of their mean, for which
    `training.calibrate` finds them:

        optimizer = optim.averaged(optim.adam(0.002))
        ...
        params = optim.mean_params(state.opt_state, state.params)
        batch_stats = training.calibrate(model, params, state.batch_stats, batches)

    Args:
        optimizer: What trains. It may be `frozen`; around an averaged one, that would leave a mean of a part alone.
        decay: In [0, 1); about 1 / (1 - decay) of the last updates count.

    Raises:
        ValueError: `optimizer` is none of this module's, or `decay` is out of its range. Its `init` raises one where
            `optimizer` is a scaled one.
    """
    check_optimizer(optimizer)
    _check_fraction("decay", decay)

    def init(params: Any) -> Averaged:
        inner = optimizer.init(params)
        _check_not_scaled(inner, "whose scale a step would not find; expected scaled(averaged(...))")
        theta, _ = tree.ravel(params)
        mean = theta.to(torch.promote_types(theta.dtype, torch.float32), copy=True)
        return Averaged(mean, mean.new_zeros(()), inner)

    def update(grads: Any, opt_state: Averaged, params: Any, step: Int[Tensor, ""]) -> tuple[Any, Averaged]:
        g, _ = tree.ravel(grads)
        theta, unravel = tree.ravel(params)
        _check_state(opt_state, Averaged, theta)
        theta, inner = _update_vectors(optimizer, g, opt_state.inner, theta, step, unravel)
        weight = decay * opt_state.weight + (1 - decay)
        mean = torch.lerp(opt_state.mean, theta.to(opt_state.mean.dtype), (1 - decay) / weight)
        return unravel(theta), Averaged(mean, weight, inner)

    return Optimizer(init, update, optimizer.learning_rate, optimizer.elementwise)


def mean_params(opt_state: Any, params: T) -> T:
    """A copy of the mean of the parameters that an optimizer under `averaged` has kept; before its first update, the
    parameters as they were. For an ensemble, map it: `torch.vmap(mean_params)(state.opt_state, state.params)`.

    Args:
        opt_state: The optimizer's state.
        params: The parameters that go with it.

    Raises:
        ValueError: The state holds no such mean, or one of other parameters.
    """
    if isinstance(opt_state, Scaled):
        opt_state = opt_state.inner
    if not isinstance(opt_state, Averaged):
        raise ValueError(
            f"opt_state: got a {type(opt_state).__name__}, expected that of an optimizer under averaged, as "
            "averaged(adam(0.002))"
        )
    theta, unravel = tree.ravel(params)
    if opt_state.mean.shape != theta.shape:
        raise ValueError(
            f"opt_state: got a mean of shape {tuple(opt_state.mean.shape)} for {len(theta):,} parameters; expected "
            "averaged to go around frozen, and torch.vmap(mean_params) for the members of an ensemble"
        )
    return unravel(opt_state.mean.to(theta.dtype, copy=True))


def frozen(optimizer: Optimizer, names: Names) -> Optimizer:
    """`optimizer` for all parameters but those that `names` chooses, which stay what they are.

    The optimizer does not see them: it keeps no state for them, and neither its weight decay nor a `scaled` or
    `clipped` inside counts them; one outside would. Its state is of no use once others are frozen. The gradients of
    frozen ones are computed all the same, unless the step is compiled.

        optim.frozen(optim.adam(0.002), "primary/*")        # trains generator and embeddings alone
        optim.frozen(optim.adam(0.002), ["generator/*", "primary/stem.*"])

    Args:
        optimizer: What trains the others.
        names: Glob patterns of paths, or a predicate on a path. The paths are those of `tree.named_leaves`: of a Model
            'generator/3x3/w_in', 'embeddings/3x3', 'primary/stem.weight' and so on, of a Conditional the same after
            'model/', and those of the encoder after 'encoder/'. '*' stands for any characters.

    Raises:
        ValueError: `optimizer` is none of this module's, or `names` are no names. Its functions raise one where a
            pattern matches no parameter, where none is frozen, and where none is left to train.
    """
    check_optimizer(optimizer)
    given: Any = () if callable(names) else names
    patterns = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            kind = type(pattern).__name__
            raise ValueError(f"names: got a {kind}, expected a glob pattern, several, or a predicate on a path")

    # Of strings alone, so that torch.compile, which cannot trace the matching of patterns, need not.
    @torch.compiler.assume_constant_result
    def stays(paths: tuple[str, ...]) -> tuple[bool, ...]:
        fixed = {path for path in paths if names(path)} if callable(names) else set[str]()
        for pattern in patterns:
            if not (matched := matching(paths, pattern)):
                raise ValueError(
                    f"names: no parameter is called {pattern!r}, expected a path or glob pattern of these: "
                    f"{some(list(paths))}"
                )
            fixed |= matched
        found = tuple(path in fixed for path in paths)
        if not any(found):
            raise ValueError(f"names: got {names!r}, which freezes none of these: {some(list(paths))}")
        if all(found):
            raise ValueError(f"names: got {names!r}, which leaves no parameter to train")
        return found

    def trained(named: dict[str, Tensor]) -> dict[str, Tensor]:
        return {path: leaf for (path, leaf), stay in zip(named.items(), stays(tuple(named)), strict=True) if not stay}

    def init(params: Any) -> Any:
        return optimizer.init(trained(tree.named_leaves(params)))

    def update(grads: Any, opt_state: Any, params: Any, step: Int[Tensor, ""]) -> tuple[Any, Any]:
        old = tree.named_leaves(params)
        new, opt_state = optimizer.update(trained(tree.named_leaves(grads)), opt_state, trained(old), step)
        return tree.replace_leaves(params, [new.get(path, leaf) for path, leaf in old.items()]), opt_state

    return Optimizer(init, update, optimizer.learning_rate)


def _update_vectors(
    optimizer: Optimizer, g: Tensor, opt_state: Any, theta: Tensor, step: Tensor, unravel: Callable[[Tensor], Any]
) -> tuple[Tensor, Any]:
    """An update of parameters theta that have been joined to one vector, as their gradients g have; `unravel` parts
    them."""
    if optimizer.elementwise:
        # As the vectors that they are: cut up and joined again, they would be a kernel for each leaf.
        return optimizer.update(g, opt_state, theta, step)
    params, opt_state = optimizer.update(unravel(g), opt_state, unravel(theta), step)
    return tree.ravel(params)[0], opt_state


def constant(value: float) -> Schedule:
    """The same learning rate at every step."""
    _check_rate("learning_rate", value)
    return lambda step: torch.full_like(step, value, dtype=torch.float64)


def piecewise(values: Sequence[float], boundaries: Sequence[int]) -> Schedule:
    """`values[i]` from step `boundaries[i - 1]` on; `values[0]` from the start.

    Raises:
        ValueError: The lengths do not fit, the boundaries do not grow, or a value is negative or not finite.
    """
    if len(values) != len(boundaries) + 1:
        raise ValueError(f"values: got {len(values)} for {len(boundaries)} boundaries, expected one more value")
    if list(boundaries) != sorted(boundaries):
        raise ValueError(f"boundaries: got {list(boundaries)}, expected steps in growing order")
    for value in values:
        _check_rate("values", value)
    first = constant(values[0])

    def schedule(step: Tensor) -> Tensor:
        lr = first(step)
        for (before, after), boundary in zip(pairwise(values), boundaries, strict=True):
            lr = torch.add(lr, step >= boundary, alpha=after - before)
        return lr

    return schedule


def multistep(
    learning_rate: float, epochs: int, steps_per_epoch: int, *, at: Sequence[float] = (0.3, 0.6, 0.8), by: float = 0.5
) -> Schedule:
    """Multiplies the learning rate by `by` after each of the fractions `at` of the epochs, rounded to whole epochs and
    at the earliest after the first.

    Raises:
        ValueError: `epochs`, `steps_per_epoch`, one of `at` or a learning rate is out of its range.
    """
    _check_steps(epochs, "epochs")
    _check_steps(steps_per_epoch, "steps_per_epoch")
    for fraction in at:
        _check_fraction("at", fraction)
    values = [learning_rate * by**i for i in range(len(at) + 1)]
    return piecewise(values, [max(1, round(fraction * epochs)) * steps_per_epoch for fraction in at])


def paper(learning_rate: float, steps: int, *, adaptive: bool = True) -> Schedule:
    """The paper's own tables (Ha et al. 2016, appendix), scaled from their lengths to `steps`.

    Args:
        learning_rate: The first value: 0.002 for Adam in the paper, 0.1 for SGD.
        steps: Length of the run.
        adaptive: The table for Adam, four quarters at 0.002, 0.001, 0.0002 and 0.00005 over 672,000 steps; otherwise
            the one for SGD, five fifths that fall from 0.1 by a factor of 5 each over 140,000 steps.
    """
    _check_steps(steps)
    factors = (1, 0.5, 0.1, 0.025) if adaptive else (1, 0.2, 0.04, 0.008, 0.0016)
    boundaries = [round(steps * i / len(factors)) for i in range(1, len(factors))]
    return piecewise([learning_rate * factor for factor in factors], boundaries)


def cosine(learning_rate: float, steps: int, *, warmup: int = 0) -> Schedule:
    """Rises linearly over `warmup` steps to `learning_rate`, then falls along half a cosine to zero at `steps`,
    where it stays.

    Raises:
        ValueError: The warm-up is negative or not shorter than the run, or a number is out of range.
    """
    _check_steps(steps)
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup: got {warmup}, expected at least 0 and less than the {steps} steps of the run")
    _check_rate("learning_rate", learning_rate)

    def schedule(step: Tensor) -> Tensor:
        done = step.double()
        rising = (done + 1) / max(warmup, 1)
        share = ((done - warmup) / (steps - warmup)).clamp(max=1)
        falling = 0.5 + 0.5 * torch.cos(math.pi * share)
        return learning_rate * torch.where(step < warmup, rising, falling)

    return schedule


def _as_schedule(learning_rate: float | Schedule) -> Schedule:
    return learning_rate if callable(learning_rate) else constant(learning_rate)


def _check_rate(name: str, value: Any) -> None:
    if not _is_finite(value) or value < 0:
        raise ValueError(f"{name}: got {value!r}, expected a finite number of at least 0")


def _check_positive(name: str, value: Any) -> None:
    if not _is_finite(value) or value <= 0:
        raise ValueError(f"{name}: got {value}, expected a finite number above 0")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _check_step(step: Any) -> None:
    if not isinstance(step, Tensor):
        raise ValueError(
            f"step: got {step!r}, expected a tensor, such as torch.tensor(0), which compiled code can vary"
        )


def _check_state(opt_state: Any, kind: type, theta: Tensor) -> None:
    if not isinstance(opt_state, kind):
        raise ValueError(
            f"opt_state: got a {type(opt_state).__name__}, expected the {kind.__name__} that the optimizer's own "
            "`init` gives; a state does not outlive a change of optimizer"
        )
    if opt_state[0].shape != theta.shape:
        raise ValueError(
            f"opt_state: got that of {len(opt_state[0]):,} parameters for {len(theta):,}, expected what the optimizer's"
            " `init` gives for these; where others are frozen than before, it begins anew"
        )


def _check_not_scaled(opt_state: Any, reason: str) -> None:
    if isinstance(opt_state, Scaled):
        raise ValueError(f"optimizer: got a scaled one, {reason}")


def _check_fraction(name: str, value: Any) -> None:
    if not _is_finite(value) or not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 0 and less than 1")


def _check_steps(steps: int, name: str = "steps") -> None:
    if steps < 1:
        raise ValueError(f"{name}: got {steps}, expected at least 1")
