"""From ordinary weights to a hypernetwork: generator and embeddings by least squares.

Equation 2, written for a unit u as a matrix with a row for each output channel and place of the window (m) and a column
for each input channel (i),

    K[u, m, i] = sum_d W_out[m, d] (W_in[i] z[u] + b_in[i])[d] + b_out[m],

is a Tucker decomposition of the tensor K over the modes u and m (Kolda and Bader 2009, "Tensor decompositions and
applications", section 4), with a constant added to each mode. It starts from the truncated singular value
decompositions of the two modes, one after the other, whose squared error is at most the sum of what the two by
themselves leave out, and goes on by alternating least squares: each of z, (W_in, b_in) and (W_out, b_out) is linear
while the others stand still, so that the error never grows.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.func import vjp

from hyperfunc import tree
from hyperfunc.hypernet import HyperNetParams
from hyperfunc.model import BatchStats, Model, Params, check_model
from hyperfunc.primary import by_first_name, check_state_dict
from hyperfunc.tiling import Layer, assemble


class Fit(NamedTuple):
    """What `fit_embeddings` found; as text, a table of the shares.

    Attributes:
        params: Generator and embeddings, and the ordinary parameters as they were given.
        batch_stats: The buffers as they were given.
        explained: For each generated tensor the share of its variance that the generated one explains (R squared): 1 is
            exact, 0 no better than the tensor's mean, and below 0 worse, which may happen to a small layer, because one
            generator is fitted to all of its layers together.
        errors: For each generator the sum of squared errors over all of its layers: at the start, and after each sweep.
    """

    params: Params
    batch_stats: BatchStats
    explained: dict[str, float]
    errors: dict[str, tuple[float, ...]]

    def __str__(self) -> str:
        width = max((len(name) for name in self.explained), default=0)
        lines = [f"{name:{width}}  {share:8.4f}" for name, share in self.explained.items()]
        lines = [f"{'generated tensor':{width}}  explained", *lines] if lines else ["nothing is generated"]
        for key, errors in self.errors.items():
            lines.append(
                f"generator {key}: squared error {errors[0]:.4g} -> {errors[-1]:.4g}, {len(errors) - 1} sweeps"
            )
        return "\n".join(lines)


def fit_embeddings(
    model: Model,
    state_dict: Mapping[str, Any],
    *,
    generator: Generator | None = None,
    sweeps: int = 20,
    tolerance: float = 1e-4,
) -> Fit:
    """Parameters whose generated weights come as near as they can to given ones, for a warm start.

    All weights count alike, so that layers with larger weights matter more; entries that are cropped away do not
    count. It is computed in float64 on the CPU. Directions that the weights leave free keep their fresh
    draw, so that training can still use them.

    Args:
        model: What is to be trained on. A model that generates nothing just takes the weights.
        state_dict: Of the primary network: of the module itself, of `hf.materialize`, or
            `{**model.weights(params), **batch_stats}` of a model of the same network, such as `hf.resnet`.
        generator: Of the fresh draw; one with seed 0 where not given. The result is on its device.
        sweeps: The most sweeps of alternating least squares.
        tolerance: Ends earlier once a sweep reduces the error by less than this share of it.

    Raises:
        ValueError: `state_dict` lacks a name, has one too many, or one that is no tensor of real numbers of the right
            shape; what it has is on the meta device, or a weight to be fitted is not finite; a module's extra state
            in it is not that of the model's module; or `sweeps` or `tolerance` is negative.
    """
    check_model(model)
    if sweeps < 0:
        raise ValueError(f"sweeps: got {sweeps}, expected at least 0")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance}, expected at least 0")
    given = _by_first_name(model, state_dict)
    fresh, fresh_stats = model.init(torch.Generator().manual_seed(0) if generator is None else generator)
    generators: dict[str, HyperNetParams] = {}
    embeddings: dict[str, Tensor] = {}
    errors: dict[str, tuple[float, ...]] = {}
    for key, layers in model.tiling.layers.items():
        p, z = tree.to((fresh.generator[key], fresh.embeddings[key]), "cpu", torch.float64)
        targets = {layer.name: given[layer.name].detach().to("cpu", torch.float64) for layer in layers}
        units, observed = _cut(layers, targets, (len(z), p.w_out.shape[0], p.w_in.shape[0], *p.w_out.shape[1:-1]))
        p, z, errors[key] = _fit(p, z, units, observed, sweeps, tolerance)
        generators[key] = tree.map(Tensor.to, p, fresh.generator[key])
        embeddings[key] = z.to(fresh.embeddings[key])
    primary = {name: given[name].detach().to(leaf, copy=True) for name, leaf in fresh.primary.items()}
    batch_stats = {
        # A buffer that a module leaves out of its state_dict is not given.
        name: given[name].detach().to(leaf, copy=True) if name in given else leaf
        for name, leaf in fresh_stats.items()
    }
    params = Params(generators, embeddings, primary)
    fitted = model.kernels(params)
    explained = {name: _share_explained(given[name], fitted[name]) for name in model.tiling.names}
    return Fit(params, batch_stats, explained, errors)


class _Factors(NamedTuple):
    """The generator and its embeddings, with output channels and window in one dimension m."""

    z: Float[Tensor, "u z"]
    w_in: Float[Tensor, "i d z"]
    b_in: Float[Tensor, "i d"]
    w_out: Float[Tensor, "m d"]
    b_out: Float[Tensor, "m"]

    def hidden(self) -> Float[Tensor, "u i d"]:
        return torch.einsum("idz,uz->uid", self.w_in, self.z) + self.b_in

    def kernels(self) -> Float[Tensor, "u m i"]:
        return torch.einsum("md,uid->umi", self.w_out, self.hidden()) + self.b_out[:, None]


def _fit(
    p: HyperNetParams,
    z: Tensor,
    units: Float[Tensor, "u out in *window"],
    observed: Bool[Tensor, "u out in *window"],
    sweeps: int,
    tolerance: float,
) -> tuple[HyperNetParams, Tensor, tuple[float, ...]]:
    """The fitted generator and embeddings, and the squared errors; p and z are the fresh draw."""
    x, mask = units.movedim(2, -1).flatten(1, -2), observed.movedim(2, -1).flatten(1, -2)
    factors = _start(_Factors(z, p.w_in, p.b_in, p.w_out.flatten(0, -2), p.b_out.flatten()), x, mask)

    def residual(factors: _Factors) -> Float[Tensor, "u m i"]:
        # Zero where nothing is observed: as if the present prediction stood there.
        return (x - factors.kernels()) * mask

    errors = [residual(factors).square().sum().item()]
    scale = x.square().sum().item() * torch.finfo(x.dtype).eps ** 2
    while len(errors) <= sweeps and errors[-1] > scale:
        factors = _improve_z(factors, residual(factors), mask)
        factors = _improve_in(factors, residual(factors))
        factors = _improve_out(factors, residual(factors), mask)
        errors.append(residual(factors).square().sum().item())
        if errors[-2] - errors[-1] <= tolerance * errors[-2]:
            break
    w_out, b_out = factors.w_out.reshape(p.w_out.shape), factors.b_out.reshape(p.b_out.shape)
    return HyperNetParams(factors.w_in, factors.b_in, w_out, b_out), factors.z, tuple(errors)


def _start(fresh: _Factors, x: Float[Tensor, "u m i"], mask: Bool[Tensor, "u m i"]) -> _Factors:
    """Truncated singular value decompositions of the mode m, then of the mode u; `fresh` fills the ranks left over.

    Its scales are those of a fresh draw: W_out and W_in as large as there, and whatever the weights measure in z.
    """
    count = mask.sum(0)
    x = torch.where(mask, x, (x * mask).sum(0) / count.clamp(min=1))
    d, length = fresh.w_out.shape[1], fresh.z.shape[1]
    b_out = x.mean((0, 2))
    centered = x - b_out[:, None]
    left, _, _ = torch.linalg.svd(centered.movedim(1, 0).flatten(1), full_matrices=False)
    rank = min(d, left.shape[1])
    scale_out = (x.shape[1] / d) ** 0.5
    w_out = fresh.w_out.clone()
    w_out[:, :rank] = left[:, :rank] * scale_out
    a = torch.einsum("md,umi->uid", left[:, :rank], centered) / scale_out
    b_in = torch.zeros_like(fresh.b_in)
    b_in[:, :rank] = a.mean(0)
    left, values, right = torch.linalg.svd((a - a.mean(0)).flatten(1), full_matrices=False)
    length_used = min(length, len(values))
    scale_in = (x.shape[2] * d / length) ** 0.5
    w_in = fresh.w_in.clone()
    w_in[:, :, :length_used] = 0
    w_in[:, :rank, :length_used] = right[:length_used].view(-1, x.shape[2], rank).movedim(0, -1) * scale_in
    z = torch.zeros_like(fresh.z)
    z[:, :length_used] = left[:, :length_used] * values[:length_used] / scale_in
    return _Factors(z, w_in, b_in, w_out, b_out)


def _improve_z(factors: _Factors, residual: Float[Tensor, "u m i"], mask: Bool[Tensor, "u m i"]) -> _Factors:
    design = torch.einsum("md,idz->miz", factors.w_out, factors.w_in).flatten(0, 1)
    return factors._replace(z=factors.z + _regress(design, residual.flatten(1), mask.flatten(1)))


def _improve_in(factors: _Factors, residual: Float[Tensor, "u m i"]) -> _Factors:
    """W_in and b_in together: least squares between W_out and the embeddings, by the pseudoinverse of each.

    Unobserved entries take part with a residual of zero. That bounds the true error from above and touches it where
    the factors stand, so that what lowers the bound lowers the error, by less than a direct solution; but that one
    would be of d times z unknowns at once.
    """
    ones = torch.ones_like(factors.z[:, :1])
    between = torch.einsum("dm,umi->uid", torch.linalg.pinv(factors.w_out), residual)
    change = torch.einsum("zu,uid->idz", torch.linalg.pinv(torch.cat([factors.z, ones], 1)), between)
    return factors._replace(w_in=factors.w_in + change[..., :-1], b_in=factors.b_in + change[..., -1])


def _improve_out(factors: _Factors, residual: Float[Tensor, "u m i"], mask: Bool[Tensor, "u m i"]) -> _Factors:
    a = factors.hidden().flatten(0, 1)
    by_row = residual.movedim(1, 0).flatten(1), mask.movedim(1, 0).flatten(1)
    change = _regress(torch.cat([a, torch.ones_like(a[:, :1])], 1), *by_row)
    return factors._replace(w_out=factors.w_out + change[:, :-1], b_out=factors.b_out + change[:, -1])


def _regress(
    design: Float[Tensor, "rows k"], targets: Float[Tensor, "problems rows"], mask: Bool[Tensor, "problems rows"]
) -> Float[Tensor, "problems k"]:
    """Least squares of each row of `targets` on the same design, over the entries that its mask shows.

    The shortest solution, as a change to what there is, leaves alone what the targets do not decide.
    """
    solutions = targets.new_zeros(len(targets), design.shape[1])
    patterns, which = torch.unique(mask, dim=0, return_inverse=True)
    for index, pattern in enumerate(patterns):
        mine = which == index
        if pattern.any():
            solved = torch.linalg.lstsq(design[pattern], targets[mine][:, pattern].T, driver="gelsd")
            solutions[mine] = solved.solution.T
    return solutions


def _cut(
    layers: tuple[Layer, ...], targets: dict[str, Tensor], shape: tuple[int, ...]
) -> tuple[Float[Tensor, "u out in *window"], Bool[Tensor, "u out in *window"]]:
    """The units that `assemble` would put together to `targets`, and which of their entries it shows.

    What `assemble` does is to copy and crop, and perhaps to add a constant; so its transpose puts every entry, less
    that constant, back into its place.
    """
    made: tuple[Any, ...] = vjp(partial(assemble, layers), torch.zeros(shape, dtype=torch.float64))
    constant, transpose = made
    (units,) = transpose({name: target - constant[name] for name, target in targets.items()})
    (shown,) = transpose({name: torch.ones_like(target) for name, target in targets.items()})
    return units, shown > 0


def _share_explained(target: Tensor, fitted: Tensor) -> float:
    target = target.detach().double().to(fitted.device)
    error = (target - fitted).square().sum().item()
    total = (target - target.mean()).square().sum().item()
    if total == 0:  # of a constant, such as a layer of zeros: equal in float32, or not
        scale = max(target.square().sum().item(), target.numel())
        return 1.0 if error <= scale * torch.finfo(torch.float32).eps ** 2 else 0.0
    return 1 - error / total


def _by_first_name(model: Model, state_dict: Any) -> dict[str, Tensor]:
    """The tensors by the names that the model knows them by; a tied one may be given by any of its names.

    Raises:
        ValueError: The state_dict does not fit, is without values, or a weight to be fitted is not finite.
    """
    own = [name for name, _ in (*model.module.named_parameters(), *model.module.named_buffers())]
    for prefix in ("module.", "_orig_mod.", "model.") if isinstance(state_dict, Mapping) and state_dict else ():
        if all(str(name).startswith(prefix) for name in state_dict) and not all(n.startswith(prefix) for n in own):
            stripped = f"{{name.removeprefix({prefix!r}): tensor for name, tensor in state_dict.items()}}"
            raise ValueError(f"state_dict: every name begins with {prefix!r}; give {stripped}")
    check_state_dict(model.module, state_dict)
    found = by_first_name(model.module, state_dict)
    for name, tensor in found.items():
        if tensor.is_meta:
            raise ValueError(f"state_dict: {name} is on the meta device, without values; give that of a real module")
    for name in model.tiling.names:
        if not bool(found[name].isfinite().all()):
            raise ValueError(f"state_dict: {name} has values that are not finite, and nothing can be fitted to them")
    return found
