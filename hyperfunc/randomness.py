"""Dropout as a function of a seed.

A module's dropout draws from torch's global generator, which makes its output depend on what ran before. Under
`Seeded(seed)` everything random that the module asks torch for is computed from the seed instead: number i of draw n is
a hash of (seed, n, i), as in the counter-based generators of Salmon et al. (2011). That is arithmetic on tensors, so
`torch.func`, `torch.vmap`, torch.compile and a CUDA graph take it as they take the rest, the seed may be a tensor that
changes from call to call, and the global generator is neither read nor moved.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hyperfunc import tree
from hyperfunc._attention import attention_forward

Seed = int | Tensor
"""A whole number, as int or as a tensor of one element."""

_MASK = 0xFFFFFFFF
# Odd, and below 2^31 as all factors here, so that no product leaves the 63 bits of a signed integer.
_STEP = 0x1E3779B9


def drawing_layers(module: nn.Module) -> list[str]:
    """The layers of `module` that draw random numbers in training, as `path (type)`.

    Only layers are seen; a forward method may call `functional.dropout` by itself. Of these, fractional pooling alone
    draws in evaluation too.
    """
    return [f"{path or 'it'} ({type(layer).__name__})" for path, layer in module.named_modules() if _rate_of(layer) > 0]


def fold_in(seed: Seed, number: Seed) -> Seed:
    """Another seed, for the `number`-th of the things that are to be random independently of each other."""
    return _hash((_hash(_state(seed)) + _state(number)) & _MASK)


def as_traced(seed: Seed, device: torch.device) -> Seed:
    """The same seed; while torch.compile traces, as a tensor on that device. A number is compiled in, and once it
    changes becomes a symbol, of whose hashes the compiler makes expressions that take it minutes."""
    if torch.compiler.is_compiling() and isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            seed = (seed + 2**63) % 2**64 - 2**63  # the 64 bits that count, as a tensor has them
        return torch.full((), seed, dtype=torch.int64, device=device)
    return seed


class Seeded(TorchFunctionMode):
    """A context in which what is random is a function of `seed` alone.

    This covers every dropout in torch.nn, that of attention and of recurrent layers included, nn.RReLU, fractional
    pooling, `rand`, `randn`, their `_like`, `bernoulli`, and the methods `bernoulli_`, `uniform_` and `normal_`. Under
    `torch.vmap` a seed that is not mapped gives all members the same numbers, and a mapped one gives each its own.

    Code that runs later is outside of the context: what `torch.utils.checkpoint` computes again in a `backward()`
    afterwards draws new numbers.

    Raises:
        ValueError: What runs in the context calls another of torch's random functions, such as `randperm` or
            `multinomial`, without a generator of its own; or the seed is no whole number.
    """

    def __init__(self, seed: Seed) -> None:
        super().__init__()
        self.state = _state(seed)
        self.other_state = _hash(self.state ^ _STEP)
        self.draws = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return attention_forward(*args, **kwargs)
        if func is Tensor.unflatten:  # attention calls it, and torch.compile can trace it in torch 2.7 as a method only
            return args[0].unflatten(*args[1:], **kwargs)
        seeded_form = _SEEDED.get(func)
        if seeded_form is not None and kwargs.get("generator") is None:
            kwargs = {name: value for name, value in kwargs.items() if name != "generator"}
            return seeded_form(self, func, *args, **kwargs)
        if func in _EMPTY and tree.is_mapped(self.state):
            return _mapped_like(self.state, func(*args, **kwargs))
        if func in _REFUSED and kwargs.get("generator") is None:
            raise ValueError(
                f"seed: the module calls torch's {func.__name__}, which draws from the global generator and cannot be "
                "seeded from here; draw with torch.rand or torch.randn, or pass in what is random as an input"
            )
        return func(*args, **kwargs)

    def bits(self, shape: Iterable[int], device: torch.device) -> Tensor:
        """Fresh whole numbers, uniform in [0, 2^32), the high bits more so than the low."""
        self.draws += 1
        first = self.state + self.draws * _STEP
        second = self.other_state ^ _hash(self.draws)
        shape = tuple(shape)
        x = (torch.arange(math.prod(shape), device=device).view(shape) * _STEP + first) & _MASK
        # As _hash, with a key in the middle, and without a last shift, which would touch nothing but the low bits.
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
        x = x ^ second
        x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
        return ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK

    def uniform(self, shape: Iterable[int], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fresh numbers, uniform in [0, 1), in steps as fine as the type has them near 1, and 2^-24 at the finest."""
        digits = min(24, 1 - round(math.log2(torch.finfo(dtype).eps)))
        return ((self.bits(shape, device) >> (32 - digits)).float() * 2.0**-digits).to(dtype)

    def normal(self, shape: Iterable[int], device: torch.device) -> Tensor:
        """Fresh numbers of the unit normal distribution (Box and Muller 1958)."""
        shape = tuple(shape)
        radius = torch.sqrt(-2 * torch.log1p(-self.uniform(shape, device)))
        return radius * torch.cos(2 * math.pi * self.uniform(shape, device))


def _rate_of(layer: nn.Module) -> float:
    """How much of its input a layer drops in training, or how much a slope that it draws may vary; 1 for places that
    it draws."""
    # By their names: torchvision's, because torchvision takes a second to import, and timm's, which may not be there.
    is_path = type(layer).__name__.endswith("DropPath")
    if is_path or isinstance(layer, nn.modules.dropout._DropoutNd) or type(layer).__name__ == "StochasticDepth":
        rate = getattr(layer, "drop_prob" if is_path else "p", None)
        return float(rate) if isinstance(rate, (int, float)) else 0.0
    if isinstance(layer, nn.RNNBase):
        return layer.dropout if layer.num_layers > 1 else 0.0  # it is between layers
    if isinstance(layer, nn.MultiheadAttention):
        return layer.dropout
    if isinstance(layer, nn.RReLU):
        return layer.upper - layer.lower
    if isinstance(layer, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return float(layer._random_samples is None)
    return 0.0


def _state(seed: Seed) -> Any:
    """32 bits that depend on all of the 64 of a seed."""
    if not isinstance(seed, (int, Tensor)):
        raise ValueError(f"seed: got a {type(seed).__name__}, expected an int, or a tensor of one whole number")
    if isinstance(seed, Tensor) and (seed.numel() != 1 or seed.is_floating_point() or seed.is_complex()):
        raise ValueError(f"seed: got a {seed.dtype} of shape {tuple(seed.shape)}, expected one whole number")
    if isinstance(seed, Tensor):
        seed = seed.long().reshape(())
    return _hash(_hash(seed & _MASK) ^ ((seed >> 32) & _MASK))


def _hash(x: Any) -> Any:
    """A permutation of the whole numbers below 2^32 without visible order: two rounds of multiply and xor-shift.

    The constants are of those that hash-prospector lists (T. Ettinger, public domain).
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    x = x ^ (x >> 15)
    if isinstance(x, Tensor) and torch.compiler.is_compiling():
        # A reduction is computed once. All else the compiler writes out anew at each use, and two uses in each of
        # these steps, step after step, make an expression that takes it minutes.
        x = x.expand(16).amax()
    return x


# --- what stands in for torch's own functions; each takes the mode, the function, and the function's own arguments


def _dropout(
    mode: Seeded, func: Callable[..., Any], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _drop(mode, input, input.shape, p, training, inplace)


def _torch_dropout(mode: Seeded, func: Callable[..., Any], input: Tensor, p: float, train: bool) -> Tensor:
    return _drop(mode, input, input.shape, p, train, False)


def _feature_dropout(
    mode: Seeded, func: Callable[..., Any], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _drop(mode, input, _channels(func, input), p, training, inplace)


def _drop(mode: Seeded, input: Tensor, shape: Iterable[int], p: float, training: bool, inplace: bool) -> Tensor:
    _check_rate(p)
    if not training or p == 0:
        return input
    kept = _keep(mode, shape, p, input.device).to(input.dtype)
    output = input * (kept * (1 / (1 - p) if p < 1 else 0.0))
    return input.copy_(output) if inplace else output


def _alpha_dropout(
    mode: Seeded, func: Callable[..., Any], input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    """Klambauer et al. 2017 (arXiv 1706.02515), section 2: what is dropped takes SELU's limit, then mean and variance
    are put right.
    """
    _check_rate(p)
    if not training or p == 0:
        return input
    shape = input.shape if func is F.alpha_dropout else _channels(func, input)
    limit = -1.7580993408473766
    kept = _keep(mode, shape, p, input.device)
    scale = ((1 - p) * (1 + p * limit**2)) ** -0.5 if p < 1 else 0.0
    output = scale * torch.where(kept, input, limit) - scale * limit * p
    return input.copy_(output) if inplace else output


def _check_rate(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: got the probability {p}, expected 0 to 1")


def _keep(mode: Seeded, shape: Iterable[int], p: float, device: torch.device) -> Tensor:
    return mode.bits(shape, device) >= int(p * 2**32)


def _channels(func: Callable[..., Any], input: Tensor) -> tuple[int, ...]:
    """One number per channel; the channels are the second axis, or the first where there is no axis of examples."""
    alone = {F.dropout1d: 2, F.dropout3d: 4}.get(func) == input.dim()
    leading = 1 if alone else 2
    return (*input.shape[:leading], *[1] * (input.dim() - leading))


def _attention(
    mode: Seeded,
    func: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Scaled dot-product attention, written out where it drops weights: no fused kernel takes a mask of ours."""
    if dropout_p == 0:
        return func(query, key, value, attn_mask=attn_mask, dropout_p=0.0, is_causal=is_causal, **kwargs)
    if kwargs.get("enable_gqa"):
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    scale = kwargs.get("scale")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: got attn_mask and is_causal=True, expected one of them")
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if attn_mask is not None:  # by which a query may have nothing to look at; torch then gives zeros
        nothing = scores.isneginf().all(dim=-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
    else:
        weights = scores.softmax(dim=-1)
    return _drop(mode, weights, weights.shape, dropout_p, True, False) @ value


def _recurrent(mode: Seeded, func: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    """A stack of recurrent layers, computed layer by layer where there is dropout between them.

    The arguments are the input, for packed sequences their lengths, the state or several, the weights of all layers,
    and then, from the first bool on, how many layers there are and of what kind.
    """
    place = next(index for index, value in enumerate(args) if isinstance(value, bool))
    has_biases, layers, rate, training, bidirectional, *order = args[place:]
    if not training or rate == 0 or layers == 1:
        return func(*args)
    output, *lengths, states, weights = args[:place]
    several = not isinstance(states, Tensor)
    parts = [state.chunk(layers) for state in (states if several else [states])]
    each = len(weights) // layers
    ends: list[list[Tensor]] = []
    for layer in range(layers):
        if layer > 0:
            output = _drop(mode, output, output.shape, rate, training, inplace=False)
        begins = tuple(part[layer] for part in parts)
        own = weights[layer * each : (layer + 1) * each]
        given = (*lengths, begins if several else begins[0], own, has_biases, 1, 0.0, training, bidirectional, *order)
        output, *end = func(output, *given)
        ends.append(end)
    return output, *(torch.cat(end) for end in zip(*ends, strict=True))


def _rrelu(
    mode: Seeded,
    func: Callable[..., Any],
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Xu et al. 2015 (arXiv 1505.00853), section 2.4: a leaky rectifier with a slope of its own for each number."""
    if not training:
        return func(input, lower, upper, training, inplace)
    slope = lower + (upper - lower) * mode.uniform(input.shape, input.device).to(input.dtype)
    output = torch.where(input < 0, input * slope, input)
    return input.copy_(output) if inplace else output


def _rand(mode: Seeded, func: Callable[..., Any], *size: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    return _fill(mode, func, (torch.empty if out is None else out.new_empty)(*size, **kwargs), out)


def _rand_like(mode: Seeded, func: Callable[..., Any], input: Tensor, **kwargs: Any) -> Tensor:
    return _fill(mode, func, torch.empty_like(input, **kwargs))


def _fill(mode: Seeded, func: Callable[..., Any], empty: Tensor, out: Tensor | None = None) -> Tensor:
    """Random numbers in place of `empty`: a tensor of their own, because under vmap `empty` has no room for those of a
    mapped seed."""
    if empty.is_complex():
        raise ValueError(
            f"seed: the module calls torch's {func.__name__} for {tree.dtype_name(empty.dtype)}, and only real numbers "
            "can be drawn from a seed; join two draws with torch.complex"
        )
    if func in (torch.rand, torch.rand_like):
        numbers = mode.uniform(empty.shape, empty.device, empty.dtype)
    else:
        numbers = mode.normal(empty.shape, empty.device).to(empty.dtype)
    if out is not None:
        return out.copy_(numbers)
    return numbers.requires_grad_() if empty.requires_grad else numbers


def _fractional_pool(mode: Seeded, func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Where its windows lie depends on one number in [0, 1) for each example, channel and spatial axis."""
    axes = 2 if func in (F.fractional_max_pool2d, F.fractional_max_pool2d_with_indices) else 3
    if kwargs.get("_random_samples") is None:
        leading = (1, input.shape[0]) if input.dim() == axes + 1 else tuple(input.shape[:2])
        kwargs["_random_samples"] = mode.uniform((*leading, axes), input.device, input.dtype)
    return func(input, *args, **kwargs)


def _mapped_like(seed: Tensor, made: Tensor) -> Tensor:
    """A new tensor with room for what each member of a mapped seed draws; numbers that count stay as they are."""
    return tree.mapped_with(made, seed) if made.is_floating_point() or made.dtype == torch.bool else made


def _bernoulli(
    mode: Seeded, func: Callable[..., Any], input: Tensor, p: Any = None, *, out: Tensor | None = None
) -> Tensor:
    chance = input if p is None else p
    drawn = (mode.uniform(input.shape, input.device) < chance).to(input.dtype)
    return drawn if out is None else out.copy_(drawn)


def _bernoulli_(mode: Seeded, func: Callable[..., Any], input: Tensor, p: Any = 0.5, **kwargs: Any) -> Tensor:
    return input.copy_(mode.uniform(input.shape, input.device) < p)


def _uniform_(mode: Seeded, func: Callable[..., Any], input: Tensor, *bounds: float, **named: float) -> Tensor:
    """Its bounds are called `from`, which is no name in Python, and `to`."""
    a = bounds[0] if bounds else named.get("from", 0.0)
    b = bounds[1] if len(bounds) > 1 else named.get("to", 1.0)
    return input.copy_(a + (b - a) * mode.uniform(input.shape, input.device, input.dtype))


def _normal_(mode: Seeded, func: Callable[..., Any], input: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return input.copy_(mean + std * mode.normal(input.shape, input.device))


_SEEDED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    F.dropout1d: _feature_dropout,
    F.dropout2d: _feature_dropout,
    F.dropout3d: _feature_dropout,
    F.alpha_dropout: _alpha_dropout,
    F.feature_alpha_dropout: _alpha_dropout,
    F.scaled_dot_product_attention: _attention,
    torch.lstm: _recurrent,
    torch.gru: _recurrent,
    torch.rnn_tanh: _recurrent,
    torch.rnn_relu: _recurrent,
    F.rrelu: _rrelu,
    F.fractional_max_pool2d: _fractional_pool,
    F.fractional_max_pool3d: _fractional_pool,
    F.fractional_max_pool2d_with_indices: _fractional_pool,
    F.fractional_max_pool3d_with_indices: _fractional_pool,
    torch.rand: _rand,
    torch.randn: _rand,
    torch.rand_like: _rand_like,
    torch.randn_like: _rand_like,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.uniform_: _uniform_,
    Tensor.normal_: _normal_,
}

_EMPTY = (
    *(torch.empty, torch.zeros, torch.ones, torch.full),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
)
"""What makes a tensor that may be filled with random numbers later."""

_REFUSED = (
    torch.normal,
    torch.randint,
    torch.randint_like,
    torch.randperm,
    torch.multinomial,
    torch.poisson,
    torch.binomial,
    torch._standard_gamma,  # pyright: ignore[reportPrivateImportUsage]
    torch._sample_dirichlet,  # pyright: ignore[reportPrivateImportUsage]
    torch.native_dropout,
    torch.dropout_,
    torch.feature_dropout,
    torch.feature_dropout_,
    torch.alpha_dropout,
    torch.alpha_dropout_,
    torch.feature_alpha_dropout,
    torch.feature_alpha_dropout_,
    torch.rrelu,
    torch.rrelu_,
    F.rrelu_,
    F.gumbel_softmax,
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_),
    Tensor.multinomial,
    Tensor.exponential_,
    Tensor.random_,
    Tensor.cauchy_,
    Tensor.log_normal_,
    Tensor.geometric_,
)
