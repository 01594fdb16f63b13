import json
import math
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from helpers import ROOT
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image
from torch import nn

import hyperfunc as hf
from hyperfunc import checkpoint, curves, journal, painter, plot
from hyperfunc.interrupt import SIGNALS
from hyperfunc.painter import Painter

CURVES = ROOT / "hyperfunc" / "curves.py"

PATIENCE = 120
"""Seconds; pictures are drawn at the lowest priority, and a busy machine can keep them waiting for long."""

Row = dict[str, Any]


def make_rows(count: int, *, val: bool = False, seed: int = 0, rate: float = 0.002) -> list[Row]:
    """Epochs as train.py notes them: falling losses, rising accuracies, a rate that is halved twice."""
    noise = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[Row] = []
    best = (-1.0, 0)
    for epoch, (a, b) in enumerate(noise, 1):
        left = math.exp(-6 * epoch / max(count, 20))
        row: Row = {"epoch": epoch, "step": 391 * epoch, "epoch_time": 93.1, "images_per_second": 530.0}
        row |= {"train/loss": 0.02 + 1.6 * left, "train/accuracy": 99.5 - 57 * left}
        row |= {"test/loss": 0.3 + 1.4 * left + 0.05 * a, "test/accuracy": 93 - 50 * left - a}
        if val:
            row |= {"val/loss": 0.3 + 1.4 * left + 0.05 * b, "val/accuracy": 92.5 - 50 * left - b}
        row["learning_rate"] = rate * 0.5 ** (2 * epoch // (count + 1))
        best = max(best, (row["val/accuracy" if val else "test/accuracy"], epoch), key=lambda pair: pair[0])
        rows.append(row | {"best_accuracy": best[0], "best_epoch": best[1]})
    return rows


def lines_of(axes: Any) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.get_lines()}


def values(line: Line2D) -> tuple[list[float], list[float]]:
    return list(line.get_xdata()), list(line.get_ydata())  # type: ignore[arg-type]


def shown_texts(figure: Figure) -> Iterator[Text]:
    """What there is to read: without the ticks beyond the limits, which exist and are not drawn."""
    hidden: set[int] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-6 * (high - low)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not (axes.axison and low - slack <= tick.get_loc() <= high + slack):
                    hidden |= {id(tick.label1), id(tick.label2)}
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if id(text) not in hidden and text.get_visible() and text.get_text().strip():
            yield text


def assert_legible(figure: Figure) -> None:
    """Every text is inside the picture, large enough, and covers no other."""
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    texts = list(shown_texts(figure))
    boxes = [text.get_window_extent() for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        what = text.get_text()
        assert float(text.get_fontsize()) >= 8, what
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, (what, box)
    for i, box in enumerate(boxes):
        for j in range(i):
            apart = box.x1 <= boxes[j].x0 or boxes[j].x1 <= box.x0 or box.y1 <= boxes[j].y0 or boxes[j].y1 <= box.y0
            assert apart, (texts[i].get_text(), texts[j].get_text())


def read_picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image


@pytest.mark.parametrize("val", [False, True])
def test_curves_hold_what_the_rows_say(val: bool) -> None:
    rows = make_rows(40, val=val)
    figure = curves.draw(rows, "a run")
    loss, accuracy, rate = figure.axes
    epochs = list(range(1, 41))
    for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
        found = lines_of(axes)
        for split, label in (("train", "train"), ("test", "test"), *([("val", "held out")] if val else [])):
            assert values(found.pop(label)) == (epochs, [row[f"{split}/{what}"] for row in rows])
        (marked,) = found.values()
        assert values(marked)[0] == [rows[-1]["best_epoch"]] * 2
    assert values(lines_of(rate)["learning rate"]) == (epochs, [row["learning_rate"] for row in rows])
    assert rate.get_yscale() == "log"
    assert rate.get_zorder() < loss.get_zorder()
    assert accuracy.get_xlabel() == "epoch"
    assert "nats" in loss.get_ylabel()
    assert "%" in accuracy.get_ylabel()
    texts = [text.get_text() for text in shown_texts(figure)]
    best = f"best {rows[-1]['best_accuracy']:.2f} % ({'held-out' if val else 'test'}), epoch {rows[-1]['best_epoch']}"
    assert "a run" in texts
    assert best in texts
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("train", "test"),
        *(["held out"] if val else []),
        "learning rate",
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 30, 200, 10_000])
def test_any_number_of_epochs_makes_a_legible_picture(count: int, tmp_path: Path) -> None:
    figure = curves.draw(make_rows(count, val=True), "/home/someone/runs/hypernetworks_cifar_gpu.pth")
    assert_legible(figure)
    ticks = [float(tick) for tick in figure.axes[1].get_xticks()]
    assert ticks == [round(tick) for tick in ticks]
    visible = [line.get_marker() != "None" for line in figure.axes[0].get_lines()[:3]]
    assert visible == [count <= curves.MARKED_EPOCHS] * 3
    curves.save(figure, tmp_path / "picture")
    assert read_picture(tmp_path / "picture").size == curves.SIZE
    assert os.listdir(tmp_path) == ["picture"]


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.0},
        {"learning_rate": 1e-9, "test/loss": 1e8},
        {"train/loss": 0.0, "train/accuracy": 100.0, "test/accuracy": 100.0},
        {"test/loss": None, "best_epoch": 0, "best_accuracy": -1.0},
        {"train/loss": math.nan, "test/loss": math.inf},
    ],
)
def test_odd_numbers_make_a_legible_picture_too(change: Row) -> None:
    rows = make_rows(10)
    assert_legible(curves.draw([*rows, rows[-1] | {"epoch": 11} | change], "odd"))
    assert_legible(curves.draw([rows[0] | change], "odd"))


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="no finished epoch"):
        curves.draw([], "nothing")


def test_any_title_can_be_drawn(tmp_path: Path) -> None:
    for title in ("$\\frac$", "运行/超网络.pth", "a" * 300, "line\nbreak\0", os.fsdecode(b"/\xff/run"), ""):
        figure = curves.draw(make_rows(3), title)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            assert_legible(figure)
        curves.save(figure, tmp_path / "picture.png")
    assert curves.shorten("x" * 100 + "y" * 100, 20) == "xxxxxxxxx … yyyyyyyy"


def test_settings_of_the_user_change_nothing(tmp_path: Path) -> None:
    curves.save(curves.draw(make_rows(3), "title"), tmp_path / "a.png")
    mine: Any = {"text.usetex": True, "savefig.bbox": "tight", "figure.dpi": 33, "axes.facecolor": "red"}
    with matplotlib.rc_context(mine):
        curves.save(curves.draw(make_rows(3), "title"), tmp_path / "b.png")
        assert {name: matplotlib.rcParams[name] for name in mine} == mine
    assert read_picture(tmp_path / "a.png").tobytes() == read_picture(tmp_path / "b.png").tobytes()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    figure = curves.draw(make_rows(2), "title")
    (tmp_path / "real.png").write_text("old")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    with pytest.raises(ValueError, match="xyz"):
        curves.save(figure, tmp_path / "link.png", "xyz")
    assert (tmp_path / "real.png").read_text() == "old"
    curves.save(figure, tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert read_picture(tmp_path / "real.png").size == curves.SIZE
    (tmp_path / "folder.png").mkdir()
    for bad in ("folder.png", "nothing/x.png"):
        with pytest.raises(OSError, match=f"{tmp_path / bad}'$"):
            curves.save(figure, tmp_path / bad)
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "link.png", "real.png"]


class Watched:
    """A painter, the lines it warned of, and a way to wait for its process."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.painter = Painter(self.warnings.append)

    @property
    def pid(self) -> int:
        assert self.painter._process is not None
        return self.painter._process.pid

    def paint(self, rows: Sequence[Row], path: Path) -> float:
        """Asks for a picture and returns how long that took."""
        began = time.perf_counter()
        self.painter.paint(rows, "title", path)
        return time.perf_counter() - began

    def wait_for_answer(self) -> None:
        """Waits till there is an answer, which the painter reads when it is called the next time."""
        assert select.select([self.painter._pipes()[1]], [], [], PATIENCE)[0]


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    watched.painter.close(10)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # What has ended may still wait for its parent, which in a container may never ask.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_the_painter_draws_the_newest_and_drops_what_is_in_between(watched: Watched, tmp_path: Path) -> None:
    for count in range(1, 21):
        assert watched.paint(make_rows(count), tmp_path / f"{count}.png") < 0.5
    pid = watched.pid
    watched.painter.close(PATIENCE)
    assert sorted(os.listdir(tmp_path)) == ["1.png", "20.png"]
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    curves.save(curves.draw(make_rows(20), "title"), tmp_path / "expected.png")
    assert read_picture(tmp_path / "20.png").tobytes() == read_picture(tmp_path / "expected.png").tobytes()
    watched.paint(make_rows(3), tmp_path / "late.png")
    watched.painter.close(1)
    assert not (tmp_path / "late.png").exists()
    assert watched.warnings == []


def test_without_pictures_there_is_no_process() -> None:
    painter = Painter(pytest.fail)
    painter.close(5)
    assert painter._process is None


def test_signals_that_reach_all_processes_do_not_stop_the_drawing(watched: Watched, tmp_path: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    watched.paint(make_rows(1), tmp_path / "a.png")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    # At once, while it starts, and once it is at work.
    for path in ("b.png", "c.png"):
        for number in SIGNALS:
            os.kill(watched.pid, number)
        watched.wait_for_answer()
        watched.paint(make_rows(2), tmp_path / path)
    watched.painter.close(PATIENCE)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png", "c.png"]
    assert watched.warnings == []


def test_a_process_that_was_killed_is_replaced(watched: Watched, tmp_path: Path) -> None:
    watched.paint(make_rows(1), tmp_path / "a.png")
    watched.wait_for_answer()
    for name in ("b.png", "c.png"):
        pid = watched.pid
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda pid=pid: is_gone(pid))
        watched.paint(make_rows(2), tmp_path / name)
        assert watched.pid != pid
        watched.wait_for_answer()
    watched.painter.close(PATIENCE)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png", "c.png"]
    reason = "the process that draws them ended (SIGKILL)"
    assert watched.warnings == [f"the curves are not drawn: {reason}; training goes on"]


def test_processes_that_die_at_once_are_given_up(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho >>{tmp_path}/starts\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    for _ in range(painter.RESTARTS + 2):
        watched.paint(make_rows(1), tmp_path / "a.png")
        assert wait_until(lambda: watched.painter._process is None or is_gone(watched.pid))
    watched.painter.close(5)
    assert (tmp_path / "starts").read_text().count("\n") == painter.RESTARTS
    assert watched.warnings == [
        "the curves are not drawn: the process that draws them ended (exit code 3); training goes on"
    ]


def test_a_program_that_cannot_be_started_is_said_once(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    watched.paint(make_rows(1), tmp_path / "a.png")
    watched.paint(make_rows(1), tmp_path / "a.png")
    (line,) = watched.warnings
    assert line.startswith("the curves are not drawn: [Errno 2] No such file")


def test_a_stopped_process_keeps_nobody_waiting(watched: Watched, tmp_path: Path) -> None:
    watched.paint(make_rows(1), tmp_path / "a.png")
    watched.wait_for_answer()
    pid = watched.pid
    os.kill(pid, signal.SIGSTOP)
    long = make_rows(8_000)  # more than the pipe holds
    assert max(watched.paint(long, tmp_path / "long.png") for _ in range(3)) < 1
    began = time.perf_counter()
    watched.painter.close(0.2)
    assert time.perf_counter() - began < 1
    assert watched.warnings == ["the picture of the curves is not ready after 0.2 s; it is being finished alone"]
    os.kill(pid, signal.SIGCONT)
    os.waitpid(pid, 0)
    assert os.listdir(tmp_path) == ["a.png"]


def test_without_patience_the_process_finishes_alone(watched: Watched, tmp_path: Path) -> None:
    watched.paint(make_rows(1), tmp_path / "a.png")
    watched.paint(make_rows(2), tmp_path / "b.png")
    pid = watched.pid
    os.kill(pid, signal.SIGSTOP)
    began = time.perf_counter()
    watched.painter.close(0)
    assert time.perf_counter() - began < 0.5
    os.kill(pid, signal.SIGCONT)
    assert os.waitpid(pid, 0)[1] == 0
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]
    assert watched.warnings == []


def test_a_long_run_is_drawn_although_the_pipe_is_too_small(watched: Watched, tmp_path: Path) -> None:
    rows = make_rows(10_000)
    assert watched.paint(rows, tmp_path / "a.png") < 1
    watched.painter.close(PATIENCE)
    assert read_picture(tmp_path / "a.png").size == curves.SIZE
    assert watched.warnings == []


def test_what_cannot_be_written_is_said_once_and_does_not_end_the_drawing(watched: Watched, tmp_path: Path) -> None:
    bad = tmp_path / "nothing" / "a.png"
    for path in (bad, bad, tmp_path / "a.png"):
        watched.paint(make_rows(1), path)
        watched.wait_for_answer()
    watched.painter.close(PATIENCE)
    assert watched.warnings == [
        f"the curves are not drawn: [Errno 2] No such file or directory: '{bad}'; training goes on"
    ]
    assert os.listdir(tmp_path) == ["a.png"]


def test_rows_that_are_no_json_are_said(watched: Watched, tmp_path: Path) -> None:
    watched.paint([{"epoch": object()}], tmp_path / "a.png")
    (line,) = watched.warnings
    assert "not JSON serializable" in line


def test_without_matplotlib_the_reason_is_said(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('No module', name='matplotlib')\n")
    # The process prints what is not an answer, too.
    (tmp_path / "sitecustomize.py").write_text("print('welcome', flush=True)\nprint(17, flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    watched.paint(make_rows(1), tmp_path / "a.png")
    watched.painter.close(PATIENCE)
    reason = "matplotlib is not installed (pip install matplotlib)"
    assert watched.warnings == [f"the curves are not drawn: {reason}; training goes on"]


def test_no_module_of_the_package_or_of_the_working_folder_gets_in_the_way(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "somewhere"
    folder.mkdir()
    (folder / "matplotlib.py").write_text("raise RuntimeError('the wrong one')\n")
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "sitecustomize.py").write_text(
        "import atexit, json, sys\n"
        "def note():\n"
        f"    with open({str(tmp_path / 'seen')!r}, 'w') as file:\n"
        "        json.dump([sys.path, list(sys.modules)], file)\n"
        "atexit.register(note)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "probe"))
    monkeypatch.chdir(folder)
    watched.painter.paint(make_rows(1), "title", "a.png")
    watched.painter.close(PATIENCE)
    assert read_picture(folder / "a.png").size == curves.SIZE
    assert watched.warnings == []
    folders, modules = json.loads((tmp_path / "seen").read_text())
    assert not {"", str(folder), str(CURVES.parent)} & set(folders)
    assert not {"torch", "hyperfunc", "matplotlib.pyplot"} & set(modules)


def test_the_process_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "from hyperfunc.painter import Painter\n"
        "painter = Painter(print)\n"
        f"painter.paint([{{'epoch': 1, 'test/loss': 1.0}}], '', {str(tmp_path / 'a.png')!r})\n"
        "print(painter._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert wait_until((tmp_path / "a.png").exists)
    assert not is_gone(pid)
    parent.kill()
    assert wait_until(lambda: is_gone(pid))
    parent.wait()
    parent.stdout.close()


def test_the_drawing_process_answers_every_line(tmp_path: Path) -> None:
    good = {"rows": make_rows(2), "title": "title", "output": str(tmp_path / "a.png")}
    requests = [b"no json", json.dumps(good | {"rows": []}).encode(), json.dumps(good).encode()]
    # Started by its own path, as it may be as well.
    done = subprocess.run([sys.executable, CURVES], input=b"\n".join(requests) + b"\n", capture_output=True, check=True)
    first, second, third = (json.loads(line) for line in done.stdout.splitlines())
    assert list(first) == ["error"]
    assert second == {"error": "there is no finished epoch to draw"}
    assert third == {"drawn": str(tmp_path / "a.png")}
    assert done.stderr == b""


def test_runs_are_compared() -> None:
    runs = {"first": make_rows(30), "_second $x$": make_rows(20, val=True, seed=1), "third " * 30: make_rows(1, seed=2)}
    figure = plot.compare(runs)
    assert_legible(figure)
    loss, accuracy = figure.axes
    for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
        lines = iter(axes.get_lines())
        for rows in runs.values():
            train, test, best = next(lines), next(lines), next(lines)
            assert values(train)[1] == [row[f"train/{what}"] for row in rows]
            assert values(test) == ([row["epoch"] for row in rows], [row[f"test/{what}"] for row in rows])
            assert values(best)[0] == [rows[-1]["best_epoch"]]
            assert test.get_linewidth() > train.get_linewidth()
            assert train.get_color() == test.get_color() == best.get_color()
    assert len({line.get_color() for line in accuracy.get_lines()}) == 3
    first, second, third = (text.get_text() for text in figure.legends[0].get_texts())
    assert first == f"first:  {curves.best_text(runs['first'][-1])}"
    rows = runs["_second $x$"]
    then = rows[rows[-1]["best_epoch"] - 1]
    assert second == f"_second $x$:  {curves.best_text(rows[-1])} (test {then['test/accuracy']:.2f} %)"
    assert third.startswith("third third")


def test_many_runs_can_be_told_apart() -> None:
    figure = plot.compare({f"run {seed}": make_rows(5, seed=seed) for seed in range(16)})
    assert_legible(figure)
    tests = figure.axes[1].get_lines()[1::3]
    dashes = [repr(line._dash_pattern) for line in tests]  # type: ignore[attr-defined]
    assert len({(line.get_color(), dash) for line, dash in zip(tests, dashes, strict=True)}) == 16


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a.pth", "runs/b.pth"], ["a", "b"]),
        (["runs/a/net.pth", "runs/b/net.metrics.jsonl"], ["a", "b"]),
        (["runs/a/1/net.pth", "runs/b/2/net.pth"], ["a/1", "b/2"]),
        (["a/x.pth", "b/y.pth"], ["a/x", "b/y"]),
        (["x/run.pth", "run.pth"], ["x/run", "run"]),
        (["run.pth", "run.metrics.jsonl", "other.pth"], ["run.pth", "run.metrics.jsonl", "other"]),
        (["run.pth", "./run.pth"], ["run.pth", "run.pth (2)"]),
        (["lr0.1", "lr0.2"], ["lr0.1", "lr0.2"]),
    ],
)
def test_names_are_as_short_as_can_be(paths: list[str], names: list[str]) -> None:
    assert plot.distinguishing_names(paths) == names


def embedding_map(figure: Figure) -> tuple[torch.Tensor, list[int]]:
    (axes,) = [axes for axes in figure.axes if "principal" in axes.get_xlabel()]
    (points,) = axes.collections
    array = points.get_array()
    assert array is not None
    return torch.from_numpy(points.get_offsets().filled()), list(array)  # type: ignore[union-attr]


def test_kernels_are_shown_layer_by_layer(generator: torch.Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=8)
    params, _ = model.init(generator)
    figure = plot.draw_kernels(model, params, "a network")
    assert_legible(figure)
    kernels = model.kernels(params)
    mosaics = {
        axes.get_title(loc="left"): axes.get_images()[0] for axes in figure.axes if "std" in axes.get_title(loc="left")
    }
    assert len(mosaics) == 6
    for number, ((title, image), (name, kernel)) in enumerate(zip(mosaics.items(), kernels.items(), strict=True), 1):
        out, into, high, wide = kernel.shape
        assert title == f"{number}: {name}\n{out}x{into}x3x3, std {kernel.std(correction=0):.3g}"
        shown = torch.from_numpy(image.get_array().filled())  # type: ignore[union-attr]
        for i, j in ((0, 0), (out - 1, 0), (3, into - 1)):
            assert torch.equal(shown[high * i : high * (i + 1), wide * j : wide * (j + 1)], kernel[i, j])
        low, top = image.get_clim()
        assert low == -top == pytest.approx(-3 * float(kernel.std(correction=0)))
        # Each weight takes the same whole number of pixels.
        assert image.axes is not None
        zoom = image.axes.bbox.width / shown.shape[1]
        assert zoom == pytest.approx(round(zoom))
        assert image.axes.bbox.height == pytest.approx(round(zoom) * shown.shape[0])

    places, layers = embedding_map(figure)
    owners = [number for number, layer in enumerate(model.tiling.layers["3x3"], 1) for _ in range(layer.units)]
    assert layers == owners[::-1]
    centred = (params.embeddings["3x3"] - params.embeddings["3x3"].mean(0)).double()
    variances, axes_of_space = torch.linalg.eigh(centred.T @ centred)
    expected = centred.flip(0) @ axes_of_space.flip(1)[:, :2]
    torch.testing.assert_close(places.abs(), expected.abs(), rtol=1e-6, atol=1e-8)
    share = 100 * variances.flip(0) / variances.sum()
    assert any(
        axes.get_xlabel() == f"first principal component ({share[0]:.1f} % of the variance)" for axes in figure.axes
    )
    assert any(axes.get_ylabel() == f"second principal component ({share[1]:.1f} %)" for axes in figure.axes)


def test_of_many_or_large_layers_a_part_is_shown_and_said_to_be_one(generator: torch.Generator) -> None:
    layers = [nn.Linear(4, 4, bias=False) for _ in range(59)] + [nn.Conv1d(4, 600, 3)]
    model = hf.hyperize(nn.Sequential(*layers), targets="*.weight", unit=(4, 4), z_dim=1)
    params, _ = model.init(generator)
    figure = plot.draw_kernels(model, params)
    assert_legible(figure)
    assert any(text.get_text().startswith("generated layers: 48 of 60;") for text in figure.texts)
    titles = [title for axes in figure.axes if "std" in (title := axes.get_title(loc="left"))]
    assert len(titles) == 48
    assert titles[0].startswith("1: 0.weight\n4x4, std ")
    assert titles[-1].startswith("60: 59.weight\n600x4x3, std ")
    assert titles[-1].endswith(", first channels")
    maps = [axes.get_title(loc="left") for axes in figure.axes if "principal" in axes.get_xlabel()]
    assert maps == ["embeddings of the matrix kernels", "embeddings of the 3 kernels"]


def test_a_plain_network_has_no_kernels_to_show(generator: torch.Generator) -> None:
    model = hf.resnet(10)
    with pytest.raises(ValueError, match="no generated kernels"):
        plot.draw_kernels(model, model.init(generator)[0])


def run_main(arguments: list[str]) -> Any:
    """The exit code, however it is handed over."""
    try:
        return plot.main(arguments)
    except SystemExit as end:
        return end.code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with runs in it, whole and damaged."""
    monkeypatch.chdir(tmp_path)
    rows = make_rows(3)
    checkpoint.save("run.pth", {}, {"progress": {"history": rows}})
    checkpoint.save("new.pth", {}, {"progress": {"history": []}})
    journal.write_rows(Path("run.metrics.jsonl"), [{"kind": "start"}, *({"kind": "epoch", **row} for row in rows)])
    with open("run.metrics.jsonl", "ab") as file:
        file.write(b'{"kind":"epoch","epo')
    Path("renamed").write_bytes(Path("run.metrics.jsonl").read_bytes())
    Path("empty.metrics.jsonl").write_bytes(b"")
    Path("damaged.pth").write_bytes(Path("run.pth").read_bytes()[:-3] + b"abc")
    Path("text.txt").write_text("Hello\n")
    Path("other.jsonl").write_text('{"kind": "epoch", "loss": 1}\n')
    model = hf.hyper_resnet(10, z_dim=2)
    hf.save("net.pth", model, *model.init(torch.Generator().manual_seed(0)))
    model = hf.resnet(10)
    hf.save("plain.pth", model, *model.init(torch.Generator().manual_seed(0)))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["run.pth", "-o", "new.png"], b"\x89PNG"),
        (["renamed", "--output", "new.pdf"], b"%PDF"),
        (["run.pth", "run.metrics.jsonl", "-o", "new.SVG"], b"<?xml"),
        (["run.pth", "-o", "new.png", "renamed"], b"\x89PNG"),
        (["--kernels", "net.pth", "-o", "new.png"], b"\x89PNG"),
    ],
)
def test_the_program_writes_what_is_asked_for(
    folder: Path, arguments: list[str], beginning: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(os.listdir(folder))
    assert plot.main(arguments) == 0
    (written,) = set(os.listdir(folder)) - before
    assert written in arguments
    assert Path(written).read_bytes().startswith(beginning)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "-o"),
        (["-o", "x.png"], 2, "expected either"),
        (["run.pth"], 2, "-o"),
        (["run.pth", "--kernels", "net.pth", "-o", "x.png"], 2, "expected either"),
        (["run.pth", "-o", "x.xyz"], 2, "got x.xyz, expected a name that ends in .png, .pdf, .svg"),
        (["nothing.pth", "-o", "x.png"], 2, "No such file"),
        ([".", "-o", "x.png"], 2, "directory"),
        (["damaged.pth", "-o", "x.png"], 2, "damaged"),
        (["text.txt", "-o", "x.png"], 2, "not a file of hyperfunc"),
        (["other.jsonl", "-o", "x.png"], 2, "line 1 is not a row of one"),
        (["run.pth", "new.pth", "-o", "x.png"], 2, "new.pth has no finished epoch"),
        (["empty.metrics.jsonl", "-o", "x.png"], 2, "no finished epoch"),
        (["net.pth", "-o", "x.png"], 2, "no history"),
        (["--kernels", "plain.pth", "-o", "x.png"], 2, "no generated kernels"),
        (["--kernels", "run.pth", "-o", "x.png"], 2, "holds no model"),
        (["run.pth", "-o", "nothing/x.png"], 1, "could not write the picture: [Errno 2]"),
    ],
)
def test_an_error_is_one_line(
    folder: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(folder))
    assert run_main(arguments) == code
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("python -m hyperfunc.plot: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert sorted(os.listdir(folder)) == before


def test_the_program_says_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main(["run.pth", "-o", "x.png"]) == 1
    assert capsys.readouterr().err == "python -m hyperfunc.plot: matplotlib is not installed (pip install matplotlib)\n"


def test_the_program_can_be_run(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hyperfunc.plot", "run.pth", "-o", "x.png"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert read_picture(folder / "x.png").size == curves.SIZE
