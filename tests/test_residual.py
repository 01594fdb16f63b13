import pytest
import torch
from helpers import unchecked
from torch import Generator, nn

import hyperfunc as hf
from hyperfunc.residual import PadShortcut, ResNet, check_depth, init_weights


@pytest.mark.parametrize(("depth", "blocks"), [(10, 1), (16, 2), (40, 6), (100, 16)])
def test_depth_is_6n_plus_4(depth: int, blocks: int) -> None:
    assert check_depth(depth) == blocks


@pytest.mark.parametrize(("depth", "nearby"), [(41, "40 or 46"), (39, "34 or 40"), (4, "10 or 16"), (9, "10 or 16")])
def test_other_depths_are_refused(depth: int, nearby: str) -> None:
    with pytest.raises(ValueError, match=f"depth: got {depth}, expected 6n \\+ 4, for example {nearby}"):
        ResNet(depth)


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
@pytest.mark.parametrize("block", ["post", "pre"])
def test_stages_halve_and_widen(shortcut: str, block: str) -> None:
    network = ResNet(16, 2, num_classes=7, shortcut=shortcut, block=block)  # pyright: ignore[reportArgumentType]
    shapes = []
    for module in network.blocks:
        module.register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape[1:])))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [(32, 32, 32)] * 2 + [(64, 16, 16)] * 2 + [(128, 8, 8)] * 2


def test_biases_are_named_only_where_a_batch_norm_takes_them_away() -> None:
    class Own(ResNet):
        pass

    assert Own(10).biases_before_norms == ()
    network = ResNet(10)
    network.stem.bias = None
    network.blocks[0].bn2 = nn.GroupNorm(4, 16)  # pyright: ignore[reportAttributeAccessIssue]
    network.blocks[2] = nn.Identity()
    expected = ("blocks.0.conv1.bias", "blocks.1.conv1.bias", "blocks.1.conv2.bias")
    assert network.biases_before_norms == expected


def test_padded_shortcut_adds_zeros_alone() -> None:
    x = torch.randn(2, 16, 8, 8)
    y = PadShortcut(extra_channels=16, stride=2)(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert (y[:, 16:] == 0).all()


def test_init_weights_covers_every_parameter_at_its_scale(generator: Generator) -> None:
    with torch.device("meta"):
        module = ResNet(40, 2)
    weights = init_weights(module, generator)
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in module.named_parameters()
    }
    for name, value in weights.items():
        if name.endswith("conv2.weight"):
            assert value.std().item() == pytest.approx((2 / value[0].numel()) ** 0.5, rel=0.05)
        if name.endswith("bias"):
            assert (value == 0).all()


def test_init_weights_refuses_layers_it_has_no_rule_for(generator: Generator) -> None:
    with pytest.raises(ValueError, match="no rule for 0.weight of a Embedding"):
        init_weights(nn.Sequential(nn.Embedding(3, 4)), generator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width: got 0, expected at least 1"),
        ({"num_classes": 0}, "num_classes: got 0"),
        ({"shortcut": "none"}, "shortcut: got 'none', expected one of pad, conv"),
        ({"block": "mid"}, "block: got 'mid', expected one of post, pre"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    network = nn.Module.__new__(ResNet)
    with pytest.raises(ValueError, match=message):
        unchecked(ResNet.__init__)(network, 10, **arguments)


def test_is_public() -> None:
    assert hf.ResNet is ResNet
