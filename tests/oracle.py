"""What the package computes, written again as plainly as can be: loops over units and channels, in float64.

Nothing here uses vmap, einsum, functional_call or the package's own tiling.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperfunc.hypernet import HyperNetParams
from hyperfunc.model import Params

EXACT = 1e-10
"""The tolerance between two ways to compute the same in float64."""


def kernel(p: HyperNetParams, z: Tensor) -> Tensor:
    """Equation 2 of the paper, a channel at a time."""
    columns = []
    for w_in, b_in in zip(p.w_in, p.b_in, strict=True):
        a = torch.mv(w_in, z) + b_in
        flat = torch.mv(p.w_out.reshape(-1, p.w_out.shape[-1]), a)
        columns.append(flat.reshape(p.b_out.shape) + p.b_out)
    return torch.stack(columns, dim=1)


def tiled(p: HyperNetParams, embeddings: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """A whole layer's kernel from its own embeddings, row by row of its grid."""
    rows = []
    for row in range(grid[0]):
        tiles = [kernel(p, embeddings[row * grid[1] + column]) for column in range(grid[1])]
        rows.append(torch.cat(tiles, dim=1))
    return torch.cat(rows, dim=0)


def resnet_kernels(params: Params, depth: int, width: int) -> dict[str, Tensor]:
    """All generated kernels of a residual network, in the module's order."""
    remaining = list(params.embeddings["3x3"])
    kernels = {}
    channels = 16
    for index in range((depth - 4) // 2):
        out = 16 * width * 2 ** (index // ((depth - 4) // 6))
        for conv, cin in (("conv1", channels), ("conv2", out)):
            grid = (out // 16, cin // 16)
            mine, remaining = remaining[: grid[0] * grid[1]], remaining[grid[0] * grid[1] :]
            kernels[f"blocks.{index}.{conv}.weight"] = tiled(params.generator["3x3"], mine, grid)
        channels = out
    assert not remaining
    return kernels


def resnet_logits(weights: dict[str, Tensor], images: Tensor, depth: int, stats: dict[str, Tensor] | None) -> Tensor:
    """The residual network with post-activation and padded shortcuts; the batch's statistics where `stats` is None."""

    def norm(x: Tensor, name: str) -> Tensor:
        if stats is None:
            mean = x.mean(dim=(0, 2, 3))
            variance = x.var(dim=(0, 2, 3), unbiased=False)
        else:
            mean, variance = stats[f"{name}.running_mean"], stats[f"{name}.running_var"]
        x = (x - mean[:, None, None]) / torch.sqrt(variance[:, None, None] + 1e-5)
        return x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding=1)

    blocks_per_stage = (depth - 4) // 6
    x = torch.relu(norm(conv(images, "stem"), "bn"))
    for index in range(3 * blocks_per_stage):
        stride = 2 if index in (blocks_per_stage, 2 * blocks_per_stage) else 1
        path = f"blocks.{index}"
        h = torch.relu(norm(conv(x, f"{path}.conv1", stride), f"{path}.bn1"))
        h = norm(conv(h, f"{path}.conv2"), f"{path}.bn2")
        shortcut = x[:, :, ::stride, ::stride]
        missing = torch.zeros(len(x), h.shape[1] - x.shape[1], *h.shape[2:], dtype=x.dtype)
        x = torch.relu(h + torch.cat([shortcut, missing], dim=1))
    return F.linear(x.mean(dim=(2, 3)), weights["head.weight"], weights["head.bias"])
