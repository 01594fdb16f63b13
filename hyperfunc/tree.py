"""Pytrees: nested NamedTuples, dicts, lists and tuples with tensors at the leaves.

The names follow `jax.tree`, but that `flatten` gives a function that rebuilds the tree. Every use of
`torch.utils._pytree` in the package is here, because that module is private to torch and may move.
"""

# torch.compile cannot trace the evaluation of an annotation, and functions are defined inside of what it traces.
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

_SMALL = 2**16
"""Elements up to which leaves are joined before they are copied: more take longer than what an operation costs."""

Tree = TypeVar("Tree")
"""Any nesting of NamedTuple, dict, list and tuple whose leaves are tensors."""


def map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Applies `function` to every leaf (and to the leaves that stand at the same place in `others`)."""
    return pytree.tree_map(function, tree, *others)


def leaves(tree: Any) -> list[Tensor]:
    """The leaves, in the order of the tree's fields and keys."""
    return pytree.tree_leaves(tree)


def named_leaves(tree: Any) -> dict[str, Tensor]:
    """The leaves by path, as in `params/generator/3x3/w_in`; a single tensor has the path ``''``.

    Raises:
        ValueError: Two leaves have the same path, as a key with a slash in it makes possible.
    """
    paths_and_leaves, _ = pytree.tree_flatten_with_path(tree)
    named: dict[str, Tensor] = {}
    for path, leaf in paths_and_leaves:
        name = "/".join(_key_name(key) for key in path)
        if name in named:
            raise ValueError(f"tree: two leaves have the path {name!r}; give their keys other names, without slashes")
        named[name] = leaf
    return named


def flatten(tree: Tree) -> tuple[list[Tensor], Callable[[Sequence[Any]], Tree]]:
    """The leaves, and the function that makes the same tree of others."""
    values, structure = pytree.tree_flatten(tree)
    return values, lambda new: pytree.tree_unflatten(list(new), structure)


def replace_leaves(tree: Tree, new: Sequence[Any]) -> Tree:
    """The same tree with other leaves, given in the order of `leaves`."""
    return flatten(tree)[1](new)


def check_tensors(name: str, tree: Any) -> None:
    """Raises a ValueError that names the first leaf that is no tensor; `name` is what the tree is called."""
    if all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(tree)):
        return  # without the paths, which take longer
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, Tensor):
            where = f" at {'/'.join(_key_name(key) for key in path)}" if path else ""
            raise ValueError(f"{name}: got a {type(leaf).__name__}{where}, expected tensors at the leaves")


def num_params(tree: Any) -> int:
    """The number of scalars in all leaves together.

    Raises:
        ValueError: A leaf is no tensor, as where a module is given and not its parameters.
    """
    check_tensors("tree", tree)
    return sum(leaf.numel() for leaf in leaves(tree))


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree whose leaves have the given trees as first dimension."""
    return map(lambda *values: torch.stack(values), *trees)


def to(tree: Tree, *args: Any, **kwargs: Any) -> Tree:
    """`Tensor.to` on every leaf: another device, another floating-point type. Integers, which count, stay integers, as
    under `nn.Module.to`."""

    def move(leaf: Tensor) -> Tensor:
        moved = leaf.to(*args, **kwargs)
        if moved.dtype == leaf.dtype or leaf.is_floating_point() or leaf.is_complex():
            return moved
        return leaf.to(moved.device, copy=kwargs.get("copy", False))

    return map(move, tree)


def leaves_and_structure(tree: Any) -> tuple[list[Tensor], Any]:
    """The leaves, and what is left without them; equal for trees of the same kinds, and keys in the same order."""
    return pytree.tree_flatten(tree)


def clone(tree: Tree) -> Tree:
    """A copy that shares no memory with the original. Its leaves are parts of a few vectors: copying costs an operation
    for each of those, and not one a leaf."""
    values, rebuild = flatten(tree)
    has_tangents = forward_ad._current_level >= 0
    if torch.compiler.is_compiling() or has_tangents or not all(_is_plain(leaf) for leaf in values):
        return map(torch.clone, tree)
    # Views of one vector would share a count of what is written into it, by which autograd would refuse a leaf that it
    # has stored after another has been written.
    return rebuild([part.data for part in _copies(values)])


def fetch(tree: Tree) -> Tree:
    """A copy on the CPU, whose leaves are views of a few vectors: the device is waited for a few times, and not once a
    leaf."""
    values, rebuild = flatten(tree)
    return rebuild(_copies(values, "cpu"))


def vectors(tree: Any) -> list[Tensor]:
    """All leaves as a few vectors, each of one dtype and device, in no order that means anything; not to be written."""
    return [_join(group) for group, _ in _groups(leaves(tree))]


def is_mapped(tree: Any) -> bool:
    """Whether `torch.vmap` maps over a leaf. torch.compile cannot trace the question; under it the answer is no."""
    if torch.compiler.is_compiling() or not any(_is_vmap(level) for level in _transforms()):
        return False
    return any(isinstance(leaf, Tensor) and _is_mapped(leaf) for leaf in pytree.tree_leaves(tree))


def mapped_with(tree: Tree, others: Any) -> Tree:
    """`tree`, and where `torch.vmap` maps over a leaf of `others`, mapped along with it, the same for all members.

    So each member has leaves of its own to write into, which vmap demands of what is written in place. Under
    torch.compile nothing is mapped along; see `is_mapped`.
    """
    if torch.compiler.is_compiling():
        return tree
    mapped = [leaf for leaf in pytree.tree_leaves(others) if isinstance(leaf, Tensor) and _is_mapped(leaf)]
    if not mapped:
        return tree
    zero = functools.reduce(torch.add, [leaf.detach().new_zeros((), dtype=torch.int8) for leaf in mapped])
    return map(lambda leaf: leaf + zero.to(leaf), tree)


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves as one vector, and the function that makes the tree again from such a vector.

    The tree that comes back consists of views of the vector; of a tree with one leaf, the vector is a view too. One
    vector turns an update of every parameter into a handful of operations, where a loop over leaves takes a handful for
    each.

    Raises:
        ValueError: The leaves differ in dtype, or there are none.
    """
    values, rebuild = flatten(tree)
    dtypes = sorted({str(leaf.dtype) for leaf in values})
    if len(dtypes) != 1:
        found = " and ".join(dtypes) or "no leaf at all"
        raise ValueError(
            f"ravel: all leaves must have one dtype, got {found}; convert them with "
            "tree.map(lambda leaf: leaf.to(dtype), tree)"
        )
    shapes = [leaf.shape for leaf in values]

    return _join(values), lambda vector: rebuild(_split(vector, shapes))


def equal(tree: Any, other: Any) -> bool:
    """Whether two trees are of one structure and equal leaf by leaf, of which those that are no tensors count too."""
    (ours, structure), (theirs, other_structure) = pytree.tree_flatten(tree), pytree.tree_flatten(other)
    return structure == other_structure and all(_is_equal(*pair) for pair in zip(ours, theirs, strict=True))


def dtype_name(dtype: torch.dtype) -> str:
    """As in `float32`."""
    return str(dtype).removeprefix("torch.")


def describe(leaf: Tensor, *, any_length: bool = False) -> str:
    """Dtype and shape as in `float32[16, 3]`, or, where the first extent does not count, `float32[n, 3]`."""
    shape = ["n", *leaf.shape[1:]] if any_length and leaf.dim() else leaf.shape
    return f"{dtype_name(leaf.dtype)}[{', '.join(str(extent) for extent in shape)}]"


def to_bytes(leaf: Tensor) -> bytes:
    """Dtype, shape and content, as fingerprints are made of."""
    values = leaf.detach().cpu().contiguous().reshape(-1)
    return describe(leaf).encode() + values.view(torch.uint8).numpy().tobytes()


def is_readable(leaf: Tensor) -> bool:
    """Whether its values can be looked at for nothing: it is on the CPU, and neither transformed nor traced."""
    if leaf.device.type != "cpu" or torch.compiler.is_compiling():  # which cannot trace the other question
        return False
    return not _functorch.is_functorch_wrapped_tensor(leaf)


def is_differentiated(tree: Any) -> bool:
    """Whether somebody outside may ask for a derivative through these leaves: by autograd, or by `torch.func.grad`,
    `jvp` and the like around the caller. `torch.vmap` by itself is none of these."""
    return any(not _is_vmap(level) for level in _transforms()) or any(leaf.requires_grad for leaf in leaves(tree))


def is_for_autograd(tree: Any) -> bool:
    """Whether autograd by itself can differentiate what is computed of these leaves: neither a transform of
    `torch.func`, `torch.vmap`, nor a level of `torch.autograd.forward_ad` is around the caller, and no leaf was made in
    inference mode."""
    is_ordinary = not _transforms() and torch.autograd.forward_ad._current_level < 0
    return is_ordinary and not any(leaf.is_inference() for leaf in leaves(tree))


def _groups(values: Sequence[Tensor]) -> list[tuple[list[Tensor], list[int]]]:
    """Small leaves by dtype and device, and each large one alone, so that joining them takes little memory; with their
    places in the list."""
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[int]]] = {}
    for place, leaf in enumerate(values):
        kind = (leaf.dtype, leaf.device, place if leaf.numel() > _SMALL else None)
        group, places = groups.setdefault(kind, ([], []))
        group.append(leaf)
        places.append(place)
    return list(groups.values())


def _copies(values: Sequence[Tensor], device: str | None = None) -> list[Tensor]:
    """Copies that are views of a few vectors, on this device or on the leaf's own."""
    copies: dict[int, Tensor] = {}
    for group, places in _groups(values):
        vector = _join(group).to(device or group[0].device, copy=len(group) == 1)
        copies |= zip(places, _split(vector, [leaf.shape for leaf in group]), strict=True)
    return [copies[place] for place in range(len(values))]


def _join(values: Sequence[Tensor]) -> Tensor:
    # One with one dimension stays what it is: most leaves have one, and a view takes the host as long as an operation.
    vectors = [leaf if leaf.dim() == 1 else leaf.reshape(-1) for leaf in values]
    # Joined alone, a large one would take as much memory again.
    return torch.cat(vectors) if len(vectors) > 1 else vectors[0]


def _split(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = torch.split(vector, [math.prod(shape) for shape in shapes])
    return [part if len(shape) == 1 else part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _transforms() -> list[Any]:
    """The transforms of `torch.func` around the caller."""
    return _functorch.get_interpreter_stack() or []


def _is_vmap(transform: Any) -> bool:
    return transform.key() == _functorch.TransformType.Vmap


def _is_equal(leaf: Any, other: Any) -> bool:
    if isinstance(leaf, Tensor) and isinstance(other, Tensor):
        return leaf.dtype == other.dtype and torch.equal(leaf, other.to(leaf.device))
    # What does not say True or False, as an array, is not taken for equal.
    return leaf is other or (type(leaf) is type(other) and (leaf == other) is True)


def _is_plain(leaf: Tensor) -> bool:
    """Whether it is numbers in memory and no more: of no transform, without a gradient, and not sparse."""
    is_wrapped = _functorch.is_functorch_wrapped_tensor(leaf)
    return not is_wrapped and not leaf.requires_grad and leaf.layout is torch.strided


def _is_mapped(leaf: Tensor) -> bool:
    """Whether a level of vmap maps over the leaf, however deep under levels of grad."""
    while _functorch.is_functorch_wrapped_tensor(leaf):
        if _functorch.is_batchedtensor(leaf):
            return True
        leaf = _functorch.get_unwrapped(leaf)
    return False


def _key_name(key: Any) -> str:
    """The field, key or position that one step of a path goes through."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"a path of torch's pytree has a key of unknown kind: {key!r}")
