"""Signals that ask a run to end."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from hyperfunc.exits import AFTER_SIGNAL

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C; what `kill` and schedulers send; what schedulers send ahead of a time limit; a terminal that is closed."""


TWINS_SECONDS = 0.5
"""Within which of the first signal another one is not taken for impatience."""


class Interrupted(Exception):
    """A signal came, of which `Interrupts` has the number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """While entered, turns `SIGNALS` into a note to look at between two steps.

    Before `defer` is called there is nothing in hand, and a signal ends the process; so does a second one after that,
    because whoever asks twice does not want to wait. Signals in quick succession count as one: service managers and
    shells send pairs of them. A thread does this, woken by the interpreter's own handler: the
    main thread may be in a call into C for seconds (resolving a name, compiling), and runs no handler meanwhile; nor
    could an exception come up there in the middle of code that loses it.

    Args:
        farewell: Gives the line that is written when a signal ends the process before `defer`.

    Attributes:
        received: The number of the first signal that came after `defer`, or None.
        leave_word: Called before a signal ends the process before `defer`.
    """

    def __init__(self, farewell: Callable[[int], str]) -> None:
        self.received: int | None = None
        self.leave_word: Callable[[], object] = lambda: None
        self._farewell = farewell
        self._deferred = False
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "Interrupts":
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._restore.callback(os.close, write)
        self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write, warn_on_full_buffer=False))
        for number in SIGNALS:
            self._restore.callback(signal.signal, number, signal.getsignal(number))
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()
        take_over(_do_nothing)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def defer(self) -> None:
        """From now on the first signal is noted in `received`."""
        self._deferred = True

    def _watch(self, read: int) -> None:
        first_at = 0.0
        while signaled := os.read(read, 1):
            number = signaled[0]
            if number not in SIGNALS:
                continue
            if not self._deferred:
                self.leave_word()
                with contextlib.suppress(OSError):
                    # Below a bar that may stand there. A path in it may be one that UTF-8 does not hold.
                    line = f"{os.linesep * os.isatty(2)}{self._farewell(number)}{os.linesep}"
                    os.write(2, line.encode(errors="backslashreplace"))
                exit_at_once(number)
            if self.received is None:
                self.received, first_at = number, time.monotonic()
            elif time.monotonic() - first_at > TWINS_SECONDS:
                with contextlib.suppress(OSError):
                    os.write(2, f"stopped at once by {signal.Signals(number).name}{os.linesep}".encode())
                exit_at_once(number)
        os.close(read)


def take_over(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Handles all of `SIGNALS` by `handler`; but a process started by `nohup` goes on ignoring a closed terminal."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def ignore() -> None:
    """From now on signals do nothing: all is done, and Python's own end is not to be disturbed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_at_once(number: int) -> NoReturn:
    """Ends the process as a shell expects it after a signal, without running anything else."""
    os._exit(AFTER_SIGNAL + number)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """Python's handler; what there is to do is done in the thread that `set_wakeup_fd` wakes."""
