"""A run on Weights & Biases that training never waits for.

Everything that concerns wandb happens in a thread of its own: a server that refuses, hangs or dies holds up that thread
and not the training. Whatever goes wrong is said once, in a line, with the command that sends later what is on disk.
"""

import logging
import os
import queue
import secrets
import string
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from hyperfunc.exits import one_line
from hyperfunc.histogram import Histogram

Mode = Literal["auto", "online", "offline", "disabled"]

START_SECONDS = 12.0
"""How long a start may wait for the server before the run is kept offline."""

FINISH_SECONDS = 12.0
"""How long the end of a run may wait for the server to have everything."""

PATIENCE_SECONDS = START_SECONDS + FINISH_SECONDS + 4
"""The most that the end of a program may wait for tracking, whatever happens."""

LAST_WORD_SECONDS = 1.0
"""How long an error that is being told as that time is over may take to be written."""

LONGEST_REASON = 300
"""Characters of an error that its line shows."""


def turned_off() -> bool:
    """Whether the environment says that nothing is to be tracked."""
    return os.environ.get("WANDB_MODE") == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1")


def holds_up_exit() -> bool:
    """Whether Python's end may wait for a server, as what wandb does there can; `os._exit` does not."""
    return "wandb" in sys.modules


def new_run_id() -> str:
    """An id that a run can be continued under; that of WANDB_RUN_ID where it is set."""
    letters = string.ascii_lowercase + string.digits
    return os.environ.get("WANDB_RUN_ID") or "".join(secrets.choice(letters) for _ in range(8))


class Tracker:
    """Starts a run, or continues one, and takes what there is to log; no method but `finish` ever waits.

    Nothing is ever asked for: without a key the run is kept offline, where `wandb sync` can send it later. The
    environment variables WANDB_MODE, WANDB_DIR and the like count as everywhere.

    Args:
        run_id: From `new_run_id`.
        resume: Whether a run of that id may be there already, to be continued.
        mode: "online", "offline", or "auto": what the environment says, else online if there is a key.
        settings: Arguments of `wandb.init`: project, name, entity, config.
        say: Is told where the run can be seen.
        warn: Is told, once, what went wrong.
    """

    def __init__(
        self,
        run_id: str,
        *,
        resume: bool,
        mode: Mode,
        settings: Mapping[str, Any],
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.id = run_id
        self.stopped = False
        """Whether tracking has ended, of itself or by an error; what is logged from then on is lost."""
        self.failed = False
        """Whether an error ended it."""
        self.logged: dict[str, int] = {}
        """The last number of each kind of rows that wandb has taken."""
        self._init = {**settings, "id": run_id, "resume": "allow" if resume else None}
        self._mode = mode
        self._say = say
        self._warn = warn
        self._run: Any = None
        self._model_error: Exception | None = None
        self._finishing = False
        self._outcome = threading.Lock()  # taken for good by who tells it: the thread, or who has waited long enough
        self._calls: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, Any], numbered: tuple[str, int] | None = None) -> None:
        """Logs a row; it must hold the `step` or the `epoch` that its metrics are drawn over.

        Args:
            values: The row.
            numbered: Its kind and its number among those, for `logged`.
        """
        row = dict(values)

        def log_row(run: Any) -> None:
            run.log({key: _as_wandb(value) for key, value in row.items()})
            if numbered is not None:
                self.logged[numbered[0]] = numbered[1]

        self._calls.put(log_row)

    def summarize(self, values: Mapping[str, float]) -> None:
        """Sets values of the run's summary."""
        self._calls.put(lambda run: run.summary.update(dict(values)))

    def log_model(self, path: str | os.PathLike[str], name: str, aliases: list[str]) -> None:
        """Logs a file as an artifact of the type "model"."""

        def log_artifact(run: Any) -> None:
            import wandb

            try:
                artifact = wandb.Artifact(name, type="model")
                artifact.add_file(str(path))
                run.log_artifact(artifact, aliases=aliases)
            except Exception as error:
                # Told at the end: what else there is to send does not depend on it.
                self._model_error = error

        self._calls.put(log_artifact)

    def finish(self, exit_code: int, patience: float, give_up: Callable[[], bool] = lambda: False) -> None:
        """Ends the run, and waits at most `patience` seconds until the server has it.

        After that the thread may still be waiting for something, see `holds_up_exit`.

        Args:
            exit_code: What the server is told of the run's end.
            patience: In seconds.
            give_up: Asked again and again; True ends the waiting.
        """

        def end(run: Any) -> None:
            self._finishing = True
            run.finish(exit_code=exit_code)
            if self._model_error is not None:
                raise self._model_error

        self._calls.put(end)
        self._calls.put(None)
        deadline = time.monotonic() + patience
        while self._thread.is_alive() and time.monotonic() < deadline and not give_up():
            self._thread.join(0.05)
        if not self._outcome.acquire(blocking=False):
            self._thread.join(LAST_WORD_SECONDS)
        elif self._run is None:
            self._warn("wandb: no answer so far, this run was not tracked")
        else:
            self._warn(f"wandb: not all has been sent{_later(self._run)}")

    def _work(self) -> None:
        try:
            self._run = self._start()
            while (call := self._calls.get()) is not None:
                call(self._run)
            self._outcome.acquire(blocking=False)
        except Exception as error:
            self.failed = True
            if self._outcome.acquire(blocking=False):
                self._warn(f"wandb: {self._what_failed()}: {_reason(error)}{_later(self._run)}")
        finally:
            self.stopped = True

    def _what_failed(self) -> str:
        if self._run is None:
            return "not tracking, training goes on"
        return "not all has been sent" if self._finishing else "stopped tracking, training goes on"

    def _start(self) -> Any:
        import wandb

        # The failures of wandb's own telemetry are of no interest to who trains.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        if not os.environ.get("WANDB_MODE", "x"):
            del os.environ["WANDB_MODE"]  # set to nothing, which wandb takes for the name of a mode
        wandb.setup(wandb.Settings(silent=True))
        mode: Any = None if self._mode == "auto" else self._mode
        why = "as asked for"
        if mode is None and "WANDB_MODE" in os.environ:
            why = "as WANDB_MODE says"
        elif mode != "offline" and not wandb.login(prompt=False, verify=False):
            mode, why = "offline", "no key was found"
        settings = wandb.Settings(
            init_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            silent=True,
        )
        try:
            run = wandb.init(**self._init, mode=mode, settings=settings)
        except Exception as error:
            if mode == "offline":
                raise
            # Its service keeps the id of a run that could not be started.
            wandb.teardown(exit_code=1)
            run = wandb.init(**self._init, mode="offline", settings=settings)
            self._warn(f"wandb: the server cannot be used, the run is kept offline: {_reason(error)}{_later(run)}")
        else:
            if run.offline:
                self._say(f"wandb        offline, {why}; to send the run later: {_sync_command(run)}")
            elif run.url:
                self._say(f"wandb        {run.url}")
        # Rows carry their own step: a row whose implicit step went backwards would be dropped in silence.
        run.define_metric("step", hidden=True)
        run.define_metric("epoch", hidden=True)
        for metric in ("batch/*", "learning_rate", "parameters/*", "kernels/*", "gradients/*"):
            run.define_metric(metric, step_metric="step")
        for metric in ("train/*", "val/*", "test/*", "best_accuracy", "best_epoch", "epoch_time", "images_per_second"):
            run.define_metric(metric, step_metric="epoch")
        for metric in ("test/accuracy", "val/accuracy"):
            run.define_metric(metric, step_metric="epoch", summary="max")
        return run


def _as_wandb(value: Any) -> Any:
    if isinstance(value, Histogram):
        import wandb

        return wandb.Histogram(np_histogram=(value.counts, value.edges))
    return value


def _sync_command(run: Any) -> str:
    return f"wandb sync {os.path.dirname(run.dir)}"


def _later(run: Any) -> str:
    return f"; to send it later: {_sync_command(run)}" if run is not None else ""


def _reason(error: Exception) -> str:
    text = one_line(error)
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..."
