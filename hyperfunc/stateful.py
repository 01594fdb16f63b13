"""A model as an ordinary `nn.Module` that holds its parameters and statistics: for programs that are built on modules,
optimizers of torch, `DistributedDataParallel`, trainers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hyperfunc import tree
from hyperfunc.conditions import Conditional, ConditionalParams
from hyperfunc.ensembles import Ensemble
from hyperfunc.model import BatchStats, Model, Params, check_model
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
        self.params, self.batch_stats = nn.Module(), nn.Module()
        self._function = apply
        self._draws = bool(drawing_layers((model if isinstance(model, Model) else model.model).module))
        self._parameter_places = _places(self.params, tree.named_leaves(params))
        self._buffer_places = _places(self.batch_stats, tree.named_leaves(batch_stats))
        for (holder, name), leaf in zip(self._parameter_places, tree.leaves(params), strict=True):
            holder.register_parameter(name, nn.Parameter(leaf.detach().clone()))
        for (holder, name), leaf in zip(self._buffer_places, tree.leaves(batch_stats), strict=True):
            holder.register_buffer(name, leaf.detach().clone())
        _, self._like_params = tree.flatten(params)
        _, self._like_stats = tree.flatten(batch_stats)

    def trees(self) -> tuple[Any, BatchStats]:
        """The parameters and the statistics, as the pytrees that the model's functions take: for `materialize`, `save`
        and all else. Their leaves are this module's own tensors."""
        return self._like_params(_tensors(self._parameter_places)), self._like_stats(_tensors(self._buffer_places))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of `apply`; in training the new statistics are written into the buffers.

        Networks with dropout take a `seed` here too; without one it is drawn from torch's global generator.
        """
        params, batch_stats = self.trees()
        if self.training and self._draws and kwargs.get("seed") is None:
            kwargs["seed"] = torch.randint(2**62, (), device=tree.leaves(params)[0].device)
        outputs, new_stats = self._function(params, batch_stats, *args, train=self.training, **kwargs)
        if self.training:
            with torch.no_grad():
                for old, new in zip(tree.leaves(batch_stats), tree.leaves(new_stats), strict=True):
                    old.copy_(new)
        return outputs

    def extra_repr(self) -> str:
        """The model."""
        return repr(self.model)


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

    In training each call writes the new statistics into the module's buffers, and in evaluation none. It generates all
    kernels at each call; `materialize(net.model, *net.trees())` does so once. Its functions cannot be pickled: save
    `state_dict()`, or give `trees()` to `save`.

    Args:
        model: Of `hyper_resnet`, `hyperize`, `conditional` or `ensemble`.
        params: Its parameters, which are copied.
        batch_stats: Its statistics, likewise.
        apply: Which of its functions a call is; its `apply` where not given. The other choice is `model.apply_each`.

    Raises:
        ValueError: `model` is none of those, or a leaf is no tensor.
    """
    if not isinstance(model, (Conditional, Ensemble)):
        check_model(model, "hyperize makes one of a module")
    tree.check_tensors("params", params)
    tree.check_tensors("batch_stats", batch_stats)
    return Stateful(model, params, batch_stats, apply or model.apply)


def _places(root: nn.Module, leaves: Mapping[str, Tensor]) -> list[Place]:
    """Where each leaf goes: a module for each part of a path but the last, which is the name of the tensor."""
    places: list[Place] = []
    for path in leaves:
        *parts, name = path.replace("/", ".").split(".")
        holder = root
        for part in parts:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        places.append((holder, name))
    return places


def _tensors(places: list[Place]) -> list[Tensor]:
    return [getattr(holder, name) for holder, name in places]
