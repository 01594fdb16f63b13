"""Everything that a run shows goes through one `Reporter`: to the console, the journal, the picture and the tracker.

`start_reporting` makes that of a run: it begins the files beside the checkpoint, or goes on with them.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hyperfunc import journal, tracking
from hyperfunc._version import __version__
from hyperfunc.build import count_ordinary, describe_network
from hyperfunc.config import DEFAULT_PROJECT
from hyperfunc.console import Printer
from hyperfunc.exits import AFTER_SIGNAL
from hyperfunc.files import beside, free_number, numbered, remove_leftovers
from hyperfunc.histogram import histograms
from hyperfunc.journal import Journal, Row
from hyperfunc.painter import Painter
from hyperfunc.run import Run
from hyperfunc.tracking import PATIENCE_SECONDS, Tracker
from hyperfunc.tree import num_params

LAST_PICTURE_SECONDS = 20.0
"""How long the end of a run waits for its picture."""

STOP_SECONDS = 2.5
"""How long the end of a run waits for its tracker after a signal."""

TRACKING = "tracking"
"""The event from which on rows are handed to a tracker, with its id and what it had before."""

TRACKING_ENDED = "tracking ended"
"""The event of a tracker that failed, with its id and what it had then."""

_TRACKED: dict[str, tuple[str, ...] | None] = {
    "report": ("step", "batch/loss", "batch/accuracy", "learning_rate"),
    "epoch": None,
}
"""Of which kinds of rows which columns are tracked; None means all."""


class Reporter:
    """Hands rows on.

    Args:
        printer: For the lines.
        journal: For the rows.
        painter: For the picture; None draws none.
        picture: Where the picture is.
        title: What stands above it.
        tracker: For the rows, or None.
        handed_over: What the tracker's run already has: the last `step` of a report and the last `epoch`. A run that
            goes on from a checkpoint may do some of it again, and does not log it twice.

    Attributes:
        shows_histograms: Whether there is any use in making them.
    """

    def __init__(
        self,
        printer: Printer,
        journal: Journal,
        painter: Painter | None,
        picture: Path,
        title: str,
        tracker: Tracker | None,
        handed_over: tuple[int, int],
    ) -> None:
        self.printer = printer
        self.tracker = tracker
        self._journal = journal
        self._painter = painter
        self._picture = picture
        self._title = title
        self._handed_over = {"report": handed_over[0], "epoch": handed_over[1]}
        self._had_before = dict(self._handed_over)
        self.shows_histograms = True
        if tracker is not None:
            self.event(TRACKING, wandb=tracker.id, step=handed_over[0], epoch=handed_over[1])

    def row(self, kind: str, row: Mapping[str, Any]) -> bool:
        """Notes a row of the kind "report" or "epoch"; returns whether the tracker got it, and had not before."""
        self._journal.write(kind, row)
        return self.track(kind, row)

    def track(self, kind: str, row: Mapping[str, Any]) -> bool:
        """Hands a row to the tracker alone, unless it is there already; returns whether it did."""
        if self.tracker is None:
            return False
        number = row["step" if kind == "report" else "epoch"]
        if self.tracker.stopped:
            self._note_end_of_tracking()
            self.tracker = None
        elif number > self._handed_over[kind]:
            columns = _TRACKED[kind] or row
            self.tracker.log({column: row[column] for column in columns}, (kind, number))
            self._handed_over[kind] = number
            return True
        return False

    def event(self, what: str, **details: Any) -> None:
        """Notes what happened."""
        self._journal.write("event", {"event": what, **details})

    def paint(self, epochs: list[Row]) -> None:
        """Draws the curves anew, in a process of their own."""
        if self._painter is not None:
            self._painter.paint(epochs, self._title, self._picture)

    def histograms(self, step: int, trees: Mapping[str, Any]) -> None:
        """Hands histograms of every leaf of some named pytrees to the tracker."""
        if self.tracker is not None:
            named = {f"{name}/{path}": h for name, tree in trees.items() for path, h in histograms(tree).items()}
            self.tracker.log({"step": step, **named})

    def close(self, code: int, give_up: Callable[[], bool]) -> None:
        """Ends the picture and the tracker, and waits for them, but not long after a signal or once `give_up` says so.

        Args:
            code: The exit code that the run ends with.
            give_up: Asked again and again while there is something to wait for.
        """
        stopped = code > AFTER_SIGNAL
        if self._painter is not None:
            self._painter.close(0 if stopped else LAST_PICTURE_SECONDS, give_up)
        if self.tracker is not None:
            self.tracker.finish(code, STOP_SECONDS if stopped else PATIENCE_SECONDS, give_up)
            self._note_end_of_tracking()

    @property
    def handed_over(self) -> tuple[int, int]:
        """What the tracker's run has: the last `step` of a report and the last `epoch`."""
        return self._handed_over["report"], self._handed_over["epoch"]

    def _note_end_of_tracking(self) -> None:
        """What was handed to a tracker and never logged is not there, and is to be logged by a run that goes on."""
        assert self.tracker is not None
        if self.tracker.failed:
            self._handed_over = {
                kind: min(last, max(self._had_before[kind], self.tracker.logged.get(kind, 0)))
                for kind, last in self._handed_over.items()
            }
            step, epoch = self.handed_over
            self.event(TRACKING_ENDED, wandb=self.tracker.id, step=step, epoch=epoch)


def handed_over(rows: list[Row], tracked_as: str | None) -> tuple[int, int] | None:
    """What a journal says was given to a tracker under that id: the last `step` of a report, and the last `epoch`; None
    where it says nothing of that tracker."""
    step = epoch = 0
    tracking = known = False
    for row in rows:
        kind = row["kind"]
        if kind in ("start", "resume"):
            tracking = False
        elif kind == "event" and row.get("wandb") == tracked_as and "wandb" in row:
            known, tracking = True, row["event"] == TRACKING
            step, epoch = row.get("step", 0), row.get("epoch", 0)
        elif tracking and kind == "report":
            step = max(step, row["step"])
        elif tracking and kind == "epoch":
            epoch = max(epoch, row["epoch"])
    return (step, epoch) if known else None


def start_reporting(run: Run, printer: Printer, *, paints: bool) -> Reporter:
    """Opens what stands beside the checkpoint, and starts or continues the run on Weights & Biases."""
    config, progress = run.config, run.progress
    if run.ranks.rank:
        nowhere = Path(os.devnull)
        return Reporter(printer, Journal(nowhere, printer.warn), None, nowhere, "", None, (0, 0))
    path = Path(config.checkpoint_path).resolve()
    journal_path, picture = journal.path_of(path), beside(path, ".png")
    resumed, rows, before = run.owns_path, [], []
    number = free_number(path, journal_path, picture)
    run.aside = numbered(path, number)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(picture)
        if resumed:
            rows, before = journal.go_on(
                journal_path,
                progress.run,
                step=run.steps_done,
                epoch=progress.epoch,
                history=progress.history,
                warn=printer.warn,
            )
        else:
            for old in (journal_path, picture):
                if old.exists():
                    old.rename(numbered(old, number))
    except OSError as error:
        printer.warn(f"could not write {journal_path}: {error}")
    handed = handed_over(before, progress.wandb_id) or progress.handed_over
    tracker = _start_tracking(run, printer)
    title = (
        f"{describe_network(config)} on {config.dataset}, batch {config.batch_size}, {config.optimizer} {config.lr:g}"
    )
    writer = Journal(journal_path, printer.warn)
    writer.write(
        "resume" if resumed else "start",
        {"run": progress.run, "step": run.steps_done, "epoch": progress.epoch, "config": dataclasses.asdict(config)}
        | {"environment": run.environment},
    )
    painter = Painter(printer.warn) if paints else None
    reporter = Reporter(printer, writer, painter, picture, title, tracker, handed)
    if tracker is not None:
        # What was shown while there was no tracking, because it was turned off or had failed.
        for row in rows:
            if row["kind"] in ("report", "epoch"):
                reporter.track(row["kind"], {key: value for key, value in row.items() if key not in ("kind", "time")})
    return reporter


def _start_tracking(run: Run, printer: Printer) -> Tracker | None:
    """Starts, or continues, the run on Weights & Biases."""
    config, progress = run.config, run.progress
    mode = config.wandb_mode
    if config.no_wandb or mode == "disabled" or (mode == "auto" and tracking.turned_off()):
        return None
    resume = progress.wandb_id is not None
    progress.wandb_id = progress.wandb_id or tracking.new_run_id()
    name = f"hypernetworks_b{config.batch_size}_lr{config.lr}_e{config.epochs}"
    from_environment = config.wandb_project == DEFAULT_PROJECT and os.environ.get("WANDB_PROJECT")
    total = num_params(run.state.params)
    tracker = Tracker(
        progress.wandb_id,
        resume=resume,
        mode=mode,
        settings={
            "project": from_environment or config.wandb_project,
            "name": config.wandb_name or os.environ.get("WANDB_NAME") or name,
            "entity": config.wandb_entity or None,
            "config": dataclasses.asdict(config) | run.environment | {"hyperfunc": __version__},
        },
        say=printer.say,
        warn=printer.warn,
    )
    tracker.summarize({"total_parameters": total, "compression": count_ordinary(run.model) / total})
    return tracker
