"""Which tensors of a network are generated, how each is tiled from basic kernels, and the assembly.

A generated tensor of shape (out, in, *window) is a grid of basic kernels, row-major: the tiles of the first `unit[0]`
output channels come first, from the first input channels to the last. Where a channel count is not a multiple of the
unit, the last tiles reach over the edge and are cropped.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import einops.layers.torch  # noqa: F401  # tells torch.compile of einops, which before torch 2.8 it cannot trace
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


class Kernel(NamedTuple):
    """A parameter as the tiling sees it.

    Most parameters are tiled as they are. Others are laid out as a `plane` first: matrices and kernels whose input
    channels come first are transposed, and those with hardly any input channels are folded, several output channels to
    a row, because otherwise most of a row of a basic kernel would be cropped away.

    Attributes:
        shape: The parameter's own shape.
        plane: The shape (out, in, *window) that is tiled: the parameter's, unless it is transposed or folded.
        fan_in: Inputs that one output sums over.
        std: Standard deviation that its entries start with.
        mean: What is added to all that is generated: 1 for the scale of a norm.
        transposed: Whether the first two axes of the plane are those of the parameter the other way round.
        zero_row: A row that is zero for ever, as an embedding's padding is.
    """

    shape: tuple[int, ...]
    plane: tuple[int, ...]
    fan_in: float
    std: float
    mean: float = 0.0
    transposed: bool = False
    zero_row: int | None = None


class Layer(NamedTuple):
    """One generated tensor: its name in the module, how it is laid out, and its grid (output, input tiles)."""

    name: str
    kernel: Kernel
    grid: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.kernel.shape

    @property
    def window(self) -> tuple[int, ...]:
        """The spatial extent of the kernel; () for a matrix."""
        return self.kernel.plane[2:]

    @property
    def fan_in(self) -> float:
        """Inputs that one output of the whole layer sums over."""
        return self.kernel.fan_in

    @property
    def units(self) -> int:
        """Basic kernels in this layer."""
        return math.prod(self.grid)


class Tiling(NamedTuple):
    """The generated layers of one network, by the key of the generator that serves them, in the module's order."""

    unit: tuple[int, int]
    layers: dict[str, tuple[Layer, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all generated tensors."""
        return tuple(layer.name for layers in self.layers.values() for layer in layers)


def window_key(window: Sequence[int]) -> str:
    """The name of the generator for a window: '3x3', '5', or 'matrix' for the empty one."""
    return "x".join(str(extent) for extent in window) or "matrix"


def plain_kernel(shape: Sequence[int]) -> Kernel:
    """A kernel (out, in, *window) that is tiled as it is and starts with He's variance for the inputs of an output.

    Raises:
        ValueError: `shape` has fewer than two dimensions.
    """
    if len(shape) < 2:
        raise ValueError(f"a generated tensor needs the shape (out, in, *window), got {tuple(shape)}")
    fan_in = math.prod(shape[1:])
    return Kernel(tuple(shape), tuple(shape), fan_in, (2 / fan_in) ** 0.5)


def tile(kernels: Mapping[str, Kernel], unit: tuple[int, int] = (16, 16)) -> Tiling:
    """Lays the grid of basic kernels over every named kernel."""
    layers: dict[str, list[Layer]] = {}
    for name, kernel in kernels.items():
        layer = Layer(name, kernel, (math.ceil(kernel.plane[0] / unit[0]), math.ceil(kernel.plane[1] / unit[1])))
        layers.setdefault(window_key(layer.window), []).append(layer)
    return Tiling(unit, {key: tuple(value) for key, value in layers.items()})


def assemble(layers: Sequence[Layer], units: Float[Tensor, "units out in *window"]) -> dict[str, Tensor]:
    """Puts basic kernels, in the order of `layers` and of each layer's grid, together to whole kernels.

    Consecutive layers of one layout are put together at once, so that the cost is a copy for each run of equal layers
    and not for each layer or unit; the layers of a run are views of one tensor. Kernels with a two-dimensional window
    that are tiled as they are come out in channels_last memory order, the one that the fast convolutions want.
    """
    runs = _runs(layers)
    # As the fast generation lays many of them out; the way back then writes each gradient once, and where it is wanted.
    rows = units.movedim(2, -1)
    parts = torch.split(rows, [sum(layer.units for layer in run) for run in runs])
    kernels: dict[str, Tensor] = {}
    for run, part in zip(runs, parts, strict=True):
        for layer, kernel in zip(run, _assemble_run(run[0], len(run), part), strict=True):
            kernels[layer.name] = kernel
    return kernels


def _runs(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Consecutive layers of one layout; itertools.groupby is nothing that torch.compile can trace in torch 2.7."""
    runs: list[list[Layer]] = []
    for layer in layers:
        if runs and _layout(runs[-1][0].kernel) == _layout(layer.kernel):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _layout(kernel: Kernel) -> tuple[Any, ...]:
    """What counts when it is put together: all but what its units start with."""
    return kernel.shape, kernel.plane, kernel.mean, kernel.transposed, kernel.zero_row


def _assemble_run(layer: Layer, count: int, rows: Float[Tensor, "units cout *window cin"]) -> tuple[Tensor, ...]:
    """The kernels of `count` layers that are all laid out like `layer`."""
    kernel = layer.kernel
    # Input channels last in memory: exactly channels_last for a two-dimensional window. It is a copy at most.
    whole = rearrange(
        rows,
        "(layer tile_out tile_in) cout ... cin -> layer (tile_out cout) ... (tile_in cin)",
        layer=count,
        tile_out=layer.grid[0],
        tile_in=layer.grid[1],
    ).contiguous()
    if (whole.shape[1], whole.shape[-1]) != kernel.plane[:2]:
        whole = whole[:, : kernel.plane[0], ..., : kernel.plane[1]]
    is_plain = kernel.plane == kernel.shape and not kernel.transposed
    if is_plain and not kernel.mean and kernel.zero_row is None:
        if layer.window and whole.stride(-2) != whole.shape[-1]:  # cropped: a convolution would copy each by itself
            whole = whole.contiguous()
        # Moved after they are parted: the gradients of channels_last kernels then are put together as they lie.
        return tuple(part.movedim(-1, 1) for part in whole.unbind(0))
    whole = whole.movedim(-1, 2)
    if kernel.transposed:
        whole = whole.transpose(1, 2)
    if whole.shape[1:] != kernel.shape:
        whole = whole.reshape(count, -1)[:, : math.prod(kernel.shape)].reshape(count, *kernel.shape)
    if kernel.mean:
        # In 16 bits, which are an autocast's, what is near 1 would be no finer than hundredths.
        whole = whole.to(torch.promote_types(whole.dtype, torch.float32)) + kernel.mean
    if kernel.zero_row is not None:
        # Not in place and not by an index, which vmap and an older compiler take worse than a product.
        rows = torch.arange(kernel.shape[0], device=whole.device) != kernel.zero_row
        whole = whole * rows.to(whole.dtype).unsqueeze(1)
    return whole.unbind(0)
