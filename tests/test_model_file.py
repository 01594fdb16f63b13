import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_trees_equal, unchecked
from torch import Generator, nn

import hyperfunc as hf
from hyperfunc import checkpoint, conditions, files, tree


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 16, 3))


@pytest.mark.parametrize(
    "model",
    [
        hf.hyper_resnet(10, 2, 5, 16, hidden_dim=8, init="clipped-normal", shortcut="conv", block="pre"),
        hf.hyper_resnet(16),
        hf.resnet(10, 1, 7, block="pre"),
    ],
    ids=["hyper with all options", "hyper", "plain"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_comes_back_from_its_file_alone(
    tmp_path: Path, generator: Generator, model: hf.Model, dtype: torch.dtype
) -> None:
    params, batch_stats = tree.to(model.init(generator), dtype)
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=dtype)
    _, batch_stats = model.apply(params, batch_stats, images, train=True)
    hf.save(tmp_path / "model", model, params, batch_stats, notes={"accuracy": 91.5})
    other, loaded_params, loaded_stats = hf.load(tmp_path / "model")
    assert other.recipe == model.recipe
    assert_trees_equal(tree.named_leaves(loaded_params), tree.named_leaves(params))
    expected, _ = model.apply(params, batch_stats, images, train=False)
    found, _ = other.apply(loaded_params, loaded_stats, images, train=False)
    assert torch.equal(found, expected)
    assert checkpoint.load(tmp_path / "model").notes["accuracy"] == 91.5


def test_a_hyperized_module_comes_back_with_the_module(tmp_path: Path, generator: Generator) -> None:
    module = small_net()
    model = hf.hyperize(module, unit=(8, 16), z_dim=8, hidden_dim=4)
    params, batch_stats = model.init(generator)
    hf.save(tmp_path / "model", model, params, batch_stats)
    with pytest.raises(ValueError, match="made by hyperize, and a file holds no code; give the module"):
        hf.load(tmp_path / "model")
    other, loaded_params, loaded_stats = hf.load(tmp_path / "model", small_net())
    images = torch.randn(2, 3, 16, 16, generator=generator)
    expected, _ = model.apply(params, batch_stats, images, train=False)
    found, _ = other.apply(loaded_params, loaded_stats, images, train=False)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"1.weight"):
        hf.load(tmp_path / "model", nn.Sequential(nn.Linear(4, 4)))
    wider = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 16, 3))
    with pytest.raises(ValueError, match=r"best/0/embeddings/3x3 is float32\[4, 8\], expected float32\[8, 8\]"):
        hf.load(tmp_path / "model", wider)


def test_targets_of_any_kind_come_back_by_their_names(tmp_path: Path, generator: Generator) -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.ConvTranspose2d(64, 16, 2, 2), nn.BatchNorm2d(16)
        )

    model = hf.hyperize(net(), targets=lambda name, parameter: parameter.dim() == 4 or name == "3.bias", z_dim=8)
    params, batch_stats = model.init(generator)
    hf.save(tmp_path / "model", model, params, batch_stats)
    other, loaded_params, loaded_stats = hf.load(tmp_path / "model", net())
    assert other.tiling == model.tiling
    assert other.recipe["targets"] == ["0.weight", "1.weight", "2.weight", "3.bias"]
    images = torch.randn(2, 3, 8, 8, generator=generator)
    expected, _ = model.apply(params, batch_stats, images, train=False)
    assert torch.equal(other.apply(loaded_params, loaded_stats, images, train=False)[0], expected)


def test_files_that_hold_no_model_of_ours_are_named(tmp_path: Path, generator: Generator) -> None:
    checkpoint.save(tmp_path / "other", {"state": {}}, {})
    with pytest.raises(ValueError, match="other holds no model; expected a file that hyperfunc.save or train.py wrote"):
        hf.load(tmp_path / "other")
    model = hf.hyper_resnet(10)
    params, batch_stats = model.init(generator)
    hf.save(tmp_path / "model", model, params, batch_stats)
    with pytest.raises(ValueError, match="made by hyper_resnet, and takes none"):
        hf.load(tmp_path / "model", small_net())
    unknown = model._replace(recipe={"function": "os.system"})
    checkpoint.save(tmp_path / "model", {"best": (params, batch_stats)}, {"model": unknown.recipe})
    with pytest.raises(ValueError, match="got the function 'os.system', expected hyper_resnet, resnet, hyperize"):
        hf.load(tmp_path / "model")
    checkpoint.save(tmp_path / "model", {}, {"model": {"function": "resnet", "colour": "red"}})
    with pytest.raises(ValueError, match="recipe: .*unexpected keyword argument 'colour'"):
        hf.load(tmp_path / "model")
    files.write_tensors(tmp_path / "model", {}, {"format": checkpoint.FORMAT, "notes": {"model": model.recipe}})
    with pytest.raises(ValueError, match="best/0/embeddings/3x3 is missing"):
        hf.load(tmp_path / "model")


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    params, batch_stats = model.init(generator)
    other = copy.copy(params)._replace(embeddings={"3x3": torch.zeros(1, 64)})
    with pytest.raises(ValueError, match=r"best/0/embeddings/3x3 is float32\[1, 64\], expected float32\[32, 64\]"):
        hf.save(tmp_path / "model", model, other, batch_stats)
    assert list(tmp_path.iterdir()) == []


def test_a_note_does_not_take_the_recipes_place(tmp_path: Path, generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    with pytest.raises(ValueError, match="notes: got an entry 'model'"):
        hf.save(tmp_path / "model.pth", model, *model.init(generator), notes={"model": "mine"})
    assert not list(tmp_path.iterdir())


def encoder_of(kind: str) -> hf.Encoder:
    made = {
        "table": lambda: conditions.table(3),
        "bounded": lambda: conditions.bounded([0, -1.5], [1, 2]),
        "module": lambda: conditions.from_module(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), 3),
    }
    return made[kind]()


@pytest.mark.parametrize("kind", ["table", "bounded", "module"])
def test_a_conditional_model_comes_back(tmp_path: Path, generator: Generator, kind: str) -> None:
    model = hf.conditional(hf.hyperize(small_net(), unit=(8, 16), z_dim=8), encoder_of(kind))
    params, batch_stats = model.init(generator)
    hf.save(tmp_path / "model", model, params, batch_stats, notes={"accuracy": 91.5})
    own = kind == "module"
    loaded, *trees = hf.load_conditional(tmp_path / "model", small_net(), encoder_of(kind) if own else None)
    images, condition = torch.randn(2, 3, 16, 16), torch.tensor(2) if kind == "table" else torch.tensor([0.3, 0.9])
    expected, _ = model.apply(params, batch_stats, condition, images, train=False)
    found, _ = unchecked(loaded.apply)(*trees, condition, images, train=False)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="encoder: got none, and a file holds no code" if own else "encoder: the mod"):
        hf.load_conditional(tmp_path / "model", small_net(), None if own else encoder_of(kind))
    if own:
        wider = conditions.from_module(nn.Sequential(nn.Linear(2, 4), nn.Tanh()), 4)
        with pytest.raises(ValueError, match=r"best/0/encoder/0.bias is float32\[3\], expected float32\[4\]"):
            hf.load_conditional(tmp_path / "model", small_net(), wider)


def test_an_encoder_that_was_changed_is_not_taken_for_the_one_that_it_was(tmp_path: Path, generator: Generator) -> None:
    table = conditions.table(3)
    model = hf.conditional(
        hf.hyper_resnet(10, z_dim=4), table._replace(apply=lambda params, tasks: table.apply(params, tasks).flip(1))
    )
    hf.save(tmp_path / "model", model, *model.init(generator))
    with pytest.raises(ValueError, match="encoder: got none, and a file holds no code"):
        hf.load_conditional(tmp_path / "model")


def test_an_encoder_with_other_buffers_is_told_of(tmp_path: Path, generator: Generator) -> None:
    class Fourier(nn.Module):
        """A vector by random frequencies, which are not trained."""

        def __init__(self) -> None:
            super().__init__()
            self.frequencies = nn.Buffer(torch.randn(2, 3, generator=generator))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.frequencies).cos()

    drawn, another = Fourier(), Fourier()
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), conditions.from_module(drawn, 3))
    hf.save(tmp_path / "model", model, *model.init(generator))
    with pytest.warns(UserWarning, match="encoder: its buffers are not those that the model was saved with"):
        hf.load_conditional(tmp_path / "model", encoder=conditions.from_module(another, 3))
    another.load_state_dict(drawn.state_dict())
    hf.load_conditional(tmp_path / "model", encoder=conditions.from_module(another, 3))


def test_an_encoder_that_wraps_another_is_not_taken_for_it(tmp_path: Path, generator: Generator) -> None:
    table = conditions.table(3)
    wrapped = functools.wraps(table.apply)(lambda params, tasks: table.apply(params, tasks) + 0.5)
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), hf.Encoder(table.init, wrapped, 3))
    hf.save(tmp_path / "model", model, *model.init(generator))
    with pytest.raises(ValueError, match="encoder: got none, and a file holds no code"):
        hf.load_conditional(tmp_path / "model")


def test_a_name_with_the_characters_of_a_pattern_comes_back(tmp_path: Path, generator: Generator) -> None:
    def net() -> nn.Module:
        return nn.ModuleDict({"a*": nn.Linear(16, 16), "ab": nn.Linear(16, 16), "c": nn.Linear(16, 16)})

    model = hf.hyperize(net(), targets=lambda name, _: name == "a*.weight", z_dim=4)
    assert model.tiling.names == ("a*.weight",)
    hf.save(tmp_path / "model", model, *model.init(generator))
    assert hf.load(tmp_path / "model", net())[0].tiling == model.tiling


def test_an_ensemble_comes_back(tmp_path: Path, generator: Generator) -> None:
    members = hf.ensemble(hf.hyper_resnet(10, z_dim=4), 3)
    params, batch_stats = members.init(generator)
    hf.save(tmp_path / "model", members, params, batch_stats)
    loaded, *found = hf.load_ensemble(tmp_path / "model")
    assert loaded.size == 3
    assert_trees_equal(tree.named_leaves(tuple(found)), tree.named_leaves((params, batch_stats)))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.predict(*found, images), members.predict(params, batch_stats, images))


def test_each_kind_of_file_names_the_function_that_reads_it(tmp_path: Path, generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    kinds = {
        "load": model,
        "load_conditional": hf.conditional(model, conditions.table(2)),
        "load_ensemble": hf.ensemble(model, 2),
    }
    for right, kind in kinds.items():
        params, batch_stats = kind.init(generator)
        hf.save(tmp_path / "model", kind, params, batch_stats)
        for name in kinds.keys() - {right}:
            with pytest.raises(ValueError, match=rf"holds a model made by \w+, .*; hyperfunc\.{right} reads it"):
                getattr(hf, name)(tmp_path / "model")
        if kind is not model:
            with pytest.raises(ValueError, match=r"do not belong to the model: .*; give those of its init, or of one"):
                hf.save(tmp_path / "model", model, params, batch_stats)
    with pytest.raises(ValueError, match="model: got Sequential, expected a Model"):
        unchecked(hf.save)(tmp_path / "model", small_net(), *model.init(generator))


def test_sizes_of_other_types_of_integers_are_saved_as_ints(tmp_path: Path, generator: Generator) -> None:
    sizes = {"z_dim": np.int64(4), "hidden_dim": np.int32(5)}
    classes = unchecked(lambda labels: labels.max() + 1)(np.array([0, 2, 1]))
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    for model, module in (
        (unchecked(hf.hyper_resnet)(np.int64(10), torch.tensor(1), classes, **sizes), None),
        (unchecked(hf.resnet)(np.int64(10), torch.tensor(1), classes), None),
        (unchecked(hf.hyperize)(convolutions, unit=np.array([8, 8]), **sizes), convolutions),
    ):
        params, batch_stats = model.init(generator)
        hf.save(tmp_path / "model.pth", model, params, batch_stats)
        loaded, *found = hf.load(tmp_path / "model.pth", module)
        assert {**loaded.recipe} == model.recipe
        assert_trees_equal(tree.named_leaves(tuple(found)), tree.named_leaves((params, batch_stats)))


@pytest.mark.parametrize("notes", [{"x": torch.zeros(1)}, {"x": float("nan")}, {"x": Path("y")}])
def test_notes_that_json_cannot_hold_are_refused_and_nothing_is_written(
    tmp_path: Path, generator: Generator, notes: dict[str, object]
) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    with pytest.raises(ValueError, match="notes: .* expected what JSON can hold: texts, finite numbers"):
        hf.save(tmp_path / "model.pth", model, *model.init(generator), notes=notes)
    assert not any(tmp_path.iterdir())


def test_what_is_no_tensor_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trees: got a float at adam/lr, expected tensors at the leaves"):
        unchecked(checkpoint.save)(tmp_path / "a.pth", {"adam": {"lr": 0.1}}, {})
    with pytest.raises(ValueError, match="tree: got a Linear, expected tensors at the leaves"):
        hf.num_params(nn.Linear(2, 2))
    assert not any(tmp_path.iterdir())


def test_another_module_than_the_models_is_named(tmp_path: Path, generator: Generator) -> None:
    model = hf.hyperize(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), targets="2.weight", z_dim=2)
    hf.save(tmp_path / "model.pth", model, *model.init(generator))
    with pytest.raises(
        ValueError, match="module: expected the one that the model was made of, or one like it: targets: "
    ):
        hf.load(tmp_path / "model.pth", nn.Sequential(nn.Linear(16, 16)))
