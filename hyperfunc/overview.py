"""What a model generates, as data and as a table: `hyperfunc.summary`."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from hyperfunc.hypernet import generator_shapes
from hyperfunc.model import Model, Params, check_model


class Row(NamedTuple):
    """One generated tensor.

    Attributes:
        name: In the module; the first one of a tied parameter.
        shape: Of the parameter.
        generator: The generator that serves it, by its key in `Params.generator`.
        grid: Basic kernels along the output and the input channels.
        units: Basic kernels in it.
        fan_in: Inputs that one output sums over.
        std: Standard deviation of its entries: the one that `init` gives them, or, where parameters were given,
            the one that they have. It is nan for an `init` that makes no such promise, as "clipped-normal".
    """

    name: str
    shape: tuple[int, ...]
    generator: str
    grid: tuple[int, int]
    units: int
    fan_in: float
    std: float


class Totals(NamedTuple):
    """Numbers of parameters.

    Attributes:
        ordinary: Of the module, with ordinary weights.
        primary: Of the module, except those that are generated.
        generator: Of all generators.
        embeddings: Of all embeddings.
        whole: Of everything that is trained: generator, embeddings and primary.
        compression: ordinary / whole.
    """

    ordinary: int
    primary: int
    generator: int
    embeddings: int
    whole: int
    compression: float


class Summary(NamedTuple):
    """Rows and totals; `print` shows them as a table."""

    rows: tuple[Row, ...]
    totals: Totals

    def __str__(self) -> str:
        header = ("tensor", "shape", "generator", "grid", "units", "fan-in", "std")
        cells = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
        lines = ["  ".join(_align(column, cell, widths) for column, cell in enumerate(line)) for line in cells]
        lines.insert(1, "-" * len(lines[0]))
        totals = self.totals
        numbers = {
            "not generated": f"{totals.primary:,}",
            "generators": f"{totals.generator:,}",
            "embeddings": f"{totals.embeddings:,}",
            "whole": f"{totals.whole:,}",
            "with ordinary weights": f"{totals.ordinary:,}",
            "compression": f"{totals.compression:.2f}",
        }
        width, name_width = max(map(len, numbers.values())), max(map(len, numbers))
        lines += ["", *(f"{name:{name_width}}  {number:>{width}}" for name, number in numbers.items())]
        return "\n".join(line.rstrip() for line in lines)


def summary(model: Model, params: Params | None = None) -> Summary:
    """Shape, grid and scale of every generated tensor in the module's order, and the numbers of parameters.

    Args:
        model: From `hyper_resnet`, `resnet` or `hyperize`.
        params: Its parameters, for the standard deviations that its tensors have now instead of those they start with.

    Raises:
        ValueError: `params` do not belong to `model`, or it is not a Model.
    """
    check_model(model)
    rows = {
        layer.name: Row(layer.name, layer.shape, key, layer.grid, layer.units, layer.fan_in, layer.kernel.std)
        for key, layers in model.tiling.layers.items()
        for layer in layers
    }
    if params is not None:
        rows = {
            name: row._replace(std=std) for (name, row), std in zip(rows.items(), _measured(model, params), strict=True)
        }
    elif model.recipe.get("init") != "he":
        rows = {name: row._replace(std=math.nan) for name, row in rows.items()}
    sizes = {name: parameter.numel() for name, parameter in model.module.named_parameters()}
    z_dim, hidden_dim = model.recipe.get("z_dim", 0), model.recipe.get("hidden_dim")
    generator = sum(
        math.prod(shape)
        for layers in model.tiling.layers.values()
        for shape in generator_shapes(layers[0].window, model.tiling.unit, z_dim, hidden_dim)
    )
    ordinary, generated = sum(sizes.values()), sum(sizes[name] for name in rows)
    embeddings = z_dim * sum(row.units for row in rows.values())
    whole = ordinary - generated + generator + embeddings
    totals = Totals(ordinary, ordinary - generated, generator, embeddings, whole, ordinary / max(whole, 1))
    return Summary(tuple(rows[name] for name in sizes if name in rows), totals)


def _measured(model: Model, params: Params) -> Iterable[float]:
    kernels = model.kernels(params)
    return [kernels[name].detach().double().std(correction=0).item() for name in model.tiling.names]


def _cells(row: Row) -> tuple[str, ...]:
    std = "-" if math.isnan(row.std) else f"{row.std:.4f}"
    grid = f"{row.grid[0]}x{row.grid[1]}"
    return (row.name, "x".join(map(str, row.shape)), row.generator, grid, str(row.units), f"{row.fan_in:g}", std)


def _align(column: int, cell: str, widths: list[int]) -> str:
    """Names to the left, numbers to the right."""
    return cell.ljust(widths[column]) if column < 3 else cell.rjust(widths[column])
