from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_trees_equal
from torch import Tensor
from torch.autograd import forward_ad

from hyperfunc import tree


class Pair(NamedTuple):
    left: Tensor
    right: dict[str, Tensor]


def a_tree() -> Pair:
    return Pair(torch.arange(6.0).view(2, 3), {"a.b": torch.tensor(7.0), "c": torch.ones(4).view(2, 2).t()})


def test_named_leaves_are_paths_in_order() -> None:
    assert list(tree.named_leaves(a_tree())) == ["left", "right/a.b", "right/c"]


def test_ravel_and_unravel_are_inverse() -> None:
    vector, unravel = tree.ravel(a_tree())
    assert vector.shape == (11,)
    back = unravel(vector)
    assert isinstance(back, Pair)
    for ours, theirs in zip(tree.leaves(back), tree.leaves(a_tree()), strict=True):
        assert torch.equal(ours, theirs)


def test_ravel_refuses_mixed_dtypes() -> None:
    with pytest.raises(ValueError, match=r"float32 and torch\.int64"):
        tree.ravel({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.int64)})


def test_ravel_refuses_an_empty_tree() -> None:
    with pytest.raises(ValueError, match="no leaf at all"):
        tree.ravel({})


def test_replace_leaves_goes_by_their_order() -> None:
    replaced = tree.replace_leaves(a_tree(), [leaf + 1 for leaf in tree.leaves(a_tree())])
    assert torch.equal(replaced.right["a.b"], torch.tensor(8.0))


def test_clone_shares_no_memory() -> None:
    original = a_tree()
    for ours, theirs in zip(tree.leaves(tree.clone(original)), tree.leaves(original), strict=True):
        assert ours.data_ptr() != theirs.data_ptr()


def mixed_leaves() -> dict[str, Tensor]:
    """Of several dtypes and shapes, some in another order than memory's, with a large one among them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"small": (3, 2), "large": (300, 301), "scalar": (), "nothing": (0, 4), "more": (5,)}
    floats = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    others = {"int": torch.arange(6).view(2, 3).t(), "low": torch.ones(4).bfloat16(), "flag": torch.tensor(True)}
    return floats | others


@pytest.mark.parametrize("copy", [tree.clone, tree.fetch])
def test_copies_are_equal_whatever_the_leaves(copy: Callable[[Any], Any]) -> None:
    original = mixed_leaves()
    copied = copy(original)
    assert_trees_equal(copied, original)
    for name, leaf in copied.items():
        assert (leaf.dtype, leaf.is_contiguous()) == (original[name].dtype, True)
        assert not leaf.numel() or leaf.data_ptr() != original[name].data_ptr()


def test_a_write_into_one_copied_leaf_is_none_into_another() -> None:
    """Of views of one vector autograd would think so."""
    left, right = tree.leaves(tree.clone((torch.ones(2), torch.ones(2))))
    weight = torch.ones(2, requires_grad=True)
    product = (weight * left).sum()
    right.zero_()
    product.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == left.tolist() == [1, 1]


def test_vectors_hold_all_leaves_in_a_few() -> None:
    vectors = tree.vectors(mixed_leaves())
    assert [(vector.dtype, len(vector)) for vector in vectors] == [
        (torch.float32, 3 * 2 + 1 + 5),
        (torch.float32, 300 * 301),
        (torch.int64, 6),
        (torch.bfloat16, 4),
        (torch.bool, 1),
    ]
    expected = torch.cat([leaf.flatten().double() for leaf in mixed_leaves().values()])
    assert torch.equal(torch.cat([vector.double() for vector in vectors]).sort().values, expected.sort().values)


def test_describe_names_dtype_and_shape() -> None:
    assert [tree.describe(leaf) for leaf in tree.leaves(a_tree())] == ["float32[2, 3]", "float32[]", "float32[2, 2]"]
    lengths = [tree.describe(leaf, any_length=True) for leaf in tree.leaves(a_tree())]
    assert lengths == ["float32[n, 3]", "float32[]", "float32[n, 2]"]


def test_to_converts_and_num_params_counts() -> None:
    assert {leaf.dtype for leaf in tree.leaves(tree.to(a_tree(), torch.float64))} == {torch.float64}
    assert tree.num_params(a_tree()) == 11


def test_trees_are_equal_in_structure_and_every_leaf() -> None:
    assert tree.equal(a_tree(), a_tree())
    assert tree.equal({"a": [1, "b", None]}, {"a": [1, "b", None]})
    changed = tree.map(lambda leaf: leaf + 1, a_tree())
    others = ([1], (1, 2), [1, 2.0], [1, "2"], [1, torch.tensor(2)], [1, True])
    assert not any(tree.equal(*pair) for pair in [(a_tree(), changed), *(([1, 2], other) for other in others)])
    assert not tree.equal(torch.ones(2), torch.ones(2, dtype=torch.float64))


def test_another_dtype_leaves_integers_as_they_are() -> None:
    values = {"weight": torch.ones(2), "step": torch.tensor(300), "mask": torch.tensor([True])}
    moved = tree.to(values, torch.bfloat16)
    assert {name: leaf.dtype for name, leaf in moved.items()} == {
        "weight": torch.bfloat16,
        "step": torch.int64,
        "mask": torch.bool,
    }
    assert moved["step"] == 300
    copied = tree.to(values, torch.float64, copy=True)
    assert copied["step"] is not values["step"]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:`torch.jit")  # by which torch makes its rules for tangents
def test_a_clone_is_of_what_is_sparse_and_of_what_has_a_tangent_too() -> None:
    dense, adjacency = torch.eye(3), torch.eye(3).to_sparse()
    found = tree.clone({"dense": dense, "coo": adjacency, "csr": adjacency.to_sparse_csr()})
    assert all(torch.equal(leaf.to_dense(), dense) for leaf in found.values())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dense, 2 * dense)
        found = forward_ad.unpack_dual(tree.clone([dual, dense])[0]).tangent
        assert found is not None
        assert torch.equal(found, 2 * dense)
