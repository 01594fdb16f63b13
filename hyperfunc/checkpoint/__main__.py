"""Prints what a checkpoint holds: python -m hyperfunc.checkpoint FILE"""

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperfunc import checkpoint, tree
from hyperfunc.exits import EXIT_BAD_INPUT, one_line
from hyperfunc.flags import Parser

ROWS_SHOWN = 10
"""Of a longer table the first and the last rows are shown, so many in all."""


def describe(path: str | os.PathLike[str], *, tensors: bool = True) -> Iterator[str]:
    """The lines that say what a checkpoint holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or not a checkpoint of this version.
    """
    found = checkpoint.load(path)
    size = Path(path).stat().st_size
    yield f"{path}: {size:,} bytes, format {checkpoint.FORMAT}, whole: its content matches its SHA-256"
    yield from _describe_notes(found.notes)
    trees: dict[str, dict[str, Any]] = {}
    for name, leaf in found.tensors.items():
        trees.setdefault(name.partition("/")[0], {})[name] = leaf
    for name, leaves in trees.items():
        yield ""
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
        yield f"{name}: {len(leaves)} tensors, {tree.num_params(leaves):,} numbers, {size:,} bytes"
        if tensors:
            width = max(len(leaf) for leaf in leaves)
            yield from (f"  {leaf:{width}}  {tree.describe(value)}" for leaf, value in leaves.items())


def _describe_notes(notes: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Values one below the other; notes within notes indented; a list of alike notes as a table."""
    width = max((len(key) for key in notes), default=0)
    for key, value in sorted(notes.items(), key=lambda item: isinstance(item[1], dict | list)):
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _describe_notes(value, indent + "  ")
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            yield f"{indent}{key}: {len(value)} rows"
            yield from (f"{indent}  {line}" for line in _table(value))
        elif isinstance(value, list):
            yield f"{indent}{key:{width}}  {', '.join(map(str, value))}"
        else:
            yield f"{indent}{key:{width}}  {value}"


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    shown = list(rows)
    if len(rows) > ROWS_SHOWN:
        shown = [*rows[: ROWS_SHOWN // 2], *rows[-ROWS_SHOWN // 2 :]]
    cells = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in shown]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    for number, line in enumerate(cells):
        if len(rows) > ROWS_SHOWN and number == ROWS_SHOWN // 2 + 1:
            yield "..."
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: 2 for a file that cannot be read."""
    parser = Parser(prog="python -m hyperfunc.checkpoint", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", help="a checkpoint of train.py, or a file that hyperfunc.save wrote")
    parser.add_argument("--json", action="store_true", help="print the notes as JSON, for programs")
    parser.add_argument("--brief", action="store_true", help="leave the list of tensors out")
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold what the output cannot show
    try:
        if arguments.json:
            print(json.dumps(checkpoint.load(arguments.file).notes, indent=2, sort_keys=True))
        else:
            print("\n".join(describe(arguments.file, tensors=not arguments.brief)))
        if sys.stdout is not None:  # closed
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough, as `head` has; and there is nothing left to flush at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
