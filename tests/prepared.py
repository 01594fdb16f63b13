"""Processes of train.py that find torch imported: forked from one that has imported it, once for all of them.

Importing torch takes longer than all that a small run does. The process that is forked does nothing but import, so that
a run begins as it would have done; what depends on the start of Python itself, or on a shell, needs a real one. Nor
does `run` draw the curves where nobody looks at them: the process that draws imports matplotlib, and takes as long as
all the rest. A run without has imported the package before its first line.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from threading import Timer
from typing import IO, Any
from unittest import mock

IMPORTED = ["torchvision.datasets", "rich.progress", "safetensors.torch"]

SECONDS = 240
"""How long a process may take."""


class Process:
    """What the tests need of `subprocess.Popen`, with standard output and error in one stream of text.

    It draws its curves: whatever is done to it may meet a picture in work.
    """

    def __init__(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        ours, theirs = os.pipe()
        self.stdout: IO[str] = os.fdopen(ours, encoding="utf-8")
        self._process = _start(command, cwd, env, theirs, theirs, drawn=True)
        os.close(theirs)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def communicate(self, timeout: float = SECONDS) -> tuple[str, None]:
        """What is left of the output, and the end of the process."""
        late = Timer(timeout, self._process.kill)
        late.start()
        with self.stdout:
            output = self.stdout.read()
        self._process.join()
        in_time = late.is_alive()
        late.cancel()
        if not in_time:
            raise subprocess.TimeoutExpired("train.py", timeout, output)
        return output, None


def run(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], drawn: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Runs the program to its end."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = _start(command, cwd, env, output.fileno(), errors.fileno(), drawn=drawn)
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired("train.py", SECONDS)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(list(command), process.exitcode, output.read(), errors.read())


def skip_fsync(_descriptor: int) -> None:
    """What a write to the disk is waited for by, left out: a process may be killed here, but no power is cut."""


def drawing(drawn: bool) -> contextlib.AbstractContextManager[Any]:
    """A context in which runs in this process draw their curves, or do not."""
    return contextlib.nullcontext() if drawn else mock.patch("hyperfunc.painter.RESTARTS", 0)


def _start(command: Sequence[str], cwd: Path, env: Mapping[str, str], output: int, errors: int, *, drawn: bool) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_Run(list(command), str(cwd), dict(env), output, errors, drawn))
    process.start()
    return process


class _Run:
    """Is pickled for the process that it is called in, and its files with it."""

    def __init__(
        self, command: list[str], cwd: str, env: dict[str, str], output: int, errors: int, drawn: bool
    ) -> None:
        self.command, self.cwd, self.env, self.drawn = command, cwd, env, drawn
        self.files = output, errors

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": [DupFd(file) for file in self.files]}

    def __call__(self) -> None:
        for file, stream in zip(self.files, (1, 2), strict=True):
            os.dup2(file.detach(), stream)  # pyright: ignore[reportAttributeAccessIssue]
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.env)
        os.fsync = skip_fsync
        _, program, *flags = self.command
        sys.argv = [program, *flags]
        sys.path.insert(0, str(Path(program).parent))
        try:
            with drawing(self.drawn):
                runpy.run_path(program, run_name="__main__")
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
