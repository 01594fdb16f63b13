"""Generator, tiling and primary network put together: a `Model`, a NamedTuple of pure functions in the style of JAX."""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call

from hyperfunc import tree
from hyperfunc.arguments import positive, some
from hyperfunc.hypernet import (
    HyperNetParams,
    Init,
    check_init,
    checked_sizes,
    generate_kernels_at_once,
    generator_shapes,
    init_embeddings,
    init_generator,
)
from hyperfunc.layers import is_linear_map
from hyperfunc.primary import check_module, check_values, first_names, on_meta, one_thread_at_a_time, with_values
from hyperfunc.randomness import Seed, Seeded, as_traced, drawing_layers
from hyperfunc.residual import Block, ResNet, Shortcut, init_weights
from hyperfunc.targets import Std, Targets, choose, with_std
from hyperfunc.tiling import Kernel, Tiling, assemble, plain_kernel, tile
from hyperfunc.vmap_rules import VmapRules, autocast_under_vmap, check_mapped_training, counting_norms

BatchStats = dict[str, Tensor]
"""The module's buffers by name: running means and variances of its batch norms, and whatever else it keeps."""


class Params(NamedTuple):
    """Everything that is trained.

    Attributes:
        generator: The kernel generators, by window ('3x3').
        embeddings: For the same keys, one row z per basic kernel: layers in the module's order, within a layer
            row-major over its grid, output tiles first.
        primary: The parameters of the primary network that are not generated, by name.
    """

    generator: dict[str, HyperNetParams]
    embeddings: dict[str, Float[Tensor, "*leading units z"]]
    primary: dict[str, Tensor]


@runtime_checkable
class Forward(Protocol):
    """The primary network as a function of its weights and buffers; returns the output and the new buffers."""

    def __call__(
        self,
        weights: Any,
        batch_stats: BatchStats,
        /,
        *args: Any,
        train: bool,
        seed: Seed | None = None,
        **kwargs: Any,
    ) -> tuple[Any, BatchStats]: ...


class Model(NamedTuple):
    """A network whose kernels are generated, as pure functions: neither parameters nor statistics are ever written.

    These functions are only as pure as the primary network: a module that writes into its input still does so. Threads
    may share a model; its calls, outside of compiled code, then wait for each other.

    Attributes:
        init: `init(generator) -> (params, batch_stats)`, on the generator's device.
        apply: `apply(params, batch_stats, *args, train, seed=None, **kwargs) -> (output, new batch_stats)`; `args` and
            `kwargs` are the module's own, and the output is whatever it returns. With train=True batch norms use the
            statistics of the batch and update the running ones; with train=False they use the running ones and change
            nothing. With a `seed` (an int, or a tensor of one) everything random, such as dropout, is a function of it.
            A module with layers of dropout requires one in training; anything else that is drawn without one comes
            from torch's global generator. See `randomness`. Arguments of the module's own that are called `train` or
            `seed` can be given by position only.
        kernels: `kernels(params) -> {name: tensor}`, the generated tensors. Like every function that generates, it
            raises a ValueError unless there is exactly one embedding for each basic kernel.
        forward: `apply` from ready weights, which `weights(params)` gives: for many batches under the same parameters.
        weights: `weights(params) -> {name: tensor}`, all parameters of the primary network, generated and ordinary.
        tiling: What is generated, and from how many basic kernels.
        module: The primary network on the meta device, without data.
        recipe: The name of the function that made the model, and its arguments (but for a module), as JSON can hold
            them: what a file needs to make it again.
    """

    init: Callable[[Generator], tuple[Params, BatchStats]]
    apply: Forward
    kernels: Callable[[Params], dict[str, Tensor]]
    forward: Forward
    weights: Callable[[Params], dict[str, Tensor]]
    tiling: Tiling
    module: nn.Module
    recipe: dict[str, Any]

    def __repr__(self) -> str:
        """What it was made by: the tuple of its functions says nothing, and that with the module fills pages."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.recipe.items() if name != "function")
        return f"<Model of {type(self.module).__name__}: {self.recipe['function']}({arguments})>"


def hyper_resnet(
    depth: int = 40,
    width: int = 1,
    num_classes: int = 10,
    z_dim: int = 64,
    *,
    hidden_dim: int | None = None,
    init: Init = "he",
    shortcut: Shortcut = "pad",
    block: Block = "post",
) -> Model:
    """The paper's network: a residual network whose 3x3 kernels, but the stem's, are generated in tiles of 16 by 16.

    Depth 40 has 96,570 parameters at width 1 and 147,578 at width 2, with either kind of block; shortcuts by
    convolution add 2,656 and 10,976.

    Args:
        depth: 6n + 4.
        width: The widening factor.
        num_classes: Length of the output.
        z_dim: Length of an embedding.
        hidden_dim: The generator's d; z_dim where not given.
        init: See `hypernet.init_generator`.
        shortcut: See `residual.ResNet`; the 1x1 kernels of "conv" are ordinary parameters.
        block: See `residual.ResNet`.

    Raises:
        ValueError: A size or name is out of range.
    """
    unit, z_dim, hidden_dim = checked_sizes((16, 16), z_dim, hidden_dim)
    module, arguments = _resnet_on_meta(depth, width, num_classes, shortcut, block)
    targets = [f"blocks.{i}.conv{j}.weight" for i in range(len(module.blocks)) for j in (1, 2)]
    return _make_model(
        module,
        {name: plain_kernel(module.get_parameter(name).shape) for name in targets},
        partial(_init_resnet, module),
        unit=unit,
        z_dim=z_dim,
        hidden_dim=hidden_dim,
        init=init,
        recipe={"function": "hyper_resnet", **arguments, "z_dim": z_dim, "hidden_dim": hidden_dim, "init": init},
    )


def resnet(
    depth: int = 40,
    width: int = 1,
    num_classes: int = 10,
    *,
    shortcut: Shortcut = "pad",
    block: Block = "post",
) -> Model:
    """The same network with ordinary weights, the paper's baseline, as a `Model` that generates nothing.

    Depth 40 has 562,730 parameters at width 1 and 2,235,498 at width 2.

    Raises:
        ValueError: A size or name is out of range.
    """
    module, arguments = _resnet_on_meta(depth, width, num_classes, shortcut, block)
    return _make_model(module, {}, partial(_init_resnet, module), recipe={"function": "resnet", **arguments})


def hyperize(
    module: nn.Module,
    *,
    targets: Targets | None = None,
    unit: tuple[int, int] = (16, 16),
    z_dim: int = 64,
    hidden_dim: int | None = None,
    init: Init = "he",
    std: Std = "layer",
) -> Model:
    """Any module as primary network, with generated weights for its convolutions and linear layers.

    The module is read, not changed. Parameters that are not generated start from the values that they have in it, and
    so do its buffers; generated ones are drawn anew, with the mean that their layer's type calls for and the standard
    deviation that `std` says. All of them are in `Params`, also those with requires_grad=False; `optim.frozen` keeps
    some of them fixed. A tied parameter is one tensor, under the first of its names. Generated kernels of convolutions
    lie in memory as channels_last, so that a forward which looks at one by itself needs `reshape` and not `view`.

    Args:
        module: The primary network.
        targets: What to generate: a name or glob pattern of parameters, such as 'layer3.*.weight'; a type of module,
            such as nn.Conv2d, for the weights of all such modules and of what they contain; a list of these; or a
            predicate on (name, parameter). By default every weight of a convolution, linear layer or attention
            projection that fills at least one unit, except those of the first and the last such layer; an
            `nn.Embedding` in front of all of them counts as the first.
        unit: Output and input channels of a basic kernel.
        z_dim: Length of an embedding.
        hidden_dim: The generator's d; z_dim where not given.
        init: See `hypernet.init_generator`.
        std: The standard deviation that generated tensors start with. "layer": what their layer's type calls for at its
            fan-in (see `layers.kernel_of`), whatever the module holds. "module": the one of their values in the module,
            as for networks with an initialisation of their own, such as those with sines. Or numbers by name or glob
            pattern, of which the last that fits counts, and the layer's where none does.

    Raises:
        ValueError: A target matches no parameter, or one that cannot be generated; nothing is left to generate; targets
            of one window differ in dtype; or the module cannot be a primary network as it is: it is lazily initialised,
            quantized, compiled or spread over devices, has complex parameters, or holds or writes parameters where
            apply cannot replace them.
    """
    unit, z_dim, hidden_dim = checked_sizes(unit, z_dim, hidden_dim)
    check_module(module)
    kernels = choose(module, targets, unit)
    if init != "he" and std != "layer":
        raise ValueError(f"std: got {std!r}, but init={init!r} draws all embeddings alike; expected init='he' with it")
    kernels = with_std(kernels, std, module)
    values = {name: p.detach().clone() for name, p in module.named_parameters() if name not in kernels}
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    check_values({**values, **buffers})

    def init_from_module(generator: Generator) -> tuple[dict[str, Tensor], BatchStats]:
        return tree.map(lambda leaf: leaf.to(generator.device, copy=True), (values, buffers))

    recipe = {"function": "hyperize", "targets": list(kernels), "unit": unit, "z_dim": z_dim}
    recipe |= {"hidden_dim": hidden_dim, "init": init}
    if std != "layer":
        recipe["std"] = {name: kernel.std for name, kernel in kernels.items()}
    return _make_model(
        on_meta(module),
        kernels,
        init_from_module,
        unit=unit,
        z_dim=z_dim,
        hidden_dim=hidden_dim,
        init=init,
        recipe=recipe,
    )


def from_recipe(recipe: Mapping[str, Any], module: nn.Module | None = None) -> Model:
    """The model that a `Model.recipe` describes.

    Args:
        recipe: Of `hyper_resnet`, `resnet` or `hyperize`.
        module: For a recipe of `hyperize`, the primary network, which no recipe can hold.

    Raises:
        ValueError: The recipe is of another function, or of `hyperize` and `module` is missing, or the other way
            round; or the function refuses an argument.
    """
    if not isinstance(recipe, Mapping):
        raise ValueError(f"recipe: got {recipe!r}, expected what Model.recipe holds")
    arguments = dict(recipe)
    function = arguments.pop("function", None)
    functions = {"hyper_resnet": hyper_resnet, "resnet": resnet, "hyperize": hyperize}
    if function not in functions:
        raise ValueError(f"recipe: got the function {function!r}, expected {', '.join(functions)}")
    if module is None and function == "hyperize":
        raise ValueError(
            "module: the model was made by hyperize, and a file holds no code; give the module that it was made of"
        )
    if module is not None and function != "hyperize":
        raise ValueError(f"module: the model was made by {function}, and takes none")
    try:
        if "unit" in arguments:
            arguments["unit"] = tuple(arguments["unit"])  # JSON knows lists only
        return functions[function](*[module] if module is not None else [], **arguments)
    except TypeError as error:
        raise ValueError(f"recipe: {error}; it was written by another version of hyperfunc") from None
    except ValueError as error:
        if module is None:
            raise
        raise ValueError(f"module: expected the one that the model was made of, or one like it: {error}") from None


def check_model(
    model: Any,
    cure: str = "a Conditional, an Ensemble and what as_module made have one as their `model`, for the parameters that "
    "`at`, `member` and `trees` give; and hyperize makes one of a module",
) -> None:
    """Raises a ValueError where it is another kind of object; `cure` says what to do instead."""
    if not isinstance(model, Model):
        raise ValueError(f"model: got {type(model).__name__}, expected a Model; {cure}")


def materialize(model: Model, params: Params, batch_stats: BatchStats) -> nn.Module:
    """The primary network as an ordinary module that holds the generated weights: no hypernetwork is left in it.

    It is of the class that the model was made of, and its state_dict fits that class. Its tensors are copies, on the
    device and in the dtype of `params`, and leaves that an optimizer can go on training. Tied parameters stay tied. It
    is in training mode, like any new module.

    Raises:
        ValueError: `params` or `batch_stats` do not belong to `model`.
    """
    check_model(model)
    return with_values(model.module, {**model.weights(params), **batch_stats})


def make_forward(module: nn.Module) -> Forward:
    """`module`, on the meta device, as a pure function of its weights and buffers; see `Model.forward`."""
    drawing, counting = drawing_layers(module), counting_norms(module)
    has_onednn = torch.backends.mkldnn.is_available()
    # The mode is fixed in one module for each, because switching it at the call would be hidden state.
    modules = {True: copy.deepcopy(module).train(), False: copy.deepcopy(module).eval()}
    first = first_names(module)
    names = set(first.values())
    is_tied = len(first) > len(names)
    locked = one_thread_at_a_time()
    empty = {train: _empty_buffers(modules[train]) for train in modules}

    def forward(
        weights: dict[str, Tensor],
        batch_stats: BatchStats,
        /,
        *args: Any,
        train: bool,
        seed: Seed | None = None,
        **kwargs: Any,
    ) -> tuple[Any, BatchStats]:
        if not isinstance(train, bool):
            raise ValueError(f"train: got {train!r}, expected True or False")
        if train and seed is None and drawing:
            raise ValueError(
                f"seed: the module is random in training, in {some(drawing, 4)}; give apply a seed=, another one for "
                "each step, or take the randomness out of them, as by a rate of 0"
            )
        if not isinstance(batch_stats, dict):
            raise ValueError(
                f"batch_stats: got {type(batch_stats).__name__}, expected tensors by name, as the model's own init "
                "gives them"
            )
        if seed is not None and weights:
            seed = as_traced(seed, next(iter(weights.values())).device)
        # functional_call writes new statistics into the tensors that it is given, so it is given copies.
        new_stats = tree.clone(batch_stats)
        is_mapped = tree.is_mapped((weights, batch_stats, args, kwargs, seed))
        if train and is_mapped:
            check_mapped_training(counting)
            new_stats = tree.mapped_with(new_stats, (weights, args, kwargs, seed))
        values = {**{name: _safe_order(leaf, has_onednn) for name, leaf in weights.items()}, **new_stats}
        with (
            autocast_under_vmap(next(iter(values.values())).device) if is_mapped and values else nullcontext(),
            VmapRules() if is_mapped else nullcontext(),
            nullcontext() if seed is None else Seeded(seed),
        ):
            # A name that the module does not know would be passed over in silence. The host takes long to look at all
            # names of what is tied, so that it does where it may find something.
            is_known = values.keys() == names
            if not is_known:
                _check_names(values, first)
            with locked():
                try:
                    output = functional_call(modules[train], values, args, kwargs, tie_weights=is_tied)
                finally:
                    _check_empty(empty[train])
        # A buffer that forward replaced, instead of writing into it, is in `values` alone.
        return output, {name: values[name] for name in new_stats}

    return forward


def _check_names(values: Mapping[str, Tensor], first: Mapping[str, str]) -> None:
    """Raises a ValueError where `values` are not one for each of the tensors, of whose names `first` says which come
    first; one that is tied may have any of its names."""
    given = {first[name] for name in first if name in values}
    differences = [f"{name} is missing" for name in dict.fromkeys(first.values()) if name not in given]
    differences += [f"{name} is unknown" for name in values if name not in first]
    if differences:
        raise ValueError(
            f"weights, batch_stats: {some(differences, 4, '; ')}; give what the model's own init and weights give"
        )


def _empty_buffers(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The buffers that are registered as None: their full names, their layers, and their names there."""
    return [
        (f"{path}.{name}".lstrip("."), layer, name)
        for path, layer in module.named_modules()
        for name, buffer in layer._buffers.items()
        if buffer is None
    ]


def _check_empty(buffers: list[tuple[str, nn.Module, str]]) -> None:
    """Empties the buffers again, because what one call left would be found by the next, and raises a ValueError where
    one had been filled."""
    filled = [(path, layer, name) for path, layer, name in buffers if layer._buffers[name] is not None]
    for _, layer, name in filled:
        layer._buffers[name] = None
    if filled:
        raise ValueError(
            f"module: its forward fills the buffer {filled[0][0]!r}, which it registers as None, and a pure function "
            "keeps nothing from call to call; register it with a tensor of its shape, before the module is hyperized"
        )


def _safe_order(weight: Tensor, has_onednn: bool) -> Tensor:
    """The weight, in plain memory order where its convolution would be one of torch's own on the CPU.

    Of a channels_last kernel these compute a wrong gradient without a word, where they are grouped, as under vmap all
    are, and the batch is of one: so in torch 2.7.1, 2.14.1 and 2.15.0. In float32 oneDNN stands in for them, but not
    for kernels of one pixel on one thread; in float64 never.
    """
    if weight.dim() != 4 or weight.device.type != "cpu":
        return weight
    if weight.shape[2:].numel() == 1:
        # It lies in memory in both orders alike, and only its strides say which is meant: a new view says the plain.
        return weight.reshape(-1).view(weight.shape)
    return weight if weight.dtype == torch.float32 and has_onednn else weight.contiguous()


def _make_model(
    module: nn.Module,
    kernels_by_name: Mapping[str, Kernel],
    init_primary: Callable[[Generator], tuple[dict[str, Tensor], BatchStats]],
    *,
    recipe: dict[str, Any],
    unit: tuple[int, int] = (16, 16),
    z_dim: int = 64,
    hidden_dim: int | None = None,
    init: Init = "he",
) -> Model:
    """Ties the pieces: `module` is on the meta device, `init_primary` makes what is not generated."""
    check_init(init)
    parameters = dict(module.named_parameters())
    tiling = tile(kernels_by_name, unit)
    generated = set(tiling.names)
    units_of = {key: sum(layer.units for layer in layers) for key, layers in tiling.layers.items()}
    shapes_of = {
        key: ((z_dim,), *generator_shapes(layers[0].window, unit, z_dim, hidden_dim))
        for key, layers in tiling.layers.items()
    }
    primary_shapes = {name: p.shape for name, p in parameters.items() if name not in generated}
    _check_dtypes(tiling, parameters)
    linear_maps = {name for name in tiling.names if _is_linear_map(module, name)}

    def init_params(generator: Generator) -> tuple[Params, BatchStats]:
        if not isinstance(generator, Generator):
            raise ValueError(
                f"generator: got {type(generator).__name__}, expected a torch.Generator; "
                "torch.Generator().manual_seed(0) makes one, and torch.Generator('cuda') one of a GPU"
            )
        generators: dict[str, HyperNetParams] = {}
        embeddings: dict[str, Tensor] = {}
        for key, layers in tiling.layers.items():
            drawn = init_generator(
                generator, window=layers[0].window, unit=unit, z_dim=z_dim, hidden_dim=hidden_dim, init=init
            )
            std = torch.cat([torch.full((layer.units,), layer.kernel.std) for layer in layers])
            dtype = parameters[layers[0].name].dtype
            generators[key] = tree.to(drawn, dtype)
            embeddings[key] = init_embeddings(generator, drawn, std, init=init).to(dtype)
        primary, batch_stats = init_primary(generator)
        primary = {name: value for name, value in primary.items() if name not in generated}
        return Params(generators, embeddings, primary), batch_stats

    def check(params: Any) -> None:
        if not isinstance(params, Params):
            raise ValueError(
                f"params: got a {type(params).__name__}, expected the Params of the model's init, or of one condition, "
                "as at(params, condition) of a conditional model gives them"
            )
        found = {key: len(z) if z.dim() == 2 else tuple(z.shape[:-1]) for key, z in params.embeddings.items()}
        if found != units_of:
            raise ValueError(
                f"params: they hold embeddings {found} and the model needs {units_of}; give those of its init, or of "
                "one member or condition"
            )
        for key, z in params.embeddings.items():
            shapes = (z.shape[1:], *(leaf.shape for leaf in params.generator.get(key, ())))
            if shapes != shapes_of[key]:
                raise ValueError(
                    f"params: the embeddings and the generator of '{key}' have the shapes "
                    f"{', '.join(str(tuple(shape)) for shape in shapes)}, expected "
                    f"{', '.join(str(shape) for shape in shapes_of[key])}; give those of its init"
                )
        for name, leaf in params.primary.items():
            if leaf.shape != (shape := primary_shapes.get(name, leaf.shape)):  # an unknown name is found by `forward`
                raise ValueError(
                    f"params: primary/{name} has the shape {tuple(leaf.shape)}, expected {tuple(shape)}; give those of "
                    "its init"
                )

    def kernels(params: Params) -> dict[str, Tensor]:
        check(params)
        whole: dict[str, Tensor] = {}
        for key, layers in tiling.layers.items():
            units = generate_kernels_at_once(params.generator[key], params.embeddings[key])
            # Under autocast the units are of its dtype, which convolutions and linear layers ask for, and norms refuse.
            dtype = params.embeddings[key].dtype
            for name, kernel in assemble(layers, units).items():
                whole[name] = kernel if name in linear_maps else kernel.to(dtype)
        return whole

    def weights(params: Params) -> dict[str, Tensor]:
        whole = kernels(params)  # first, because it looks at params
        return {**params.primary, **whole}

    forward = make_forward(module)
    return Model(init_params, make_apply(weights, forward), kernels, forward, weights, tiling, module, recipe)


def make_apply(weights: Callable[[Params], dict[str, Tensor]], forward: Forward) -> Forward:
    """`Model.apply`: `forward` with the weights that the parameters give."""

    def apply(
        params: Params,
        batch_stats: BatchStats,
        /,
        *args: Any,
        train: bool,
        seed: Seed | None = None,
        **kwargs: Any,
    ) -> tuple[Any, BatchStats]:
        return forward(weights(params), batch_stats, *args, train=train, seed=seed, **kwargs)

    return apply


def _is_linear_map(module: nn.Module, name: str) -> bool:
    path, _, short_name = name.rpartition(".")
    return is_linear_map(module.get_submodule(path), short_name)


def _check_dtypes(tiling: Tiling, parameters: Mapping[str, Tensor]) -> None:
    """Raises a ValueError where tensors of different dtypes are to come out of one generator."""
    for key, layers in tiling.layers.items():
        first = layers[0].name
        for layer in layers:
            dtype, other = parameters[first].dtype, parameters[layer.name].dtype
            if other != dtype:
                raise ValueError(
                    f"targets: {first} is {tree.dtype_name(dtype)} and {layer.name} is "
                    f"{tree.dtype_name(other)}, and one generator, '{key}', makes both; convert the module "
                    "to one dtype, or leave one of them out of the targets"
                )


def _resnet_on_meta(
    depth: Any, width: Any, num_classes: Any, shortcut: Shortcut, block: Block
) -> tuple[ResNet, dict[str, Any]]:
    """The network, and the arguments that make it, as JSON can hold them; sizes may be of any type of integers."""
    sizes = {"depth": depth, "width": width, "num_classes": num_classes}
    arguments: dict[str, Any] = {name: positive(name, size) for name, size in sizes.items()}
    arguments |= {"shortcut": shortcut, "block": block}
    with torch.device("meta"):
        return ResNet(**arguments), arguments


def _init_resnet(module: ResNet, generator: Generator) -> tuple[dict[str, Tensor], BatchStats]:
    buffers = {
        name: (torch.ones if name.endswith("running_var") else torch.zeros)(meta.shape, device=generator.device)
        for name, meta in module.named_buffers()
    }
    return init_weights(module, generator), buffers
