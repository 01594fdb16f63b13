"""What a run shows on the console: lines, and on a terminal one live display below them."""

import contextlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.table import Column

REFRESHES_A_SECOND = 4


class Printer:
    """Lines on standard output, trouble on standard error.

    Where both are a terminal, what takes long has a bar below the lines; elsewhere there is no control character.

    Args:
        quiet: Shows trouble and nothing else.
        mute: Shows nothing at all, because another process does.
        prefix: Stands before every line, because several runs write to one console; and none of them has a bar there.
    """

    def __init__(self, *, quiet: bool = False, mute: bool = False, prefix: str = "") -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A path may hold what the terminal cannot show, and that must not end a run.
                stream.reconfigure(errors="backslashreplace")
        self.quiet = quiet or mute
        self._mute = mute
        self._prefix = prefix
        # Not rich's own opinion, which FORCE_COLOR and the like change for a file too.
        terminal = sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._console = Console() if terminal and not prefix else None

    @property
    def shows_bars(self) -> bool:
        """Whether there is a live display, and it is worth while to keep it up to date."""
        return self._console is not None and not self.quiet

    def say(self, line: str) -> None:
        """Prints a line of the run's report. A reader that has gone away, as in `| head`, does not end the run."""
        if self.quiet:
            return
        try:
            self._print(line, sys.stdout)
        except OSError:
            self._console = None
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            self.warn("nobody reads the report any more; the run goes on")

    def warn(self, line: str) -> None:
        """Prints a line about something that went wrong; here, too, nobody need be reading."""
        if self._mute:
            return
        try:
            self._print(line, sys.stderr)
        except OSError:
            self._console = None
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    def _print(self, line: str, stream: Any) -> None:
        line = self._prefix + line.replace("\n", "\\n")  # a path may hold that too
        if self._console is not None:
            # Above the live display, if there is one. As it is: rich would colour numbers and break lines.
            self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            # In one piece, because another thread may be printing as well.
            stream.write(line + "\n")
            stream.flush()

    def track(self, items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        """Passes `items` through and shows how far they are: a bar on a terminal, else a line before and after."""
        if self.quiet:
            yield from items
            return
        if self._console is None:
            self.warn(f"{description}: {total:,} files")
            yield from items
            self.warn(f"{description}: done")
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeftColumn())
        with self._live(*columns) as progress:
            yield from progress.track(items, total, description=description)

    @contextlib.contextmanager
    def waiting(self, description: str) -> Iterator[None]:
        """Shows on a terminal that something is being done whose end cannot be foreseen, and for how long."""
        if not self.shows_bars:
            yield
            return
        with self._live(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
            progress.add_task(description, total=None)
            yield

    @contextlib.contextmanager
    def training(self, epochs: int, batches: int) -> Iterator["TrainingBars"]:
        """The live display of a training run: a bar for the epoch and one for all of them."""
        if not self.shows_bars:
            yield TrainingBars(None, epochs, batches)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeLeftColumn(),
            TextColumn("left  {task.fields[figures]}", table_column=Column(no_wrap=True)),
        )
        with self._live(*columns) as progress:
            yield TrainingBars(progress, epochs, batches)

    @contextlib.contextmanager
    def _live(self, *columns: Any) -> Iterator[Progress]:
        progress = Progress(*columns, console=self._console, transient=True, refresh_per_second=REFRESHES_A_SECOND)
        # A terminal that is gone does not end a run, neither here nor in `say`.
        with contextlib.suppress(OSError):
            progress.start()
            # A process that is killed could not bring it back.
            progress.console.show_cursor(True)
        try:
            yield progress
        finally:
            with contextlib.suppress(OSError):
                progress.stop()


class TrainingBars:
    """The two bars of a training run; without a terminal they are nothing."""

    def __init__(self, progress: Progress | None, epochs: int, batches: int) -> None:
        self._progress = progress
        self._epochs = epochs
        self._batches = batches
        if progress is not None:
            self._epoch = progress.add_task("", total=batches, figures="")
            self._run = progress.add_task("run", total=epochs * batches, figures="")

    def begin_epoch(self, epoch: int, batch: int) -> None:
        """Starts the bar of an epoch, counted from 0, that goes on after so many batches."""
        if self._progress is not None:
            self._progress.reset(
                self._epoch, description=f"epoch {epoch + 1}/{self._epochs}", completed=batch, figures=""
            )
            self._progress.update(self._run, completed=epoch * self._batches + batch)

    def move(self, epoch: int, batch: int) -> None:
        """Shows that so many batches of an epoch are done."""
        if self._progress is not None:
            self._progress.update(self._epoch, completed=batch)
            self._progress.update(self._run, completed=epoch * self._batches + batch)

    def figures(self, epoch: str | None = None, run: str | None = None) -> None:
        """Sets what stands beside the bars."""
        if self._progress is not None:
            for task, text in ((self._epoch, epoch), (self._run, run)):
                if text is not None:
                    self._progress.update(task, figures=text)
