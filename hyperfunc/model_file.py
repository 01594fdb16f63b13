"""A trained model as one file: `hyperfunc.save` and `hyperfunc.load`.

The file is a checkpoint (see `checkpoint`) that holds the pytree "best" and, in its notes, the model's recipe; what
else stands in it does not matter here, and so every checkpoint of train.py is such a file.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hyperfunc import checkpoint
from hyperfunc.arguments import some
from hyperfunc.model import BatchStats, Model, Params, check_model, from_recipe


def save(
    path: str | os.PathLike[str],
    model: Model,
    params: Params,
    batch_stats: BatchStats,
    *,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model to one file, whole or not at all.

    Of a conditional model or an ensemble this saves one network. To save all of it, use
    `checkpoint.save(path, {"best": (params, batch_stats)}, {})`; to read it back,
    `checkpoint.restore(checkpoint.load(path), "best", model.init(torch.Generator()))`.

    Args:
        path: The file; its folder must exist.
        model: From `hyper_resnet`, `resnet` or `hyperize`.
        params: Its parameters, of any dtype and on any device.
        batch_stats: Its statistics.
        notes: What else the reader should find, as JSON can hold it: `checkpoint.load(path).notes`.

    Raises:
        OSError: The file cannot be written; an older one stands as it was.
        ValueError: `params` or `batch_stats` do not belong to `model`, or JSON cannot hold the notes.
    """
    if not isinstance(model, Model) and isinstance(getattr(model, "model", None), Model):
        raise ValueError(
            f"model: got {type(model).__name__}, expected a Model; give its `model` with the params of one network, "
            "which `at` of a Conditional and `member` of an Ensemble give, or take checkpoint.save for all of them"
        )
    check_model(model)
    trees = {"best": (params, batch_stats)}
    tensors = checkpoint.named(trees)
    # What could not be read again is not written.
    different = checkpoint.differences(checkpoint.Checkpoint(tensors, {}), "best", _like(model), any_dtype=True)
    if different:
        raise ValueError(
            f"params, batch_stats: they do not belong to the model: {some(different, 4, '; ')}; give those of "
            "its init, or of one condition or member, where it is the `model` of a Conditional or an Ensemble"
        )
    if notes and "model" in notes:
        raise ValueError(
            "notes: got an entry 'model', which is where the model's own recipe goes; give it another name"
        )
    checkpoint.save(path, trees, {**(notes or {}), "model": model.recipe})


def load(path: str | os.PathLike[str], module: nn.Module | None = None) -> tuple[Model, Params, BatchStats]:
    """The model in a file that `save` or train.py wrote, on the CPU; of a run it is the best so far.

    Args:
        path: The file.
        module: For a model made by `hyperize`, the module that it was made of: a file holds no code. Its values do
            not matter.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or holds no model, or one of another shape than `module`; or `module` is missing.
    """
    found = checkpoint.load(path)
    if "model" not in found.notes:
        raise ValueError(f"{path} holds no model; expected a file that hyperfunc.save or train.py wrote")
    model = from_recipe(found.notes["model"], module)
    params, batch_stats = checkpoint.restore(found, "best", _like(model), any_dtype=True)
    return model, params, batch_stats


def _like(model: Model) -> tuple[Params, BatchStats]:
    return model.init(torch.Generator())
