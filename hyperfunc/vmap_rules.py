"""Layers that `torch.vmap` has no rule for, or one that fails: computed in another way, or refused by name.

torch's own error names an operator, and neither the layer nor the cure.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from hyperfunc import tree
from hyperfunc._attention import attention_forward


def counting_norms(module: nn.Module) -> list[str]:
    """The batch norms that read their count of batches in training, which vmap has no single number for."""
    return [
        f"{path or 'it'} ({type(layer).__name__})"
        for path, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats and layer.momentum is None
    ]


def check_mapped_training(counting: list[str]) -> None:
    """Raises a ValueError where there are `counting_norms`."""
    if counting:
        raise ValueError(
            f"module: {counting[0]} has momentum=None, by which it reads its count of batches as a Python number, and "
            "under torch.vmap every member has a count of its own; give it a momentum, such as 0.1, before the module "
            "is hyperized, or map with train=False"
        )


class VmapRules(TorchFunctionMode):
    """A context in which batch norms on any device, recurrent layers, spectral norms and randomised rectifiers can be
    mapped by `torch.vmap`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _RULES.get(func, _as_it_is)(func, *args, **(kwargs or {}))


def autocast_under_vmap(device: torch.device) -> AbstractContextManager[object]:
    """A context around a `torch.vmap` by which a `torch.autocast` around both reaches all that is computed in it: torch
    takes convolutions, linear layers and attention apart for vmap before autocast has seen them. Without an autocast it
    does nothing."""
    return _AutocastUnderVmap() if _is_autocast(device) else nullcontext()


class _AutocastUnderVmap(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return attention_forward(*args, **kwargs)
        # It is given 16 bits now, and under torch.compile is not one of `VmapRules`; these give it on as the second.
        if func in (F.batch_norm, batch_norm):
            return _batch_norm(func, *args, **kwargs)
        if func in _PRODUCTS:
            device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            if _is_autocast(device):  # and nothing inside has turned it off
                dtype = torch.get_autocast_dtype(device.type)
                args = tuple(_cast(value, dtype) for value in args)
                kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` by torch's own kernel, on a GPU too.

    That function would take cuDNN's there, for which it first asks in what order the input lies in memory; under vmap
    nobody knows, and it fails. It also fails under vmap where the input has 16 bits and the statistics have 32: here
    they meet in the wider type.
    """
    if not _is_sound(input, running_mean, running_var, weight, bias, training):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dtype = input.dtype
    for other in (running_mean, weight):
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    wide = input.to(dtype)
    output, _, _ = torch.native_batch_norm(wide, weight, bias, running_mean, running_var, training, momentum, eps)
    return output.to(input.dtype)


def _is_sound(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> bool:
    """Whether torch's kernel can be called, which looks at nothing; what it cannot take `F.batch_norm` refuses by name,
    or returns as it is, before it has chosen a kernel."""
    if input.dim() < 2 or not input.is_floating_point():
        return False
    channels = input.shape[1]
    has_statistics = running_mean is not None and running_var is not None
    return (
        input.numel() > (channels if training else 0)
        and (has_statistics or (training and running_mean is None and running_var is None))
        and all(given is None or given.numel() == channels for given in (running_mean, running_var, weight, bias))
    )


def _is_autocast(device: torch.device) -> bool:
    # Of the meta device torch has none, and raises; torch.compile cannot trace its question for that in torch 2.7.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """As autocast does it, which leaves float64 alone."""
    is_cast = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_cast else value


def _as_it_is(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _batch_norm(func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """By `batch_norm`, unless a mode outside of this one has another way."""
    if has_torch_function((input,)):
        return handle_torch_function(batch_norm, (input,), input, *args, **kwargs)
    return batch_norm(input, *args, **kwargs)


def _recurrent(func: Callable[..., Any], input: Tensor, *args: Any) -> Any:
    """Under a level of grad torch computes these step by step, by functions that all have a rule."""
    # The steps add in place, so that whatever they start from must be mapped where anything is.
    place = int(isinstance(args[0], Tensor) and not args[0].is_floating_point())  # after the lengths of a packed batch
    input, state = tree.mapped_with((input, args[place]), (input, args))
    return torch.func.vjp(lambda input: func(input, *args[:place], state, *args[place + 1 :]), input)[0]


def _normalize(func: Callable[..., Any], *args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    """A spectral norm writes its vectors by `out`, which no rule knows."""
    return func(*args, **kwargs) if out is None else out.copy_(func(*args, **kwargs))


def _rrelu(
    func: Callable[..., Any],
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """In evaluation, and so with the slope that is the mean of all; in training `randomness.Seeded` comes first."""
    if training:
        return func(input, lower, upper, training, inplace)
    return F.leaky_relu(input, (lower + upper) / 2, inplace)


def _no(func: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """A transformer asks whether a mask would let it compute on nested tensors, of which vmap knows nothing."""
    return False


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: _recurrent,
    torch.gru: _recurrent,
    torch.rnn_tanh: _recurrent,
    torch.rnn_relu: _recurrent,
    torch.lstm_cell: _recurrent,
    F.batch_norm: _batch_norm,
    F.normalize: _normalize,
    F.rrelu: _rrelu,
    torch._nested_tensor_from_mask_left_aligned: _no,  # pyright: ignore[reportPrivateImportUsage]
}

_PRODUCTS = (
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(F.linear, F.scaled_dot_product_attention),
    *(torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm),
    *(Tensor.addmm, Tensor.addmv, Tensor.addbmm, Tensor.baddbmm),
)
"""What `_AutocastUnderVmap` casts the arguments of; other products autocast sees by itself."""
