import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from hyperfunc.interrupt import SIGNALS, Interrupts


def run_program(body: str, *before: str, farewell: str = "farewell {number}") -> "subprocess.CompletedProcess[str]":
    """Runs a program in which `signals` are entered and say `farewell`, which may hold their number."""
    program = (
        "import ctypes, os, signal, sys, time\n"
        "from interrupt import Interrupts\n"
        f"with Interrupts(lambda number: f'{farewell}') as signals:\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
    )
    # From within the package, which would import torch first; and with all signals as they are by default, which they
    # are not where the tests themselves run in the background.
    command = ["env", "--default-signal", *before, sys.executable, "-c", program]
    return subprocess.run(
        command,
        cwd=ROOT / "hyperfunc",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def wait_for_signal(interrupts: Interrupts) -> int | None:
    deadline = time.monotonic() + 10
    while interrupts.received is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return interrupts.received


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_process_while_nothing_is_in_hand(number: int) -> None:
    done = run_program(f"os.kill(os.getpid(), {number})\ntime.sleep(30)\nprint('still here')")
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", f"farewell {int(number)}\n")


def test_a_farewell_that_utf_8_does_not_hold_ends_the_process_too() -> None:
    done = run_program("os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(30)", farewell=r"\udcff")
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "\\udcff\n")


def test_a_signal_is_obeyed_while_the_main_thread_is_in_a_long_call_into_c() -> None:
    # As in resolving a name, where a call begins anew after a signal and no handler of Python's runs before its end.
    body = (
        "import threading\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "ctypes.CDLL(None).usleep(20_000_000)"
    )
    begin = time.monotonic()
    done = run_program(body)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, f"farewell {int(signal.SIGTERM)}\n")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("number", SIGNALS)
def test_a_deferred_signal_is_noted(number: int) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("the tests were started with this signal ignored, as by nohup, and it stays so")
    before = [signal.getsignal(other) for other in SIGNALS]
    with Interrupts(lambda _: "") as interrupts:
        interrupts.defer()
        assert interrupts.received is None
        os.kill(os.getpid(), number)
        assert wait_for_signal(interrupts) == number
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_a_second_signal_ends_the_process_at_once() -> None:
    body = (
        "signals.defer()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(0.7)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(30)\n"
        "print('still here')"
    )
    done = run_program(body)
    expected = (128 + signal.SIGTERM, "", "stopped at once by SIGTERM\n")
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_signals_that_come_together_are_one() -> None:
    body = (
        "signals.defer()\n"
        "for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):\n"
        "    os.kill(os.getpid(), number)\n"
        "time.sleep(0.2)\n"
        "print(signals.received == signal.SIGTERM)"
    )
    done = run_program(body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_other_signals_are_left_alone() -> None:
    body = (
        "caught = []\n"
        "signal.signal(signal.SIGALRM, lambda *_: caught.append(1))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
        "time.sleep(0.5)\n"
        "print(caught, signals.received)"
    )
    done = run_program(body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1] None\n", "")


def test_nohup_is_respected() -> None:
    body = "os.kill(os.getpid(), signal.SIGHUP)\ntime.sleep(0.3)\nprint('still here')"
    assert run_program(body).returncode == 128 + signal.SIGHUP
    done = run_program(body, "nohup")
    assert (done.returncode, done.stdout) == (0, "still here\n")


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_ctrl_c_while_the_program_starts_leaves_no_traceback(seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "train.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # The last is the end of --help, where Python takes the handlers away before it lets go of torch.
    assert process.returncode in (128 + signal.SIGINT, 0, -signal.SIGINT)
    assert "Traceback" not in errors
