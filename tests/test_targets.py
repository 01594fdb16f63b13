from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import unchecked
from torch import Generator, Tensor, nn

import hyperfunc as hf
from hyperfunc.targets import Targets, choose, with_std


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


LAYER4 = tuple(f"layer4.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("layer4.*.conv?.weight", LAYER4),
        (["layer4.1.conv*.weight", "layer4.0.conv*"], LAYER4),
        (list(LAYER4), LAYER4),
        (lambda name, parameter: name.startswith("layer4") and parameter.shape[2:] == (3, 3), LAYER4),
        (nn.Linear, ("fc.weight",)),
        ((nn.Linear, "conv1.weight"), ("conv1.weight", "fc.weight")),
        (iter(["fc.weight"]), ("fc.weight",)),
    ],
)
def test_ways_to_name_targets(resnet18: nn.Module, targets: Targets, names: tuple[str, ...]) -> None:
    assert hf.hyperize(resnet18, targets=targets).tiling.names == names


def test_by_default_all_but_the_first_and_last_layer_are_generated(resnet18: nn.Module) -> None:
    weights = [
        f"{path}.weight" for path, layer in resnet18.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    assert set(hf.hyperize(resnet18).tiling.names) == set(weights[1:-1])
    large = {name for name in weights[1:-1] if min(resnet18.get_parameter(name).shape[:2]) >= 256}
    assert set(hf.hyperize(resnet18, unit=(256, 256)).tiling.names) == large


def test_an_embedding_in_front_is_the_first_layer() -> None:
    """And after the others it is not the last."""
    maps = [nn.Linear(16, 16) for _ in range(3)]
    for layers, names in (
        ([nn.Embedding(50, 16), *maps], ("1.weight", "2.weight")),
        ([*maps, nn.Embedding(50, 16)], ("1.weight",)),
    ):
        assert hf.hyperize(nn.Sequential(*layers)).tiling.names == names


def test_a_type_stands_for_the_weights_of_all_that_it_contains(resnet18: nn.Module) -> None:
    block = torchvision.models.resnet.BasicBlock
    weights = {name for name, p in resnet18.named_parameters() if name.startswith("layer") and p.dim() == 4}
    assert set(hf.hyperize(resnet18, targets=block).tiling.names) == weights


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["layer1.0.conv3.weight"], r"no parameter 'layer1.0.conv3.weight'; near names: layer1.0.conv"),
        ("*.nothing", r"no parameter '\*.nothing'"),
        ("layer1.0.conv1", r"no parameter 'layer1.0.conv1'; near names: layer1.0.conv1.weight$"),
        (["fc.weight", "fc.wieght"], r"no parameter 'fc.wieght'; near names: fc.weight"),
        ("§", r"no parameter '§'; it has conv1.weight, .* and 54 more"),
        ([], "targets: got none, expected at least one name, pattern or type"),
        (nn.Conv1d, "no weight in a Conv1d, but in Conv2d, Linear; biases and norms are chosen by name"),
        (nn.BatchNorm2d, "no weight in a BatchNorm2d, but in Conv2d, Linear"),
        (
            lambda name, parameter: False,
            r"the predicate chose none of the parameters of the module \(ResNet\): conv1.w",
        ),
    ],
)
def test_what_matches_nothing_is_named(resnet18: nn.Module, targets: Targets, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.hyperize(resnet18, targets=targets)


@pytest.mark.parametrize(
    "module", [nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))]
)
def test_a_module_without_targets_is_named(module: nn.Module) -> None:
    name = type(module).__name__
    with pytest.raises(
        ValueError, match=rf"none of the weights of the module \({name}\) fills a unit of 16x16 channels"
    ):
        hf.hyperize(module)


def test_a_module_without_parameters_is_named() -> None:
    with pytest.raises(ValueError, match=r"module: the module \(ReLU\) has no parameter, and so nothing"):
        hf.hyperize(nn.ReLU())


class TiedHead(nn.Module):
    """The head of a small language model is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.middle = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.embedding(tokens))))


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_a_tied_weight_is_one_tensor_by_whichever_name(generator: torch.Generator, name: str) -> None:
    model = hf.hyperize(TiedHead(), targets=name, z_dim=16)
    params, batch_stats = model.init(generator)
    assert model.tiling.names == ("embedding.weight",)
    assert set(params.primary) == {"middle.weight", "middle.bias"}
    table = model.kernels(params)["embedding.weight"]
    # The embedding by itself would start at 1, and the logits far too large.
    assert table.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    tokens = torch.tensor([[1, 5, 39]])
    hidden = torch.relu(table[tokens] @ params.primary["middle.weight"].T + params.primary["middle.bias"])
    torch.testing.assert_close(model.apply(params, batch_stats, tokens, train=True)[0], hidden @ table.T)
    network = hf.materialize(model, params, batch_stats)
    assert network.get_parameter("embedding.weight") is network.get_parameter("head.weight")
    own = TiedHead()
    own.load_state_dict(network.state_dict())
    torch.testing.assert_close(own(tokens), hidden @ table.T)


def test_the_weight_of_the_last_layer_is_left_out_by_whatever_name() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    module[3].weight = module[1].weight
    assert hf.hyperize(module).tiling.names == ("2.weight",)


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "2.*ght"])
def test_a_shared_layer_is_found_by_each_of_its_names(name: str) -> None:
    layer = nn.Linear(16, 16)
    assert hf.hyperize(nn.Sequential(layer, nn.ReLU(), layer), targets=name).tiling.names == ("0.weight",)


def test_targets_of_one_generator_have_one_dtype() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16).double())
    message = "targets: 0.weight is float32 and 1.weight is float64, and one generator, 'matrix', makes both; convert"
    with pytest.raises(ValueError, match=message):
        hf.hyperize(module, targets=nn.Linear)
    assert hf.hyperize(module, targets="1.weight").tiling.names == ("1.weight",)


def test_a_unit_has_two_extents() -> None:
    with pytest.raises(ValueError, match=r"unit: got 16, expected two positive channel counts \(out, in\)"):
        unchecked(hf.hyperize)(nn.Linear(16, 16), targets="weight", unit=16)


class Scale(nn.Module):
    """A scale by channel, as a norm has one, under the name that the parameter is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(16)))


@pytest.mark.parametrize("layer", [Scale("weight"), Scale("gamma"), nn.PReLU(16)])
def test_a_vector_of_unknown_start_is_named(layer: nn.Module) -> None:
    name = next(iter(dict(layer.named_parameters())))
    message = rf"targets: 1.{name}: where its vector `{name}` starts is not known of {type(layer).__name__}; leave it"
    with pytest.raises(ValueError, match=message):
        hf.hyperize(nn.Sequential(nn.Linear(16, 16), layer), targets=["0.weight", "1.*"])


def test_a_bias_of_an_unknown_layer_starts_at_zero(generator: torch.Generator) -> None:
    model = hf.hyperize(nn.Sequential(Scale("bias")), targets="0.bias")
    assert torch.equal(model.kernels(model.init(generator)[0])["0.bias"], torch.zeros(16))


@pytest.mark.parametrize("target", [nn.Linear, nn.Sequential])
def test_a_type_does_not_pass_over_a_parametrized_weight(target: type[nn.Module]) -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    module = nn.Sequential(nn.Linear(16, 16), normed, nn.Linear(16, 16))
    message = (
        rf"targets: 1.weight is in a {target.__name__}, but it is computed from "
        r"1.parametrizations.weight.original0, 1.parametrizations.weight.original1 and no parameter; name what"
    )
    with pytest.raises(ValueError, match=message):
        hf.hyperize(module, targets=target)
    name = "1.parametrizations.weight.original1"
    assert hf.hyperize(module, targets=["0.weight", name]).tiling.names == ("0.weight", name)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (3, "targets: got 3, expected a name or pattern of parameters, a type of module"),
        (["weight", 3], "targets: got 3, expected a name"),
        (int, "targets: got <class 'int'>, expected a name"),
        (
            nn.Linear(2, 2),
            r"targets: got Linear\(.*a predicate on \(name, parameter\); for all of its type give Linear",
        ),
    ],
)
def test_targets_of_another_kind_are_named(targets: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unchecked(choose)(nn.Linear(16, 16), targets, (16, 16))


def test_a_parameter_without_entries_is_named() -> None:
    module = nn.Linear(16, 16)
    module.weight = nn.Parameter(torch.zeros(16, 0))
    with pytest.raises(ValueError, match=r"targets: weight: it has the shape \(16, 0\), without any entry; leave it"):
        hf.hyperize(module, targets="weight")


@pytest.mark.parametrize("module", [nn.Linear, lambda x: x, "net"])
def test_what_is_no_module_is_named(module: object) -> None:
    with pytest.raises(ValueError, match="module: got .*, expected an instance of torch.nn.Module"):
        unchecked(hf.hyperize)(module)


def sines() -> nn.Sequential:
    """Small at the start, as those of Sitzmann et al. (2020)."""
    net = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 3))
    for number, bound in ((1, 1 / 240), (2, 1 / 24)):
        nn.init.uniform_(net.get_parameter(f"{number}.weight"), -bound, bound)
    nn.init.constant_(net.get_parameter("2.bias"), 0.5)
    return net


def test_generated_tensors_start_as_large_as_asked_for(generator: Generator, tmp_path: Path) -> None:
    targets = ["1.weight", "2.weight", "2.bias", "3.weight"]
    model = hf.hyperize(sines(), targets=targets, std="module", z_dim=32)
    params, batch_stats = model.init(generator)
    found = model.kernels(params)
    expected = {"1.weight": 240**-1 / 3**0.5, "2.weight": 24**-1 / 3**0.5, "2.bias": 0.5, "3.weight": 0.0}
    for name, std in expected.items():
        offsets = found[name] - (1.0 if name == "3.weight" else 0.0)
        assert float(offsets.square().mean().sqrt()) == pytest.approx(std, rel=0.15), name
    hf.save(tmp_path / "model.pth", model, params, batch_stats)
    other = sines()
    nn.init.normal_(other.get_parameter("1.weight"))
    assert hf.load(tmp_path / "model.pth", other)[0].tiling == model.tiling
    given = hf.hyperize(sines(), targets=targets, std={"*.weight": 0.1, "1.weight": 0.2})
    assert {layer.name: layer.kernel.std for layers in given.tiling.layers.values() for layer in layers} == {
        "1.weight": 0.2,
        "2.weight": 0.1,
        "2.bias": 0.0,
        "3.weight": 0.1,
    }


def test_layers_that_start_unequally_are_put_together_at_once(generator: Generator) -> None:
    layers = [nn.Linear(32, 32) for _ in range(4)]
    for number, layer in enumerate(layers, 1):
        nn.init.normal_(layer.weight, std=0.1 * number)
    model = hf.hyperize(nn.Sequential(*layers), targets="*.weight", std="module")
    kernels = model.kernels(model.init(generator)[0])
    assert len({kernel.untyped_storage().data_ptr() for kernel in kernels.values()}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": {"9.*": 1.0}}, r"std: '9\.\*' is none of what is generated: 1\.weight, 2\.weight"),
        ({"std": {"*": -1.0}}, r"std: got -1\.0 for \*, expected a number of at least 0"),
        ({"std": {"*": float("nan")}}, r"std: got nan for \*, expected a number of at least 0"),
        ({"std": "module", "init": "clipped-normal"}, "std: got 'module', but init='clipped-normal' draws all"),
    ],
)
def test_a_wrong_standard_deviation_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unchecked(hf.hyperize)(sines(), **options)


def test_an_unknown_standard_deviation_is_named() -> None:
    with pytest.raises(ValueError, match="std: got 'mean', expected 'layer', 'module', or numbers by name or pattern"):
        unchecked(with_std)({}, "mean", sines())


def test_values_that_are_not_finite_have_no_standard_deviation() -> None:
    net = sines()
    nn.init.constant_(net.get_parameter("2.weight"), float("nan"))
    with pytest.raises(ValueError, match="std: 'module' needs finite values, and those of 2.weight are not"):
        hf.hyperize(net, std="module")


def test_a_tied_tensor_is_told_how_large_it_starts_by_any_of_its_names() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    net.get_submodule("head").weight = net.get_submodule("embed").weight
    model = hf.hyperize(net, targets="head.weight", unit=(4, 4), std={"head.weight": 1})
    assert [layer.kernel.std for layers in model.tiling.layers.values() for layer in layers] == [1.0]


def test_values_that_are_not_there_have_no_standard_deviation() -> None:
    with pytest.raises(ValueError, match="module: it is on the meta device, without values for 1.weight, 2.weight"):
        hf.hyperize(sines().to("meta"), std="module")
