from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers import assert_trees_equal, unchecked
from torch import Generator, Tensor, nn

import hyperfunc as hf
from hyperfunc import tree


def perturbed(model: hf.Model, generator: Generator) -> tuple[hf.Params, hf.BatchStats]:
    """Drawn biases and statistics too, so that nothing is right for being zero."""

    def perturb(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        return leaf + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).abs()

    return tree.map(perturb, model.init(generator))


def overhanging(z_dim: int = 3) -> hf.Model:
    """Layers of 12, 20 and 9 channels in units of 8, the window not square, and a matrix."""
    layers = [nn.Conv2d(12, 20, (3, 2)), nn.Conv2d(20, 20, (3, 2)), nn.Conv2d(20, 9, (3, 2)), nn.Linear(9, 30)]
    return hf.hyperize(
        nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), *layers).double(),
        targets=["[2345].weight"],
        unit=(8, 8),
        z_dim=z_dim,
    )


def a_state_dict(model: hf.Model, generator: Generator) -> dict[str, Tensor]:
    """Random weights of the model's module, which no hypernetwork made."""
    return {
        name: torch.randn(meta.shape, generator=generator, dtype=torch.float64)
        if meta.is_floating_point()
        else torch.tensor(7)
        for name, meta in model.module.state_dict().items()
    }


def test_weights_from_such_a_hypernetwork_are_found_again(generator: Generator) -> None:
    model = hf.hyper_resnet(16, 2, z_dim=6)
    params, batch_stats = perturbed(model, generator)
    network = hf.materialize(model, params, batch_stats)
    fit = hf.fit_embeddings(model, network.state_dict())
    assert fit.explained.keys() == set(model.tiling.names)
    assert min(fit.explained.values()) > 1 - 1e-9
    assert not torch.allclose(fit.params.embeddings["3x3"], params.embeddings["3x3"])
    images = torch.randn(4, 3, 16, 16, generator=generator)
    ours, _ = model.apply(fit.params, fit.batch_stats, images, train=False)
    torch.testing.assert_close(ours, network.eval()(images), rtol=1e-3, atol=1e-3)


def test_the_overhang_does_not_count(generator: Generator) -> None:
    model = overhanging()
    params, batch_stats = perturbed(model, generator)
    state_dict = hf.materialize(model, params, batch_stats).state_dict()
    fit = hf.fit_embeddings(model, state_dict, sweeps=200, tolerance=0.0)
    assert min(fit.explained.values()) > 1 - 1e-6, str(fit)


@pytest.mark.parametrize("make", [overhanging, lambda: hf.hyper_resnet(16, z_dim=6)])
def test_the_error_never_grows_and_is_what_the_weights_show(make: Callable[[], hf.Model], generator: Generator) -> None:
    model = make()
    state_dict = a_state_dict(model, generator)
    fit = hf.fit_embeddings(model, state_dict, sweeps=12, tolerance=0.0)
    kernels = model.kernels(fit.params)
    for key, errors in fit.errors.items():
        assert len(errors) == 13
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
        assert errors[-1] < 0.999 * errors[0]
        names = [layer.name for layer in model.tiling.layers[key]]
        shown = torch.stack([(kernels[name] - state_dict[name]).square().sum() for name in names]).sum().item()
        assert shown == pytest.approx(errors[-1], rel=1e-5)
        for name in names:
            target = state_dict[name]
            expected = 1 - (kernels[name] - target).square().mean() / target.var(correction=0)
            assert fit.explained[name] == pytest.approx(expected.item(), abs=1e-6)


def test_the_error_lies_between_what_singular_values_allow(generator: Generator) -> None:
    """No fit is better than each mode's own truncation, and the start is no worse than the two of them together."""
    z_dim, d = 5, 7
    model = hf.hyper_resnet(16, 2, z_dim=z_dim, hidden_dim=d)
    state_dict = a_state_dict(model, generator)
    fit = hf.fit_embeddings(model, state_dict, sweeps=5)
    units = []
    for layer in model.tiling.layers["3x3"]:
        for rows in state_dict[layer.name].split(16, dim=0):
            units += rows.split(16, dim=1)
    x = torch.stack(units)

    def left_out(matrix: Tensor, rank: int) -> float:
        return torch.linalg.svdvals(matrix)[rank:].square().sum().item()

    by_unit = (x - x.mean(0)).flatten(1)
    by_row = x.permute(1, 3, 4, 0, 2).reshape(144, -1)
    centered = by_row - by_row.mean(1, keepdim=True)
    lowest = max(left_out(by_unit, z_dim), left_out(by_row, d + 1))
    centered_units = centered.view(144, len(x), 16).movedim(1, 0).flatten(1)
    highest = left_out(centered, d) + left_out(centered_units - centered_units.mean(0), z_dim)
    assert lowest < fit.errors["3x3"][-1] < fit.errors["3x3"][0] <= highest


def test_enough_embeddings_explain_anything(generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=31, hidden_dim=144)  # 32 units are a constant and 31 directions
    fit = hf.fit_embeddings(model, a_state_dict(model, generator))
    assert min(fit.explained.values()) > 1 - 1e-9, str(fit)


def test_what_is_not_generated_is_copied(generator: Generator) -> None:
    model = overhanging()
    state_dict = a_state_dict(model, generator)
    before = tree.clone(dict(state_dict))
    fit = hf.fit_embeddings(model, state_dict, sweeps=1)
    rest = {name: state_dict[name] for name in state_dict.keys() - set(model.tiling.names)}
    assert_trees_equal(fit.params.primary | fit.batch_stats, rest)
    fit.params.primary["0.weight"].zero_()
    assert_trees_equal(state_dict, before)


def test_a_trained_network_with_ordinary_weights_is_a_start(generator: Generator) -> None:
    plain = hf.resnet(10)
    params, batch_stats = perturbed(plain, generator)
    given = {**plain.weights(params), **batch_stats}
    fit = hf.fit_embeddings(hf.hyper_resnet(10, z_dim=8), given)
    from_module = hf.fit_embeddings(
        hf.hyper_resnet(10, z_dim=8), hf.materialize(plain, params, batch_stats).state_dict()
    )
    assert_trees_equal(tree.named_leaves(fit.params), tree.named_leaves(from_module.params))
    assert all(0 < share < 1 for share in fit.explained.values())
    same = hf.fit_embeddings(plain, given)
    assert_trees_equal(tree.named_leaves((same.params, same.batch_stats)), tree.named_leaves((params, batch_stats)))
    assert same.explained == {}


def test_a_tied_weight_may_be_given_by_either_name(generator: Generator) -> None:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    model = hf.hyperize(nn.Sequential(first, nn.ReLU(), second), targets=["0.weight"], unit=(8, 8), z_dim=4)
    params, batch_stats = perturbed(model, generator)
    state_dict = hf.materialize(model, params, batch_stats).state_dict()
    assert "2.weight" in state_dict
    del state_dict["0.weight"]
    assert hf.fit_embeddings(model, state_dict).explained["0.weight"] > 1 - 1e-9


def test_layers_that_are_laid_out_otherwise_are_found_again(generator: Generator) -> None:
    """Transposed and depthwise convolutions, an embedding with padding, and the scale of a norm."""
    module = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(20, 12, 3),
            "depthwise": nn.Conv2d(32, 32, 3, groups=32),
            "words": nn.Embedding(20, 16, padding_idx=3),
            "norm": nn.LayerNorm(24),
        }
    )
    targets = ["up.weight", "depthwise.weight", "words.weight", "norm.weight"]
    model = hf.hyperize(module, targets=targets, unit=(8, 8), z_dim=3)
    params, batch_stats = perturbed(model, generator)
    given = {**model.weights(params), **batch_stats}
    fit = hf.fit_embeddings(model, given, sweeps=300, tolerance=0.0)
    assert set(fit.explained) == set(targets)
    assert min(fit.explained.values()) > 1 - 1e-4, str(fit)


def test_directions_left_free_can_still_be_trained(generator: Generator) -> None:
    small, large = hf.hyper_resnet(10, z_dim=3), hf.hyper_resnet(10, z_dim=64)
    state_dict = hf.materialize(small, *perturbed(small, generator)).state_dict()
    fit = hf.fit_embeddings(large, state_dict)
    assert min(fit.explained.values()) > 1 - 1e-9
    noise = {name: torch.randn(kernel.shape, generator=generator) for name, kernel in large.kernels(fit.params).items()}

    def loss(params: hf.Params) -> Tensor:
        return torch.stack([(kernel * noise[name]).sum() for name, kernel in large.kernels(params).items()]).sum()

    gradient = torch.func.grad(loss)(fit.params)
    moving = gradient.embeddings["3x3"].norm(dim=0) + gradient.generator["3x3"].w_in.flatten(0, 1).norm(dim=0)
    assert moving.min() > 1e-3 * moving.max()


def test_the_fit_is_a_function_of_its_arguments() -> None:
    model = overhanging(z_dim=40)
    state_dict = a_state_dict(model, Generator().manual_seed(3))
    first, second, other = (
        tree.named_leaves(
            hf.fit_embeddings(model, state_dict, generator=Generator().manual_seed(seed), sweeps=1).params
        )
        for seed in (1, 1, 2)
    )
    assert_trees_equal(first, second)
    assert not torch.equal(first["generator/3x2/w_in"], other["generator/3x2/w_in"])


def test_the_report_can_be_read(generator: Generator) -> None:
    model = overhanging()
    text = str(hf.fit_embeddings(model, a_state_dict(model, generator), sweeps=2, tolerance=0.0))
    lines = text.splitlines()
    assert lines[0].split() == ["generated", "tensor", "explained"]
    assert lines[1].split()[0] == "2.weight"
    assert "generator 3x2: squared error" in text
    assert lines[-1].endswith("2 sweeps")


@pytest.mark.parametrize("prefix", ["model", "module"])
def test_a_network_whose_own_names_all_begin_alike(prefix: str, generator: Generator) -> None:
    network = nn.Module()
    network.add_module(prefix, nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 2)))
    model = hf.hyperize(network, targets=f"{prefix}.1.weight", z_dim=4)
    fit = hf.fit_embeddings(model, network.state_dict(), generator=generator)
    assert torch.equal(fit.params.primary[f"{prefix}.0.weight"], network.state_dict()[f"{prefix}.0.weight"])


def test_what_does_not_fit(generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    good = a_state_dict(model, generator)
    lacking = {name: value for name, value in good.items() if name != "stem.bias"}
    with pytest.raises(ValueError, match=r"state_dict: it does not fit the module \(ResNet\): stem.bias is missing;"):
        hf.fit_embeddings(model, lacking)
    with pytest.raises(ValueError, match="extra is unknown"):
        hf.fit_embeddings(model, {**good, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"every name begins with '_orig_mod.'; give \{name.removeprefix"):
        hf.fit_embeddings(model, {f"_orig_mod.{name}": value for name, value in good.items()})
    with pytest.raises(ValueError, match=r"head.weight is float32\[7, 64\], expected float32\[10, 64\]"):
        hf.fit_embeddings(model, {**good, "head.weight": torch.zeros(7, 64)})
    good["blocks.1.conv2.weight"][0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="blocks.1.conv2.weight has values that are not finite"):
        hf.fit_embeddings(model, good)
    expected = r", expected float32\[16\]; it must come from a module of the same class and sizes"
    for wrong, description in (
        ([0.0], "an object of type list"),
        (nn.Parameter(torch.zeros(16)).detach().numpy(), "an object of type ndarray"),
        (nn.UninitializedParameter(), "an object of type UninitializedParameter"),
        (torch.zeros(16, dtype=torch.complex64), r"complex64\[16\]"),
        (torch.zeros(16, dtype=torch.int8), r"int8\[16\]"),
        (torch.zeros(16).to_sparse(), r"sparse_coo float32\[16\]"),
    ):
        with pytest.raises(ValueError, match=rf"state_dict: it does not fit .*: stem.bias is {description}{expected}"):
            unchecked(hf.fit_embeddings)(model, {**good, "stem.bias": wrong})
    with pytest.raises(ValueError, match="stem.bias is on the meta device, without values; give that of a real module"):
        hf.fit_embeddings(model, {**good, "stem.bias": torch.zeros(16, device="meta")})
    with pytest.raises(
        ValueError, match=r"state_dict: got an object of type Linear, expected tensors by name, .*state_d"
    ):
        unchecked(hf.fit_embeddings)(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: got Linear, expected a Model"):
        unchecked(hf.fit_embeddings)(nn.Linear(2, 2), good)
    with pytest.raises(ValueError, match="sweeps: got -1"):
        hf.fit_embeddings(model, good, sweeps=-1)
    with pytest.raises(ValueError, match="tolerance: got -1"):
        hf.fit_embeddings(model, good, tolerance=-1.0)


def test_a_layer_of_zeros_that_is_met_is_explained() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    nn.init.zeros_(module.get_parameter("1.weight"))
    model = hf.hyperize(module, targets="*.weight", unit=(8, 8), z_dim=16)
    fit = hf.fit_embeddings(model, module.state_dict())
    assert fit.explained["1.weight"] == 1.0, str(fit)
