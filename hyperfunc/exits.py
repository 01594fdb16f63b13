"""How a program ends: its exit code, and what went wrong as one line."""

import os

import torch

EXIT_FAILED = 1

EXIT_BAD_INPUT = 2

AFTER_SIGNAL = 128
"""What the exit code of a run that a signal has ended exceeds, by the signal's number."""


def one_line(error: BaseException) -> str:
    """What the error says, else its name."""
    return " ".join(str(error).split()) or type(error).__name__


def explain(error: Exception, *, smaller: str = "--batch-size") -> str:
    """The line about an error that has ended a run; `smaller` is the flag that would have kept it within memory.

    Raises:
        Exception: The error itself, where it may be the program's own fault and HYPERFUNC_TRACEBACK asks to see it.
    """
    reason = one_line(error)
    # On the CPU torch has no class for it.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in reason:
        return f"the device is out of memory, try a smaller {smaller}: {reason}"
    if not isinstance(error, RuntimeError):
        return reason
    if os.environ.get("HYPERFUNC_TRACEBACK"):
        raise error
    return f"{type(error).__name__}: {reason} (HYPERFUNC_TRACEBACK=1 shows where)"
