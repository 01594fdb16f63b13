"""Checks of arguments, and the words for what is wrong with them."""

import operator
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any


def positive(name: str, value: Any) -> int:
    """The argument as an int of Python's, which files and messages can hold, of whatever type of integers it is.

    Raises:
        ValueError: It is no whole number, or less than 1; the message begins with `name`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}: got {value!r}, expected at least 1, as a whole number")
    return number


def some(parts: list[str], most: int = 8, between: str = ", ") -> str:
    """As many of them as one can read, and how many more there are."""
    more = [f"and {len(parts) - most} more"] if len(parts) > most else []
    return between.join(parts[:most] + more)


def matching(names: Iterable[str], pattern: str) -> set[str]:
    """Those of the names that a glob pattern fits. A name itself fits no other, whatever characters are in it."""
    names = set(names)
    return {pattern} if pattern in names else {name for name in names if fnmatchcase(name, pattern)}
