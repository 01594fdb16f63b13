"""Several runs of one program in one step: their states are stacked, and `torch.vmap` takes the step of all of them.

Each run stays what it is alone: a generator that asks for steps and does all else by itself. `in_step` brings their
requests together. A run sees the pictures and the parameters that it would see alone, and equals it up to rounding.
"""

# torch.compile cannot trace the evaluation of an annotation, and functions are defined inside of what it traces.
from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hyperfunc import data, tree
from hyperfunc.exits import AFTER_SIGNAL
from hyperfunc.interrupt import Interrupted
from hyperfunc.training import Load, M, Metrics, Step, TrainState

Member = Generator[data.Draw, tuple[TrainState, Metrics], int]
"""A run: it yields the rows of its next step, is sent its new state and its metrics, and returns its exit code."""


class Rows(NamedTuple):
    """`data.Draw` of several runs side by side, as what `data.batches` cuts; and whose each column is."""

    picture: Int[Tensor, "*n"]
    top: Int[Tensor, "*n"]
    left: Int[Tensor, "*n"]
    flip: Bool[Tensor, "*n"]
    member: Int[Tensor, "*n"]


def map_side_by_side(step: Step[M]) -> Step[M]:
    """A step of stacked states from a step of one, for rows as `side_by_side` makes them. Metrics have the members as
    first dimension."""
    return torch.vmap(step, in_dims=(0, 1), randomness="different")


def stack(states: Sequence[TrainState]) -> TrainState:
    """The states with the members as first dimension; a single one stays as it is."""
    return tree.stack(states) if len(states) > 1 else states[0]


def side_by_side(draws: Sequence[data.Draw]) -> Rows | data.Draw:
    """The draws of all members for one step; a single one stays as it is."""
    if len(draws) == 1:
        return draws[0]
    picture, top, left, flip = (torch.stack(column, dim=1) for column in zip(*draws, strict=True))
    member = torch.arange(len(draws), device=picture.device).repeat(len(picture), 1)
    return Rows(picture, top, left, flip, member)


def make_load(images: Sequence[data.Images], normalizations: Sequence[data.Normalization]) -> Load:
    """Builds `load(rows) -> (images, labels)` for a step of one member under `map_side_by_side`: as
    `data.make_train_load`, where each member has training pictures and a normalization of its own.

    Args:
        images: Of each member, as many as of any other. The same pixels for all are held once.
        normalizations: Of each member; the pictures are held on their device.
    """
    count = len(images[0].labels)
    shared = all(one.pixels is images[0].pixels for one in images)
    whole = images[0] if shared else data.Images(*(torch.cat(column) for column in zip(*images, strict=True)))
    whole = tree.to(whole, normalizations[0].mean.device)
    padded, labels = data.pad(whole.pixels), whole.labels
    begins = torch.arange(len(images), device=labels.device) * (0 if shared else count)
    mean, std = (torch.stack(column)[:, None, None] for column in zip(*normalizations, strict=True))

    def load(rows: Rows) -> tuple[Tensor, Tensor]:
        draw = data.Draw(rows.picture + begins[rows.member], rows.top, rows.left, rows.flip)
        own = data.Normalization(mean[rows.member], std[rows.member])
        return data.normalize(data.crop_and_flip(padded, draw), own), labels[draw.picture]

    return load


def rows_of_member(index: int, draw: data.Draw) -> Rows:
    """What `load` of `make_load` takes, for a draw of that member alone."""
    return Rows(*draw, torch.full_like(draw.picture, index))


def in_step(
    members: Mapping[int, Member],
    step: Step,
    states: Sequence[TrainState],
    ends: dict[int, Any],
) -> None:
    """Runs members to their ends, each step one for all of them.

    All have to ask for the same number of steps. A member that fails by a FloatingPointError leaves the others as they
    are; in its place in the stack goes on what nobody looks at. After a member ended by a signal the others get an
    `Interrupted` where they stand, so that all have made the same steps.

    Args:
        members: By any number; not started yet.
        step: Of a single state and draw for one member, else of `stack` and `side_by_side`; metrics have the steps as
            first dimension and the members as second.
        states: Their states, in the same order.
        ends: Gets the exit code of each, or the FloatingPointError that it failed of, as soon as it has ended.

    Raises:
        Exception: Of the step, which is raised in all members that are left, or of a member.
    """
    asked: dict[int, data.Draw] = {}
    together = stack(states)
    parts = _unstack(together, len(members))

    def advance(index: int, found: tuple[TrainState, Metrics] | Exception | None) -> None:
        asked.pop(index, None)
        try:
            if isinstance(found, Exception):
                asked[index] = members[index].throw(found)
            else:
                asked[index] = members[index].send(found)  # pyright: ignore[reportArgumentType]
        except StopIteration as stop:
            ends[index] = stop.value
        except FloatingPointError as error:
            # Its traceback, and that of its context, would hold the frames of the member, and so all that it has.
            error.__context__ = error.__cause__ = None
            ends[index] = error.with_traceback(None)

    try:
        for index in members:
            advance(index, None)
        while asked:
            ended = map(ends.get, members)
            signals = [end - AFTER_SIGNAL for end in ended if isinstance(end, int) and end > AFTER_SIGNAL]
            if signals:
                for index in list(asked):
                    advance(index, Interrupted(signals[0]))
                continue
            anyone = next(iter(asked.values()))
            before = together
            try:
                together, metrics = step(together, side_by_side([asked.get(index, anyone) for index in members]))
            except Exception as error:
                for index in list(asked):
                    with contextlib.suppress(Exception):
                        advance(index, error)
                raise
            # A captured step writes into the state that it returned before, and so into its parts.
            parts = parts if together is before else _unstack(together, len(members))
            own = _unstack(metrics if len(members) == 1 else tree.map(torch.t, metrics), len(members))
            for place, index in enumerate(members):
                if index in asked:
                    advance(index, (parts[place], own[place]))
    finally:
        for member in members.values():
            member.close()


def _unstack(stacked: Any, count: int) -> list[Any]:
    """Views of the members' parts."""
    if count == 1:
        return [stacked]
    columns = [leaf.unbind() for leaf in tree.leaves(stacked)]
    return [tree.replace_leaves(stacked, [column[index] for column in columns]) for index in range(count)]
