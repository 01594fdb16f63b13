import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import oracle
import pytest
import torch
from helpers import assert_trees_equal, unchecked
from torch import Generator, Tensor, nn
from torch.func import grad
from torch.nn import functional as F

import hyperfunc as hf
from hyperfunc import tree
from hyperfunc.model import Model


def in_float64(model: Model, generator: Generator) -> tuple[hf.Params, hf.BatchStats]:
    """Parameters and statistics in float64, all of them drawn, so that no zero hides a mistake."""
    params, batch_stats = model.init(generator)

    def perturb(leaf: Tensor) -> Tensor:
        return leaf.double() + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).abs()

    return tree.map(perturb, params), tree.map(perturb, batch_stats)


def batch(generator: Generator, count: int = 4) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 10


def test_threads_may_share_a_model(generator: Generator) -> None:
    """Since functional_call puts the values into a module that both of them call."""
    encoder = hf.conditions.from_module(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), 2)
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), encoder)
    states = [model.init(generator) for _ in range(4)]
    images, condition = torch.randn(2, 3, 32, 32, generator=generator), torch.ones(4)

    def call(number: int) -> tuple[Tensor, Tensor]:
        return model.apply(*states[number % 4], condition, images, train=False)[0], encoder.apply(
            states[number % 4][0].encoder, condition.expand(1, 4)
        )

    expected = [call(number) for number in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            for number, found in enumerate(threads.map(call, range(100))):
                torch.testing.assert_close(found, expected[number % 4])
    finally:
        sys.setswitchinterval(interval)


def test_weights_of_other_names_are_refused(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    params, batch_stats = model.init(generator)
    images, weights = torch.zeros(1, 3, 32, 32), model.weights(params)
    with pytest.raises(ValueError, match="weights, batch_stats: haed.weight is unknown; give what"):
        model.forward({**weights, "haed.weight": torch.zeros(10, 64)}, batch_stats, images, train=False)
    del weights["head.weight"]
    with pytest.raises(ValueError, match="weights, batch_stats: head.weight is missing; give what"):
        model.forward(weights, batch_stats, images, train=False)
    with pytest.raises(ValueError, match="batch_stats: blocks.0.bn1.running_mean is missing; .*; and 10 more; give"):
        model.apply(params, {}, images, train=True)
    with pytest.raises(
        ValueError, match="batch_stats: got NoneType, expected tensors by name, as the model's own init"
    ):
        unchecked(model.forward)(model.weights(params), None, images, train=True)


def test_a_seed_is_no_generator() -> None:
    with pytest.raises(ValueError, match="generator: got int, expected a torch.Generator; .* makes one"):
        unchecked(hf.hyper_resnet(10).init)(0)


class Remembering(nn.Module):
    """Scales by what its first input was."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
        self.layers[1].register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.layers[1].scale is None:
            self.layers[1].scale = x.detach().abs().mean()
        return self.layers(x) / self.layers[1].scale


def test_a_module_that_keeps_something_from_its_first_call_is_refused_at_every_one(generator: Generator) -> None:
    model = hf.hyperize(Remembering(), z_dim=4)
    params, batch_stats = model.init(generator)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"its forward fills the buffer 'layers.1.scale', .* register it with"):
            model.apply(params, batch_stats, torch.ones(2, 16), train=True)


@pytest.mark.parametrize(
    ("depth", "width", "options", "hyper", "plain"),
    [
        (40, 1, {}, 96_570, 562_730),
        (40, 2, {}, 147_578, 2_235_498),
        (40, 1, {"block": "pre"}, 96_570, 562_730),
        (40, 2, {"block": "pre"}, 147_578, 2_235_498),
        (40, 1, {"shortcut": "conv"}, 99_226, 565_386),
        (40, 2, {"shortcut": "conv"}, 158_554, 2_246_474),
        (40, 2, {"shortcut": "conv", "block": "pre"}, 158_554, 2_246_474),
    ],
)
def test_parameter_counts(
    generator: Generator, depth: int, width: int, options: dict[str, Any], hyper: int, plain: int
) -> None:
    assert hf.num_params(hf.hyper_resnet(depth, width, **options).init(generator)[0]) == hyper
    assert hf.num_params(hf.resnet(depth, width, **options).init(generator)[0]) == plain


@pytest.mark.parametrize(("width", "units"), [(1, 242), (2, 966)])
def test_numbers_of_basic_kernels(generator: Generator, width: int, units: int) -> None:
    params, _ = hf.hyper_resnet(40, width).init(generator)
    assert params.embeddings["3x3"].shape == (units, 64)


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 2)])
def test_kernels_logits_and_gradients_agree_with_the_oracle(generator: Generator, depth: int, width: int) -> None:
    model = hf.hyper_resnet(depth, width, z_dim=8)
    params, batch_stats = in_float64(model, generator)
    images, labels = batch(generator)

    def oracle_logits(params: hf.Params, stats: hf.BatchStats | None) -> Tensor:
        weights = params.primary | oracle.resnet_kernels(params, depth, width)
        return oracle.resnet_logits(weights, images, depth, stats)

    ours, theirs = model.kernels(params), oracle.resnet_kernels(params, depth, width)
    assert list(ours) == list(theirs)
    for name, kernel in ours.items():
        torch.testing.assert_close(kernel, theirs[name], rtol=oracle.EXACT, atol=oracle.EXACT)

    for train, stats in ((True, None), (False, batch_stats)):
        logits, _ = model.apply(params, batch_stats, images, train=train)
        torch.testing.assert_close(logits, oracle_logits(params, stats), rtol=oracle.EXACT, atol=oracle.EXACT)

    ours = grad(lambda p: F.cross_entropy(model.apply(p, batch_stats, images, train=True)[0], labels))(params)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    F.cross_entropy(oracle_logits(leaves, None), labels).backward()
    for path, leaf in tree.named_leaves(leaves).items():
        assert leaf.grad is not None, path
        torch.testing.assert_close(tree.named_leaves(ours)[path], leaf.grad, rtol=oracle.EXACT, atol=oracle.EXACT)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_every_kernel_starts_at_hes_scale(generator: Generator, width: int) -> None:
    model = hf.hyper_resnet(40, width)
    params, _ = model.init(generator)
    for name, kernel in model.kernels(params).items():
        fan_in = math.prod(kernel.shape[1:])
        assert kernel.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05), name


def test_a_model_is_shown_as_what_made_it() -> None:
    assert repr(hf.resnet(10)).startswith("<Model of ResNet: resnet(depth=10, width=1, num_classes=10")
    layers = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    assert repr(hf.hyperize(layers)).startswith("<Model of Sequential: hyperize(targets=['1.weight'], unit=(16, 16)")
    model = hf.hyper_resnet(10)
    assert repr(hf.ensemble(model, 3)) == f"<Ensemble of 3: {model!r}>"
    assert repr(hf.conditional(model, hf.conditions.bounded([0], [1]))) == f"<Conditional of {model!r}, codes of 2>"


def test_init_is_a_function_of_the_generator_alone() -> None:
    model = hf.hyper_resnet(10)
    torch.manual_seed(1)
    first = tree.named_leaves(model.init(Generator().manual_seed(5)))
    before = torch.get_rng_state()
    torch.manual_seed(2)
    second = tree.named_leaves(model.init(Generator().manual_seed(5)))
    other = tree.named_leaves(model.init(Generator().manual_seed(6)))
    assert_trees_equal(first, second)
    assert not torch.equal(first["0/embeddings/3x3"], other["0/embeddings/3x3"])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("train", [True, False])
def test_apply_writes_none_of_its_arguments(generator: Generator, train: bool) -> None:
    model = hf.hyper_resnet(10)
    params, batch_stats = model.init(generator)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    before = tree.clone((params, batch_stats, {"images": images}))
    model.apply(params, batch_stats, images, train=train)
    assert_trees_equal(tree.named_leaves(before), tree.named_leaves((params, batch_stats, {"images": images})))


def test_statistics_move_in_training_and_stay_in_evaluation(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    params, batch_stats = model.init(generator)
    images = 3 + torch.randn(16, 3, 32, 32, generator=generator)
    _, moved = model.apply(params, batch_stats, images, train=True)
    stem = F.conv2d(images, params.primary["stem.weight"], params.primary["stem.bias"], padding=1)
    expected = 0.1 * stem.mean(dim=(0, 2, 3))
    torch.testing.assert_close(moved["bn.running_mean"], expected, rtol=1e-4, atol=1e-5)
    _, stayed = model.apply(params, moved, images, train=False)
    assert_trees_equal(stayed, moved)


def test_evaluation_does_not_depend_on_the_batch(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    params, batch_stats = in_float64(model, generator)
    images, _ = batch(generator, 6)
    together, _ = model.apply(params, batch_stats, images, train=False)
    alone = torch.cat([model.apply(params, batch_stats, image[None], train=False)[0] for image in images])
    torch.testing.assert_close(together, alone, rtol=oracle.EXACT, atol=oracle.EXACT)


def test_apply_is_forward_of_weights(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    params, batch_stats = model.init(generator)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    applied = model.apply(params, batch_stats, images, train=True)
    assert_trees_equal(
        tree.named_leaves(applied),
        tree.named_leaves(model.forward(model.weights(params), batch_stats, images, train=True)),
    )


@pytest.mark.parametrize("train", [True, False])
def test_apply_maps_over_parameters_and_their_statistics(generator: Generator, train: bool) -> None:
    model = hf.hyper_resnet(10, z_dim=8)
    members = [in_float64(model, generator) for _ in range(2)]
    images, _ = batch(generator)
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *members)
    mapped = torch.vmap(lambda params, batch_stats: model.apply(params, batch_stats, images, train=train))(*stacked)
    for index, (params, batch_stats) in enumerate(members):
        alone = tree.leaves(model.apply(params, batch_stats, images, train=train))
        for ours, theirs in zip(tree.leaves(mapped), alone, strict=True):
            torch.testing.assert_close(ours[index], theirs, rtol=oracle.EXACT, atol=oracle.EXACT)


@pytest.mark.parametrize("damage", ["missing", "unknown"])
def test_wrong_names_are_errors(generator: Generator, damage: str) -> None:
    model = hf.resnet(10)
    params, batch_stats = model.init(generator)
    primary = dict(params.primary)
    if damage == "missing":
        del primary["head.bias"]
    else:
        primary["head.bais"] = primary["head.bias"]
    with pytest.raises(ValueError, match="weights, batch_stats: head.b.* is "):
        model.apply(params._replace(primary=primary), batch_stats, torch.randn(2, 3, 32, 32), train=True)


@pytest.mark.parametrize("make", [hf.hyper_resnet, hf.resnet])
def test_materialize_is_the_same_network_without_the_hypernetwork(
    generator: Generator, make: Callable[[int], Model]
) -> None:
    model = make(10)
    params, batch_stats = in_float64(model, generator)
    images, _ = batch(generator)
    network = hf.materialize(model, params, batch_stats)
    assert type(network) is hf.ResNet
    assert hf.num_params(dict(network.named_parameters())) == 75_530
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in network.parameters())
    logits = network.eval()(images)
    torch.testing.assert_close(
        logits, model.apply(params, batch_stats, images, train=False)[0], rtol=oracle.EXACT, atol=oracle.EXACT
    )
    with torch.no_grad():
        network.head.weight.zero_()
    assert params.primary["head.weight"].abs().sum() > 0


def test_hyperize_follows_the_dtype_of_the_module(generator: Generator) -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 2)).double()
    model = hf.hyperize(module, z_dim=8)
    params, batch_stats = model.init(generator)
    logits, _ = model.apply(params, batch_stats, torch.randn(2, 3, 6, 6, dtype=torch.float64), train=True)
    assert logits.dtype == torch.float64


@pytest.mark.parametrize("sizes", [{"z_dim": 0}, {"hidden_dim": -1}, {"z_dim": 2.5}])
def test_bad_sizes_are_found_when_the_model_is_made(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(sizes))}: got {next(iter(sizes.values()))}, expected at least 1"):
        unchecked(hf.hyperize)(nn.Linear(16, 16), **sizes)


def test_parameters_of_another_model_are_named(generator: Generator) -> None:
    model, other = hf.hyper_resnet(10), hf.hyper_resnet(16)
    params, batch_stats = other.init(generator)
    message = r"params: they hold embeddings \{'3x3': 74\} and the model needs \{'3x3': 32\}; give those of its init"
    with pytest.raises(ValueError, match=message):
        model.apply(params, batch_stats, torch.zeros(1, 3, 32, 32), train=False)
    with pytest.raises(ValueError, match=message):
        hf.materialize(model, params, batch_stats)
    narrow, narrow_stats = hf.hyper_resnet(10, z_dim=5).init(generator)
    with pytest.raises(
        ValueError, match=r"the generator of '3x3' have the shapes \(5,\), .* expected \(64,\), \(16, 64,"
    ):
        hf.materialize(model, narrow, narrow_stats)
    with pytest.raises(ValueError, match=r"the generator of '3x3' have the shapes \(64,\), expected"):
        model.kernels(model.init(generator)[0]._replace(generator={}))
    conditional = hf.conditional(model, hf.conditions.table(2))
    hundred, images = hf.hyper_resnet(10, num_classes=100), torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"params: primary/head.weight has the shape \(100, 64\), expected \(10, 64\)"):
        hf.hyper_resnet(10).apply(*hundred.init(generator), images, train=False)
    with pytest.raises(ValueError, match=r"params: got a ConditionalParams, .* as at\(params, condition\) of a"):
        unchecked(model.kernels)(conditional.init(generator)[0])
    with pytest.raises(ValueError, match="model: got Conditional, expected a Model"):
        unchecked(hf.materialize)(conditional, params, batch_stats)
    with pytest.raises(ValueError, match=r"embeddings \{'3x3': \(2, 32\)\} and the model needs"):
        model.kernels(conditional.init(generator)[0].model)
