"""The gradient of a loss over pytrees, by whatever way of torch's costs least where it is asked for."""

# torch.compile cannot trace the evaluation of an annotation, and functions are defined inside of what it traces.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp

from hyperfunc import tree

Function = Callable[[Any], tuple[Tensor, Any]]
"""A loss of one pytree, a single number, and what comes beside it."""

Differentiate = Callable[[Function, Any, Any], tuple[Any, Any]]
"""`differentiate(function, params, depends_on) -> (gradient, what comes beside)`. The third is all that the function
depends on, its parameters among it: whoever asks for a derivative by it gets one."""


def make_differentiate() -> Differentiate:
    """Builds a `Differentiate`, for functions of one network."""
    # It is the network that keeps autograd from differentiating it by itself, and so no second step runs it twice.
    is_refused = False

    def differentiate(function: Function, params: Any, depends_on: Any) -> tuple[Any, Any]:
        nonlocal is_refused
        if torch.compiler.is_compiling() or tree.is_differentiated(depends_on):
            return grad(function, has_aux=True)(params)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return differentiate(function, params, depends_on)
        if not is_refused and tree.is_for_autograd(depends_on):
            found = _plain_gradient(_without_cache(function), params)
            if found is not None:
                return found
            is_refused = True
        answer: Any = vjp(_without_cache(function), params, has_aux=True)
        total, pull_back, aux = answer
        (gradients,) = pull_back(torch.ones_like(total), retain_graph=False, create_graph=False)
        # It may hang on what the function closes over, which nobody asked about.
        return gradients, tree.map(Tensor.detach, aux)

    return differentiate


def _plain_gradient(function: Function, params: Any) -> tuple[Any, Any] | None:
    """By autograd itself: torch.func wraps each tensor at each operation, which the host feels where a batch is small,
    and its way back imports torch's compiler, which takes two seconds.

    None where the loss seems not to depend on a leaf. It may be true, or come of a `torch.utils.checkpoint` in the
    network: that runs the network again on the way back, when its weights and its seed are not there any more.
    torch.func refuses those, and so is asked then.
    """
    leaves = [leaf.detach().requires_grad_() for leaf in tree.leaves(params)]
    with torch.enable_grad(), torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS):
        total, aux = function(tree.replace_leaves(params, leaves))
    if not total.requires_grad:
        return None
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    if any(gradient is None for gradient in found):
        return None
    return tree.replace_leaves(params, found), tree.map(Tensor.detach, aux)


def _without_cache(function: Function) -> Function:
    """The function where an autocast around the caller does not keep what it makes of the parameters: they are new
    tensors at every call, so that it would only grow."""

    def call(params: Any) -> tuple[Tensor, Any]:
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return function(params)
        finally:
            torch.set_autocast_cache_enabled(before)

    return call


_NO_HOOKS = (
    "a training step cannot go through torch.utils.checkpoint or other hooks of saved tensors, because the "
    "generated weights exist during the forward pass only; remove them from the network"
)
