"""Which runs a population consists of, and what came out of them: a grid of flags, names, a table."""

import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hyperfunc.files import CHECKPOINT_ENDINGS, free_number, numbered, write_bytes
from hyperfunc.flags import check_ranges, parse_value

MOST_RUNS = 100_000
"""Of a population: each is checked and named before the first one begins, which takes seconds for so many."""

Flags = dict[str, Any]
"""Values by the name of their field, as in {"lr": 0.001, "seed": 3}."""


def parse_seeds(text: str) -> list[int]:
    """0,1,2 as what it means; nothing where it is empty.

    Raises:
        ValueError: It is something else, or a seed is there twice.
    """
    if not re.fullmatch(r"([0-9]{1,18}(,[0-9]{1,18})*)?", text):
        raise ValueError(f"got {text!r}, expected seeds with commas between, as 0,1,2")
    seeds = [int(part) for part in text.split(",") if part]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"got {text!r}, where a seed is given twice")
    return seeds


def read_grid(path: str, allowed: Sequence[str]) -> dict[str, list[Any]]:
    """The file of a sweep: {"lr": [0.001, 0.002], "seed": [0, 1, 2]} in JSON.

    Args:
        path: The file.
        allowed: The fields that it may have; dashes and underscores are alike.

    Raises:
        ValueError: It cannot be read, or is something else; the message does not name the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError('expected flags with lists of values, as {"lr": [0.001, 0.002], "seed": [0, 1, 2]}')
    grid: dict[str, list[Any]] = {}
    for key, values in content.items():
        name = key.lstrip("-").replace("-", "_")
        if name not in allowed:
            raise ValueError(f"{key}: not a flag that a sweep can have; those are {', '.join(sorted(allowed))}")
        if name in grid:
            raise ValueError(f"{key}: is there twice")
        plain = isinstance(values, list) and all(isinstance(value, str | int | float) for value in values)
        if not plain or not values:
            raise ValueError(f"{key}: got {json.dumps(values)}, expected a list of values, at least one")
        if len(set(map(str, values))) < len(values):
            raise ValueError(f"{key}: got {json.dumps(values)}, where a value is given twice")
        grid[name] = values
    return grid


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[Flags]:
    """Every combination of a grid's values; the seed changes fastest."""
    names = sorted(grid, key=lambda name: name == "seed")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(grid[name] for name in names))]


def path_of(checkpoint_path: str, flags: Flags) -> str:
    """run.lr0.001.seed3.pth for run.pth: where the run with these flags has its checkpoint."""
    path = Path(checkpoint_path)
    ending = path.suffix if path.suffix in CHECKPOINT_ENDINGS else ""
    stem = path.name[: len(path.name) - len(ending)]
    return str(path.with_name(f"{stem}.{name_of(flags)}{ending}"))


def name_of(flags: Flags) -> str:
    """lr0.001.seed3: what tells a run from the others."""
    return ".".join(f"{name.replace('_', '-')}{value}" for name, value in flags.items())


Planned = tuple[Flags, Any]
"""A run of a population: the flags that tell it from the others, and all of its flags."""


def expand(config: Any, allowed: Sequence[str], check: Callable[[Any], None]) -> list[Planned]:
    """The runs that `--seeds` and `--sweep` ask for, with a checkpoint each; `resume` where there is one already.

    Args:
        config: The program's flags, made by `flags.option`.
        allowed: The fields that the file of a sweep may have.
        check: As of `flags.parse`.

    Raises:
        ValueError: A flag, or the file, is not what it should be.
    """
    grid: dict[str, list[Any]] = {"seed": parse_seeds(config.seeds)} if config.seeds else {}
    where = f"--sweep: {config.sweep}: " if config.sweep else ""
    try:
        given = read_grid(config.sweep, allowed) if config.sweep else {}
        if config.seeds and "seed" in given:
            raise ValueError("has seeds, and so does --seeds; omit one of them")
        count = math.prod(map(len, (grid | given).values()))
        if count > MOST_RUNS:
            flag = "" if config.sweep else "--seeds: "
            raise ValueError(f"{flag}asks for {count:,} runs, expected at most {MOST_RUNS:,}")
        grid |= {name: [parse_value(type(config), name, value) for value in given[name]] for name in given}
        if "seed" in grid and config.seed != 0:
            raise ValueError(f"--seed: got {config.seed} beside other seeds; omit one of them")
        members: list[Planned] = []
        for flags in combinations({"seed": [config.seed]} | grid):
            path = path_of(config.checkpoint_path, flags)
            own = {"seeds": "", "sweep": "", "no_wandb": True, "checkpoint_path": path}
            member = replace(config, **flags, **own, resume=config.resume and os.path.isfile(path))
            check_ranges(member)
            check(member)
            members.append((flags, member))
        if len({member.checkpoint_path for _, member in members}) < len(members):
            raise ValueError("two of the runs are the same")
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    return members


def groups(members: Sequence[Planned], at_once: int, world: int = 1) -> list[list[Planned]]:
    """The runs that share a step: such as differ in nothing but the seed, at most so many and no more than the share of
    a rank of the `world`, in groups of nearly one size. Where all differ in nothing else, each rank gets as many groups
    as any other, if there are runs enough."""
    at_once = min(at_once, math.ceil(len(members) / world))
    kinds = [list(kind) for _, kind in itertools.groupby(members, lambda member: name_of(_without_seed(member[0])))]
    found: list[list[Planned]] = []
    for alike in kinds:
        count = math.ceil(len(alike) / at_once)
        if len(kinds) == 1:
            count = min(math.ceil(count / world) * world, len(alike))
        bounds = [math.ceil(len(alike) * index / count) for index in range(count + 1)]
        found += [alike[begin:end] for begin, end in itertools.pairwise(bounds)]
    return found


class Result(NamedTuple):
    """What came out of a run.

    Attributes:
        flags: What tells it from the others.
        checkpoint: Where it is.
        last: Test accuracy of the last epoch, in percent; None where the run failed.
        best: Test accuracy of the epoch that was chosen as the best, in percent; None as for `last`.
        best_epoch: Its number; 0 as for `last`.
        failed: Why it failed, or empty.
        chosen_by: What pictures the best epoch was chosen by.
        rescheduled: The last epoch with another learning rate than a run with these flags has in it, because
            `--epochs` was another then; 0 where there is none.
        diverged: Whether it failed of a number that is not finite, and so would again.
        refused: Whether it failed of bad input, such as a flag or data.
    """

    flags: Flags
    checkpoint: str
    last: float | None
    best: float | None
    best_epoch: int
    failed: str = ""
    chosen_by: str = ""
    rescheduled: int = 0
    diverged: bool = False
    refused: bool = False


class Line(NamedTuple):
    """The runs that differ in nothing but the seed: how many came to their end, mean and standard deviation.

    The standard deviation is that of a sample (n - 1 in the denominator), nan for a single run.
    """

    flags: Flags
    n: int
    last: tuple[float, float]
    best: tuple[float, float]
    failed: int
    chosen_by: str


def lines(results: Sequence[Result]) -> list[Line]:
    """The table over all runs, in their order."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(name_of(_without_seed(result.flags)), []).append(result)
    found: list[Line] = []
    for group in groups.values():
        done = [result for result in group if not result.failed]
        last, best = (_mean_and_std([getattr(r, column) for r in done]) for column in ("last", "best"))
        flags, failed = _without_seed(group[0].flags), len(group) - len(done)
        found.append(Line(flags, len(done), last, best, failed, group[0].chosen_by))
    return found


def _without_seed(flags: Flags) -> Flags:
    return {name: value for name, value in flags.items() if name != "seed"}


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def markdown(results: Sequence[Result]) -> str:
    """The table of `lines`, and one of the single runs."""
    rows = [["runs", "n", "failed", "test accuracy, last epoch", "test accuracy, best epoch"]]
    note = "Mean ± sample standard deviation over n runs"
    choices = list(dict.fromkeys(result.chosen_by for result in results))
    if len(choices) == 1:
        note += f"; the best epoch was chosen by {choices[0]}"
    else:
        rows[0].append("best epoch chosen by")
    for line in lines(results):
        shown = (_mean_text(*pair) for pair in (line.last, line.best))
        chosen_by = [line.chosen_by] if len(choices) > 1 else []
        rows.append([_readable(line.flags) or "all", str(line.n), str(line.failed), *shown, *chosen_by])
    single = [["run", "last epoch", "best epoch", "epoch", "checkpoint"]]
    for result in results:
        numbers = ("-" if value is None else f"{value:.2f} %" for value in (result.last, result.best))
        epoch = str(result.best_epoch) if not result.failed else "failed"
        single.append([_readable(result.flags), *numbers, epoch, result.checkpoint])
    footnotes = [
        f"{_readable(result.flags)}: up to epoch {result.rescheduled} it had the learning rates of another --epochs."
        for result in results
        if result.rescheduled
    ]
    return "\n".join([*_table(rows), "", f"{note}.", "", *_table(single), *[""] * bool(footnotes), *footnotes]) + "\n"


def _mean_text(mean: float, std: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.2f} %" if math.isnan(std) else f"{mean:.2f} ± {std:.2f} %"


def _readable(flags: Flags) -> str:
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in flags.items())


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = ["| " + " | ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [shown[0], "| " + " | ".join("-" * width for width in widths) + " |", *shown[1:]]


def clear_table(path: Path, *, keep: bool) -> list[Path]:
    """Takes path.json and path.md away, so that no older table stands beside newer checkpoints.

    Args:
        path: As of `write_table`.
        keep: Gives them the next free number instead, as in run.1.population.json.

    Returns:
        The new names.

    Raises:
        OSError: That cannot be done.
    """
    old = [file for file in _files(path) if file.exists()]
    if not keep:
        for file in old:
            file.unlink()
        return []
    number = free_number(*_files(path))
    return [file.rename(numbered(file, number)) for file in old]


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + ".json"), path.with_name(path.name + ".md")


def any_failed(path: Path) -> bool:
    """Whether a run has failed by the table that `write_table` wrote there.

    Raises:
        OSError: There is none.
    """
    content = json.loads(_files(path)[0].read_text(encoding="utf-8"))
    return any(run["failed"] for run in content["runs"])


def write_table(path: Path, results: Sequence[Result]) -> None:
    """Writes path.json and path.md, where nan is null.

    Raises:
        OSError: They cannot be written.
    """

    def numbers(pair: tuple[float, float]) -> dict[str, float | None]:
        return {key: None if math.isnan(x) else x for key, x in zip(("mean", "std"), pair, strict=True)}

    table = [line._asdict() | {"last": numbers(line.last), "best": numbers(line.best)} for line in lines(results)]
    content = {"table": table, "runs": [result._asdict() for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = _files(path)
    write_bytes(as_json, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
    write_bytes(as_markdown, markdown(results).encode(errors="surrogateescape"))
