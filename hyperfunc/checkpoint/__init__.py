"""Checkpoints: named pytrees and the run's own notes in one file (see `files` for its format)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hyperfunc import tree
from hyperfunc.arguments import some
from hyperfunc.files import read_tensors, write_tensors

FORMAT = 2
"""The version of what stands in a file; a reader refuses what it does not know."""


class Checkpoint(NamedTuple):
    """The content of a file: tensors by path, and whatever the writer noted."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]


def save(
    path: str | os.PathLike[str], trees: Mapping[str, Any], notes: Mapping[str, Any], *, keep_old_as: Path | None = None
) -> None:
    """Writes named pytrees and notes (anything that JSON can hold) to one file, whole or not at all.

    Args:
        path: The file.
        trees: Pytrees by name.
        notes: What else the reader needs, as JSON can hold it.
        keep_old_as: A name under which the file that stands at `path` now is kept.

    Raises:
        FileExistsError: The name `keep_old_as` is taken.
        OSError: The file cannot be written; an older one stands as it was.
        ValueError: JSON cannot hold the notes, or a leaf is no tensor.
    """
    if not isinstance(trees, Mapping):
        raise ValueError(f"trees: got a {type(trees).__name__}, expected pytrees by name, such as {{'state': state}}")
    tree.check_tensors("trees", trees)
    write_tensors(path, named(trees), {"format": FORMAT, "notes": dict(notes)}, keep_old_as=keep_old_as)


def named(trees: Mapping[str, Any]) -> dict[str, Tensor]:
    """The leaves as a file holds them, by the path that begins with their tree's name."""
    return tree.named_leaves(dict(trees))


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads what `save` wrote.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or not a checkpoint of this version.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT or not isinstance(metadata.get("notes"), dict):
        raise ValueError(f"{path} has format {metadata.get('format')!r}, this version of hyperfunc reads {FORMAT}")
    return Checkpoint(tensors, metadata["notes"])


def restore(checkpoint: Checkpoint, name: str, like: Any, *, any_dtype: bool = False) -> Any:
    """The pytree that was saved as `name`, with the structure and the devices of `like`.

    Args:
        checkpoint: From `load`.
        name: Of the pytree.
        like: A pytree of the same structure and shapes.
        any_dtype: Whether floating-point numbers may be of another type than those of `like`.

    Raises:
        ValueError: The checkpoint holds no pytree of this name, or its leaves are others than those of `like`; the
            message names them.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise ValueError(f"checkpoint: got a {type(checkpoint).__name__}, expected what checkpoint.load returns")
    if found := differences(checkpoint, name, like, any_dtype=any_dtype):
        names = list(dict.fromkeys(path.partition("/")[0] for path in checkpoint.tensors))
        if names and name.partition("/")[0] not in names:
            raise ValueError(f"name: the checkpoint holds no {name!r}, expected one of {some(names)}")
        raise ValueError(f"the checkpoint differs: {some(found, between='; ')}")
    paths = _paths(name, like)
    return tree.replace_leaves(like, [checkpoint.tensors[path].to(leaf.device) for path, leaf in paths.items()])


def differences(checkpoint: Checkpoint, name: str, like: Any, *, any_dtype: bool = False) -> list[str]:
    """How the pytree that was saved as `name` differs from `like`, leaf by leaf; for the arguments see `restore`."""
    expected = _paths(name, like)
    found = {p: leaf for p, leaf in checkpoint.tensors.items() if p == name or p.startswith(f"{name}/")}
    different = [f"{path} is missing" for path in expected if path not in found]
    different += [f"{path} is unknown" for path in found if path not in expected]
    for path in expected.keys() & found.keys():
        ours, theirs = expected[path], found[path]
        may_differ = any_dtype and ours.is_floating_point() and theirs.is_floating_point()
        if ours.shape != theirs.shape or (ours.dtype != theirs.dtype and not may_differ):
            different.append(f"{path} is {tree.describe(theirs)}, expected {tree.describe(ours)}")
    return sorted(different)


def _paths(name: str, like: Any) -> dict[str, Tensor]:
    return {f"{name}/{path}" if path else name: leaf for path, leaf in tree.named_leaves(like).items()}
