"""The kernel generator of Ha, Dai and Le (2016, arXiv 1609.09106), equation 2: a two-layer linear network that turns a
learned embedding z into one basic kernel.

A basic kernel has `in` input channels, `out` output channels (16 and 16 in the paper) and a window of any rank: (3, 3)
for a 3x3 convolution, (5,) for a one-dimensional one, () for a matrix. One generator serves every layer whose window it
fits; only the embeddings differ between layers.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional as F

from hyperfunc.arguments import positive

Init = Literal["he", "clipped-normal"]


class HyperNetParams(NamedTuple):
    """The generator's parameters, in the paper's letters: a_i = W_in[i] z + b_in[i], K[:, i] = W_out a_i + b_out."""

    w_in: Float[Tensor, "in d z"]
    b_in: Float[Tensor, "in d"]
    w_out: Float[Tensor, "out *window d"]
    b_out: Float[Tensor, "out *window"]


def generate_kernel(p: HyperNetParams, z: Float[Tensor, "z"]) -> Float[Tensor, "out in *window"]:
    """One basic kernel from one embedding: equation 2 of the paper."""
    a = p.w_in @ z + p.b_in
    return torch.einsum("o...d,id->oi...", p.w_out, a) + p.b_out.unsqueeze(1)


def generate_kernels(p: HyperNetParams, z: Float[Tensor, "units z"]) -> Float[Tensor, "units out in *window"]:
    """All basic kernels from all embeddings: `generate_kernel`, mapped over the rows of z."""
    return torch.vmap(generate_kernel, in_dims=(None, 0))(p, z)


def generate_kernels_at_once(p: HyperNetParams, z: Float[Tensor, "units z"]) -> Float[Tensor, "units out in *window"]:
    """`generate_kernels` as a few matrix products over all units: the form for the hot path.

    Mapping `generate_kernel` batches the second product by unit; backwards that makes a gradient of W_out for each unit
    and then sums them, which costs more than everything else. Here the two layers, which are linear, are multiplied
    into one, K[:, i] = (W_out W_in[i]) z + (W_out b_in[i] + b_out), where there are enough units to make that cheaper.
    A unit then comes out as one row with its input channels last, and tiles are put together in whole runs of them.
    """
    n_in, d, n_z = p.w_in.shape
    w_out = p.w_out.reshape(-1, d)
    if n_z * len(w_out) * (d + len(z)) <= d * len(z) * (n_z + len(w_out)):  # multiplications, by input channel
        w = torch.mm(w_out, p.w_in.transpose(0, 1).reshape(d, -1)).view(-1, n_z)
        b = torch.addmm(p.b_out.reshape(-1, 1), w_out, p.b_in.t()).flatten()
        return F.linear(z, w, b).view(-1, *p.b_out.shape, n_in).movedim(-1, 2)
    a = F.linear(z, p.w_in.flatten(0, 1), p.b_in.flatten())
    columns = torch.addmm(p.b_out.reshape(-1, 1), w_out, a.view(-1, d).t())
    return columns.view(*p.b_out.shape, -1, n_in).movedim(-2, 0).movedim(-1, 2)


def init_generator(
    generator: Generator,
    *,
    window: Sequence[int],
    unit: tuple[int, int] = (16, 16),
    z_dim: int = 64,
    hidden_dim: int | None = None,
    init: Init = "he",
) -> HyperNetParams:
    """Draws a generator of `unit` = (out, in) channels.

    Under "he" both layers keep the scale of what goes through them, std(W_in) = 1/sqrt(z_dim) and
    std(W_out) = 1/sqrt(d), and the biases are zero, so that a kernel is linear in its embedding and the embedding alone
    sets its scale. "clipped-normal" draws everything, the biases too, from the unit normal folded into (-2, 2); its
    kernels are several hundred times too large for a residual network and are here for comparison.

    Args:
        generator: The source of randomness; the tensors are made on its device, in torch's default dtype.
        window: The spatial extent of the kernel, for example (3, 3).
        unit: Output and input channels of a basic kernel.
        z_dim: Length of an embedding.
        hidden_dim: The paper's d; z_dim where it is not given, as in the paper.
        init: "he" or "clipped-normal".

    Raises:
        ValueError: A size is not positive, or `init` is unknown.
    """
    unit, z_dim, hidden_dim = checked_sizes(unit, z_dim, hidden_dim)
    if min(window, default=1) < 1:
        raise ValueError(f"window: got {tuple(window)}, expected extents of at least 1")
    check_init(init)
    shapes = generator_shapes(window, unit, z_dim, hidden_dim)
    if init == "clipped-normal":
        return HyperNetParams(*(_clipped_normal(generator, shape) for shape in shapes))
    w_in, b_in, w_out, b_out = shapes
    return HyperNetParams(
        w_in=_normal(generator, w_in) / w_in[-1] ** 0.5,
        b_in=torch.zeros(b_in, device=generator.device),
        w_out=_normal(generator, w_out) / w_out[-1] ** 0.5,
        b_out=torch.zeros(b_out, device=generator.device),
    )


def generator_shapes(
    window: Sequence[int], unit: tuple[int, int], z_dim: int, hidden_dim: int | None
) -> tuple[tuple[int, ...], ...]:
    """The shapes of a generator's w_in, b_in, w_out and b_out."""
    d = z_dim if hidden_dim is None else hidden_dim
    n_out, n_in = unit
    return (n_in, d, z_dim), (n_in, d), (n_out, *window, d), (n_out, *window)


def init_embeddings(
    generator: Generator, p: HyperNetParams, std: Float[Tensor, "units"], *, init: Init = "he"
) -> Float[Tensor, "units z"]:
    """Draws one embedding per unit.

    Under "he" each is a random direction at the length that gives its kernel the root mean square `std` under the
    generator `p`. The paper's generator serves layers of very different fan-in, so no single scale of z can suit them
    all; and since the freshly drawn generator has no biases, scaling z scales the kernel alike.

    Args:
        generator: The source of randomness; the embeddings are made on its device.
        p: The generator that will turn these embeddings into kernels.
        std: The wanted root mean square of each unit's kernel.
        init: "he", or "clipped-normal" for unit normals folded into (-2, 2), where `std` counts for nothing.

    Raises:
        ValueError: `init` is unknown.
    """
    check_init(init)
    shape = (len(std), p.w_in.shape[-1])
    if init == "clipped-normal":
        return _clipped_normal(generator, shape)
    z = _normal(generator, shape)
    return z * (std.to(z.device) / root_mean_squares(p, z)).unsqueeze(1)


def root_mean_squares(p: HyperNetParams, z: Float[Tensor, "units z"]) -> Float[Tensor, "units"]:
    """That of each basic kernel's entries.

    In parts, because a large network has hundreds of thousands of units, and their a_i alone would fill gigabytes.
    """
    return torch.cat([generate_kernels_at_once(p, part).flatten(1).square().mean(1).sqrt() for part in z.split(4096)])


def check_init(init: str) -> None:
    """Raises a ValueError where `init` is not the name of an initialisation."""
    if init not in get_args(Init):
        raise ValueError(f"init: got {init!r}, expected one of {', '.join(get_args(Init))}")


def checked_sizes(unit: Any, z_dim: Any, hidden_dim: Any) -> tuple[tuple[int, int], int, int | None]:
    """The same, in ints of Python's.

    Raises:
        ValueError: A generator cannot have these sizes.
    """
    try:
        n_out, n_in = (positive("unit", channels) for channels in unit)
    except (TypeError, ValueError):
        raise ValueError(f"unit: got {unit}, expected two positive channel counts (out, in)") from None
    hidden_dim = None if hidden_dim is None else positive("hidden_dim", hidden_dim)
    return (n_out, n_in), positive("z_dim", z_dim), hidden_dim


def _normal(generator: Generator, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device=generator.device)


def _clipped_normal(generator: Generator, shape: Sequence[int]) -> Tensor:
    return torch.fmod(_normal(generator, shape), 2.0)
