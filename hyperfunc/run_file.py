"""A run as one file: kept for it alone, written whole or not at all, and gone on from.

The file is a checkpoint (see `checkpoint`): the state, the best model so far and all that the run needs beside them.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from hyperfunc import checkpoint, distributed, journal, tree
from hyperfunc.build import first_scale
from hyperfunc.config import Config
from hyperfunc.console import Printer
from hyperfunc.files import beside, free_name, lock_for, numbered, remove_leftovers, temporary_name
from hyperfunc.flags import flag, shaping
from hyperfunc.optim import Scaled
from hyperfunc.report import Reporter
from hyperfunc.run import Progress, Run, check_finite, read_metrics

EPOCH_COLUMNS = {
    *("epoch", "step", "train/accuracy", "train/loss", "test/accuracy", "test/loss"),
    *("learning_rate", "epoch_time", "best_accuracy", "best_epoch"),
}
"""What the history of a run has of every epoch."""


@contextlib.contextmanager
def locked(config: Config, ranks: distributed.Ranks) -> Iterator[None]:
    """Keeps the checkpoint and the journal for this run alone, as `locked_file` does."""
    with locked_file(Path(config.checkpoint_path), ranks), locked_file(journal.path_of(config.checkpoint_path), ranks):
        yield


@contextlib.contextmanager
def locked_file(path: Path, ranks: distributed.Ranks) -> Iterator[None]:
    """Keeps a file for this run alone; of its ranks the first does so for all.

    Raises:
        ValueError: Another process of this machine is training into it.
    """
    if ranks.rank:
        yield
        return
    lock = lock_for(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--checkpoint-path: another run is writing to {path}; wait for its end, or name another file"
        ) from None
    try:
        remove_leftovers(path)
        yield
    finally:
        lock.release()


def check_writable(path: Path) -> None:
    """Tries the checkpoint's folder, or the one that it will be made in: a run is not to find out after an epoch.

    Raises:
        ValueError: Nothing can be written there.
    """
    try:
        folder = path.resolve().parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        # As long a name as any that the run will write to.
        longest = temporary_name(folder / numbered(beside(path, journal.ENDING), 10**4).name)
        with open(longest, "xb"):
            longest.unlink()
    except OSError as error:
        raise ValueError(f"--checkpoint-path: nothing can be written at {path}: {error}") from None


def save(run: Run, reporter: Reporter) -> None:
    """Writes the checkpoint, or says that it could not; `run.saved` tells.

    Raises:
        FloatingPointError: The state, or a loss, is not finite. Nothing was saved.
        RankLost: The states of the ranks differ. Nothing was saved.
    """
    read_metrics(run)
    check_finite(run)
    run.ranks.compare(run.state)
    if run.ranks.rank == 0:
        _write(run, reporter)
    run.saved = run.ranks.tell(run.saved)
    run.owns_path = run.owns_path or run.saved
    run.saved_at = time.monotonic()


def _write(run: Run, reporter: Reporter) -> None:
    """Writes the checkpoint, or says that it could not."""
    path = Path(run.config.checkpoint_path)
    if reporter.tracker is not None:
        run.progress.handed_over = reporter.handed_over
    trees = {
        "state": run.state,
        # Before the first epoch is over, what there is so far.
        "best": run.best if run.progress.best_epoch else (run.state.params, run.state.batch_stats),
        "epoch_totals": run.epoch_totals,
        "report_totals": run.report_totals,
        "normalization": run.normalization,
    }
    notes = {
        "config": dataclasses.asdict(run.config),
        "model": run.model.recipe,
        "progress": vars(run.progress),  # not asdict, which would copy the rows of all epochs
        "classes": run.dataset.classes,
        "data": run.data_digest,
        "environment": run.environment,
    }
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path.resolve(), run.aside) if path.exists() and not run.owns_path else None
        try:
            checkpoint.save(path, trees, notes, keep_old_as=aside)
        except FileExistsError:
            # Another run has begun under that name in the meantime.
            aside = free_name(path)
            checkpoint.save(path, trees, notes, keep_old_as=aside)
        run.saved = run.owns_path = True
        run.saved_best_epoch = run.progress.best_epoch
        run.ranks.note_saved(run.progress.run, run.config.checkpoint_path)
        if aside is not None:
            reporter.printer.say(f"kept the earlier run of {path} as {aside}")
    except OSError as error:
        run.saved = False
        reporter.printer.warn(f"could not save {path}: {error}; trying again at the next occasion")
        reporter.event("not saved", reason=str(error), step=run.steps_done)


def _aside(path: Path, otherwise: Path | None) -> Path | None:
    """Where the earlier run's checkpoint goes: beside its journal, which a run that came to nothing in between may have
    moved under another number."""
    try:
        earlier = checkpoint.load(path).notes["progress"]["run"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or not of a run
        return otherwise
    number = journal.number_of(journal.path_of(path), earlier)
    return otherwise if number is None else numbered(path, number)


def find(config: Config, ranks: distributed.Ranks) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; None where a run begins.

    Raises:
        ValueError: It is damaged, or the command line asks for another run than the one in it.
    """
    if config.resume:
        return _read(config)
    saved_run = ranks.saved_run(config.checkpoint_path)
    if saved_run is None:
        return None
    # Ranks that take the place of others go on with what those have saved.
    previous = _read(config)
    return previous if previous.notes["progress"]["run"] == saved_run else None


def _read(config: Config) -> checkpoint.Checkpoint:
    previous = checkpoint.load(config.checkpoint_path)
    _check_notes(previous.notes, config.checkpoint_path)
    before, now = previous.notes["config"], dataclasses.asdict(config)
    # Of flags that came later than the checkpoint.
    defaults = {item.name: item.default for item in dataclasses.fields(Config)}
    different = [
        f"{flag(name)} is {now[name]}, was {before.get(name, defaults[name])}"
        for name in shaping(Config)
        if now[name] != before.get(name, defaults[name])
    ]
    if different:
        raise ValueError(f"--resume: {config.checkpoint_path} holds another run: {'; '.join(different)}")
    progress = previous.notes["progress"]
    begun = progress["epoch"] + (progress["batch"] > 0)
    if config.epochs < begun:
        raise ValueError(
            f"--epochs: got {config.epochs}, but the run in {config.checkpoint_path} has begun epoch {begun} already"
        )
    return previous


def go_on(run: Run, previous: checkpoint.Checkpoint, printer: Printer) -> None:
    """Puts what a checkpoint holds in the place of the fresh state, and says so.

    Raises:
        ValueError: It holds a network of other shapes, or one for other classes or other pictures.
    """
    config, ranks = run.config, run.ranks
    _restore(run, previous)
    printer.say(
        f"resumed      from {config.checkpoint_path} at epoch {run.progress.epoch + 1}, batch {run.progress.batch}"
    )
    planned = previous.notes["config"]["epochs"]
    if planned != config.epochs:
        printer.say(f"schedule     now spans {config.epochs} epochs, and not {planned} as before")
    before = previous.notes.get("environment", {}).get("ranks", 1)
    opt_state = run.state.opt_state
    if isinstance(opt_state, Scaled):
        scale = opt_state.scale * (first_scale(config, ranks.world) / first_scale(config, before))
        run.state = run.state._replace(opt_state=opt_state._replace(scale=scale))
    format_before = noted_precision(previous)
    if format_before not in (None, run.precision):
        printer.warn(f"the precision is {run.precision} and was {format_before} so far, which does not work here")
    if before != ranks.world and not config.sync_bn:
        printer.warn(
            f"resumed on {ranks.world} ranks, was {before}: without --sync-bn each rank has batch statistics of "
            "its own, so the result will not be that of before"
        )


def noted_precision(previous: checkpoint.Checkpoint) -> Any:
    """What a run has computed in, if its checkpoint says so; --precision may be auto."""
    return previous.notes.get("environment", {}).get("precision")


def _restore(run: Run, previous: checkpoint.Checkpoint) -> None:
    if list(run.dataset.classes) != previous.notes["classes"]:
        raise ValueError(
            f"--resume: the checkpoint was trained on the classes {', '.join(previous.notes['classes'][:5])} ..., "
            f"the data now has {', '.join(run.dataset.classes[:5])} ..."
        )
    if run.data_digest != previous.notes["data"]:
        raise ValueError(
            f"--resume: the pictures or their labels are not those that {run.config.checkpoint_path} was trained on; "
            "name the same data with --data-dir"
        )
    run.state = checkpoint.restore(previous, "state", run.state)
    run.best = checkpoint.restore(previous, "best", run.best)
    run.epoch_totals = checkpoint.restore(previous, "epoch_totals", run.epoch_totals)
    run.report_totals = checkpoint.restore(previous, "report_totals", run.report_totals)
    noted = previous.notes["progress"]
    step, epoch = noted["handed_over"]
    run.progress = Progress(**noted | {"handed_over": (step, epoch)})  # JSON knows lists only
    run.owns_path, run.saved_best_epoch = True, run.progress.best_epoch
    finite = all(bool(leaf.isfinite().all()) for leaf in tree.leaves((run.state, run.epoch_totals, run.report_totals)))
    if run.progress.batch > run.batch_count or int(run.state.step) != run.steps_done or not finite:
        raise ValueError(f"--resume: {run.config.checkpoint_path} was not written by this version of train.py")


def _check_notes(notes: dict[str, Any], path: str) -> None:
    """Raises a ValueError for notes that this train.py does not write: of another version, or made up."""
    fields = {item.name: item.type for item in dataclasses.fields(Progress)}
    progress, config = notes.get("progress"), notes.get("config")
    numbers = int | float
    fine = (
        isinstance(config, dict)
        and isinstance(config.get("epochs"), int)
        and isinstance(notes.get("classes"), list)
        and isinstance(notes.get("data"), str)
        and isinstance(progress, dict)
        and progress.keys() == fields.keys()
        and all(isinstance(progress[name], kind) for name, kind in fields.items() if kind in (int, str))
        and all(isinstance(progress[name], numbers) for name, kind in fields.items() if kind is float)
        and isinstance(progress["wandb_id"], str | None)
        and isinstance(progress["history"], list)
        and len(progress["history"]) == progress["epoch"] <= config["epochs"]
        and progress["batch"] >= 0
        and isinstance(progress["handed_over"], list)
        and [isinstance(number, int) for number in progress["handed_over"]] == [True, True]
    )
    if fine:
        assert isinstance(progress, dict)  # for the type checker
        for epoch, row in enumerate(progress["history"], 1):
            # The columns that a run always has; what else there is may be shown, and so must be numbers.
            fine &= isinstance(row, dict) and row.get("epoch") == epoch and row.keys() >= EPOCH_COLUMNS
            fine = fine and all(isinstance(value, numbers) for value in row.values())
    if not fine:
        raise ValueError(f"--resume: {path} was not written by this version of train.py")
