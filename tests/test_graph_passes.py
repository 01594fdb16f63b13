"""What is changed in the graph of a compiled step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from hyperfunc import graph_passes, tiling


def stored(function: Callable[..., object], *args: Tensor) -> tuple[GraphModule, int]:
    """The graph of a function after the pass, and how many tensors are stored in it."""
    graph = make_fx(function, tracing_mode="fake")(*args)
    graph_passes.store_before_unbind(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph, sum("as_strided" in str(node.target) for node in graph.graph.nodes)


def test_kernels_of_one_shape_are_put_together_once(generator: torch.Generator) -> None:
    """But not those of a single unit, which need no copy."""
    shapes = (16, 16), (16, 16), (32, 32), (32, 32), (32, 32), (64, 32), (64, 32), (40, 24), (40, 24)
    kernels_by_name = {str(number): tiling.plain_kernel((*shape, 3, 3)) for number, shape in enumerate(shapes)}
    layers = tiling.tile(kernels_by_name).layers["3x3"]
    rows = torch.randn(sum(layer.units for layer in layers), 16, 3, 3, 16, generator=generator)

    def kernels(rows: Tensor) -> dict[str, Tensor]:
        return tiling.assemble(layers, rows.movedim(-1, 2))

    graph, count = stored(kernels, rows)
    assert count == 3
    expected = kernels(rows)
    for name, found in graph(rows).items():
        assert torch.equal(found, expected[name])
        assert found.stride() == expected[name].stride()


def whole(x: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous().sum(0)]


def plain(x: Tensor) -> list[Tensor]:
    return list(x.clone().unbind())


def another(x: Tensor) -> list[Tensor]:
    return list(x.transpose(1, 2).exp().unbind())


@pytest.mark.parametrize("function", [whole, plain, another], ids=lambda function: function.__name__)
def test_nothing_else_is_touched(function: Callable[[Tensor], list[Tensor]]) -> None:
    assert stored(function, torch.ones(2, 3, 4))[1] == 0


def test_what_was_compiled_with_other_passes_is_not_taken_from_the_cache() -> None:
    both, one = (graph_passes.graph_pass(convolutions=convolutions) for convolutions in (True, False))
    assert both.uuid() != one.uuid() == graph_passes.graph_pass(convolutions=False).uuid()
