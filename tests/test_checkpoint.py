from pathlib import Path

import pytest
import torch
from helpers import assert_trees_equal
from torch import Generator

import hyperfunc as hf
from hyperfunc import checkpoint, files, optim, training, tree


def test_a_state_comes_back_bit_for_bit(tmp_path: Path, generator: Generator) -> None:
    model, optimizer = hf.hyper_resnet(10), optim.adam(0.002)
    state = training.init_state(model, optimizer, generator)
    images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)
    step = training.make_train_step(model, optimizer)
    state, _ = step(state, (images, labels))
    checkpoint.save(tmp_path / "c", {"state": state}, {"epoch": 3})
    loaded = checkpoint.load(tmp_path / "c")
    fresh = training.init_state(model, optimizer, Generator().manual_seed(9))
    restored = checkpoint.restore(loaded, "state", fresh)
    assert loaded.notes == {"epoch": 3}
    assert isinstance(restored, training.TrainState)
    assert_trees_equal(tree.named_leaves(restored), tree.named_leaves(state))
    ours, theirs = step(restored, (images, labels)), step(state, (images, labels))
    assert_trees_equal(tree.named_leaves(ours), tree.named_leaves(theirs))


def test_differences_are_named_leaf_by_leaf(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"x": {"a": torch.ones(2), "b": torch.ones(3), "old": torch.ones(1)}}, {})
    like = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(4), "new": torch.ones(1)}
    expected = (
        r"another network: x/a is float32\[2\], expected float64\[2\]; x/b is float32\[3\], expected float32\[4\]; "
        "x/new is missing; x/old is unknown"
    )
    with pytest.raises(ValueError, match=expected):
        checkpoint.restore(checkpoint.load(tmp_path / "c"), "x", like)


def test_another_version_is_named(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "c", {}, {"format": 99, "notes": {}})
    with pytest.raises(ValueError, match="has format 99, this version of hyperfunc reads 1"):
        checkpoint.load(tmp_path / "c")
