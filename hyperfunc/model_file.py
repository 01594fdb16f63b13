"""A trained model as one file: `hyperfunc.save`, and `hyperfunc.load` for a Model, `load_conditional` and
`load_ensemble` for what is built on one.

The file is a checkpoint (see `checkpoint`) that holds the pytree "best" and, in its notes, the model's recipe; what
else stands in it does not matter here, and so every checkpoint of train.py is such a file.
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hyperfunc import checkpoint
from hyperfunc.arguments import some
from hyperfunc.conditions import (
    Conditional,
    ConditionalParams,
    Encoder,
    bounded,
    conditional,
    encoder_recipe,
    table,
)
from hyperfunc.ensembles import Ensemble, ensemble
from hyperfunc.model import BatchStats, Model, Params, check_model, from_recipe

_ENCODERS = {"table": table, "bounded": bounded}

_LOADERS = {"conditional": "load_conditional", "ensemble": "load_ensemble"}
"""Of recipes that are not of a Model, by the function in them."""


def save(
    path: str | os.PathLike[str],
    model: Model | Conditional | Ensemble,
    params: Params | ConditionalParams,
    batch_stats: BatchStats,
    *,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model to one file, whole or not at all.

    One network of a Conditional or an Ensemble is saved as its `model`, with the parameters that `at` or `member` give.

    Args:
        path: The file; its folder must exist.
        model: From `hyper_resnet`, `resnet`, `hyperize`, `conditional` or `ensemble`.
        params: Its parameters, of any dtype and on any device.
        batch_stats: Its statistics.
        notes: What else the reader should find, as JSON can hold it: `checkpoint.load(path).notes`.

    Raises:
        OSError: The file cannot be written; an older one stands as it was.
        ValueError: `params` or `batch_stats` do not belong to `model`, or JSON cannot hold the notes.
    """
    recipe = _recipe(model)
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
    checkpoint.save(path, trees, {**(notes or {}), "model": recipe})


def load(path: str | os.PathLike[str], module: nn.Module | None = None) -> tuple[Model, Params, BatchStats]:
    """The model in a file that `save` or train.py wrote, on the CPU; of a run it is the best so far.

    Args:
        path: The file.
        module: For a model made by `hyperize`, the module that it was made of: a file holds no code. Its values do
            not matter.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or holds no Model, or one of another shape than `module`; or `module` is missing.
    """
    found, recipe = _read(path, "load")
    model = from_recipe(recipe, module)
    return model, *_restored(found, model)


def load_conditional(
    path: str | os.PathLike[str], module: nn.Module | None = None, encoder: Encoder | None = None
) -> tuple[Conditional, ConditionalParams, BatchStats]:
    """The conditional model in a file that `save` wrote, on the CPU.

    Args:
        path: The file.
        module: As of `load`.
        encoder: For an encoder that is neither `conditions.table` nor `conditions.bounded`, one made as it was. Its
            parameters come from the file; a module's buffers, which are constants, come with the encoder. A warning
            says so where they are others than it was saved with.

    Raises:
        OSError: The file cannot be read.
        ValueError: As of `load`; or `encoder` is missing, or given where the file has its own.
    """
    found, recipe = _read(path, "load_conditional")
    model = conditional(from_recipe(recipe["model"], module), _encoder(recipe["encoder"], encoder))
    return model, *_restored(found, model)


def load_ensemble(path: str | os.PathLike[str], module: nn.Module | None = None) -> tuple[Ensemble, Params, BatchStats]:
    """The ensemble in a file that `save` wrote, on the CPU; for arguments and errors see `load`."""
    found, recipe = _read(path, "load_ensemble")
    members = ensemble(from_recipe(recipe["model"], module), recipe["n"])
    return members, *_restored(found, members)


def _recipe(model: Any) -> dict[str, Any]:
    if isinstance(model, Conditional):
        return {"function": "conditional", "model": model.model.recipe, "encoder": encoder_recipe(model.encoder)}
    if isinstance(model, Ensemble):
        return {"function": "ensemble", "model": model.model.recipe, "n": model.size}
    check_model(model)
    return model.recipe


def _encoder(recipe: Mapping[str, Any] | None, given: Encoder | None) -> Encoder:
    """The encoder that the recipe describes, or the one given where it is made of code."""
    if recipe is None or recipe["function"] not in _ENCODERS:
        if given is None:
            raise ValueError(
                "encoder: got none, and a file holds no code; give one made as that of the model was, such as "
                "conditions.from_module of the same module"
            )
        # Not refused, because what is computed anew may differ in the last bit.
        if recipe is not None and (own := encoder_recipe(given)) is not None and own != recipe:
            warnings.warn(
                "encoder: its buffers are not those that the model was saved with, bit for bit; where they were drawn, "
                "keep them beside the file and put the same into the module",
                stacklevel=3,
            )
        return given
    arguments = dict(recipe)
    function = arguments.pop("function")
    if given is not None:
        raise ValueError(
            f"encoder: the model's was made by conditions.{function}, which the file says all of; give none"
        )
    return _ENCODERS[function](**arguments)


def _read(path: str | os.PathLike[str], loader: str) -> tuple[checkpoint.Checkpoint, Any]:
    """What is in the file, and the recipe, for the function of this name."""
    found = checkpoint.load(path)
    if "model" not in found.notes:
        raise ValueError(f"{path} holds no model; expected a file that hyperfunc.save or train.py wrote")
    recipe = found.notes["model"]
    function = recipe.get("function") if isinstance(recipe, Mapping) else None
    if (right := _LOADERS.get(function or "", "load")) != loader:
        raise ValueError(f"{path} holds a model made by {function}, expected another; hyperfunc.{right} reads it")
    return found, recipe


def _restored(found: checkpoint.Checkpoint, model: Model | Conditional | Ensemble) -> Any:
    return checkpoint.restore(found, "best", _like(model), any_dtype=True)


def _like(model: Model | Conditional | Ensemble) -> Any:
    return model.init(torch.Generator())
