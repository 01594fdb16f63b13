"""3x3 convolutions of a step that is compiled for the CPU, by Winograd's minimal filtering F(2x2, 3x3).

On a CPU with AVX2 and without AVX-512 torch computes a convolution as it is written down. Here 2x2 pixels of the output
are made of 4x4 of the input by 16 multiplications per pair of channels, and not 36 (Lavin and Gray 2015, arXiv
1509.09308, section 4.1), at the cost of sums before and after. The gradient with respect to the input is a convolution
itself, and that with respect to the kernel is the adjoint of the same formula. `winograd.cpp` computes them; here are
the operators by which torch knows them, and the pass that puts these into a graph of torch.compile.

They take pictures and kernels as they lie in channels_last order, in which nothing is copied to call them: a copy would
be compiled for each layer anew, because where its kernel begins in the tensor of all kernels would stand in the code.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

SOURCE = Path(__file__).with_suffix(".cpp")
SOURCES = __file__, str(SOURCE)

CHANNELS = 16
"""The operators take multiples of it."""

MOST_CHANNELS = 256
"""Of a convolution that the pass replaces: the sums of more do not fit a core's cache."""

BLOCK = 64
"""Tiles that are transformed, multiplied and transformed back at a time."""


def is_worthwhile() -> bool:
    """Whether it is faster here than torch's own convolutions: it was measured with AVX2 alone."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


@functools.cache
def operators() -> Any:
    """`torch.ops.hyperfunc`, whose `convolve`, `input_gradient` and `kernel_gradient` are registered at the first call.

    They take contiguous float32 tensors on the CPU, whose numbers of channels are multiples of 16. A convolution is of
    stride 1 and padded by 1.

    - `convolve(pictures, kernel, bias)`: pictures (n, h, w, in), kernel (out, 3, 3, in), bias (out) or None; gives
      (n, h, w, out).
    - `input_gradient(gradient, kernel)`: the gradient (n, h, w, out) of what `convolve` made by the kernel; gives that
      of the pictures.
    - `kernel_gradient(pictures, gradient)`: gives that of the kernel.

    The first use of one compiles `winograd.cpp`, which takes seconds, unless torch's cache on disk has it.
    """
    for name, signature, function, like in (
        ("convolve", "(Tensor pictures, Tensor kernel, Tensor? bias) -> Tensor", _convolve, _empty_outputs),
        ("input_gradient", "(Tensor gradient, Tensor kernel) -> Tensor", _input_gradient, _empty_inputs),
        ("kernel_gradient", "(Tensor pictures, Tensor gradient) -> Tensor", _kernel_gradient, _empty_kernel),
    ):
        torch.library.define(f"hyperfunc::{name}", signature, tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.impl(f"hyperfunc::{name}", "cpu", function)
        torch.library.register_fake(f"hyperfunc::{name}", like)
    return torch.ops.hyperfunc


def replace_convolutions(graph: Graph) -> None:
    """Replaces those convolutions of a graph of ATen operators, and their gradients, that `operators` can compute."""
    aten = torch.ops.aten
    laid_out: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if node.target is aten.convolution.default:
            pictures, kernel, bias, *rest = node.args
            # A bias that is cut out of a larger tensor is rare, and its convolution left to torch.
            if _is_ours(pictures, kernel, rest) and (bias is None or bias.meta["val"].is_contiguous()):
                with graph.inserting_before(node):
                    inputs = _channels_last(graph, pictures, laid_out), _channels_last(graph, kernel, laid_out), bias
                    node.replace_all_uses_with(_channels_first(graph, operators().convolve.default, *inputs))
                graph.erase_node(node)
        elif node.target is aten.convolution_backward.default:
            _, pictures, kernel, _, *rest, _ = node.args
            if _is_ours(pictures, kernel, rest):
                _replace_backward(graph, node, laid_out)


def _replace_backward(graph: Graph, node: Node, laid_out: dict[Node, Node]) -> None:
    arguments: Any = node.args
    gradient, pictures, kernel, *_ = arguments
    with graph.inserting_before(node):
        for use in list(node.users):
            match use.args[1]:
                case 0:
                    inputs = [_channels_last(graph, each, laid_out) for each in (gradient, kernel)]
                    new = _channels_first(graph, operators().input_gradient.default, *inputs)
                case 1:
                    inputs = [_channels_last(graph, each, laid_out) for each in (pictures, gradient)]
                    new = _channels_first(graph, operators().kernel_gradient.default, *inputs)
                case _:
                    new = _call(graph, torch.ops.aten.sum.dim_IntList, gradient, [0, 2, 3])
            use.replace_all_uses_with(new)
            graph.erase_node(use)
    graph.erase_node(node)


def _is_ours(pictures: Node, kernel: Node, rest: list[Any]) -> bool:
    """Whether a convolution is one of `operators`'; `rest` is what follows the bias."""
    stride, padding, dilation, is_transposed, _, groups = rest
    values, weights = pictures.meta["val"], kernel.meta["val"]
    return (
        weights.shape[2:] == (3, 3)
        and [*stride, *padding, *dilation] == [1] * 6
        and not is_transposed
        and groups == 1
        and all(channels % CHANNELS == 0 and channels <= MOST_CHANNELS for channels in weights.shape[:2])
        and all(value.dtype == torch.float32 and value.device.type == "cpu" for value in (values, weights))
    )


def _channels_last(graph: Graph, node: Node, laid_out: dict[Node, Node]) -> Node:
    """A contiguous tensor of these (n, h, w, c), for pictures or a kernel (n, c, h, w); in channels_last order it is a
    view, and else a copy, which is made once and found in `laid_out` by whatever follows."""
    if node not in laid_out:
        permuted = _call(graph, torch.ops.aten.permute.default, node, [0, 2, 3, 1])
        if not permuted.meta["val"].is_contiguous():
            permuted = _call(graph, torch.ops.aten.clone.default, permuted, memory_format=torch.contiguous_format)
        laid_out[node] = permuted
    return laid_out[node]


def _channels_first(graph: Graph, target: Any, *args: Node | None) -> Node:
    """The result of one of `operators` as torch has it, (n, c, h, w)."""
    return _call(graph, torch.ops.aten.permute.default, _call(graph, target, *args), [0, 3, 1, 2])


def _call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A node for a call, which knows, as Inductor asks of it, what its value looks like."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args), **kwargs)
    return node


def _convolve(pictures: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    _check_shape("kernel", kernel, (len(kernel), 3, 3, pictures.shape[3]))
    if bias is not None:
        _check_shape("bias", bias, (len(kernel),))
    result = _empty_outputs(pictures, kernel, bias)
    _run("convolve", (pictures, kernel, bias, result), (*pictures.shape, len(kernel)))
    return result


def _input_gradient(gradient: Tensor, kernel: Tensor) -> Tensor:
    _check_shape("kernel", kernel, (gradient.shape[3], 3, 3, kernel.shape[3]))
    result = _empty_inputs(gradient, kernel)
    _run("input_gradient", (gradient, kernel, result), (*result.shape, len(kernel)))
    return result


def _kernel_gradient(pictures: Tensor, gradient: Tensor) -> Tensor:
    _check_shape("gradient", gradient, (*pictures.shape[:3], gradient.shape[3]))
    result = _empty_kernel(pictures, gradient)
    _run("kernel_gradient", (pictures, gradient, result), (*pictures.shape, gradient.shape[3]))
    return result


def _empty_outputs(pictures: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    return pictures.new_empty(*pictures.shape[:3], len(kernel))


def _empty_inputs(gradient: Tensor, kernel: Tensor) -> Tensor:
    return gradient.new_empty(*gradient.shape[:3], kernel.shape[3])


def _empty_kernel(pictures: Tensor, gradient: Tensor) -> Tensor:
    return pictures.new_empty(gradient.shape[3], 3, 3, pictures.shape[3])


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name}: got the shape {tuple(tensor.shape)}, expected {expected} beside the other arguments")


def _run(name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    """Calls a function of the library; `sizes` are n, h, w, in and out."""
    for tensor in tensors:
        if tensor is not None and not (tensor.is_contiguous() and tensor.dtype == torch.float32):
            raise ValueError(f"{name}: got strides {tensor.stride()} and {tensor.dtype}, expected contiguous float32")
    if sizes[3] % CHANNELS or sizes[4] % CHANNELS:
        raise ValueError(f"{name}: got {sizes[3]} and {sizes[4]} channels, expected multiples of {CHANNELS}")
    pointers = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    numbers = [ctypes.c_int64(number) for number in (*sizes, BLOCK, torch.get_num_threads())]
    getattr(_library(), name)(*pointers, *numbers)


@functools.cache
def _library() -> Any:
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(SOURCE.read_text())
