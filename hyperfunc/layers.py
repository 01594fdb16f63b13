"""What the type of a layer says of its parameters: which axis is which, the fan-in, and the variance to start with."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from hyperfunc.tiling import Kernel, plain_kernel

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
OUTPUT_PROJECTION = nn.modules.linear.NonDynamicallyQuantizableLinear
"""What `nn.MultiheadAttention` has as `out_proj`, and nothing else of torch."""


def is_linear_map(layer: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a convolution, of a linear layer, or of an attention's projections."""
    if isinstance(layer, nn.MultiheadAttention):
        return name in PROJECTIONS
    is_known = isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)) or is_gpt2_linear(layer)
    return name == "weight" and is_known


def is_gpt2_linear(layer: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in Hugging Face's transformers, whose weight is (in, out). It is known by
    its name, so that nobody needs that library."""
    weight = getattr(layer, "weight", None)
    is_flat = isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == getattr(layer, "nf", None)
    return type(layer).__name__ == "Conv1D" and is_flat


def is_weight(layer: nn.Module, name: str) -> bool:
    """Whether a parameter is what a layer is there for, and neither a bias nor the scale of a norm."""
    others = (nn.Bilinear, *EMBEDDINGS)
    is_recurrent = isinstance(layer, RECURRENT) and name.startswith("weight_")
    return is_linear_map(layer, name) or is_recurrent or (name == "weight" and isinstance(layer, others))


def kernel_of(layer: nn.Module, name: str, unit: tuple[int, int]) -> Kernel:
    """How a parameter of a layer is tiled, and the variance that it starts with.

    The variance keeps the scale of what goes through: 2 / fan_in (He et al. 2015, equation 10) for convolutions and
    linear layers, and for parameters of layers that are not known here, which are read as (out, in, *window);
    1 / fan_in, without the 2 that makes up for a rectifier, for the projections of `nn.MultiheadAttention` (Glorot and
    Bengio 2010) and for recurrent layers; 1 for embeddings, as torch draws them, because a lookup sums over nothing.
    Biases start at 0 and norms at 1 exactly.

    Fan-in is counted as the sum has it. Each of an attention's stacked projections sums over its own input alone. One
    output of a transposed convolution sums over the input channels of its group, and over those taps of the window that
    the stride lets fall on it (Dumoulin and Visin 2016, section 4): kernel / stride of them along each axis, or one
    where the window is the smaller.

    Args:
        layer: The layer that holds the parameter.
        name: Of the parameter in the layer.
        unit: Output and input channels of a basic kernel; weights of grouped convolutions that have fewer input
            channels than that are folded to fill them.

    Raises:
        ValueError: The parameter is a single number, or has no entries, or is a vector of a layer that is not known
            here, and by its name no bias: it may be a scale, which at 0 would let nothing through.
    """
    shape = tuple(layer.get_parameter(name).shape)
    if not shape:
        raise ValueError("a single number has no channels to generate it by; leave it out of the targets")
    if not math.prod(shape):
        raise ValueError(f"it has the shape {shape}, without any entry; leave it out of the targets")
    is_norm = isinstance(layer, NORMS)
    if len(shape) == 1 or is_norm or (isinstance(layer, nn.MultiheadAttention) and name in ("bias_k", "bias_v")):
        if not is_norm and "bias" not in name:
            raise ValueError(
                f"where its vector `{name}` starts is not known of {type(layer).__name__}; leave it out of the "
                "targets, call it a bias if it may start at 0, or derive the layer from torch's norm if it is the "
                "scale of one"
            )
        is_scale = is_norm and name == "weight"
        return Kernel(shape, (math.ceil(math.prod(shape) / unit[1]), unit[1]), 1, 0.0, mean=float(is_scale))
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS) and name == "weight":
        return _transposed(layer, shape, unit)
    if is_gpt2_linear(layer) and name == "weight":
        return Kernel(shape, shape[::-1], shape[0], (2 / shape[0]) ** 0.5, transposed=True)
    if isinstance(layer, CONVOLUTIONS) and name == "weight" and layer.groups > 1:
        return plain_kernel(shape)._replace(plane=_folded(shape, unit))
    if isinstance(layer, nn.Bilinear) and name == "weight":
        return plain_kernel(shape)._replace(plane=(shape[0], math.prod(shape[1:])))
    if isinstance(layer, EMBEDDINGS) and name == "weight":
        return Kernel(shape, shape, 1, 1.0, zero_row=layer.padding_idx)
    kernel = plain_kernel(shape)
    if isinstance(layer, (nn.MultiheadAttention, OUTPUT_PROJECTION, *RECURRENT)):
        return kernel._replace(std=kernel.fan_in**-0.5)
    return kernel


def _transposed(layer: nn.Module, shape: Sequence[int], unit: tuple[int, int]) -> Kernel:
    """Of a weight (in, out / groups, *window)."""
    assert isinstance(layer, TRANSPOSED_CONVOLUTIONS)
    fan_in = shape[0] / layer.groups
    for extent, stride, dilation in zip(shape[2:], layer.stride, layer.dilation, strict=True):
        # The taps stand `dilation` apart, so that they fall on this many of the outputs between two inputs, on all
        # alike; the others get nothing.
        fan_in *= extent / min(extent, stride // math.gcd(stride, dilation))
    std = (2 / fan_in) ** 0.5
    if layer.groups > 1:
        return Kernel(tuple(shape), _folded(shape, unit), fan_in, std)
    return Kernel(tuple(shape), (shape[1], shape[0], *shape[2:]), fan_in, std, transposed=True)


def _folded(shape: Sequence[int], unit: tuple[int, int]) -> tuple[int, ...]:
    """(rows, columns, *window) with as many rows of `shape` in one as fit into the input channels of a unit."""
    fold = min(max(1, unit[1] // shape[1]), shape[0])
    return (math.ceil(shape[0] / fold), fold * shape[1], *shape[2:])
