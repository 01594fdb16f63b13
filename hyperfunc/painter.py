"""The curves of a run, drawn by a process beside the training that is never waited for."""

import contextlib
import fcntl
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyperfunc import curves
from hyperfunc.interrupt import SIGNALS

RESTARTS = 3
"""So many processes may die one after the other without having drawn anything; then no other is started."""

_PIPE_BYTES = 1 << 20
"""Room for the rows of some 4,000 epochs."""

# Modules may be searched neither in the folder of the file that draws, where data.py or model.py could stand in the way
# of others, nor in that in which the training runs, which `-c` puts there as ''; but wherever else the parent does.
_LAUNCH = (
    "import sys; sys.path = [folder for folder in sys.path if folder]; "
    "import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
)


class Painter:
    """Draws in a process of its own, which the first picture starts, and never keeps the caller waiting.

    While a picture is being drawn, the newest request is kept and the others are dropped. Whatever goes wrong, training
    goes on: it is said once, in a line.

    Args:
        warn: Takes that line.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned = False
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths = 0
        self._next: dict[str, Any] | None = None
        self._in_work = 0  # requests that are not answered yet
        self._unsent = b""
        self._unread = b""

    def paint(self, rows: Sequence[Mapping[str, Any]], title: str, output: str | os.PathLike[str]) -> None:
        """Asks for the picture of these rows as PNG at `output`, now or as soon as the one in work is ready."""
        if self._closed:
            return
        self._next = {"rows": list(rows), "title": title, "output": os.path.abspath(output)}
        self._advance()

    def close(self, patience: float, give_up: Callable[[], bool] = lambda: False) -> None:
        """Asks for what is still to be drawn, and waits for it, but at most `patience` seconds in all.

        What is not ready by then is finished all the same, unless the process is killed: it ends by itself.

        Args:
            patience: In seconds.
            give_up: Asked again and again; True ends the waiting.
        """
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + patience
        if self._process is not None or patience > 0:
            self._advance(queue=True)
        while self._in_work and (left := deadline - time.monotonic()) > 0 and not give_up():
            self._wait(min(left, 0.1))
            self._advance(queue=True)
        if self._in_work and give_up():
            deadline = time.monotonic()
        elif self._in_work and patience > 0 and not self._warned:
            self._warn(f"the picture of the curves is not ready after {patience:g} s; it is being finished alone")
        self._leave(deadline)

    def _advance(self, *, queue: bool = False) -> None:
        """Does what can be done without waiting. With `queue` the next request is sent before the last is answered."""
        try:
            self._read()
            if self._next is not None and (queue or not self._in_work):
                request, self._next = self._next, None
                if self._process is None and self._deaths < RESTARTS:
                    self._start()
                if self._process is not None:
                    self._unsent += json.dumps(request, separators=(",", ":")).encode() + b"\n"
                    self._in_work += 1
            self._write()
        except Exception as error:
            self._trouble(curves.one_line(error))

    def _start(self) -> None:
        # Signals that reach all processes are for the training alone. What is blocked here a new process inherits.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._deaths += 1  # until it has drawn something
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _LAUNCH, os.path.abspath(curves.__file__)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for pipe in self._pipes():
            os.set_blocking(pipe, False)
        # Where this cannot be, as outside Linux, the rows of a long run go over in more than one call.
        with contextlib.suppress(AttributeError, OSError):
            fcntl.fcntl(self._pipes()[0], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def _read(self) -> None:
        """Takes the answers that are there."""
        if self._process is None:
            return
        with contextlib.suppress(BlockingIOError):
            while content := os.read(self._pipes()[1], 1 << 16):
                self._unread += content
            self._bury()
            return
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            try:
                answer = json.loads(line)
                error = answer.get("error")
            except (ValueError, AttributeError):
                continue  # printed by something that Python runs as it starts
            self._in_work -= 1
            self._deaths = 0
            if error is not None:
                self._trouble(error)

    def _write(self) -> None:
        """Sends as much as the pipe takes."""
        try:
            while self._process is not None and self._unsent:
                self._unsent = self._unsent[os.write(self._pipes()[0], self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._bury()

    def _bury(self) -> None:
        """Forgets a process that has ended, and what it had in work."""
        assert self._process is not None
        # One that has merely closed its end of a pipe is of no use either.
        self._process.kill()
        self._leave(time.monotonic() + 1)
        code = self._process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._process, self._in_work, self._unsent, self._unread = None, 0, b"", b""
        self._trouble(f"the process that draws them ended ({how})")

    def _leave(self, deadline: float) -> None:
        """Closes the pipes, at the end of which the process ends, and takes note of that if there is time."""
        if self._process is None:
            return
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        try:
            self._process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # Nobody will ask again. As long as it is None, Popen complains about that where warnings are shown.
            self._process.returncode = 0

    def _wait(self, seconds: float) -> None:
        """Waits until there is something to read, or room to write what is unsent."""
        poll = select.poll()  # and not select.select, which knows no descriptor above 1,023
        requests, answers = self._pipes()
        poll.register(answers, select.POLLIN)
        if self._unsent:
            poll.register(requests, select.POLLOUT)
        poll.poll(math.ceil(1000 * seconds))

    def _pipes(self) -> tuple[int, int]:
        """The descriptors for requests and answers."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin.fileno(), self._process.stdout.fileno()

    def _trouble(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"the curves are not drawn: {reason}; training goes on")
