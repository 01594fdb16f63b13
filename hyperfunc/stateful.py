"""A model as an ordinary `nn.Module` that holds its parameters and statistics: for programs that are built on modules,
optimizers of torch, `DistributedDataParallel`, trainers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hyperfunc import tree
from hyperfunc.conditions import Conditional, ConditionalParams
from hyperfunc.ensembles import Ensemble
from hyperfunc.model import BatchStats, Model, Params, check_model
from hyperfunc.primary import not_persistent
from hyperfunc.randomness import drawing_layers

Place = tuple[nn.Module, str]
"""A module, and the name of a tensor in it."""


class Stateful(nn.Module):
    """What `as_module` makes.

    Attributes:
        model: The functions.
        params: Modules without a forward that hold the parameters, by their path in the pytree: `params.embeddings.3x3`
            and `params.primary.head.bias` for example.
        batch_stats: Likewise the statistics, as buffers.
    """

    def __init__(
        self,
        model: Model | Conditional | Ensemble,
        params: Params | ConditionalParams,
        batch_stats: BatchStats,
        apply: Callable[..., tuple[Any, BatchStats]],
    ) -> None:
        super().__init__()
        self.model = model
        self.params = nn.Module()
        self.batch_stats = nn.Module()
        self._function = apply
        primary = (model if isinstance(model, Model) else model.model).module
        self._draws = bool(drawing_layers(primary))
        fixed = {name for name, parameter in primary.named_parameters() if not parameter.requires_grad}
        self._parameter_places: list[Place] = []
        for path, leaf in tree.named_leaves(params).items():
            trains = leaf.is_floating_point() and path.partition("primary/")[2] not in fixed
            holder, name = _place(self.params, path)
            holder.register_parameter(name, nn.Parameter(leaf.detach().clone(), requires_grad=trains))
            self._parameter_places.append((holder, name))
        not_saved = not_persistent(primary)
        self._buffer_places: list[Place] = []
        for path, leaf in tree.named_leaves(batch_stats).items():
            holder, name = _place(self.batch_stats, path)
            holder.register_buffer(name, leaf.detach().clone(), persistent=path not in not_saved)
            self._buffer_places.append((holder, name))
        _, self._like_params = tree.flatten(params)
        _, self._like_stats = tree.flatten(batch_stats)

    def trees(self) -> tuple[Any, BatchStats]:
        """The parameters and the statistics, as the pytrees that the model's functions take. Their leaves are without
        a gradient, and share the memory of this module's own: a call in training writes into these statistics, and an
        optimizer into these parameters. Keep them, as the best so far, by `tree.clone`."""
        params, batch_stats = self._own_trees()
        return tree.map(Tensor.detach, params), tree.map(Tensor.detach, batch_stats)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of `apply`; in training the new statistics are written into the buffers.

        Networks with dropout take a `seed` here too; without one it is drawn from torch's global generator.
        """
        if "train" in kwargs:
            raise ValueError(
                "train: got it by keyword, expected no such argument; the methods train() and eval() set it"
            )
        params, batch_stats = self._own_trees()
        if self.training and self._draws and kwargs.get("seed") is None:
            kwargs["seed"] = torch.randint(2**62, (), device=tree.leaves(params)[0].device)
        outputs, new_stats = self._function(params, batch_stats, *args, train=self.training, **kwargs)
        if self.training:
            with torch.no_grad():
                for place, new in zip(self._buffer_places, tree.leaves(new_stats), strict=True):
                    _write(place, new)
        return outputs

    def extra_repr(self) -> str:
        """The model."""
        return repr(self.model)

    def _own_trees(self) -> tuple[Any, BatchStats]:
        params, batch_stats = (
            [getattr(holder, name) for holder, name in places]
            for places in (self._parameter_places, self._buffer_places)
        )
        return self._like_params(params), self._like_stats(batch_stats)


def as_module(
    model: Model | Conditional | Ensemble,
    params: Params | ConditionalParams,
    batch_stats: BatchStats,
    *,
    apply: Callable[..., tuple[Any, BatchStats]] | None = None,
) -> Stateful:
    """The hypernetwork as an ordinary module, which is called as the primary network is, and is trained, moved, saved
    and wrapped as any other.

        net = hf.as_module(model, *model.init(torch.Generator().manual_seed(0)))
        optimizer = torch.optim.Adam(net.parameters())
        loss = F.cross_entropy(net(images), labels)

    In training each call writes the new statistics into the module's buffers, and in evaluation none. All kernels are
    generated anew at each call; for a Model, `materialize(net.model, *net.trees())` generates them once. The module
    cannot be pickled: save its `state_dict()`, or give `trees()` to `save`. Parameters with requires_grad=False in the
    module that a model was made of have it here too. An encoder's buffers are constants, neither moved nor saved with
    this module. `torch.utils.checkpoint` may wrap this whole module, but must not be used inside the primary network.

    Args:
        model: Of `hyper_resnet`, `hyperize`, `conditional` or `ensemble`.
        params: Its parameters, which are copied.
        batch_stats: Its statistics, likewise.
        apply: Which of its functions a call is; its `apply` where not given. The other choice is `model.apply_each`.

    Raises:
        ValueError: `model` is none of those, `params` and `batch_stats` are not what its init gives, or a path in them
            cannot be a name in a module.
    """
    if not isinstance(model, (Conditional, Ensemble)):
        check_model(model, "hyperize makes one of a module")
    for name, value, kind in (
        ("params", params, ConditionalParams if isinstance(model, Conditional) else Params),
        ("batch_stats", batch_stats, dict),
    ):
        if not isinstance(value, kind):
            raise ValueError(
                f"{name}: got a {type(value).__name__}, expected a {kind.__name__}, as the model's init gives it"
            )
    tree.check_tensors("params", params)
    tree.check_tensors("batch_stats", batch_stats)
    return Stateful(model, params, batch_stats, apply or model.apply)


def _place(root: nn.Module, path: str) -> Place:
    """A module for each part of a path but the last, which is the name of a tensor in it."""
    *parts, name = path.replace("/", ".").split(".")
    holder = root
    for part in parts:
        if part not in holder._modules:
            _check_free(holder, part, path)
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    _check_free(holder, name, path)
    return holder, name


def _check_free(holder: nn.Module, name: str, path: str) -> None:
    if not name or hasattr(holder, name):
        raise ValueError(
            f"params: {path} cannot be the name of a tensor in a module, because {name!r} is taken or empty; give "
            "it another one in the module or the encoder"
        )


def _write(place: Place, new: Tensor) -> None:
    holder, name = place
    old = getattr(holder, name)
    if (old.shape, old.dtype) == (new.shape, new.dtype):
        old.copy_(new)
    else:  # forward has put another in its place
        setattr(holder, name, new.detach())
