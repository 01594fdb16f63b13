"""What a run has shown, as a file of rows: one JSON object a line.

A row is written by a single call, so that a process killed at any moment leaves whole lines. Every row says of what
`kind` it is: "start" and "resume" of a process, "report" (some batches), "epoch", or "event" (a stop, trouble).
A report has the `step` and an epoch the `epoch` that it is about; a run that goes on from a checkpoint cuts off what it
is about to do again, and so has each once. Where it could not, on a full disk, the next one does.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hyperfunc.files import all_numbered, beside, free_name, write_bytes

Row = dict[str, Any]

ENDING = ".metrics.jsonl"
"""How the names of journals end."""


def path_of(checkpoint_path: str | os.PathLike[str]) -> Path:
    """The journal of the run that has its checkpoint there."""
    return beside(Path(checkpoint_path).resolve(), ENDING)


class Journal:
    """Appends rows to a file.

    What cannot be written, because the disk is full for example, is kept and written with a later row.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._unwritten = b""
        self._warned = False

    def write(self, kind: str, row: Mapping[str, Any]) -> None:
        """Appends a row, with the time in seconds since 1970."""
        self._unwritten += _line({"kind": kind, "time": round(time.time(), 3), **row})
        try:
            _append(self.path, self._unwritten)
            self._unwritten = b""
        except OSError as error:
            if not self._warned:
                self._warn(f"could not write {self.path}: {error}; trying again with every line")
            self._warned = True


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a journal; a torn last line, which a power cut may leave, is left out.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is not a row: a JSON object with a "kind", a report with its step, an epoch with its number.
    """
    rows = _read_lines(path)
    bad = next((number for number, row in enumerate(rows, 1) if row is None), None)
    if bad is not None:
        raise ValueError(f"{path} is not a journal of a run: line {bad} is not a row of one")
    return [row for row in rows if row is not None]


def _read_lines(path: str | os.PathLike[str]) -> list[Row | None]:
    """What stands in each whole line: a row, or None for what is none."""
    rows: list[Row | None] = []
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        rows.append(row if _is_row(row) else None)
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return False
    needed = {"report": "step", "epoch": "epoch"}.get(row["kind"])
    return needed is None or isinstance(row.get(needed), int)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a whole journal in the place of the one that is there, in one stroke.

    Raises:
        OSError: It cannot be written.
    """
    write_bytes(path, b"".join(_line(row) for row in rows))


def go_on(
    path: Path, run: str, *, step: int, epoch: int, history: Iterable[Row], warn: Callable[[str], None]
) -> tuple[list[Row], list[Row]]:
    """Makes the journal at `path` that of a run which goes on from a checkpoint; returns its rows, after and before.

    The reports after `step` and the epochs after `epoch` are cut off. If the file is another run's, because one was
    begun at the same place and came to nothing, the right one is copied from the numbered names beside it; what is
    nowhere to be found is made up for by the checkpoint's own `history`.

    Args:
        path: The journal.
        run: The run's id.
        step: That the checkpoint stands at.
        epoch: Epochs that the checkpoint has done.
        history: Its rows of those.
        warn: Is told, in a line, of what in the journal cannot be read and is left out.

    Raises:
        OSError: It cannot be written.
    """
    before: list[Row] = [{"kind": "start", "run": run}]
    found_at, left_out = None, 0
    for candidate in (path, *all_numbered(path).values()):
        try:
            lines = _read_lines(candidate)
        except OSError:
            continue
        found = [row for row in lines if row is not None]
        # Of its own that were moved aside the longest is the last; what stands at the path itself is newer still.
        if run_of(found) == run and (found_at is None or len(found) > len(before)):
            before, found_at, left_out = found, candidate, len(lines) - len(found)
            if candidate == path:
                break
    if left_out:
        warn(f"{found_at}: {left_out} lines that are no rows of a journal were left out")
    rows = until(_cut_off(before), step=step, epoch=epoch)
    known = {row["epoch"] for row in rows if row["kind"] == "epoch"}
    rows += [{"kind": "epoch", **row} for row in history if row["epoch"] not in known]
    if found_at != path and path.exists():
        path.rename(free_name(path))
    write_rows(path, rows)
    return rows, before


def number_of(path: Path, run: str) -> int | None:
    """The number under which the journal of a run that stood at `path` is kept, if it is."""
    for number, candidate in all_numbered(path).items():
        with contextlib.suppress(OSError):
            if run_of(row for row in _read_lines(candidate) if row is not None) == run:
                return number
    return None


def run_of(rows: Iterable[Row]) -> str | None:
    """The id of the run that a journal belongs to."""
    return next((row.get("run") for row in rows if row["kind"] == "start"), None)


def until(rows: Iterable[Row], *, step: int, epoch: int) -> list[Row]:
    """Without the reports after `step` and the epochs after `epoch`."""
    last = {"report": ("step", step), "epoch": ("epoch", epoch)}

    def stays(row: Row) -> bool:
        column, limit = last.get(row["kind"], ("", 0))
        return row.get(column, 0) <= limit

    return [row for row in rows if stays(row)]


def _cut_off(rows: Iterable[Row]) -> list[Row]:
    """Without what a run that went on from before it could not cut off."""
    kept: list[Row] = []
    for row in rows:
        step, epoch = row.get("step"), row.get("epoch")
        if row["kind"] == "resume" and isinstance(step, int) and isinstance(epoch, int):
            kept = until(kept, step=step, epoch=epoch)
        kept.append(row)
    return kept


def _line(row: Row) -> bytes:
    return json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _append(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, content) < len(content):
                raise OSError("there is no room for a whole line")
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)
