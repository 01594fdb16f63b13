"""The picture of a run, and what draws it in a process beside the training (see `painter`).

That process runs this file by its path and not through the package, which would import torch: hence nothing but the
standard library is imported here, and matplotlib only where something is drawn.
"""

import contextlib
import json
import math
import os
import secrets
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import matplotlib.lines

SIZE = (1000, 700)
"""Width and height of the picture, in pixels."""

DPI = 100

LEFT = 0.095
"""Where panels begin, as a part of the width."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which most colour-blind people can tell apart; without the yellow, too light for a line."""

GREY = "#767676"
"""The lightest grey that is still easy to read on white."""

MARKED_EPOCHS = 30
"""Up to so many epochs each has a marker: a single one would else be invisible."""

_STYLE = {
    "font.size": 10,
    "text.parse_math": False,  # a path may hold two dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.edgecolor": GREY,
    "grid.color": "#e8e8e8",
    "lines.markersize": 4,
    "legend.frameon": False,
    "svg.fonttype": "none",
}

_CHINESE = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS"),
)
"""Fonts for what matplotlib's own lacks, in paths and names of runs."""


def draw(rows: Sequence[Mapping[str, Any]], title: str) -> "matplotlib.figure.Figure":
    """Loss, accuracy and learning rate over the epochs of one run.

    Args:
        rows: The run's rows of the kind "epoch", in order; at least one.
        title: What stands above; it may be a path, and is cut if it is too long.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("there is no finished epoch to draw")
    with style():
        figure = new_figure(*SIZE, title)
        loss, accuracy = panels(figure, top=0.88, bottom=0.08)
        rate = loss.twinx()
        # The rate stays behind the curves, whose panel must let it through.
        rate.set_zorder(loss.get_zorder() - 1)
        loss.patch.set_visible(False)
        rate.grid(False)

        epochs = column(rows, "epoch")
        marker, width = ("o" if len(rows) <= MARKED_EPOCHS else None), line_width(len(rows))
        handles: list[Any] = []
        for split, label, colour in zip(("train", "test", "val"), ("train", "test", "held out"), COLOURS, strict=False):
            if any(f"{split}/loss" in row for row in rows):
                for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
                    values = column(rows, f"{split}/{what}")
                    (line,) = axes.plot(epochs, values, color=colour, marker=marker, linewidth=width, label=label)
                handles.append(line)
        rates = column(rows, "learning_rate")
        (line,) = rate.plot(
            epochs, rates, color="#bdbdbd", marker="o" if len(rows) == 1 else None, label="learning rate"
        )
        _set_rate_axis(rate, line)
        handles.append(line)
        finish_panels(loss, accuracy, epochs)
        _mark_best(loss, accuracy, rows[-1])
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(LEFT, 0.943), borderpad=0, ncols=len(handles))
    return figure


def save(figure: "matplotlib.figure.Figure", path: str | os.PathLike[str], kind: str = "png") -> None:
    """Writes a picture in one stroke: the old one or the new one is there, whole.

    Args:
        figure: The picture.
        path: The file. Of a symbolic link the target is written.
        kind: "png", "pdf" or "svg", whatever the path ends in.

    Raises:
        OSError: It cannot be written.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        with style(), warnings.catch_warnings(), open(temporary, "xb") as file:
            _ignore_missing_glyphs()
            figure.savefig(file, format=kind, dpi=DPI)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno:
            # Whoever reads the message knows of no temporary file.
            raise OSError(error.errno, error.strerror, path) from None
        raise


def style() -> contextlib.AbstractContextManager[None]:
    """What pictures look like, whatever the user's own settings of matplotlib are."""
    import matplotlib.font_manager
    import matplotlib.style

    installed = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in _CHINESE if name in installed)]
    return matplotlib.style.context(["default", {**_STYLE, "font.family": fonts}])


def new_figure(
    width: int, height: int, title: str, *, left: float = LEFT, right: int = 12
) -> "matplotlib.figure.Figure":
    """An empty picture, which is in no global list of pictures, with a title.

    Args:
        width: Of the picture, in pixels.
        height: The same.
        title: As much of it is shown as has room.
        left: Where it begins, as a part of the width.
        right: Pixels that are to stay free on the right of it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    font: dict[str, Any] = {"size": 12, "weight": "bold"}
    shown = fitted(figure, title, (1 - left) * width - right, **font)
    figure.text(left, 1 - 12 / height, shown, va="top", **font)
    return figure


def panels(
    figure: "matplotlib.figure.Figure", *, top: float, bottom: float, ratio: float = 1
) -> "tuple[matplotlib.axes.Axes, matplotlib.axes.Axes]":
    """Two panels one above the other, for loss and accuracy, that share the epochs; the second `ratio` as high."""
    grid = figure.add_gridspec(
        2, 1, left=LEFT, right=0.9, top=top, bottom=bottom, hspace=0.13, height_ratios=(1, ratio)
    )
    loss = figure.add_subplot(grid[0])
    accuracy = figure.add_subplot(grid[1], sharex=loss)
    loss.set_ylabel("loss: mean cross-entropy\n(nats)")
    accuracy.set_ylabel("accuracy (%)")
    accuracy.set_xlabel("epoch")
    loss.tick_params(labelbottom=False)
    for axes in (loss, accuracy):
        axes.yaxis.set_label_coords(-0.07, 0.5)  # clear of the longest numbers
    return loss, accuracy


def finish_panels(loss: "matplotlib.axes.Axes", accuracy: "matplotlib.axes.Axes", epochs: Sequence[float]) -> None:
    """Sets the limits and ticks of panels that hold their curves."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    first, last = min(epochs), max(epochs)
    pad = 0.02 * (last - first) or 0.5
    accuracy.set_xlim(first - pad, last + pad)
    accuracy.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    accuracy.xaxis.set_major_formatter(FuncFormatter(lambda epoch, _: f"{epoch:,.0f}"))
    accuracy.set_ylim(bottom=max(accuracy.get_ylim()[0], -1), top=min(accuracy.get_ylim()[1], 101))
    values = _positive(loss.get_lines())
    if values and max(values) > 10 * min(values):
        log_axis(loss, min(values) / 1.2, max(values) * 1.2)
        loss.set_ylabel("loss: mean cross-entropy\n(nats, log scale)")


def log_axis(axes: "matplotlib.axes.Axes", low: float, high: float, ticks: Sequence[float] = ()) -> None:
    """A logarithmic y axis with plain numbers beside it, at `ticks` or, without any, at round ones."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    # Before the scale, which would otherwise take the limits from curves that may have no logarithm.
    axes.set_ylim(low, high)
    axes.set_yscale("log", nonpositive="mask")
    decades = math.log10(high / low)
    subs = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    axes.yaxis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-"))
    )
    axes.yaxis.set_minor_locator(NullLocator())


def line_width(epochs: int) -> float:
    """In points; where a pixel holds several epochs, a wide line hides all between the highest and the lowest."""
    return 1.6 if epochs <= 1000 else 0.7


def column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The values of a column; nan where a row has none."""
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]


def shorten(text: str, length: int) -> str:
    """The text in one line, without its middle if it is too long, and without what cannot be shown."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    if len(text) <= length:
        return text
    return f"{text[: length // 2 - 1]} … {text[len(text) - length // 2 + 2 :]}"


def fitted(figure: "matplotlib.figure.Figure", text: str, pixels: float, **font: Any) -> str:
    """As much of a text as has room in so many pixels."""
    length = len(text)
    while True:
        shown = shorten(text, length)
        with warnings.catch_warnings():
            _ignore_missing_glyphs()
            probe = figure.text(0, 0, shown, **font)
            needed = probe.get_window_extent().width
        probe.remove()
        if needed <= pixels or length < 10:
            return shown
        length = min(length - 1, int(length * pixels / needed))


def _ignore_missing_glyphs() -> None:
    """A character that no font here has is shown as a box, and that is all that there is to say about it."""
    warnings.filterwarnings("ignore", "Glyph .* missing from")


def _set_rate_axis(axes: "matplotlib.axes.Axes", line: "matplotlib.lines.Line2D") -> None:
    """An axis for the rates, light enough not to disturb."""
    rates = sorted(set(_positive([line])))
    high = max(rates, default=1.0)
    # The last rates of a cosine are next to nothing, and would press all others against the top.
    low = max(min(rates, default=1.0), high / 1e3)
    steps = len(rates) <= 6 and all(after > 1.15 * before for before, after in pairwise(rates))
    if steps:
        line.set_drawstyle("steps-mid")
    log_axis(axes, low / 1.5, high * 1.5, rates if steps else ())
    axes.set_ylabel("learning rate (log scale)", color=GREY)
    axes.tick_params(axis="y", colors=GREY, length=2)
    axes.spines["left"].set_visible(False)


def _positive(lines: Iterable[Any]) -> list[float]:
    """All heights of some lines that a logarithmic axis can show."""
    return [value for line in lines for value in line.get_ydata() if 0 < value < math.inf]


def _mark_best(loss: "matplotlib.axes.Axes", accuracy: "matplotlib.axes.Axes", row: Mapping[str, Any]) -> None:
    """A line through both panels at the best epoch, and what it is about in the gap between them."""
    if not row.get("best_epoch"):
        return
    epoch = row["best_epoch"]
    for axes in (loss, accuracy):
        axes.axvline(epoch, color="black", linewidth=1, linestyle=(0, (2, 2)), zorder=1.5)
    low, high = accuracy.get_xlim()
    where = (epoch - low) / (high - low)
    accuracy.annotate(
        best_text(row),
        (epoch, 1),
        xycoords=accuracy.get_xaxis_transform(),
        xytext=(0, 5),
        textcoords="offset points",
        ha="left" if where < 0.2 else "right" if where > 0.8 else "center",
        va="bottom",
        annotation_clip=False,
    )


def best_text(row: Mapping[str, Any]) -> str:
    """The best accuracy so far, as a row knows it: on what, and in which epoch; '' if it does not know."""
    if not row.get("best_epoch"):
        return ""
    split = "held-out" if "val/accuracy" in row else "test"
    return f"best {row['best_accuracy']:.2f} % ({split}), epoch {row['best_epoch']:,}"


def main() -> None:
    """Draws what is asked for on standard input, a JSON object a line, and answers each with a line; till the end.

    The end of the input is also the parent's, however that came about.
    """
    os.nice(19)
    # A backend for windows is not wanted, and threads to compute with only take memory.
    os.environ |= {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            save(draw(request["rows"], request["title"]), request["output"])
            answer = {"drawn": request["output"]}
        except Exception as error:
            answer = {"error": one_line(error)}
        # With nobody there to read it, there may still be a request to fulfil.
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(answer).encode() + b"\n")


def one_line(error: Exception) -> str:
    """The error in one line; of a missing matplotlib how to install it."""
    if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
        return "matplotlib is not installed (pip install matplotlib)"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
