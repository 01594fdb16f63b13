"""A population, carried out by a program that knows how to carry out one run.

Each rank trains its share of the runs, in groups that share a step; one table shows what came out of all.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]

from hyperfunc import population, sweep
from hyperfunc.config import SEEDS_PER_STEP, Config, runs_of
from hyperfunc.console import Printer
from hyperfunc.distributed import Alone, Apart, RankLost, Ranks, digest
from hyperfunc.exits import AFTER_SIGNAL, EXIT_FAILED, explain
from hyperfunc.files import beside
from hyperfunc.interrupt import Interrupts
from hyperfunc.run import Run, flags_to_compare
from hyperfunc.run_file import locked, locked_file

_FAILURES_ARE_READ = "HYPERFUNC_FAILURES_ARE_READ"
"""In the environment of ranks whose launcher looks into their table."""


@dataclass(frozen=True)
class Program:
    """What a program does for one run, and for several that share a step.

    Attributes:
        check: `check(config, ranks, device)`: raises a ValueError for what can be known to be wrong with a run before
            its data is read.
        set_up: `set_up(config, ranks, device, printer, like)`: a run in memory, which shares with the run `like`, if
            there is one, what it can.
        start: `start(runs, printer)`: gives runs the engine; of several the first one's step is that of them all.
        carry_out: `carry_out(run, interrupts, printer)`: see `population.Member`.
    """

    check: Callable[[Config, Ranks, torch.device], object]
    set_up: Callable[[Config, Ranks, torch.device, Printer, Run | None], Run]
    start: Callable[[Sequence[Run], Printer], None]
    carry_out: Callable[[Run, Interrupts, Printer], population.Member]


def train_all(
    program: Program, config: Config, ranks: Ranks, device: torch.device, interrupts: Interrupts, printer: Printer
) -> int:
    """Trains the runs that `--seeds` and `--sweep` ask for, spread over the ranks, and shows what came out of them;
    returns the exit code.

    Args:
        program: What trains a run.
        config: The flags, the same on every rank.
        ranks: All of them.
        device: Of this one.
        interrupts: Signals that end all runs; deferred here, once there is something to save.
        printer: For lines about single runs, each with its name before it, and for the table.

    Raises:
        ValueError: A flag is not what it should be, a checkpoint is not what `--resume` asks for, another process is
            writing to the same table, or no run could begin, all for one reason of that kind. Nothing has begun.
        OSError: The same for a reason of another kind; or the table cannot be written.
    """
    members, table = runs_of(config), _table_of(config)
    with locked_file(table, ranks):
        at_once = config.seeds_per_step or (SEEDS_PER_STEP if device.type == "cuda" else 1)
        share = sweep.groups(members, at_once, ranks.world)[ranks.rank :: ranks.world]
        own = Apart(ranks)
        for _, member in itertools.chain(*share):
            program.check(member, own, device)
        # None goes on before all know that their runs are as they should be, and are runs of one population.
        kinds = {"the runs": [sweep.name_of(flags) for flags, _ in members], "the runs in one step": at_once}
        ranks.compare({}, {**flags_to_compare(config), "--sweep": ""} | kinds)
        make_room = partial(_clear_table, table, config, ranks, printer) if ranks.rank == 0 else _do_nothing
        code, results, has_begun = _train_share(program, share, ranks, device, interrupts, printer, make_room)
        reasons = {(result.refused, result.failed) for result in results}
        if not has_begun and len(results) == len(members) and len(reasons) == 1:
            # As of a single run: wrong data, say, is not the fault of each.
            is_refused, reason = reasons.pop()
            raise ValueError(reason) if is_refused else OSError(reason)
        if ranks.rank == 0 and len(results) == len(members):
            order = {member.checkpoint_path: place for place, (_, member) in enumerate(members)}
            results.sort(key=lambda result: order[result.checkpoint])
            for line in ["", *sweep.markdown(results).splitlines()]:
                printer.say(line)
            make_room()  # where no run of this rank has begun
            sweep.write_table(table, results)
    return code


def _do_nothing() -> None:
    pass


def launch(config: Config, start: Callable[[], int]) -> int:
    """Starts ranks that `train_all` of a population, and returns the exit code of it all.

    To a launcher a rank that fails is one to start again; but a run that diverged would only do so again. So these
    ranks end well in spite of it, and whether a run has failed is read from their table.

    Args:
        config: The flags.
        start: Runs the ranks, which get this process's environment, to their end; returns their exit code.
    """
    os.environ[_FAILURES_ARE_READ] = "1"
    try:
        code = start()
    finally:
        del os.environ[_FAILURES_ARE_READ]
    return EXIT_FAILED if code == 0 and sweep.any_failed(_table_of(config)) else code


def _table_of(config: Config) -> Path:
    return beside(Path(config.checkpoint_path).resolve(), ".population")


def _clear_table(table: Path, config: Config, ranks: Ranks, printer: Printer) -> None:
    # Ranks that were started again find the table of the first ones, if any.
    is_own = config.resume or ranks.saved_run(str(table)) is not None
    ranks.note_saved("table", str(table))
    for kept in sweep.clear_table(table, keep=not is_own):
        printer.say(f"kept a table of earlier runs as {kept}")


def _train_share(
    program: Program,
    share: Sequence[Sequence[sweep.Planned]],
    ranks: Ranks,
    device: torch.device,
    interrupts: Interrupts,
    printer: Printer,
    make_room: Callable[[], None],
) -> tuple[int, list[sweep.Result], bool]:
    """Trains this rank's share of all runs, in groups, after `make_room`.

    Returns:
        The exit code; what came out of those runs of all ranks that are over; and whether any of them has begun.
    """
    own = Apart(ranks)
    results: list[sweep.Result] = []
    pictures: dict[str, str] = {}
    if not share:
        interrupts.defer()  # the others save theirs, and this rank waits for them
    for group in share:
        if own.agree(interrupts.received) is None:
            found, own_pictures = _train_group(program, group, own, device, interrupts, printer, make_room)
            results += found
            pictures |= own_pictures
    number = own.agree(interrupts.received)
    spared = (result.diverged and _FAILURES_ARE_READ in os.environ for result in results if result.failed)
    code = 0 if all(spared) else EXIT_FAILED
    code = code if number is None else AFTER_SIGNAL + number
    gathered = [json.loads(text) for text in ranks.gather(json.dumps([code, results, pictures]))]
    _check_pictures([digests for _, _, digests in gathered])
    has_begun = any(digests for _, _, digests in gathered)
    every = [sweep.Result(*row) for _, rows, _ in gathered for row in rows]
    return max(code for code, _, _ in gathered), every, has_begun


def _check_pictures(digests: Sequence[Mapping[str, str]]) -> None:
    """Compares what the ranks had to train on and to test, each with the first that had such.

    Raises:
        RankLost: They had different ones.
    """
    first: dict[str, int] = {}
    for rank, own in enumerate(digests):
        for name, found in own.items():
            other = first.setdefault(name, rank)
            if digests[other][name] != found:
                raise RankLost(
                    f"the ranks are not equal: rank {rank} differs from rank {other} in {name}; "
                    "each run is saved, but no table shows them beside each other"
                )


def _train_group(
    program: Program,
    group: Sequence[sweep.Planned],
    ranks: Alone,
    device: torch.device,
    interrupts: Interrupts,
    printer: Printer,
    make_room: Callable[[], None],
) -> tuple[list[sweep.Result], dict[str, str]]:
    """Trains runs in one step; returns what came out of those that are over, and `_digests` of their pictures."""
    runs: dict[int, Run] = {}
    ends: dict[int, int | Exception] = {}
    speakers = [Printer(quiet=printer.quiet, prefix=f"{sweep.name_of(flags)}  ") for flags, _ in group]
    with contextlib.ExitStack() as stack:
        for index, ((_, config), speaker) in enumerate(zip(group, speakers, strict=True)):
            if _is_stopped(ends, [index], ranks, interrupts):
                continue
            speaker.quiet = printer.quiet or bool(runs)
            with _noting_failure(ends, [index]):
                stack.enter_context(locked(config, ranks))
                like = next(iter(runs.values()), None)
                runs[index] = program.set_up(config, ranks, device, speaker, like)
            speaker.quiet = printer.quiet
        for indices in _at_one_step(runs):
            if _is_stopped(ends, indices, ranks, interrupts):
                continue
            together = [runs[index] for index in indices]
            with _noting_failure(ends, indices):
                program.start(together, speakers[indices[0]])  # may compile for minutes, with nothing in hand yet
            if indices[0] in ends:
                continue
            interrupts.defer()
            make_room()
            with _noting_failure(ends, indices):
                started = {index: program.carry_out(runs[index], interrupts, speakers[index]) for index in indices}
                population.in_step(started, together[0].step, [run.state for run in together], ends)
        interrupts.defer()
    results: list[sweep.Result] = []
    for index, (flags, config) in enumerate(group):
        end = ends[index]
        chosen_by = "held-out pictures" if config.val_size else "the test set itself, for want of --val-size"
        failed = sweep.Result(flags, config.checkpoint_path, None, None, 0, str(end), chosen_by)
        if not isinstance(end, int):
            speakers[index].warn(f"failed: {end}")
            is_refused, has_diverged = isinstance(end, ValueError), isinstance(end, FloatingPointError)
            results.append(failed._replace(refused=is_refused, diverged=has_diverged))
        elif index in runs and (progress := runs[index].progress).epoch >= config.epochs:
            last, best = (
                progress.history[epoch - 1]["test/accuracy"] for epoch in (progress.epoch, progress.best_epoch)
            )
            not_saved = "" if end != EXIT_FAILED else "not saved"
            done = failed._replace(last=last, best=best, best_epoch=progress.best_epoch, failed=not_saved)
            results.append(done._replace(rescheduled=_rescheduled(runs[index])))
    return results, {name: found for run in runs.values() for name, found in _digests(run).items()}


def _rescheduled(run: Run) -> int:
    """The last epoch that ended on another learning rate than the flags give it."""
    for row in reversed(run.progress.history):
        rate = float(run.optimizer.learning_rate(torch.tensor(int(row["step"]) - 1)))
        if not math.isclose(rate, row["learning_rate"], rel_tol=1e-4, abs_tol=1e-4 * run.config.lr):
            return int(row["epoch"])
    return 0


def _digests(run: Run) -> dict[str, str]:
    """Fingerprints of a run's pictures, by names under which those of another run are the same."""
    config, dataset = run.config, run.dataset
    # Which pictures are held out or left out is the seed's to say; which ones test a run is not.
    drawn = f" under --val-size {config.val_size}, --train-size {config.train_size} and --seed {config.seed}"
    whole = f"the pictures of {config.dataset}{drawn if config.val_size or config.train_size else ''}"
    test = repr([dataset.classes, *map(digest, dataset.test)])
    return {whole: run.data_digest, f"the pictures to test of {config.dataset}": test}


@contextlib.contextmanager
def _noting_failure(ends: dict[int, int | Exception], indices: Sequence[int]) -> Iterator[None]:
    """Notes what ends these runs, of which the others know nothing, and goes on after it: a ValueError for bad input,
    an OSError for anything else, without what the error itself would hold on to."""
    try:
        yield
    except (DistError, RankLost):
        raise  # of the ranks, and not of a run
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        reason = explain(error, smaller="--seeds-per-step" if len(indices) > 1 else "--batch-size")
        for index in indices:
            # Some may have come to an end of their own before.
            ends.setdefault(index, ValueError(reason) if isinstance(error, ValueError) else OSError(reason))


def _is_stopped(ends: dict[int, int | Exception], indices: Sequence[int], ranks: Alone, interrupts: Interrupts) -> bool:
    """Whether a signal has come, which then is the end of these runs."""
    if (number := ranks.agree(interrupts.received)) is None:
        return False
    ends |= dict.fromkeys(indices, AFTER_SIGNAL + number)
    return True


def _at_one_step(runs: Mapping[int, Run]) -> list[list[int]]:
    """The indices of runs that go on together: that stand at the same step, which after a kill between two saves may
    not be all, of which none is complete while another has its last evaluation before it, and that compute alike."""
    groups: dict[tuple[int, bool, str], list[int]] = {}
    for index, run in runs.items():
        position = run.steps_done, run.progress.epoch >= run.config.epochs, run.precision
        groups.setdefault(position, []).append(index)
    return [groups[position] for position in sorted(groups)]
