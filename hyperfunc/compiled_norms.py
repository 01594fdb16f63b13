"""Batch norms in training, in a form of which torch.compile makes fast code for the CPU.

Inductor computes the statistics of a batch norm channel by channel: in channels_last order every few channels are one
more walk over the whole activation, with the dependent chain of Welford's updates on the way. Here each picture gives
sums of its own, for which it is read once while it lies in the cache, and these few numbers are then put together.

Inductor writes what belongs to a channel into the loop over the pixels, and computes it again for each of them. So such
numbers are products by constants, not quotients, and the standard deviation, which takes a root, is the exponential of
a logarithm, which Inductor holds to be worth keeping.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hyperfunc import vmap_rules

CACHED = 2**15
"""Numbers that are still in a core's own cache when they are read again: 128 KiB in float32."""


class CompiledNorms(TorchFunctionMode):
    """A context in which batch norms of pictures in training are computed by `batch_norm`, and all others, those on a
    GPU too, by `vmap_rules.batch_norm`: whether vmap maps over them cannot be asked while torch.compile traces."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return (batch_norm if _is_ours(*args, **kwargs) else vmap_rules.batch_norm)(*args, **kwargs)
        return func(*args, **kwargs)


def batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` in training, of pictures: one pass for the statistics, and one for the result.

    Squares are taken about a pixel of the part that is summed. Since it is one of those that vary, its square cannot
    drown the variance, as that of a large mean would. Parts are put together as by Chan, Golub and LeVeque (1979).

    Args:
        input: Of shape (n, c, h, w).
        running_mean: Is overwritten, as by torch. Sums are of its type, the result is of that of the input.
        running_var: Is overwritten too.
        weight: Scale of each channel, or None for 1.
        bias: What is added to each channel, or None for 0.
        training: True; it stands here to make the signature torch's.
        momentum: The share of this batch in the running statistics.
        eps: Added to the variance.
    """
    pixels = input.permute(0, 2, 3, 1).to(running_mean.dtype)  # 16 bits hold no sums
    within = (1, 2) if pixels[0].numel() <= CACHED else (2,)  # a part is a picture, or a row of one
    origin = (pixels[:, :1, :1] if within == (1, 2) else pixels[:, :, :1]).detach()
    offsets = pixels - origin
    sums, squares = offsets.sum(within, keepdim=True), offsets.square().sum(within, keepdim=True)
    size, count = pixels.numel() // sums.numel(), pixels.numel() // pixels.shape[-1]
    share = size / count  # of one part in the whole
    means = origin + sums * (1 / size)
    mean = (means * share).sum((0, 1, 2))
    spread = (squares - sums.square() * (1 / size)) * (1 / count)
    variance = (spread + (means - mean).square() * share).sum((0, 1, 2))

    running_mean.copy_(torch.lerp(running_mean, mean.detach(), momentum))
    # The running variance is the unbiased one, as in torch.
    running_var.copy_(torch.lerp(running_var, variance.detach() * (count / max(count - 1, 1)), momentum))

    scale = torch.exp(-0.5 * torch.log(variance + eps))
    if weight is not None:
        scale = scale * weight
    # The mean as a constant, and its gradient through a term that is zero: it then is a product of sums that the
    # gradients of scale and shift need anyway, and not one more sum over all pixels.
    constant = mean.detach()
    shift = (constant - mean) * scale
    if bias is not None:
        shift = shift + bias
    # Once for each part, so that their gradients are summed by part too.
    scale, shift = (value.expand(means.shape) for value in (scale, shift))
    return ((pixels - constant) * scale + shift).to(input.dtype).permute(0, 3, 1, 2)


def _is_ours(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> bool:
    """Whether it is a batch norm in training, of pictures on the CPU, with running statistics of float32 or float64.

    A dimension without extent has no pixel to begin with.
    """
    return (
        training
        and running_mean is not None
        and running_var is not None
        and momentum is not None
        and input.dim() == 4
        and input.numel() > input.shape[1]
        and input.device.type == "cpu"
        and running_mean.dtype in (torch.float32, torch.float64)
        and input.dtype in (torch.bfloat16, torch.float16, running_mean.dtype)
    )
