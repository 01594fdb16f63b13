"""Which parameters of a module are to be generated, and how large they start."""

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from hyperfunc.arguments import matching, some
from hyperfunc.layers import EMBEDDINGS, is_linear_map, is_weight, kernel_of
from hyperfunc.primary import check_values, first_names
from hyperfunc.tiling import Kernel

Target = str | type[nn.Module]
Targets = Target | Iterable[Target] | Callable[[str, nn.Parameter], bool]
"""Names, glob patterns, types of modules, or a predicate on (name, parameter)."""

Std = Literal["layer", "module"] | Mapping[str, float]
"""What generated tensors start with: what their layer's type calls for, what they have in the module, or numbers by
name or glob pattern."""


class Use(NamedTuple):
    """One place where a parameter stands; a tied one has several."""

    name: str
    layer: nn.Module
    short_name: str


def choose(module: nn.Module, targets: Targets | None, unit: tuple[int, int]) -> dict[str, Kernel]:
    """The chosen parameters by the first of their names, in the module's order, and how each is tiled.

    A tied parameter starts with the least of the standard deviations that its layers call for: where an embedding is
    also the head of a network, a unit variance would make its outputs far too large.

    Args:
        module: The module.
        targets: A name or glob pattern of parameters, such as 'layer3.*.weight'; a type of module, for the weights of
            all such modules and of what they contain; several of these; or a predicate. None for every weight of a
            convolution, linear layer or attention projection that fills a unit, but the first and the last; an
            embedding in front of all of them counts as the first.
        unit: Output and input channels of a basic kernel.

    Raises:
        ValueError: A target matches nothing, nothing is left to generate, or a target cannot be generated; or a type
            of module stands for a weight that is parametrized.
    """
    uses = _uses(module)
    if targets is None:
        chosen = _default(module, uses, unit)
    elif callable(targets) and not isinstance(targets, (type, nn.Module)):
        chosen = {name for name in uses if targets(name, module.get_parameter(name))}
        if not chosen:
            raise ValueError(
                f"targets: the predicate chose none of the parameters of {_title(module)}: {some(list(uses))}"
            )
    else:
        several: list[Any] = (
            list(targets) if isinstance(targets, Iterable) and not isinstance(targets, str) else [targets]
        )
        for target in several:
            _check_target(target)
        if not several:
            raise ValueError(
                "targets: got none, expected at least one name, pattern or type; without the argument, convolutions "
                "and linear layers are chosen, and hyperfunc.resnet shows a model that generates nothing"
            )
        chosen = {name for target in several for name in _matches(module, uses, target)}
    return {name: _kernel(name, places, unit) for name, places in uses.items() if name in chosen}


def with_std(kernels: Mapping[str, Kernel], std: Std, module: nn.Module) -> dict[str, Kernel]:
    """The kernels of a module, of which those start with another standard deviation that `std` has one for.

    Raises:
        ValueError: `std` is unknown, or a name or number in it is; or it is "module", and the module is on the meta
            device.
    """
    if std == "layer":
        return dict(kernels)
    if std == "module":
        values = {name: module.get_parameter(name).detach() for name in kernels}
        check_values(values)
        # About the mean that is added to them, which for the scales of norms is 1.
        squares = {name: (values[name].double() - kernel.mean).square() for name, kernel in kernels.items()}
        found = {name: float(square.mean().sqrt()) for name, square in squares.items()}
        if bad := [name for name, value in found.items() if not math.isfinite(value)]:
            raise ValueError(f"std: 'module' needs finite values, and those of {some(bad)} are not; initialise them")
        return {name: kernel._replace(std=found[name]) for name, kernel in kernels.items()}
    if not isinstance(std, Mapping):
        raise ValueError(f"std: got {std!r}, expected 'layer', 'module', or numbers by name or pattern")
    first = {name: one for name, one in first_names(module).items() if one in kernels}  # of tied ones any name will do
    given: dict[str, float] = {}
    for pattern, value in std.items():
        names = matching(first, pattern) if isinstance(pattern, str) else set()
        if not names:
            raise ValueError(f"std: {pattern!r} is none of what is generated: {some(list(kernels))}")
        if not isinstance(value, Real) or not 0 <= value <= sys.float_info.max:
            raise ValueError(f"std: got {value!r} for {pattern}, expected a number of at least 0")
        given |= dict.fromkeys((first[name] for name in names), float(value))
    return {name: kernel._replace(std=given.get(name, kernel.std)) for name, kernel in kernels.items()}


def _check_target(target: Any) -> None:
    """Raises a ValueError where it is neither a name nor a type of module."""
    if not isinstance(target, str) and not (isinstance(target, type) and issubclass(target, nn.Module)):
        hint = f"; for all of its type give {type(target).__name__}" if isinstance(target, nn.Module) else ""
        raise ValueError(
            f"targets: got {target!r}, expected a name or pattern of parameters, a type of module, several of these, "
            f"or a predicate on (name, parameter){hint}"
        )


def _uses(module: nn.Module) -> dict[str, list[Use]]:
    """All parameters by the first of their names, and where each of them stands."""
    names: dict[int, str] = {}
    uses: dict[str, list[Use]] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        for short_name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{short_name}" if path else short_name
            first = names.setdefault(id(parameter), name)
            uses.setdefault(first, []).append(Use(name, layer, short_name))
    return uses


def _kernel(name: str, uses: list[Use], unit: tuple[int, int]) -> Kernel:
    try:
        kernels = [kernel_of(use.layer, use.short_name, unit) for use in uses]
    except ValueError as error:
        raise ValueError(f"targets: {name}: {error}") from None
    rows = [kernel.zero_row for kernel in kernels if kernel.zero_row is not None]
    return min(kernels, key=lambda kernel: kernel.std)._replace(zero_row=rows[0] if rows else None)


def _default(module: nn.Module, uses: dict[str, list[Use]], unit: tuple[int, int]) -> set[str]:
    """Every weight of a linear map that fills a unit, but those of the first and the last layer. Where an embedding
    comes first, it is that layer."""
    if not uses:
        raise ValueError(f"module: {_title(module)} has no parameter, and so nothing that could be generated")
    maps = [
        (use.layer, name) for name, places in uses.items() for use in places if is_linear_map(use.layer, use.short_name)
    ]
    order = {layer: index for index, layer in enumerate(module.modules())}
    indices = [order[layer] for layer, _ in maps]
    embeddings = [order[use.layer] for many in uses.values() for use in many if isinstance(use.layer, EMBEDDINGS)]
    ends = {min(indices + embeddings), max(indices)} if indices else set()
    outside = {name for layer, name in maps if order[layer] in ends}
    chosen = set()
    for name in {name for _, name in maps} - outside:
        plane = kernel_of(uses[name][0].layer, uses[name][0].short_name, unit).plane
        if plane[0] >= unit[0] and plane[1] >= unit[1]:
            chosen.add(name)
    if not chosen:
        raise ValueError(
            f"targets: none of the weights of {_title(module)} fills a unit of {unit[0]}x{unit[1]} channels between "
            f"its first and its last layer; give a smaller unit, or name what to generate: {some(list(uses))}"
        )
    return chosen


def _matches(module: nn.Module, uses: dict[str, list[Use]], target: Target) -> set[str]:
    if isinstance(target, str):
        # A tied parameter may be named by any of its names.
        first = {use.name: name for name, places in uses.items() for use in places}
        found = {first[name] for name in matching(first, target)}
        if not found:
            near = [name for name in first if name.startswith(f"{target}.")][:3]  # where it names a layer
            near = near or difflib.get_close_matches(target, first, n=3, cutoff=0.4)
            hint = f"; near names: {', '.join(near)}" if near else f"; it has {some(list(first))}"
            raise ValueError(f"targets: the module has no parameter {target!r}{hint}")
        return found
    inside = {id(part) for layer in module.modules() if isinstance(layer, target) for part in layer.modules()}
    for path, layer in module.named_modules():
        if id(layer) in inside:
            _check_parametrized(f"{path}." if path else "", layer, target, list(uses))
    found = {
        name
        for name, places in uses.items()
        for use in places
        if id(use.layer) in inside and is_weight(use.layer, use.short_name)
    }
    if not found:
        types = dict.fromkeys(
            type(use.layer).__name__ for places in uses.values() for use in places if is_weight(*use[1:])
        )
        raise ValueError(
            f"targets: the module has no weight in a {target.__name__}, but in {some(list(types)) or 'no layer'}; "
            "biases and norms are chosen by name"
        )
    return found


def _check_parametrized(prefix: str, layer: nn.Module, target: type[nn.Module], names: list[str]) -> None:
    """Raises a ValueError where the weight of a layer that a type stands for is computed from other parameters."""
    hidden = layer.parametrizations if is_parametrized(layer) else None
    for short_name in hidden if isinstance(hidden, nn.ModuleDict) else ():
        if is_weight(layer, short_name):
            parts = [name for name in names if name.startswith(f"{prefix}parametrizations.{short_name}.")]
            raise ValueError(
                f"targets: {prefix}{short_name} is in a {target.__name__}, but it is computed from {some(parts)} and "
                "no parameter; name what is to be generated, or remove the parametrization"
            )


def _title(module: nn.Module) -> str:
    return f"the module ({type(module).__name__})"
