"""What a run shows: lines and progress bars on the console, and a run on Weights & Biases.

Whatever goes wrong with Weights & Biases, training goes on: it is said once, in a line, and tracking ends.
"""

import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import track as rich_track

WANDB_PATIENCE_SECONDS = 20
"""How long a start or an end of tracking may wait for the server."""


class Printer:
    """Lines on standard output, trouble on standard error, and a bar for what takes long, on a terminal only."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A path may hold what the terminal cannot show, and that must not end a run.
                stream.reconfigure(errors="backslashreplace")

    def say(self, line: str) -> None:
        """Prints a line of the run's report. A reader that has gone away, as in `| head`, does not end the run."""
        try:
            print(line, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            self.warn("nobody reads the report any more; the run goes on")

    def warn(self, line: str) -> None:
        """Prints a line about something that went wrong; here, too, nobody need be reading."""
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    def track(self, items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        """Passes `items` through and shows how far they are: a bar on a terminal, else a line before and after."""
        if self._console.is_terminal:
            yield from rich_track(items, description, total=total, console=self._console)
            return
        self.warn(f"{description}: {total:,} files")
        yield from items
        self.warn(f"{description}: done")


class WandbRun:
    """A run on Weights & Biases that turns itself off at its first error."""

    def __init__(self, run: Any, warn: Callable[[str], None]) -> None:
        self._run = run
        self._warn = warn

    @property
    def id(self) -> str | None:
        """The id under which the run can be continued; None once tracking is off."""
        return self._run.id if self._run is not None else None

    def log(self, values: Mapping[str, float]) -> None:
        """Logs a row; it must hold the `step` or the `epoch` that its metrics are drawn over."""
        self._guard(lambda run: run.log(dict(values)))

    def summarize(self, values: Mapping[str, float]) -> None:
        """Sets values of the run's summary."""
        self._guard(lambda run: run.summary.update(dict(values)))

    def log_model(self, path: str | os.PathLike[str], name: str, aliases: list[str]) -> None:
        """Logs a file as an artifact of the type "model"."""

        def log_artifact(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(name, type="model")
            artifact.add_file(str(path))
            run.log_artifact(artifact, aliases=aliases)

        self._guard(log_artifact)

    def finish(self, exit_code: int) -> None:
        """Ends the run and waits, for a bounded time, until the server has it."""
        self._guard(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _guard(self, call: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            folder = getattr(self._run, "dir", None)
            self._run = None
            later = f"; what was logged so far: wandb sync {os.path.dirname(folder)}" if folder else ""
            self._warn(f"wandb: stopped tracking, training goes on: {_first_line(error)}{later}")


def start_wandb(
    *,
    project: str,
    name: str,
    entity: str | None,
    config: Mapping[str, Any],
    run_id: str | None,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> WandbRun | None:
    """Starts a run, or continues the one of `run_id`; None, and a line that says why, if that cannot be.

    Nothing is ever asked for: without a key the run is kept offline, where `wandb sync` can send it later. The
    environment variables WANDB_MODE, WANDB_DIR and the like count as everywhere.
    """
    try:
        import wandb

        mode = None
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        run = wandb.init(
            project=project,
            name=name,
            entity=entity,
            config=dict(config),
            id=run_id,
            resume="allow" if run_id else None,
            mode=mode,
            settings=wandb.Settings(
                init_timeout=WANDB_PATIENCE_SECONDS,
                finish_timeout=WANDB_PATIENCE_SECONDS,
                console="off",
                silent=True,
            ),
        )
        # Rows carry their own step: a row whose implicit step went backwards would be dropped in silence.
        run.define_metric("step", hidden=True)
        run.define_metric("epoch", hidden=True)
        run.define_metric("batch/*", step_metric="step")
        run.define_metric("learning_rate", step_metric="step")
        for metric in ("train/*", "val/*", "test/*", "epoch_time", "images_per_second"):
            run.define_metric(metric, step_metric="epoch")
    except Exception as error:
        warn(f"wandb: not tracking, training goes on: {_first_line(error)}")
        return None
    if run.offline:
        why = "no key was found" if mode else "as WANDB_MODE says"
        say(f"wandb        offline, {why}; to send the run later: wandb sync {os.path.dirname(run.dir)}")
    elif run.url:
        say(f"wandb        {run.url}")
    return WandbRun(run, warn)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
