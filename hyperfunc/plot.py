"""Pictures of runs, and of what a network generates.

python -m hyperfunc.plot RUN [RUN ...] -o FILE          the curves of a run, or several runs compared
python -m hyperfunc.plot --kernels CHECKPOINT -o FILE   the generated kernels, and a map of the embeddings
"""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hyperfunc import checkpoint, curves, journal, model_file
from hyperfunc.exits import EXIT_BAD_INPUT, EXIT_FAILED
from hyperfunc.flags import Parser
from hyperfunc.model import Model, Params

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import matplotlib.lines

KINDS = ("png", "pdf", "svg")
"""What a picture can be written as; the ending of its name says which."""

DASHES = ("-", (0, (6, 2)), (0, (2, 1)))
"""Tell runs of one colour apart, where there are more runs than colours."""

MAX_LAYERS = 48
"""Of more layers an even selection is shown."""

MOSAIC = (192, 384)
"""The least and the largest side of a mosaic, in pixels.

A weight takes one pixel, or several where that would be too small; of a layer that is too large the first channels are
shown.
"""

SPREAD = 3
"""Up to so many standard deviations of its layer a weight has a colour of its own."""


def compare(runs: Mapping[str, Sequence[journal.Row]]) -> "matplotlib.figure.Figure":
    """Loss and accuracy of several runs over their epochs.

    Args:
        runs: By name, the rows of the kind "epoch" of each run, in order; at least one row each.
    """
    head, panels, foot, line = 65, 650, 70, 22  # pixels
    height = head + panels + foot + line * len(runs)
    with curves.style():
        figure = curves.new_figure(curves.SIZE[0], height, f"{len(runs)} runs")
        key = "strong lines: test, thin lines: train, dots: the best epoch of each run"
        figure.text(curves.LEFT, 1 - 36 / height, key, color=curves.GREY, va="top")
        loss, accuracy = curves.panels(
            figure, top=1 - head / height, bottom=(foot + line * len(runs)) / height, ratio=1.5
        )
        handles = []
        for number, rows in enumerate(runs.values()):
            colour = curves.COLOURS[number % len(curves.COLOURS)]
            dashes = DASHES[number // len(curves.COLOURS) % len(DASHES)]
            handles.append(_draw_run(loss, accuracy, rows, colour, dashes))
        curves.finish_panels(loss, accuracy, [e for rows in runs.values() for e in curves.column(rows, "epoch")])
        labels = [f"{curves.fitted(figure, name, 450)}:  {_best_text(rows)}" for name, rows in runs.items()]
        figure.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(curves.LEFT, 10 / height), borderpad=0, borderaxespad=0
        )
    return figure


def draw_kernels(model: Model, params: Params, title: str = "") -> "matplotlib.figure.Figure":
    """The generated kernels layer by layer, and a map of the embeddings that they are generated from.

    A kernel is shown as a mosaic with a row for each output channel and a column for each input channel. The map is
    that of the two principal components, one map for each generator.

    Args:
        model: The model.
        params: Its parameters.
        title: What stands above.

    Raises:
        ValueError: The model generates nothing.
    """
    with torch.no_grad():
        generated = model.kernels(params)
    kernels = {name: generated[name].float().cpu() for name, _ in model.module.named_parameters() if name in generated}
    if not kernels:
        raise ValueError("the network has ordinary weights only, no generated kernels")
    numbers = {name: number for number, name in enumerate(kernels, 1)}
    shown = _even_selection(list(kernels), MAX_LAYERS)
    mosaics = {name: _mosaic(kernels[name]) for name in shown}
    side = max(MOSAIC[0], *(extent for mosaic in mosaics.values() for extent in mosaic.shape))
    cell = (side + 26, side + 46)  # with a margin and two lines of text
    span = math.ceil(600 / cell[0])  # cells on each side of a map
    maps = len(params.embeddings)
    columns, rows = _grid(len(shown), cell, span, maps)
    head, margin = 78, 22
    width, height = columns * cell[0] + 2 * margin, rows * cell[1] + head + margin

    def place(left: float, top: float, wide: float, high: float) -> "matplotlib.axes.Axes":
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    with curves.style():
        figure = curves.new_figure(width, height, title, left=margin / width, right=320)
        of = f"{len(shown)} of {len(kernels)}" if len(shown) < len(kernels) else f"{len(kernels)}"
        figure.text(
            margin / width,
            1 - 40 / height,
            f"generated layers: {of}; down the output channels, across the input channels",
            va="top",
        )
        _draw_scale(place(width - margin - 260, 18, 240, 12))
        cells = _free_cells(columns, rows, span, maps)
        for (name, mosaic), (row, column) in zip(mosaics.items(), cells, strict=False):
            zoom = max(1, side // max(mosaic.shape))
            high, wide = (zoom * extent for extent in mosaic.shape)
            axes = place(margin + column * cell[0], head + row * cell[1] + 32, wide, high)
            label = curves.fitted(figure, f"{numbers[name]}: {name}", side, size=8)
            _draw_mosaic(axes, mosaic, kernels[name], label)
        for index, (key, layers) in enumerate(model.tiling.layers.items()):
            left = margin + (columns - span * (maps - index)) * cell[0]
            size = span * cell[0] - 26
            axes = place(left + 66, head + 32, size - 150, min(size - 90, span * cell[1] - 100))
            bar = place(left + size - 68, head + 32, 14, min(size - 90, span * cell[1] - 100))
            owners = [numbers[layer.name] for layer in layers for _ in range(layer.units)]
            _draw_map(axes, bar, params.embeddings[key], owners, len(kernels), f"embeddings of the {key} kernels")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: 2 for bad input, 1 if the picture cannot be written."""
    parser = Parser(
        prog="python -m hyperfunc.plot",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"FILE is written as its ending says: {', '.join(KINDS)}.",
        usage="%(prog)s RUN [RUN ...] -o FILE\n       %(prog)s --kernels CHECKPOINT -o FILE",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help=f"a checkpoint of train.py, or the *{journal.ENDING} beside it; of one run the curves are drawn, several "
        "are compared",
    )
    parser.add_argument(
        "--kernels",
        metavar="CHECKPOINT",
        help="draw the generated kernels of a checkpoint's best model, and a map of its embeddings",
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="where the picture goes")
    arguments = parser.parse_intermixed_args(argv)
    if bool(arguments.runs) == bool(arguments.kernels):
        parser.error("expected either files of runs or --kernels CHECKPOINT; see --help")
    kind = os.path.splitext(arguments.output)[1][1:].lower()
    if kind not in KINDS:
        parser.error(f"--output: got {arguments.output}, expected a name that ends in .{', .'.join(KINDS)}")
    try:
        figure = _draw(arguments)
    except ImportError as error:
        return _fail(parser, EXIT_FAILED, curves.one_line(error))
    except (OSError, ValueError) as error:
        return _fail(parser, EXIT_BAD_INPUT, curves.one_line(error))
    try:
        curves.save(figure, arguments.output, kind)
    except OSError as error:
        return _fail(parser, EXIT_FAILED, f"could not write the picture: {curves.one_line(error)}")
    return 0


def _fail(parser: argparse.ArgumentParser, code: int, line: str) -> int:
    print(f"{parser.prog}: {line}", file=sys.stderr)
    return code


def _draw(arguments: argparse.Namespace) -> "matplotlib.figure.Figure":
    if arguments.kernels:
        model, params, _ = model_file.load(arguments.kernels)
        return draw_kernels(model, params, arguments.kernels)
    if len(arguments.runs) == 1:
        return curves.draw(read_history(arguments.runs[0]), arguments.runs[0])
    names = distinguishing_names(arguments.runs)
    return compare({name: read_history(path) for name, path in zip(names, arguments.runs, strict=True)})


def read_history(path: str | os.PathLike[str]) -> list[journal.Row]:
    """The rows of the finished epochs in a checkpoint of train.py or in a journal.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is neither, it is damaged, or there is no finished epoch in it.
    """
    if _is_journal(path):
        rows = [row for row in journal.read_rows(path) if row["kind"] == "epoch"]
    else:
        progress = checkpoint.load(path).notes.get("progress")
        rows = progress.get("history") if isinstance(progress, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{path} is no checkpoint of a run of train.py, and has no history of epochs")
    for number, row in enumerate(rows, 1):
        _check_epoch(row, f"{path} is damaged: epoch row {number}")
    if not rows:
        raise ValueError(f"{path} has no finished epoch yet")
    return rows


def _check_epoch(row: Any, where: str) -> None:
    """Raises a ValueError that begins with `where` for what no epoch of a run looks like."""
    if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
        raise ValueError(f"{where} does not say which it is")
    for name, value in row.items():
        if name != "kind" and not isinstance(value, int | float | None):
            raise ValueError(f"{where} has {value!r} as {name}, expected a number")
    if row.get("best_epoch") and row.get("best_accuracy") is None:
        raise ValueError(f"{where} has a best epoch, but no best accuracy")


def distinguishing_names(paths: Sequence[str]) -> list[str]:
    """A name for each file, with as many folders as it takes to tell them apart, and none that all have."""
    parts = [[*os.path.abspath(path).split(os.sep)[:-1], _without_ending(path)] for path in paths]
    for end in (0, -1):
        while all(len(part) > 1 for part in parts) and len({part[end] for part in parts}) == 1:
            for part in parts:
                del part[end]
    names = ["/".join(part) for part in parts]
    # The checkpoint and the journal of one run differ in their endings alone.
    names = [os.path.basename(path) if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _without_ending(path: str) -> str:
    name = os.path.basename(path)
    return name.removesuffix(journal.ENDING) if name.endswith(journal.ENDING) else os.path.splitext(name)[0]


def _is_journal(path: str | os.PathLike[str]) -> bool:
    """Whether a file is lines of JSON; a checkpoint begins with a number of 8 bytes, of which some are 0."""
    with open(path, "rb") as file:
        beginning = file.read(8)
    return 0 not in beginning and (beginning[:1] == b"{" or os.fspath(path).endswith(".jsonl"))


def _draw_run(
    loss: "matplotlib.axes.Axes",
    accuracy: "matplotlib.axes.Axes",
    rows: Sequence[journal.Row],
    colour: str,
    dashes: Any,
) -> "matplotlib.lines.Line2D":
    epochs = curves.column(rows, "epoch")
    width = curves.line_width(len(rows))
    marker = "." if len(rows) == 1 else None
    best = rows[-1].get("best_epoch")
    for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
        train, test = curves.column(rows, f"train/{what}"), curves.column(rows, f"test/{what}")
        axes.plot(epochs, train, color=colour, linestyle=dashes, linewidth=width / 2, alpha=0.55, marker=marker)
        (line,) = axes.plot(epochs, test, color=colour, linestyle=dashes, linewidth=width)
        if best in epochs:
            axes.plot(best, test[epochs.index(best)], color=colour, marker="o", markeredgecolor="white", markersize=7)
    return line


def _best_text(rows: Sequence[journal.Row]) -> str:
    """The best accuracy of a run; if that is on held-out pictures, also the one on the test set then."""
    last = rows[-1]
    then = [row for row in rows if "val/accuracy" in row and row["epoch"] == last.get("best_epoch")]
    return curves.best_text(last) + "".join(f" (test {row['test/accuracy']:.2f} %)" for row in then)


def _even_selection(items: list[str], count: int) -> list[str]:
    """At most `count` of the items, evenly spread, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _mosaic(kernel: Float[Tensor, "out in *window"]) -> Float[Tensor, "high wide"]:
    """The kernel's windows side by side, as many of the first channels as there is room for."""
    out, into, *window = kernel.shape
    high = window[0] if len(window) > 1 else 1
    wide = math.prod(window) // high
    tiles = kernel.reshape(out, into, high, wide)[: max(1, MOSAIC[1] // high), : max(1, MOSAIC[1] // wide)]
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)


def _grid(layers: int, cell: tuple[int, int], span: int, maps: int) -> tuple[int, int]:
    """Columns and rows that hold the layers and the maps in a shape that suits a screen."""
    columns = span * maps + 1
    while True:
        rows = max(span, math.ceil((layers + maps * span**2) / columns))
        if rows == span or columns * cell[0] >= 1.1 * rows * cell[1]:
            return columns, rows
        columns += 1


def _free_cells(columns: int, rows: int, span: int, maps: int) -> Iterator[tuple[int, int]]:
    """The cells that no map takes, (row, column); the maps are at the top on the right."""
    for row, column in itertools.product(range(rows), range(columns)):
        if row >= span or column < columns - span * maps:
            yield row, column


def _draw_scale(axes: "matplotlib.axes.Axes") -> None:
    """What the colours of the mosaics mean."""
    steps = torch.linspace(-SPREAD, SPREAD, 256)[None].numpy()
    axes.imshow(steps, cmap="RdBu_r", aspect="auto", extent=(-SPREAD, SPREAD, 0, 1))
    axes.set_xticks([-SPREAD, 0, SPREAD], [f"-{SPREAD}", "0", f"+{SPREAD}"])
    axes.set_xlabel("standard deviations of the layer", labelpad=1)
    axes.set_yticks([])
    axes.grid(False)


def _draw_mosaic(axes: "matplotlib.axes.Axes", mosaic: Tensor, kernel: Tensor, label: str) -> None:
    std = float(kernel.std(correction=0))
    limit = SPREAD * std or 1.0
    axes.imshow(mosaic.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    shape = "x".join(map(str, kernel.shape))
    part = ", first channels" if mosaic.numel() < kernel.numel() else ""
    axes.set_title(f"{label}\n{shape}, std {std:.3g}{part}", size=8, loc="left", pad=4)


def _draw_map(
    axes: "matplotlib.axes.Axes",
    bar: "matplotlib.axes.Axes",
    embeddings: Float[Tensor, "units z"],
    owners: Sequence[int],
    layers: int,
    title: str,
) -> None:
    from matplotlib.ticker import MaxNLocator

    # The first layers have the fewest units: these come last, and on top.
    centred = embeddings.detach().cpu().double().flip(0)
    centred = centred - centred.mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    places = torch.nn.functional.pad(left * values, (0, 1)).numpy()  # a second column for embeddings of length 1
    shares = [*(values**2 / (values**2).sum().clamp_min(1e-300)).tolist(), 0.0]
    points = axes.scatter(
        places[:, 0],
        places[:, 1],
        c=owners[::-1],
        cmap="viridis",
        vmin=1,
        vmax=max(layers, 2),
        s=14 if len(owners) < 2000 else 5,
    )
    axes.set_title(title, loc="left", size=10, weight="bold")
    axes.set_xlabel(f"first principal component ({100 * shares[0]:.1f} % of the variance)")
    axes.set_ylabel(f"second principal component ({100 * shares[1]:.1f} %)")
    axes.set_aspect("equal", adjustable="datalim")
    axes.figure.colorbar(points, cax=bar, label="layer", ticks=MaxNLocator(integer=True))


if __name__ == "__main__":
    sys.exit(main())
