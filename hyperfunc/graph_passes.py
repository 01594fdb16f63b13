"""What becomes of a step's graph of ATen operators before torch.compile makes kernels of it."""

from typing import Any

import torch
from torch.fx import Graph, Node

from hyperfunc import winograd

_aten = torch.ops.aten
_VIEWS = {
    _aten.reshape.default,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.slice.Tensor,
}


def graph_pass(*, convolutions: bool) -> Any:
    """What Inductor takes as `post_grad_custom_post_pass`: `store_before_unbind`, and `winograd.replace_convolutions`
    where `convolutions` are to be replaced."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # takes seconds

    if convolutions:
        winograd.operators()  # a graph from torch's cache on disk calls them without another pass

    class Pass(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            store_before_unbind(graph)
            if convolutions:
                winograd.replace_convolutions(graph)

        def uuid(self) -> tuple[bytes, bool]:
            return get_hash_for_files((__file__, *winograd.SOURCES)), convolutions

    return Pass()


def store_before_unbind(graph: Graph) -> None:
    """Has a copy made once that is then taken apart, as that of all kernels of one shape is.

    Inductor would make it again for each of the parts, by a kernel for each, in the code of which stands where the part
    begins: so that there are as many to compile. It stores what `as_strided` reads.
    """
    for parting in [node for node in graph.nodes if node.target is _aten.unbind.int]:
        copy = parting.args[0]
        while copy.target in _VIEWS:
            copy = copy.args[0]
        if copy.target is _aten.clone.default and _is_no_view(copy):
            value = copy.meta["val"]
            with graph.inserting_after(copy):
                stored = graph.call_function(_aten.as_strided.default, (copy, value.shape, value.stride()))
            stored.meta["val"] = value
            copy.replace_all_uses_with(stored, delete_user_cb=lambda user, stored=stored: user is not stored)


def _is_no_view(copy: Node) -> bool:
    """Whether it is made in plain order of what lies otherwise; Inductor itself drops a copy that changes nothing."""
    source: Any = copy.args[0]
    value = copy.meta["val"]
    return value.is_contiguous() and not source.meta["val"].is_contiguous()
