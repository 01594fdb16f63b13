"""A command line out of a dataclass: every field is a flag, with its help, its range and an error of one line."""

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from hyperfunc.exits import EXIT_BAD_INPUT

Config = TypeVar("Config")


def option(
    default: Any,
    group: str,
    text: str,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    shapes: bool = False,
    metavar: str | None = None,
    check: Callable[[Any], object] | None = None,
    may_be_empty: bool = True,
) -> Any:
    """A field of a configuration: its default, its group and text in the help, its range.

    Args:
        default: The value where the flag is not given.
        group: The heading under which the help shows it.
        text: What the help says of it.
        at_least: The least number allowed.
        at_most: The largest number allowed; integers stay below 2**62 in any case.
        shapes: Whether it shapes the result of a run, and therefore may not change when the run is resumed.
        metavar: What the help shows in the place of the value.
        check: Raises a ValueError for a value that is not allowed.
        may_be_empty: Whether an empty text may be given, which is what a shell makes of a variable that is not set; an
            empty default only says that the flag is not there.
    """
    metadata = {"group": group, "text": text, "at_least": at_least, "at_most": at_most, "shapes": shapes}
    metadata |= {"metavar": metavar, "check": check, "may_be_empty": may_be_empty}
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {' '.join(message.split())}\n")


class _Reader(Parser):
    """A parser whose errors are a ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, "") and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def parse(
    kind: type[Config],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    check: Callable[[Config], None],
    short: dict[str, str],
) -> Config:
    """Reads a command line into `kind`; what is wrong with it ends the program with exit code 2 and one line.

    Args:
        kind: A dataclass whose fields are made by `option`.
        argv: The arguments; those of the process where None. Dashes and underscores in flags are alike.
        prog: The program's name.
        description: One line for the help.
        check: Raises a ValueError for what the ranges of single flags cannot say.
        short: Short flags by the name of their field.
    """
    parser = _Reader(prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter)
    try:
        config = _read(parser, kind, sys.argv[1:] if argv is None else argv, short)
        check_ranges(config)
        check(config)
    except ValueError as error:
        Parser.error(parser, str(error))
    return config


def parse_value(kind: type[Any], name: str, value: Any) -> Any:
    """What a field is where its flag is given so.

    Raises:
        ValueError: The flag cannot have that value; the message names both.
    """
    config = _read(_Reader(allow_abbrev=False), kind, [f"{flag(name)}={value}"], {})
    check_ranges(config)
    return getattr(config, name)


def _read(parser: argparse.ArgumentParser, kind: type[Config], argv: Sequence[str], short: dict[str, str]) -> Config:
    groups: dict[str, Any] = {}
    for item in _fields(kind):
        name = item.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        names = [flag(item.name)] + ([short[item.name]] if item.name in short else [])
        text = item.metadata["text"]
        if item.type is bool:
            groups[name].add_argument(*names, action="store_true", help=text)
        elif get_origin(item.type) is Literal:
            groups[name].add_argument(*names, choices=get_args(item.type), default=item.default, help=text)
        else:
            metavar = item.metadata["metavar"] or {int: "N", float: "X"}.get(item.type, "TEXT")
            default = item.default if item.metadata["may_be_empty"] else argparse.SUPPRESS
            groups[name].add_argument(*names, type=item.type, default=default, metavar=metavar, help=text)
    namespace, unknown = parser.parse_known_args([_with_dashes(argument) for argument in argv])
    if unknown:
        flags = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    for item in _fields(kind):
        if not item.metadata["may_be_empty"] and getattr(namespace, item.name, None) == "":
            parser.error(f"{flag(item.name)}: got an empty text, as of a variable that is not set; omit the flag")
    return kind(**vars(namespace))


def check_ranges(config: Any) -> None:
    """Raises a ValueError that names the flag, its value and its range."""
    for item in _fields(type(config)):
        value = getattr(config, item.name)
        low, high = item.metadata["at_least"], item.metadata["at_most"]
        if item.type is int:
            high = min(high, 2**62)
        if item.type in (int, float) and not low <= value <= high:
            bounds = [f"at least {low:g}"] * math.isfinite(low) + [f"at most {high:g}"] * math.isfinite(high)
            raise ValueError(f"{flag(item.name)}: got {value}, expected {' and '.join(bounds)}")
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{flag(item.name)}: got {value!r}, which has a null character")
        if item.metadata["check"] is not None:
            try:
                item.metadata["check"](value)
            except ValueError as error:
                raise ValueError(f"{flag(item.name)}: {error}") from None


def shaping(kind: type[Any]) -> list[str]:
    """The names of the fields that shape the result of a run."""
    return [item.name for item in _fields(kind) if item.metadata["shapes"]]


def flag(name: str) -> str:
    """The flag of a field: --batch-size for batch_size."""
    return f"--{name.replace('_', '-')}"


def _fields(kind: type[Any]) -> tuple[Any, ...]:
    return dataclasses.fields(kind)


def _with_dashes(argument: str) -> str:
    """--batch_size=8 as --batch-size=8."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
