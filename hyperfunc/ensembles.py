"""Several hypernetworks at once: one model, and parameters with a first dimension over its members.

Whatever is a pure function of one member's state is one of all members' under `torch.vmap`, the training step too.
"""

# torch.compile cannot trace the evaluation of an annotation, and functions are defined inside of what it traces.
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from hyperfunc import tree
from hyperfunc.arguments import positive
from hyperfunc.model import BatchStats, Forward, Model, Params, check_model
from hyperfunc.optim import Optimizer, check_optimizer
from hyperfunc.randomness import Seed
from hyperfunc.training import M, Step, TrainState
from hyperfunc.vmap_rules import autocast_under_vmap


class Ensemble(NamedTuple):
    """Models of one shape, as pure functions of their stacked parameters and statistics.

    Attributes:
        init: `init(generator) -> (params, batch_stats)`, drawn one member after the other: the first member is what
            `model.init` would draw, and more members change nothing in those before. What `hyperize` takes from its
            module starts the same in all of them.
        apply: `apply(params, batch_stats, *args, train, seed=None, **kwargs) -> (outputs, new batch_stats)`: all
            members on the same input; the outputs have the members as first dimension. A `seed` of shape (n,) is one
            for each member, any other is that of all.
        apply_each: The same, with an input for each member: `args` have the members as first dimension too.
        predict: `predict(params, batch_stats, *args, **kwargs) -> (n, classes)`: the mean over the members of their
            softmax probabilities, in evaluation. Other outputs are `apply(..., train=False)[0].mean(0)`.
        member: `member(stacked, index)`: one member's part of a stacked pytree, be it parameters, statistics or a
            training state: for `materialize`, `save` and all else that takes a single model's.
        model: The model that all members are of.
        size: The number of members.
    """

    init: Callable[[Generator], tuple[Params, BatchStats]]
    apply: Forward
    apply_each: Forward
    predict: Callable[..., Float[Tensor, "n classes"]]
    member: Callable[[Any, int], Any]
    model: Model
    size: int

    def __repr__(self) -> str:
        return f"<Ensemble of {self.size}: {self.model!r}>"


def ensemble(model: Model, n: int) -> Ensemble:
    """`n` networks of one model, computed at once.

    Train it with `init_state` and `map_step`:

        state = ensembles.init_state(members, optimizer, generator)
        step = ensembles.map_step(training.make_train_step(model, optimizer))
        state, metrics = step(state, batch)

    Args:
        model: What each member is.
        n: The number of members.

    Raises:
        ValueError: `n` is not a positive whole number, or `model` is not a Model. The functions of the result raise one
            for tensors without the members as first dimension, and `member` for an index out of range.
    """
    check_model(model, "hyperize makes one of a module; there are no ensembles of others")
    n = positive("n", n)

    def init(generator: Generator) -> tuple[Params, BatchStats]:
        return tree.stack([model.init(generator) for _ in range(n)])

    def check(name: str, stacked: Any) -> None:
        for place, leaf in enumerate(tree.leaves(stacked)):
            if isinstance(leaf, Tensor) and leaf.shape[:1] != (n,):
                raise ValueError(
                    f"{name}: {list(tree.named_leaves(stacked))[place] or 'it'} has the shape {tuple(leaf.shape)}, "
                    f"expected the {n} members as first dimension; give what the ensemble's own functions return, or "
                    "torch.stack of one for each member"
                )

    def make_apply(*, each: bool) -> Forward:
        def apply(
            params: Params,
            batch_stats: BatchStats,
            /,
            *args: Any,
            train: bool,
            seed: Seed | None = None,
            **kwargs: Any,
        ) -> Any:
            check("params", params)
            check("batch_stats", batch_stats)
            if each:
                check("args", args)

            def one(params: Params, batch_stats: BatchStats, args: tuple[Any, ...], seed: Seed | None) -> Any:
                return model.apply(params, batch_stats, *args, train=train, seed=seed, **kwargs)

            has_own_seeds = isinstance(seed, Tensor) and seed.shape == (n,)
            with autocast_under_vmap(tree.leaves(params)[0].device):
                in_dims = (0, 0, 0 if each else None, 0 if has_own_seeds else None)
                return torch.vmap(one, in_dims, randomness="different")(params, batch_stats, args, seed)

        return apply

    apply, apply_each = make_apply(each=False), make_apply(each=True)

    def predict(params: Params, batch_stats: BatchStats, *args: Any, **kwargs: Any) -> Float[Tensor, "n classes"]:
        logits, _ = apply(params, batch_stats, *args, train=False, **kwargs)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[2] < 2:
            what = tuple(logits.shape[1:]) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(
                f"predict: got {what} from each member, expected logits of shape (n, classes), of two classes or more; "
                "of other outputs take the mean over the first dimension of what apply(..., train=False) gives"
            )
        return logits.softmax(dim=-1).mean(dim=0)

    def member(stacked: Any, index: int) -> Any:
        if not 0 <= index < n:
            raise ValueError(f"index: got {index}, expected a member from 0 to {n - 1}")
        check("stacked", stacked)
        return tree.map(lambda leaf: leaf[index].clone(), stacked)

    return Ensemble(init, apply, apply_each, predict, member, model, n)


def init_state(members: Ensemble, optimizer: Optimizer, generator: Generator) -> TrainState:
    """A fresh training state of all members: every leaf has the members as first dimension, the step too.

    Raises:
        ValueError: `members` is not an Ensemble, or `optimizer` none of `optim`.
    """
    if not isinstance(members, Ensemble):
        raise ValueError(
            f"members: got {type(members).__name__}, expected an Ensemble, as ensemble(model, n) makes one"
        )
    check_optimizer(optimizer)
    params, batch_stats = members.init(generator)
    step = torch.zeros(members.size, dtype=torch.int64, device=generator.device)
    return TrainState(step, params, batch_stats, torch.vmap(optimizer.init)(params))


def map_step(step: Step[M]) -> Step[M]:
    """A training step of all members on the same batch, from a step of one; metrics have the members as first
    dimension.

    Each member's step is what it would be alone, apart from rounding; its dropout too, which a step draws from its own
    number, and so alike in all members. The step raises a ValueError for the state of a single network.
    """
    return _of_members(torch.vmap(step, in_dims=(0, None), randomness="different"))


def map_step_each(step: Step[M]) -> Step[M]:
    """`map_step` with a batch for each member: every leaf of the batch has the members as first dimension."""
    return _of_members(torch.vmap(step, randomness="different"), each=True)


def _of_members(mapped: Step[M], *, each: bool = False) -> Step[M]:
    def step(state: TrainState, batch: Any) -> tuple[TrainState, M]:
        if not isinstance(state, TrainState) or not state.step.dim():
            raise ValueError(
                "state: got none of members, expected a TrainState with the members as first dimension, as "
                "ensembles.init_state makes it"
            )
        for leaf in tree.leaves(batch) if each else ():
            if leaf.shape[:1] != state.step.shape:
                raise ValueError(
                    f"batch: got a leaf of shape {tuple(leaf.shape)} for {len(state.step)} members, expected one batch "
                    "for each, stacked along the first dimension; with the same batch for all there is map_step"
                )
        return mapped(state, batch)

    return step
