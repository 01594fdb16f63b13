import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from helpers import ROOT

from hyperfunc.interrupt import SIGNALS, Interrupted, Interrupts


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_while_nothing_is_in_hand(number: int) -> None:
    interrupts = Interrupts()
    interrupts.install()
    with pytest.raises(Interrupted, match=signal.Signals(number).name) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.number == number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_deferred_signal_is_noted(number: int) -> None:
    interrupts = Interrupts()
    interrupts.install()
    interrupts.check()
    interrupts.defer()
    os.kill(os.getpid(), number)
    assert interrupts.received == number
    with pytest.raises(Interrupted):
        interrupts.check()


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import os, signal\n"
        "from hyperfunc.interrupt import Interrupts\n"
        "interrupts = Interrupts()\n"
        "interrupts.install()\n"
        "interrupts.defer()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")


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
