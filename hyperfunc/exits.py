"""How a program ends: its exit code, and what went wrong as one line."""

EXIT_FAILED = 1

EXIT_BAD_INPUT = 2

AFTER_SIGNAL = 128
"""What the exit code of a run that a signal has ended exceeds, by the signal's number."""


def one_line(error: BaseException) -> str:
    """What the error says, else its name."""
    return " ".join(str(error).split()) or type(error).__name__
