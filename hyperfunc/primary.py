"""Any module as primary network: what it must be, its copy without data, and what must fit it."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hyperfunc import tree
from hyperfunc.arguments import some

_EXTRA_STATE = "_extra_state"
"""What torch calls in a state_dict what a module's get_extra_state gives."""


def check_module(module: Any) -> None:
    """Raises a ValueError, naming the place and the cure, where `module` cannot be a primary network as it is."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: got {_kind(module)}, expected an instance of torch.nn.Module")
    registered = {id(parameter): f"the parameter {name}" for name, parameter in module.named_parameters()}
    registered |= {id(buffer): f"the buffer {name}" for name, buffer in module.named_buffers()}
    parts = {id(part) for part in module.modules() if any(True for _ in _named_tensors(part))} | registered.keys()
    for path, layer in module.named_modules():
        place = f"module: {path or 'it'} ({type(layer).__name__})"
        _check_wrapper(place, layer)
        _check_plain_tensors(f"{path}." if path else "", layer, registered)
        _check_closures(f"{path}." if path else "", layer, parts)
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
            raise ValueError(
                f"{place} has max_norm={layer.max_norm}, by which a lookup writes into its own weight, a parameter; "
                "make it without, and scale what it gives in the forward method, as with torch.renorm"
            )
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if is_lazy(tensor):
                raise ValueError(
                    f"{place} is lazily initialised, and its {name} has no shape yet; run one batch through the module "
                    "before it is hyperized"
                )
        origin = f"{type(layer).__module__}."
        if origin.startswith("torch.") and ".quantized." in origin:
            raise ValueError(
                f"{place} is quantized, and has no floating-point weights; hyperize the float module, and quantize "
                "what hyperfunc.materialize gives"
            )
    devices: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        devices.setdefault(str(parameter.device), name)
    if len(devices) > 1:
        places = ", ".join(f"{name} is on {device}" for device, name in devices.items())
        raise ValueError(
            f"module: its parameters must be on one device, but {places}; move it with module.to(...), and where they "
            "are on meta give them values first, with module.to_empty(device=...)"
        )
    for name, parameter in module.named_parameters():
        if parameter.is_complex():
            raise ValueError(
                f"module: its parameter {name} is {tree.dtype_name(parameter.dtype)}, and the optimizers "
                "train real numbers only; hold its real and imaginary part as one real parameter, and join them in "
                "the forward method with torch.view_as_complex"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"module: its parameter {name} is {tree.dtype_name(parameter.dtype)} and cannot be trained; "
                "register it as a buffer, or hyperize the module before it is quantized"
            )


def check_values(values: Mapping[str, Tensor]) -> None:
    """Raises a ValueError that names those of a module's tensors that are on the meta device."""
    empty = [name for name, value in values.items() if value.is_meta]
    if empty:
        raise ValueError(
            f"module: it is on the meta device, without values for {some(empty)}, which nothing generates; make "
            "it on the CPU, or give it values with module.to_empty(device='cpu') and its own initialisation"
        )


def check_state_dict(module: nn.Module, state_dict: Any, name: str = "state_dict") -> None:
    """Raises a ValueError that names each difference where a state_dict does not fit `module`, of which shapes count.

    A tied parameter may be given by any of its names, and by several. Buffers that are not persistent may be missing,
    and so may extra state, which stays as the module has it; where it is given it must be equal to that.

    Args:
        module: The primary network; it may be on the meta device.
        state_dict: Tensors by name.
        name: What the state_dict is called in the message.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{name}: got {_kind(state_dict)}, expected tensors by name, as a module's state_dict() gives")
    known: dict[str, Tensor] = dict(_named_tensors(module))
    first = first_names(module)
    extra = {
        f"{path}.{_EXTRA_STATE}" if path else _EXTRA_STATE: layer
        for path, layer in module.named_modules(remove_duplicate=False)
        if type(layer).get_extra_state is not nn.Module.get_extra_state
    }
    given = {first[path] for path in known if path in state_dict}
    needed = {first[path] for path in known.keys() - not_persistent(module)}
    differences = [f"{path} is missing" for path in sorted(needed - given)]
    for path, value in state_dict.items():
        if path in extra:
            _check_extra_state(f"{name}: {path}", extra[path], value)
        elif path not in known:
            differences.append(f"{path} is unknown")
        elif not _is_plain_like(value, known[path]):
            differences.append(f"{path} is {_describe(value)}, expected {tree.describe(known[path])}")
    if differences:
        raise ValueError(
            f"{name}: it does not fit the module ({type(module).__name__}): {some(differences, between='; ')}; it must "
            "come from a module of the same class and sizes"
        )


def first_names(module: nn.Module) -> dict[str, str]:
    """Each name of a parameter or buffer of `module`, with the first of the names that the tensor has."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _named_tensors(module)}


def by_first_name(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that `module` has a name for, by the first name of each; of a tied one the first that is given."""
    found: dict[str, Any] = {}
    for name, first in first_names(module).items():
        if name in values:
            found.setdefault(first, values[name])
    return found


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of `module` without data; tied parameters stay tied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in module.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in module.buffers()}
    return copy.deepcopy(module, memo)


def with_values(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `module`, in training mode, that holds copies of `values`; tied parameters stay tied.

    Raises:
        ValueError: They do not fit the module, or one of its buffers is missing.
    """
    check_state_dict(module, values, "weights")
    found = by_first_name(module, values)
    if missing := [name for name, _ in module.named_buffers() if name not in found]:
        raise ValueError(f"batch_stats: {some(missing)} is missing; give what the model's own init and apply give")
    memo: dict[int, Any] = {}
    for name, meta in module.named_parameters():
        value = found[name].detach().clone(memory_format=torch.contiguous_format)
        memo[id(meta)] = nn.Parameter(value, requires_grad=meta.requires_grad)
    for name, meta in module.named_buffers():
        memo[id(meta)] = found[name].detach().clone()
    # deepcopy puts what the memo holds in the place of each tensor.
    return copy.deepcopy(module, memo).train()


def one_thread_at_a_time() -> Callable[[], AbstractContextManager[object]]:
    """Makes a function that gives the context for a `functional_call` of one module, which holds the values while it
    runs: another thread would compute with these. A traced call computes with nothing, and locks nothing."""
    lock = _Lock()
    return lambda: nullcontext() if torch.compiler.is_compiling() else lock


class _Lock:
    """A lock that a thread may take again, and of which a copy or a pickle is another lock: models are sent to other
    processes by programs that pickle functions."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:
        return _Lock, ()


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters, then all buffers; what is tied under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _check_wrapper(place: str, layer: nn.Module) -> None:
    """Raises a ValueError where a layer is another module, made ready to run in some way of its own."""
    if isinstance(layer, torch.jit.ScriptModule):
        raise ValueError(f"{place} is compiled by torch.jit; hyperize the module that it was made of")
    if isinstance(layer, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"{place} spreads a module over devices; hyperize that one, which is its attribute `module`")
    # By its attribute, because the type is in torch._dynamo, which takes seconds to import.
    if hasattr(layer, "_orig_mod"):
        raise ValueError(
            f"{place} is compiled; hyperize the module that it was made of, which is its attribute `_orig_mod`, and "
            "compile the model's apply"
        )


def _check_plain_tensors(prefix: str, layer: nn.Module, registered: Mapping[int, str]) -> None:
    """Raises a ValueError where an attribute holds a parameter that no call could replace, or what is made from one."""
    # torch's own recurrent layers renew their list of weights whenever one of them is replaced.
    own = {"_parameters", "_buffers", "_modules", "_flat_weights"}
    for attribute, value in vars(layer).items():
        for tensor in _tensors_in(value) if attribute not in own else ():
            if id(tensor) in registered:
                raise ValueError(
                    f"module: {prefix}{attribute} holds {registered[id(tensor)]} outside of the module, "
                    "where apply cannot replace it; read it as an attribute in the forward method"
                )
            if tensor.grad_fn is not None:
                raise ValueError(
                    f"module: {prefix}{attribute} is a tensor computed from parameters ahead of the call; compute it "
                    "in the forward method, and use torch.nn.utils.parametrizations in the place of "
                    "torch.nn.utils.weight_norm or spectral_norm, and prune.remove after pruning"
                )


def _check_closures(prefix: str, layer: nn.Module, parts: set[int]) -> None:
    """Raises a ValueError where a function that the layer keeps, or a hook, closes over one of the `parts`, which have
    parameters or are some: functions are not copied, so that it would go on with those of the original."""
    for attribute, value in vars(layer).items():
        for function in value.values() if isinstance(value, dict) else (value,):
            for held in getattr(function, "__closure__", None) or ():
                if id(_content(held)) in parts:
                    raise ValueError(
                        f"module: {prefix}{attribute} is or holds a function that closes over a part of the module, "
                        "where apply cannot replace parameters; make it a method, which finds them in self"
                    )


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def not_persistent(module: nn.Module) -> set[str]:
    """The buffers that no state_dict holds.

    They are not asked of state_dict() itself, which calls the module's own code, and that may want values, where the
    module is on the meta device.
    """
    return {
        f"{path}.{short_name}" if path else short_name
        for path, layer in module.named_modules(remove_duplicate=False)
        for short_name in layer._non_persistent_buffers_set
    }


def _check_extra_state(place: str, layer: nn.Module, value: Any) -> None:
    """Raises a ValueError where extra state is not what `layer` has, because neither parameters nor buffers hold it."""
    try:
        is_same = tree.equal(layer.get_extra_state(), value)
    except RuntimeError:  # it is made of parameters, which are on the meta device
        is_same = False
    if not is_same:
        raise ValueError(
            f"{place} is not the extra state of the module's {type(layer).__name__}, and a hypernetwork has no place "
            "for it; load it into the module before that is hyperized, or leave it out"
        )


def _is_plain_like(value: Any, like: Tensor) -> bool:
    """Whether it is a tensor of the shape of `like`, whose numbers can stand for those of `like`."""
    return (
        isinstance(value, Tensor)
        and not is_lazy(value)
        and value.layout is torch.strided
        and not value.is_quantized
        and (like.is_complex() or not value.is_complex())
        # The other way round is common: statistics that count, converted along with all others.
        and (value.is_floating_point() or not like.is_floating_point())
        and value.shape == like.shape
    )


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor) or is_lazy(value):
        return _kind(value)
    layout = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.')} "
    return f"{layout}{tree.describe(value)}"


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"
