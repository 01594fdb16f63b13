"""CUDA graphs on any device, for tests of what is built on them: a recorded call is carried out again on the memory
that it used.

As in a real graph nothing happens at the recording, and the results of a replay lie where those of the last one lay.
Unlike in one the memory in between is not shared with other graphs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyperfunc import capture, tree


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class RecordedGraph(TorchDispatchMode):
    """Records the operations within its context."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if func is torch.ops.aten.native_batch_norm.default:
            written += args[3:5]  # its running statistics, of which it does not say so
        for leaf in _tensors(written):
            storage = leaf.untyped_storage()
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        if not func.is_view:
            outputs = [] if func._schema.is_mutable else _tensors(result)
            self._operations.append((func, args, kwargs, outputs))
        return result

    def undo(self) -> None:
        """Puts back what was overwritten while recording."""
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Carries out all operations again."""
        for func, args, kwargs, outputs in self._operations:
            result = func(*args, **kwargs)
            for output, new in zip(outputs, _tensors(result) if outputs else [], strict=True):
                output.copy_(new)


def record(warm_up: Callable[[], Any], call: Callable[[], Any], _pool: Any, _stream: Any) -> tuple[RecordedGraph, Any]:
    """As `capture._record`."""
    warm_up()
    graph = RecordedGraph()
    with graph:
        result = call()
    graph.undo()
    return graph, result


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `capture` record in place of capturing, whatever the device."""
    monkeypatch.setattr(capture, "_record", record)
    monkeypatch.setattr(capture, "_on_cuda", lambda _value: True)
    monkeypatch.setattr(capture, "_device", lambda value: tree.leaves(value)[0].device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
