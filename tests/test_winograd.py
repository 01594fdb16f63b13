"""Convolutions by Winograd's formula are torch's own."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from hyperfunc import winograd

SHAPES = [
    (2, 16, 16, 32, 32),  # several blocks of tiles
    (3, 16, 32, 9, 9),  # tiles that hang over the lower and the right edge
    (5, 48, 16, 7, 4),
    (1, 112, 80, 2, 6),
    (7, 16, 16, 1, 1),
    (300, 16, 16, 1, 3),
]
"""n, in, out, h, w."""


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads as torch is told to use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.usefixtures("threads")
def test_a_convolution_is_torchs(shape: tuple[int, ...], has_bias: bool, generator: torch.Generator) -> None:
    n, inputs, outputs, height, width = shape
    pictures = torch.randn(n, height, width, inputs, generator=generator)
    kernel = torch.randn(outputs, 3, 3, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    found = winograd.operators().convolve(pictures, kernel, bias)
    wide = pictures.permute(0, 3, 1, 2).double(), kernel.permute(0, 3, 1, 2).double()
    expected = F.conv2d(*wide, bias if bias is None else bias.double(), padding=1)
    assert found.is_contiguous()
    assert relative_error(found.permute(0, 3, 1, 2), expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("threads")
def test_an_inputs_gradient_is_torchs(shape: tuple[int, ...], generator: torch.Generator) -> None:
    n, inputs, outputs, height, width = shape
    gradient = torch.randn(n, height, width, outputs, generator=generator)
    kernel = torch.randn(outputs, 3, 3, inputs, generator=generator)
    found = winograd.operators().input_gradient(gradient, kernel)
    wide = kernel.permute(0, 3, 1, 2).double(), gradient.permute(0, 3, 1, 2).double()
    expected = conv2d_input((n, inputs, height, width), *wide, padding=1)
    assert found.is_contiguous()
    assert relative_error(found.permute(0, 3, 1, 2), expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("threads")
def test_a_kernels_gradient_is_torchs(shape: tuple[int, ...], generator: torch.Generator) -> None:
    n, inputs, outputs, height, width = shape
    pictures = torch.randn(n, height, width, inputs, generator=generator)
    gradient = torch.randn(n, height, width, outputs, generator=generator)
    found = winograd.operators().kernel_gradient(pictures, gradient)
    wide = pictures.permute(0, 3, 1, 2).double(), gradient.permute(0, 3, 1, 2).double()
    expected = conv2d_weight(wide[0], (outputs, inputs, 3, 3), wide[1], padding=1)
    assert found.is_contiguous()
    assert relative_error(found.permute(0, 3, 1, 2), expected) < 1e-5


def test_the_same_number_of_threads_gives_the_same_bits(generator: torch.Generator, threads: int) -> None:
    pictures, gradient = torch.randn(2, 4, 16, 16, 16, generator=generator)
    first, second = (winograd.operators().kernel_gradient(pictures, gradient) for _ in range(2))
    assert torch.equal(first, second)


def test_other_layouts_and_numbers_of_channels_are_refused() -> None:
    """Since it would read what is not there."""
    pictures, kernel = torch.ones(1, 4, 4, 16), torch.ones(16, 3, 3, 16)
    convolve = winograd.operators().convolve
    with pytest.raises(ValueError, match=r"convolve: got strides \(256, 64, 1, 4\) and torch.float32, expected contig"):
        convolve(pictures.view(1, 4, 16, 4).transpose(2, 3), kernel, None)
    with pytest.raises(ValueError, match=r"and torch.float64, expected contiguous float32"):
        convolve(pictures, kernel.double(), None)
    with pytest.raises(ValueError, match=r"convolve: got 16 and 8 channels, expected multiples of 16"):
        convolve(pictures, kernel[:8], None)


def test_shapes_that_do_not_go_together_are_refused() -> None:
    pictures, wide, kernel = torch.ones(1, 4, 4, 16), torch.ones(1, 4, 4, 32), torch.ones(16, 3, 3, 16)
    operators = winograd.operators()
    message = r"kernel: got the shape \(16, 3, 3, 16\), expected \(16, 3, 3, 32\) beside the other arguments"
    with pytest.raises(ValueError, match=message):
        operators.convolve(wide, kernel, None)
    with pytest.raises(ValueError, match=r"bias: got the shape \(8,\), expected \(16,\)"):
        operators.convolve(pictures, kernel, torch.ones(8))
    with pytest.raises(ValueError, match=r"kernel: got the shape \(16, 3, 3, 16\), expected \(32, 3, 3, 16\)"):
        operators.input_gradient(wide, kernel)
    with pytest.raises(ValueError, match=r"gradient: got the shape \(1, 4, 2, 16\), expected \(1, 4, 4, 16\)"):
        operators.kernel_gradient(pictures, pictures[:, :, :2].contiguous())


def traced(function: Callable[..., object], *args: Tensor) -> GraphModule:
    """What Inductor would get of a function, after the pass."""
    graph = make_fx(function, tracing_mode="fake")(*args)
    winograd.replace_convolutions(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def count(graph: GraphModule, name: str) -> int:
    return sum(name == str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_pass_replaces_a_convolution_and_its_gradients(
    has_bias: bool, memory_format: torch.memory_format, generator: torch.Generator
) -> None:
    pictures = torch.randn(2, 32, 6, 6, generator=generator).to(memory_format=memory_format)
    kernel = torch.randn(16, 32, 3, 3, generator=generator).to(memory_format=memory_format)
    bias = torch.randn(16, generator=generator)

    def loss(parameters: tuple[Tensor, ...]) -> Tensor:
        pictures, kernel, bias = parameters
        return F.conv2d(pictures, kernel, bias if has_bias else None, padding=1).cos().sum()

    def gradients(*parameters: Tensor) -> tuple[Tensor, ...]:
        return grad(loss)(parameters)

    graph = traced(gradients, pictures, kernel, bias)
    for name in ("convolve", "input_gradient", "kernel_gradient"):
        assert count(graph, f"hyperfunc.{name}.default") == 1
    assert not count(graph, "aten.convolution.default") + count(graph, "aten.convolution_backward.default")
    # Its own layout is taken as it is, and another one's pictures, kernel and gradient are laid out once.
    assert count(graph, "aten.clone.default") == (0 if memory_format == torch.channels_last else 3)
    expected = gradients(*(value.double() for value in (pictures, kernel, bias)))
    for found, reference in zip(graph(pictures, kernel, bias), expected, strict=True):
        assert relative_error(found, reference) < 1e-5 if reference.any() else not found.any()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 16, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(16, 16, 3, bias=False),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(16, 16, 5, padding=1, bias=False),
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(272, 16, 3, padding=1, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, bias=False).double(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False).bfloat16(),
        nn.ConvTranspose2d(16, 16, 3, padding=1, bias=False),
        nn.Conv1d(16, 16, 3, padding=1, bias=False),
        nn.Conv3d(16, 16, 3, padding=1, bias=False),
    ],
    ids=str,
)
def test_the_pass_leaves_other_convolutions_alone(layer: nn.Conv2d) -> None:
    kernel = layer.weight.detach()
    pictures = torch.ones(1, layer.in_channels, *[7] * (kernel.dim() - 2), dtype=kernel.dtype)

    def gradients(pictures: Tensor, kernel: Tensor) -> Tensor:
        return grad(lambda kernel: torch.func.functional_call(layer, {"weight": kernel}, (pictures,)).sum())(kernel)

    graph = traced(gradients, pictures, kernel)
    assert count(graph, "aten.convolution.default") == count(graph, "aten.convolution_backward.default") == 1


def test_the_pass_leaves_a_bias_that_is_cut_out_of_another_tensor_alone() -> None:
    inputs = torch.ones(1, 16, 4, 4), torch.ones(16, 16, 3, 3), torch.arange(32.0)

    def convolve(pictures: Tensor, kernel: Tensor, values: Tensor) -> Tensor:
        return F.conv2d(pictures, kernel, values[::2], padding=1)

    graph = traced(convolve, *inputs)
    assert count(graph, "aten.convolution.default") == 1
    assert torch.equal(graph(*inputs), convolve(*inputs))
