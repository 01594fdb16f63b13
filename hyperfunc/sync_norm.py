"""Batch normalisation over the pictures of all ranks, with exact gradients, under `torch.func` and on any device.

`torch.nn.SyncBatchNorm` takes CUDA tensors alone and its gradient is not for `torch.func.grad`.
"""

# torch.compile cannot trace the evaluation of an annotation, and functions are defined inside of what it traces.
from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from hyperfunc.model import Model, make_apply, make_forward


class SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' tensors. Each rank's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return SumOverRanks.apply(*gradients)


class SyncBatchNorm(_BatchNorm):
    """A batch norm whose statistics in training are those of all ranks' pictures; a rank's own may be none.

    One all-reduce forward and one backward, of two numbers per channel and a count for every rank: each rank's mean and
    its squares about that, put together as by Chan, Golub and LeVeque (1979). Sums of squares would take less room, and
    drown the variance where the mean is large.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        shape = [1, -1] + [1] * (input.dim() - 2)
        others = [axis for axis in range(input.dim()) if axis != 1]
        x = input.to(self.running_mean.dtype)  # which is wider than an input of 16 bits
        count = x.numel() // x.shape[1]
        own_mean = x.sum(others) / max(count, 1)
        own_squares = (x - own_mean.view(shape)).square().sum(others)
        own = torch.cat([own_mean, own_squares, x.new_full((1,), count)])
        rank, world = dist.get_rank(), dist.get_world_size()
        # A sum in which all but one rank have nothing to add: every rank then has what each of them has.
        rows = F.pad(own.unsqueeze(0), (0, 0, rank, world - rank - 1))
        means, squares, counts = SumOverRanks.apply(rows).split([x.shape[1], x.shape[1], 1], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        with torch.no_grad():
            # The running variance is the unbiased one, as in torch.
            unbiased = variance * (total / (total - 1).clamp(min=1))
            for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.copy_(torch.lerp(running, value.detach(), self.momentum))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return ((x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(input.dtype)


def synchronize(model: Model) -> Model:
    """The same model with batch norms over all ranks in training; its evaluation is as it was.

    Raises:
        ValueError: A batch norm of it has no parameters, no running statistics, or no momentum, or is of a class of the
            user's own.
    """
    forward = make_forward(convert(copy.deepcopy(model.module)))
    return model._replace(forward=forward, apply=make_apply(model.weights, forward))


def convert(module: nn.Module) -> nn.Module:
    """Puts a `SyncBatchNorm` with the same parameters in the place of each batch norm of `module`, which it changes."""
    for path, layer in list(module.named_modules()):
        if not isinstance(layer, _BatchNorm):
            continue
        if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise ValueError(
                f"module: {path or 'it'} is a {type(layer).__name__}, and what it does besides normalising is not "
                "known; synchronised batch norms (--sync-bn) support torch's own alone"
            )
        if layer.momentum is None or not layer.affine or not layer.track_running_stats:
            raise ValueError(
                f"module: {path or 'it'} has no momentum, no parameters or no running statistics, which synchronised "
                "batch norms (--sync-bn) need"
            )
        # The class is all that differs: what it holds keeps its names, its place and its ties.
        layer.__class__ = SyncBatchNorm
    return module
