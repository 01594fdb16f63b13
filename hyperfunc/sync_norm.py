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
from torch.nn.modules.batchnorm import _BatchNorm

from hyperfunc.model import BatchStats, Model, Params, make_forward
from hyperfunc.randomness import Seed


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

    One all-reduce forward, of two numbers a channel and the count, and one backward.
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
        count = input.numel() // input.shape[1]
        # Relative to a mean that all ranks share and that is near theirs: squares of large means drown variances.
        shift = self.running_mean.detach().clone()
        shifted = input - shift.view(shape)
        own = torch.cat([shifted.sum(others), shifted.square().sum(others), shifted.new_full((1,), count)])
        first, second, total = SumOverRanks.apply(own).split([len(shift), len(shift), 1])
        mean = first / total
        variance = second / total - mean.square()
        with torch.no_grad():
            # The running variance is the unbiased one, as in torch.
            for running, value in (
                (self.running_mean, shift + mean),
                (self.running_var, variance * (total / (total - 1))),
            ):
                running.copy_(torch.lerp(running, value.detach(), self.momentum))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        # Of 16 bits where the input is: the statistics, and with them all that they touch, are float32.
        return (shifted * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(input.dtype)


def synchronize(model: Model) -> Model:
    """The same model with batch norms over all ranks in training; its evaluation is as it was.

    Raises:
        ValueError: A batch norm of it has no parameters, no running statistics, or no momentum.
    """
    forward = make_forward(convert(copy.deepcopy(model.module)))

    def apply(
        params: Params,
        batch_stats: BatchStats,
        /,
        *args: Any,
        train: bool,
        seed: Seed | None = None,
        **kwargs: Any,
    ) -> tuple[Any, BatchStats]:
        return forward(model.weights(params), batch_stats, *args, train=train, seed=seed, **kwargs)

    return model._replace(forward=forward, apply=apply)


def convert(module: nn.Module) -> nn.Module:
    """Puts a `SyncBatchNorm` with the same parameters in the place of each batch norm of `module`, which it changes."""
    for path, layer in list(module.named_modules()):
        if not isinstance(layer, _BatchNorm):
            continue
        if layer.momentum is None or not layer.affine or not layer.track_running_stats:
            raise ValueError(
                f"module: {path} has no momentum, no parameters or no running statistics, which --sync-bn needs"
            )
        # The class is all that differs: what it holds keeps its names, its place and its ties.
        layer.__class__ = SyncBatchNorm
    return module
