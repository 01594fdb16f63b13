"""Signals that ask a run to end."""

import os
import signal
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Raised by a signal while nothing is in hand that must be finished first."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Turns Ctrl-C and SIGTERM into an exception, or, while deferred, into a note to look at between two steps.

    A second signal ends the process at once: whoever asks twice does not want to wait.

    Attributes:
        received: The number of the signal that came while deferred, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False

    def install(self) -> None:
        """Takes the signals over; needed even for Ctrl-C, which a shell's background jobs start out ignoring."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def defer(self) -> None:
        """From now on a signal is noted in `received` and raises nothing."""
        self._deferred = True

    def check(self) -> None:
        """Raises what was noted; for places in a longer piece of work that can be left.

        Raises:
            Interrupted: A signal came.
        """
        if self.received is not None:
            raise Interrupted(self.received)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            exit_at_once(number)
        self.received = number
        if not self._deferred:
            raise Interrupted(number)


def ignore() -> None:
    """From now on signals do nothing: all is done, and Python's own end is not to be disturbed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_at_once(number: int) -> NoReturn:
    """Ends the process as a shell expects it after a signal, without running anything else."""
    os._exit(128 + number)
