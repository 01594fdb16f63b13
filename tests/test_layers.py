"""The layouts and variances of every kind of layer, measured where a formula could be wrong in the same way twice."""

import math

import pytest
import torch
import torchvision
from torch import Generator, Tensor, nn

import hyperfunc as hf
from hyperfunc import layers, tiling


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as transformers has it for GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


SUMMING_LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(24, 40, 5), (24, 200)),
    "conv2d": (nn.Conv2d(16, 48, 3, stride=2, dilation=2), (16, 48, 48)),
    "conv2d, groups": (nn.Conv2d(48, 96, 3, groups=6), (48, 32, 32)),
    "conv2d, depthwise": (nn.Conv2d(100, 200, (3, 1), groups=100), (100, 32, 32)),
    "conv3d": (nn.Conv3d(16, 20, (1, 2, 3)), (16, 12, 12, 12)),
    "transposed1d": (nn.ConvTranspose1d(32, 16, 4), (32, 800)),
    "transposed2d, stride": (nn.ConvTranspose2d(32, 24, 4, stride=2), (32, 32, 32)),
    "transposed2d, stride that divides unevenly": (nn.ConvTranspose2d(32, 24, 3, stride=2), (32, 40, 40)),
    "transposed2d, window of one": (nn.ConvTranspose2d(32, 24, 1, stride=2), (32, 40, 40)),
    "transposed2d, dilation": (nn.ConvTranspose2d(32, 24, 3, stride=2, dilation=2), (32, 40, 40)),
    "transposed2d, groups": (nn.ConvTranspose2d(64, 128, 4, stride=2, groups=8), (64, 32, 32)),
    "transposed2d, depthwise": (nn.ConvTranspose2d(256, 256, 4, stride=2, groups=256), (256, 24, 24)),
    "transposed3d": (nn.ConvTranspose3d(32, 16, 2, stride=(1, 2, 2)), (32, 12, 12, 12)),
    "linear": (nn.Linear(100, 300), (100,)),
    "linear, as (in, out)": (Conv1D(300, 100), (100,)),
}


@pytest.mark.parametrize("kind", SUMMING_LAYERS)
def test_what_sums_over_its_inputs_doubles_their_mean_square(generator: Generator, kind: str) -> None:
    """He's rule: whatever the layout, outputs have twice the mean square of the inputs, for the rectifier to halve."""
    layer, shape = SUMMING_LAYERS[kind]
    model = hf.hyperize(nn.Sequential(layer), targets="0.weight", z_dim=64)
    params, batch_stats = model.init(generator)
    primary = {name: torch.zeros_like(bias) for name, bias in params.primary.items()}
    x = torch.randn(32, *shape, generator=generator)
    y, _ = model.apply(params._replace(primary=primary), batch_stats, x, train=True)
    inner = y[(..., *[slice(8, -8) if extent > 32 else slice(2, -2) for extent in y.shape[2:]])]
    # A transposed convolution whose stride is larger than its window leaves outputs that no input reaches.
    reached = inner[inner != 0]
    assert reached.square().mean().item() == pytest.approx(2, rel=0.1)


def test_a_transposed_convolution_has_its_units_along_output_and_input_channels() -> None:
    (layer,) = hf.hyperize(nn.Sequential(nn.ConvTranspose2d(48, 16, 2)), targets="0.weight").tiling.layers["2x2"]
    assert (layer.shape, layer.kernel.plane, layer.grid, layer.fan_in) == ((48, 16, 2, 2), (16, 48, 2, 2), (1, 3), 192)


@pytest.mark.parametrize(
    ("layer", "plane", "grid"),
    [
        (nn.Conv2d(256, 256, 3, groups=256), (16, 16, 3, 3), (1, 1)),
        (nn.Conv2d(100, 100, 3, groups=100), (7, 16, 3, 3), (1, 1)),
        (nn.Conv2d(96, 64, 3, groups=16), (32, 12, 3, 3), (2, 1)),
        (nn.Conv2d(96, 64, 3, groups=4), (64, 24, 3, 3), (4, 2)),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 3, 3), (1, 1)),
    ],
)
def test_grouped_kernels_fill_the_input_channels_of_a_unit(
    generator: Generator, layer: nn.Conv2d, plane: tuple[int, ...], grid: tuple[int, int]
) -> None:
    model = hf.hyperize(nn.Sequential(layer), targets="0.weight", z_dim=4)
    (found,) = model.tiling.layers["3x3"]
    assert (found.kernel.plane, found.grid) == (plane, grid)
    kernel = model.kernels(model.init(generator)[0])["0.weight"]
    assert kernel.shape == layer.weight.shape
    # No two output channels share a kernel, as they would if folding put one entry in two places.
    assert len(kernel.flatten(1).unique(dim=0)) == len(kernel)


def test_by_default_linear_layers_of_any_order_are_chosen() -> None:
    """Not a convolution that has the name of one of them."""
    convolution = type("Conv1D", (nn.Conv1d,), {"nf": 3})(32, 32, 3)
    layers = [Conv1D(32, 16), Conv1D(48, 32), convolution, nn.Linear(32, 16)]
    found = hf.hyperize(nn.Sequential(*layers)).tiling.layers
    assert [(key, [(layer.name, layer.kernel.plane) for layer in each]) for key, each in found.items()] == [
        ("matrix", [("1.weight", (48, 32))]),
        ("3", [("2.weight", (32, 32, 3))]),
    ]


def test_folding_is_row_major() -> None:
    kernel = tiling.Kernel((6, 2, 3), plane=(2, 6, 3), fan_in=6, std=1.0)
    (layer,) = tiling.tile({"w": kernel}, unit=(2, 6)).layers["3"]
    unit = torch.arange(36.0).view(1, 2, 6, 3)
    assert torch.equal(tiling.assemble([layer], unit)["w"], unit.view(6, 2, 3))


def expected_std(layer: nn.Module, name: str, weight: Tensor) -> float:
    """By torch's own count of the fan-in, which is right for all but transposed convolutions."""
    if isinstance(layer, nn.Embedding):
        return 1.0
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)
    is_output_projection = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    is_linear = name.endswith("proj_weight") or name.startswith("weight_") or is_output_projection
    return math.sqrt((1 if is_linear else 2) / fan_in)


def net_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 32, 7), nn.Conv1d(32, 48, 5, dilation=2), nn.Conv1d(48, 48, 3, groups=48), nn.Conv1d(48, 8, 1)
    )


def net_3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 32, 3), nn.Conv3d(32, 20, (1, 3, 3)), nn.Conv3d(20, 40, 3), nn.Conv3d(40, 8, 1))


def vit_like_b_16() -> nn.Module:
    """vit_b_16 with 2 of its 12 equal layers."""
    return torchvision.models.VisionTransformer(32, 16, num_layers=2, num_heads=12, hidden_dim=768, mlp_dim=3072)


def token_net() -> nn.Module:
    attention = nn.MultiheadAttention(48, 4, kdim=32, vdim=80)
    return nn.ModuleList([nn.Embedding(100, 48), attention, nn.Linear(48, 100)])


def recurrent_net() -> nn.Module:
    return nn.ModuleList([nn.LSTM(32, 64, 2), nn.LSTMCell(64, 48), nn.GRUCell(48, 64), nn.RNNCell(64, 64)])


NETS = {
    "resnet18": (torchvision.models.resnet18, None, {"1x1", "3x3"}),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, None, {"1x1", "5x5", "matrix"}),
    "mobilenet_v3_small, all": (torchvision.models.mobilenet_v3_small, nn.Conv2d, {"1x1", "3x3", "5x5"}),
    "vit_b_16": (vit_like_b_16, None, {"matrix"}),
    "1d": (net_1d, (nn.Conv1d,), {"7", "5", "3", "1"}),
    "3d": (net_3d, None, {"1x3x3", "3x3x3"}),
    "recurrent": (recurrent_net, [nn.LSTM, nn.LSTMCell, nn.GRUCell, nn.RNNCell], {"matrix"}),
    "tokens": (token_net, [nn.Embedding, nn.MultiheadAttention, nn.Linear], {"matrix"}),
}


@pytest.mark.parametrize("name", NETS)
def test_every_generated_weight_has_the_variance_of_its_layer(generator: Generator, name: str) -> None:
    make, targets, keys = NETS[name]
    module = make()
    model = hf.hyperize(module, targets=targets, z_dim=32)
    params, _ = model.init(generator)
    assert set(params.generator) == keys
    ordinary = dict(module.named_parameters())
    kernels = model.kernels(params)
    assert len(kernels) >= 2
    for path, kernel in kernels.items():
        parent, _, short_name = path.rpartition(".")
        assert kernel.shape == ordinary[path].shape
        expected = expected_std(module.get_submodule(parent), short_name, ordinary[path])
        # Of small tensors the deviation is known by few independent numbers: as many as the embeddings have.
        (layer,) = (layer for layers in model.tiling.layers.values() for layer in layers if layer.name == path)
        assert kernel.square().mean().sqrt().item() == pytest.approx(expected, rel=0.05 if layer.units > 4 else 0.4), (
            path
        )


def test_biases_and_norms_may_be_generated_and_start_as_torch_starts_norms(generator: Generator) -> None:
    module = nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Flatten(2), nn.LayerNorm([20, 4]))
    model = hf.hyperize(module, targets=["0.bias", "1.*", "3.*"], z_dim=8)
    params, batch_stats = model.init(generator)
    assert set(params.primary) == {"0.weight"}
    attention = hf.hyperize(nn.MultiheadAttention(16, 2, add_bias_kv=True), targets="bias_?", z_dim=4)
    assert not any(tensor.any() for tensor in attention.kernels(attention.init(generator)[0]).values())
    for name, tensor in model.kernels(params).items():
        assert torch.equal(tensor, torch.full_like(module.get_parameter(name), float(name in ("1.weight", "3.weight"))))
    x = torch.randn(2, 3, 4, 4, generator=generator)

    def square(embeddings: dict[str, Tensor]) -> Tensor:
        return model.apply(params._replace(embeddings=embeddings), batch_stats, x, train=True)[0].square().mean()

    assert torch.func.grad(square)(params.embeddings)["matrix"].abs().amax(1).gt(0).sum() >= 4


def test_the_padding_of_an_embedding_stays_zero(generator: Generator) -> None:
    model = hf.hyperize(nn.Sequential(nn.Embedding(40, 24, padding_idx=3)), targets="0.weight", z_dim=8)
    table = model.kernels(model.init(generator)[0])["0.weight"]
    assert table[3].abs().max() == 0
    assert (table.abs().amax(1) > 0).sum() == 39


def test_bilinear_sums_over_pairs(generator: Generator) -> None:
    model = hf.hyperize(nn.Sequential(nn.Bilinear(20, 30, 40)), targets="0.weight", z_dim=32)
    (layer,) = model.tiling.layers["matrix"]
    assert (layer.kernel.plane, layer.fan_in) == ((40, 600), 600)
    kernel = model.kernels(model.init(generator)[0])["0.weight"]
    assert kernel.shape == (40, 20, 30)
    assert kernel.std().item() == pytest.approx((2 / 600) ** 0.5, rel=0.05)


def test_a_single_number_cannot_be_generated() -> None:
    module = nn.Sequential(nn.Linear(16, 16))
    module.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="a single number has no channels to generate it by"):
        layers.kernel_of(module, "scale", (16, 16))
    with pytest.raises(ValueError, match="targets: scale: a single number"):
        hf.hyperize(module, targets="scale")
