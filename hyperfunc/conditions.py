"""Weights that depend on a condition: a task, a continuous vector, or the input itself.

An encoder turns a condition into a code e of k numbers; the code, at norm 1, mixes k tables of embeddings,
z_u(e) = sum_j e_j Z[j, u], and from there on everything is as in the model without a condition. Kernels are linear in
z, so that a code that grows would make kernels that grow with it: hence the norm 1 (Ortiz, Guttag and Dalca 2023,
arXiv 2304.07645). The part of the weights that no condition reaches, that paper's independent parameters, is here what
the generator's biases give, and the parameters that are not generated.
"""

# torch.compile cannot trace the evaluation of an annotation, and functions are defined inside of what it traces.
from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Integer
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hyperfunc import tree
from hyperfunc.arguments import positive
from hyperfunc.hypernet import HyperNetParams, init_embeddings, root_mean_squares
from hyperfunc.model import BatchStats, Model, Params, check_model
from hyperfunc.primary import check_module, check_values, one_thread_at_a_time
from hyperfunc.randomness import Seed, as_traced, fold_in
from hyperfunc.vmap_rules import VmapRules, autocast_under_vmap, batch_norm


class Encoder(NamedTuple):
    """A function from conditions to codes; `table`, `bounded` and `from_module` make one, and your own is
    `Encoder(init, apply, code_dim)`.

    Attributes:
        init: `init(generator) -> params`, a pytree; an empty dict for an encoder without parameters.
        apply: `apply(params, conditions) -> codes`: a batch of conditions, stacked along the first dimension, to codes
            of shape (batch, code_dim). Each code depends on its own condition alone.
        code_dim: Number of entries of a code.
    """

    init: Callable[[Generator], Any]
    apply: Callable[[Any, Tensor], Tensor]
    code_dim: int


class ConditionalParams(NamedTuple):
    """Everything that is trained.

    Attributes:
        encoder: The encoder's own parameters.
        model: Those of the model, except that each tensor in `embeddings` has the shape (code_dim, units, z).
    """

    encoder: Any
    model: Params


class ConditionalForward(Protocol):
    """A conditional network; returns the output and the new buffers."""

    def __call__(
        self,
        params: ConditionalParams,
        batch_stats: BatchStats,
        condition: Tensor,
        /,
        *args: Any,
        train: bool,
        seed: Seed | None = None,
        **kwargs: Any,
    ) -> tuple[Any, BatchStats]: ...


class Conditional(NamedTuple):
    """A model whose generated weights depend on a condition, as pure functions.

    For one set of weights per condition, map: `torch.vmap(kernels, in_dims=(None, 0))(params, conditions)`.

    Attributes:
        init: `init(generator) -> (params, batch_stats)`, on the generator's device.
        apply: `apply(params, batch_stats, condition, *args, train, seed=None, **kwargs) -> (output, new batch_stats)`:
            one condition, and so one network, for the whole batch.
        apply_each: `apply_each(params, batch_stats, conditions, *args, train, seed=None, **kwargs)`: a condition for
            each sample, which goes through weights of its own. Conditions and `args` are stacked along the first
            dimension, and so are the outputs, of which the module, too, must have the samples there; `kwargs` are the
            same for all samples. Without `args` each network's whole output is a row of the result. In evaluation it
            equals a loop over the samples. In training a batch norm takes mean and variance over all samples of the
            batch (and their pixels), each sample from its own weights, and updates the one set of running statistics by
            them: what an ordinary network does, and exactly that where all conditions are equal. A loop over samples
            could not do that: it would normalise each sample by itself, unlike evaluation. Buffers of other kinds that
            a module writes are those of the first sample. Under a `seed` dropout draws for each sample by itself.
        at: `at(params, condition) -> Params` of `model`: the network of one condition by itself, for `materialize`,
            `save` and all else that takes a model's parameters.
        kernels: `kernels(params, condition) -> {name: tensor}`, the generated tensors.
        weights: `weights(params, condition) -> {name: tensor}`, all parameters of the primary network.
        model: The model without a condition.
        encoder: What turns conditions into codes.
    """

    init: Callable[[Generator], tuple[ConditionalParams, BatchStats]]
    apply: ConditionalForward
    apply_each: ConditionalForward
    at: Callable[[ConditionalParams, Tensor], Params]
    kernels: Callable[[ConditionalParams, Tensor], dict[str, Tensor]]
    weights: Callable[[ConditionalParams, Tensor], dict[str, Tensor]]
    model: Model
    encoder: Encoder

    def __repr__(self) -> str:
        return f"<Conditional of {self.model!r}, codes of {self.encoder.code_dim}>"


def conditional(model: Model, encoder: Encoder) -> Conditional:
    """A model whose embeddings depend on a condition.

    At init every entry of a code has a table of embeddings drawn like the model's own; since a code has norm 1, the
    mixture has the variance that each layer calls for, whatever the condition. The encoder's codes are brought to
    norm 1 here. A code of zeros stays zeros, and leaves the generator's biases; it has no direction, and near it
    gradients grow without bound: start codes that are trained themselves away from it.

    Raises:
        ValueError: The model generates nothing, or is not a Model; `encoder` is not an Encoder, or its code has no
            entry. The functions of the result raise one for conditions, or codes, of a wrong shape.
    """
    check_model(model, "hyperize makes one of a module; others cannot be made to depend on a condition")
    if not isinstance(encoder, Encoder):
        raise ValueError(
            f"encoder: got {type(encoder).__name__}, expected an Encoder; conditions.from_module makes one of a module"
        )
    if not model.tiling.names:
        raise ValueError(
            "model: it generates none of its weights, so that nothing could depend on a condition; "
            "expected one of hyper_resnet or hyperize"
        )
    positive("encoder.code_dim", encoder.code_dim)

    def init(generator: Generator) -> tuple[ConditionalParams, BatchStats]:
        params, batch_stats = model.init(generator)
        tables: dict[str, Tensor] = {}
        for key, z in params.embeddings.items():
            others = _draw_alike(generator, params.generator[key], z, encoder.code_dim - 1)
            tables[key] = torch.stack([z, *others])
        encoder_params = encoder.init(generator)
        return ConditionalParams(encoder_params, params._replace(embeddings=tables)), batch_stats

    def codes(params: ConditionalParams, conditions: Tensor) -> Float[Tensor, "n code"]:
        if not isinstance(params, ConditionalParams):
            raise ValueError(
                f"params: got a {type(params).__name__}, expected the ConditionalParams of the conditional model's init"
            )
        found = encoder.apply(params.encoder, conditions)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"encoder: got a {type(found).__name__}, expected a tensor of codes; around a recurrent layer, for "
                "example, put a module that returns its last output alone"
            )
        if found.shape != (len(conditions), encoder.code_dim):
            raise ValueError(
                f"encoder: for {len(conditions)} conditions of shape {tuple(conditions.shape[1:])} got codes of shape "
                f"{tuple(found.shape)}, expected {(len(conditions), encoder.code_dim)}; set code_dim to the "
                "size of the encoder's output, and let the encoder keep the first dimension; for a condition for each "
                "sample there is apply_each"
            )
        if not found.is_floating_point():
            raise ValueError(
                f"encoder: got {tree.dtype_name(found.dtype)} codes, expected real ones; convert them by .float(), and "
                "complex ones by torch.view_as_real"
            )
        # The usual least length is 0 in fp16, and a code of zeros would be divided by it.
        return F.normalize(found, dim=1, eps=max(1e-12, torch.finfo(found.dtype).tiny))

    def mix(params: ConditionalParams, code: Float[Tensor, "code"]) -> Params:
        tables = params.model.embeddings
        # Back to the type of the tables, by which norms and biases stay what they are under autocast.
        mixed = {
            key: torch.einsum("k,kuz->uz", code.to(table.dtype), table).to(table.dtype) for key, table in tables.items()
        }
        # Not _replace, which torch.compile cannot trace in torch 2.7.
        return Params(params.model.generator, mixed, params.model.primary)

    def at(params: ConditionalParams, condition: Tensor) -> Params:
        _check_tensor("condition", condition)
        return mix(params, codes(params, condition.unsqueeze(0))[0])

    def kernels(params: ConditionalParams, condition: Tensor) -> dict[str, Tensor]:
        return model.kernels(at(params, condition))

    def weights(params: ConditionalParams, condition: Tensor) -> dict[str, Tensor]:
        return model.weights(at(params, condition))

    def apply(
        params: ConditionalParams, batch_stats: BatchStats, condition: Tensor, /, *args: Any, train: bool, **kwargs: Any
    ) -> tuple[Any, BatchStats]:
        return model.apply(at(params, condition), batch_stats, *args, train=train, **kwargs)

    def apply_each(
        params: ConditionalParams,
        batch_stats: BatchStats,
        conditions: Tensor,
        /,
        *args: Any,
        train: bool,
        seed: Seed | None = None,
        **kwargs: Any,
    ) -> tuple[Any, BatchStats]:
        _check_tensor("conditions", conditions)
        _check_one_a_sample(conditions, args, kwargs)
        if args and _has_samples_second(model.module):
            raise ValueError(
                f"apply_each: {type(model.module).__name__} takes or gives its samples in the second dimension; make "
                "it with batch_first=True and, around a recurrent layer, put a module that returns its output alone; "
                "or map with torch.vmap(apply)"
            )
        # Each sample goes in as a batch of one, because a module may not know how to do without a batch.
        singles = tree.map(lambda leaf: leaf.unsqueeze(1), args)

        def one(code: Tensor, index: Tensor, sample: tuple[Any, ...]) -> tuple[Any, BatchStats]:
            own_seed = None if seed is None else fold_in(as_traced(seed, index.device), index)
            return model.apply(mix(params, code), batch_stats, *sample, train=train, seed=own_seed, **kwargs)

        with autocast_under_vmap(conditions.device), _BatchNormOverSamples(len(conditions)):
            index = torch.arange(len(conditions), device=conditions.device)
            outputs, new_stats = torch.vmap(one, randomness="different")(codes(params, conditions), index, singles)
        # The statistics are those of the whole batch, and so the same from every sample.
        if args:
            outputs = tree.map(lambda leaf: leaf.flatten(0, 1) if leaf.dim() > 1 else leaf, outputs)
        return outputs, tree.map(lambda leaf: leaf[0].clone(), new_stats)

    return Conditional(init, apply, apply_each, at, kernels, weights, model, encoder)


def table(count: int) -> Encoder:
    """For tasks by number, from 0 to `count` - 1: the code is one-hot, so that each task has embeddings of its own.

    A condition is an integer tensor of shape (); a batch of them has the shape (n,). On a GPU, under `torch.vmap` and
    when compiled nobody can look at a number, and one out of range gets a code of zeros.

    Raises:
        ValueError: `count` is not a whole number of at least 1.
    """
    count = positive("count", count)

    def apply(_params: Any, conditions: Integer[Tensor, "n"]) -> Float[Tensor, "n count"]:
        whole = not (conditions.is_floating_point() or conditions.is_complex() or conditions.dtype == torch.bool)
        if conditions.dim() != 1 or not whole:
            raise ValueError(
                f"condition: got {tree.describe(conditions[0])}, expected the number of a task, an integer tensor of "
                "shape () for one condition and (n,) for a batch; for a condition for each sample there is apply_each"
            )
        if tree.is_readable(conditions) and not bool(((conditions >= 0) & (conditions < count)).all()):
            raise ValueError(f"condition: got task {conditions.tolist()}, expected 0 to {count - 1}")
        numbers = torch.arange(count, device=conditions.device)
        return (conditions.unsqueeze(1) == numbers).to(torch.get_default_dtype())

    return _described(apply, count, lambda: {"function": "table", "count": count})


def bounded(low: Sequence[float], high: Sequence[float]) -> Encoder:
    """For vectors within bounds: the code is `encode_bounded` of the vector, two numbers an entry, without parameters.
    A vector outside of them gets the code of another one. Weights are then sums of functions of one entry each; where
    entries are to act on each other, `from_module` takes a network that mixes them.

    A condition is a tensor of shape (len(low),).

    Raises:
        ValueError: The bounds are no sequences, or of different lengths or empty, or a lower one is not below its
            upper one, or not finite.
    """
    for name, bounds in (("low", low), ("high", high)):
        if not hasattr(bounds, "__len__"):
            raise ValueError(
                f"{name}: got {bounds!r}, expected a bound for each entry of the vector, such as [{bounds}]"
            )
    if len(low) != len(high) or not len(low):
        raise ValueError(f"low, high: got {len(low)} and {len(high)} bounds, expected one of each for every entry")
    for lower, upper in zip(low, high, strict=True):
        _check_bounds(lower, upper)
    bounds = {"low": [float(bound) for bound in low], "high": [float(bound) for bound in high]}
    lows = bounds["low"]
    spans = [upper - lower for lower, upper in zip(*bounds.values(), strict=True)]

    def apply(_params: Any, conditions: Float[Tensor, "n entries"]) -> Float[Tensor, "n code"]:
        if conditions.dim() != 2 or conditions.shape[1] != len(lows):
            raise ValueError(
                f"condition: got the shape {tuple(conditions.shape[1:])}, expected ({len(lows)},), an entry for each "
                "pair of bounds"
            )
        # By numbers and not by tensors of them, which a CUDA graph could not copy to the device.
        columns = zip(conditions.unbind(1), lows, spans, strict=True)
        return encode_bounded(torch.stack([(column - lower) / span for column, lower, span in columns], dim=1))

    return _described(apply, 2 * len(lows), lambda: {"function": "bounded", **bounds})


def encoder_recipe(encoder: Encoder) -> dict[str, Any] | None:
    """The function that made an encoder and its arguments, as JSON can hold them: what a file needs to make it again,
    or, of one that `from_module` made, to know it by. None for one that is made of other code."""
    function, recipe = getattr(encoder.apply, "_recipe", (None, None))
    return recipe() if recipe is not None and function is encoder.apply else None


def _described(
    apply: Callable[[Any, Tensor], Tensor],
    code_dim: int,
    recipe: Callable[[], dict[str, Any]],
    init: Callable[[Generator], Any] = lambda _generator: {},
) -> Encoder:
    """An encoder, without parameters if no `init` is given. What makes its recipe stands at the function `apply`, and
    names it: one that wraps it gets a copy of what stands there."""
    vars(apply)["_recipe"] = apply, recipe
    return Encoder(init, apply, code_dim)


def from_module(module: nn.Module, code_dim: int) -> Encoder:
    """An encoder of the user's own: any module that turns a batch of conditions into codes of shape (batch, code_dim).

    The module is copied, and its parameters start from the values that they have in it. It runs in evaluation mode: a
    pure function has no place for what a dropout in an encoder would draw. Its buffers are constants. Where it has any,
    a model for a CUDA graph has to be initialised on the device, with a `torch.Generator("cuda")`, and not moved there:
    otherwise each call would copy the buffers from the host, which a graph cannot.

    Args:
        module: Takes conditions stacked along the first dimension. Bounded conditions train best through
            `encode_bounded` in front of it.
        code_dim: Number of entries that it puts out.

    Raises:
        ValueError: The module normalises over the batch, which would make a code depend on other conditions; or it is
            one that `hyperize` would not take either, such as a lazily initialised or quantized one. The encoder
            raises one for conditions that the module cannot take.
    """
    check_module(module)
    for path, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"module: {path or 'it'} is a {type(layer).__name__}, which makes a code depend on the other "
                "conditions of the batch; use LayerNorm or GroupNorm in an encoder"
            )
    values = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    check_values({**values, **buffers})
    skeleton = copy.deepcopy(module).eval()
    locked = one_thread_at_a_time()
    # By device, so that a call copies nothing to one that a model was initialised on: a CUDA graph could not.
    ready: dict[torch.device, dict[str, Tensor]] = {}

    def init(generator: Generator) -> dict[str, Tensor]:
        moved = tree.to(buffers, generator.device)
        ready.update({leaf.device: moved for leaf in moved.values()})
        return tree.map(lambda leaf: leaf.to(generator.device, copy=True), values)

    def apply(params: Mapping[str, Tensor], conditions: Tensor) -> Any:
        constants = ready[conditions.device] if conditions.device in ready else tree.to(buffers, conditions.device)
        try:
            with VmapRules() if tree.is_mapped((params, conditions)) else nullcontext(), locked():
                return functional_call(skeleton, {**params, **constants}, (conditions,), strict=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"condition: the encoder's module ({type(module).__name__}) cannot take {len(conditions)} conditions, "
                f"each {tree.describe(conditions[0])}: {error}; give conditions of the shape and dtype that it was "
                "made for"
            ) from error

    return _described(apply, code_dim, lambda: {"function": "from_module", "buffers": _digest(buffers)}, init)


def encode_bounded(
    values: Float[Tensor, "*batch n"], low: float = 0.0, high: float = 1.0
) -> Float[Tensor, "*batch two_n"]:
    """Bounded numbers as vectors of norm 1, whatever the numbers.

    With t = (value - low) / (high - low) the code is (cos(pi t_1 / 2), ..., cos(pi t_n / 2), sin(pi t_1 / 2), ...,
    sin(pi t_n / 2)) / sqrt(n): the encoding of Ortiz, Guttag and Dalca (2023, arXiv 2304.07645), whose norm is sqrt(n),
    divided by it. A plain number as input would scale whatever is linear in it.

    Args:
        values: From `low` to `high`; others still have norm 1, but folded onto the same circle.
        low: The least value.
        high: The greatest value.

    Raises:
        ValueError: `low` is not below `high`, or one is not finite, or the last dimension is empty.
    """
    _check_bounds(low, high)
    if not values.dim() or not values.shape[-1]:
        raise ValueError(
            f"values: got the shape {tuple(values.shape)}, expected a last dimension of at least one entry"
        )
    angle = (values - low) * (torch.pi / 2 / (high - low))
    return torch.cat([angle.cos(), angle.sin()], dim=-1) / values.shape[-1] ** 0.5


def _digest(buffers: Mapping[str, Tensor]) -> str:
    """The SHA-256 of all names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name, leaf in sorted(buffers.items()):
        total.update(f"{name} ".encode() + tree.to_bytes(leaf))
    return total.hexdigest()


class _BatchNormOverSamples(TorchFunctionMode):
    """Makes a batch norm that stands under `torch.vmap` over samples take its statistics over all of them.

    Without it every sample would be normalised by itself, or refused for being one. The mode stands around the call
    and not in the module, so that the primary network stays the user's own.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.batch_norm, batch_norm):
            return _batch_norm(self.samples, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    samples: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, with the statistics over the mapped dimension too where it is training."""
    if not training:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    count = samples * input.numel() // input.shape[1]
    if count < 2:
        raise ValueError(
            f"conditions: got {samples}, with one value per channel in a batch norm; expected more, or train=False"
        )
    dtype = input.dtype
    input = input.to(torch.promote_types(dtype, torch.float32))  # 16 bits hold no sums over a batch
    dims = [dim for dim in range(input.dim()) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(input.dim())]
    mean = _mean_over_samples(input.mean(dims))
    centered = input - mean.view(shape)
    variance = _mean_over_samples(centered.square().mean(dims))
    for running, new in ((running_mean, mean), (running_var, variance * (count / (count - 1)))):
        if running is not None:
            running.copy_((1 - momentum) * running + momentum * new.detach().to(running.dtype))
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    normalized = centered * scale.view(shape)
    if bias is not None:
        normalized = normalized + bias.view(shape)
    return normalized.to(dtype)


# An operator and not an autograd.Function, whose rule for vmap torch.compile does not follow.
@torch.library.custom_op("hyperfunc::mean_over_samples", mutates_args=(), schema="(Tensor x) -> Tensor")
def _mean_over_samples(x: Tensor) -> Tensor:
    """The mean over the dimension that `torch.vmap` hides, which only the operator's rule for vmap can see."""
    return x.clone()


def _mean_over_samples_rule(_info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, None]:
    return (x if in_dims[0] is None else x.mean(in_dims[0])), None


_mean_over_samples.register_fake(torch.empty_like)
_mean_over_samples.register_vmap(_mean_over_samples_rule)
_mean_over_samples.register_autograd(lambda _ctx, grad: grad)


def _draw_alike(generator: Generator, p: HyperNetParams, z: Float[Tensor, "units z"], times: int) -> list[Tensor]:
    """So many other tables of embeddings like z, whose kernels have the root mean square of those that z gives, biases
    left out."""
    linear = p._replace(b_in=torch.zeros_like(p.b_in), b_out=torch.zeros_like(p.b_out))
    default = torch.get_default_dtype()  # in which init_embeddings draws
    std, drawing = root_mean_squares(linear, z).to(default), tree.to(linear, default)
    return [init_embeddings(generator, drawing, std).to(z.dtype) for _ in range(times)]


def _check_bounds(low: float, high: float) -> None:
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low, high: got {low} and {high}, expected finite numbers, the first less than the second")


def _check_tensor(name: str, conditions: Any) -> None:
    if not isinstance(conditions, Tensor):
        raise ValueError(f"{name}: got {conditions!r}, expected a tensor; make it one with torch.tensor")


def _has_samples_second(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers for sequences in its usual form, or one whose last state is so in any."""
    if isinstance(module, nn.RNNBase):
        return True
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        module = module.layers[0]
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = module.self_attn
    return getattr(module, "batch_first", True) is False


def _check_one_a_sample(conditions: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if not conditions.dim():
        raise ValueError(
            "conditions: got a single number, expected one condition a sample, stacked along the first dimension; "
            "for one condition for all samples use apply"
        )
    if not len(conditions):
        raise ValueError("conditions: got none, expected one or more; apply takes a batch without samples")
    try:
        tree.check_tensors("args", args)
    except ValueError as error:
        raise ValueError(
            f"{error}, with one entry a sample; give by keyword what is the same for all samples"
        ) from None
    for name, value in kwargs.items() if not args else ():
        if isinstance(value, Tensor) and len(conditions) > 1 and value.shape[:1] == conditions.shape[:1]:
            raise ValueError(
                f"{name}: got {tree.describe(value)} by keyword for {len(conditions)} conditions; what is given by "
                "keyword goes whole through the network of each; give by position what has an entry for each condition"
            )
    for leaf in tree.leaves(args):
        if not leaf.dim() or len(leaf) != len(conditions):
            raise ValueError(
                f"conditions: got {len(conditions)} for an input of shape {tuple(leaf.shape)}, expected one for each "
                "sample; for one condition for all samples use apply"
            )
