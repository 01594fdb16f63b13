import io
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_folder, run_train, train_command

from hyperfunc.console import Printer

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def test_a_bar_is_a_line_before_and_after_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    assert list(Printer().track(range(3), "reading pictures", 3)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "reading pictures: 3 files\nreading pictures: done\n"


def test_colours_that_the_environment_forces_stay_out_of_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    printer = Printer()
    printer.say("epoch 1  [bold]accuracy[/bold] 55.1 % :smile:")
    with printer.training(3, 10) as bars, printer.waiting("compiling"):
        bars.begin_epoch(0, 0)
        bars.move(0, 1)
        bars.figures(epoch="x", run="y")
    assert capsys.readouterr().out == "epoch 1  [bold]accuracy[/bold] 55.1 % :smile:\n"


def test_quiet_says_only_what_goes_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(quiet=True)
    printer.say("epoch 1")
    list(printer.track(range(3), "reading", 3))
    printer.warn("trouble")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "trouble\n")


def test_a_stream_without_a_file_behind_it_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    Printer().say("line")
    assert sys.stdout.getvalue() == "line\n"  # pyright: ignore[reportAttributeAccessIssue]


def on_a_terminal(command: list[str], cwd: Path) -> tuple[int, str]:
    """Runs a program whose standard output and error are a terminal of 100 columns; its exit code and all it wrote."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    written = b""
    while True:
        readable, _, _ = select.select([ours], [], [], 120)
        try:
            part = os.read(ours, 65536) if readable else b""
        except OSError:  # as Linux says that the other side is closed
            part = b""
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(timeout=60), written.decode()


def test_the_live_display_stands_below_the_lines(tmp_path: Path) -> None:
    # Long enough for the display, which is drawn a few times a second, to be seen after a report.
    folder = make_folder(tmp_path / "pictures", train=160)
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "4", "--report-every", "5"]
    code, text = on_a_terminal(train_command(*flags, "--epochs", "2", "--checkpoint-path", "run.pth"), tmp_path)
    assert code == 0
    assert "reading " in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    bars = [line for line in re.split(r"[\r\n]+", plain) if "━" in line]
    assert any(re.match(r"epoch [12]/2 ━+.* +\d+/80 .* left  loss \d.\d{4}  accuracy .* lr 0.00\d+ ", b) for b in bars)
    assert any(re.match(r"run +━*.* +\d+/160 .* left  best \d+.\d+ % \(epoch 1\)", b) for b in bars)
    # The lines are whole and as they are in a file, with nothing of a bar in them.
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain)]
    reports = [
        line for line in lines if re.fullmatch(r"epoch [12]/2  batch \d+/80  loss [\d.]+  accuracy [\d.]+ %", line)
    ]
    assert len(reports) == 32
    # The cursor is never left hidden.
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


def test_off_a_terminal_there_are_the_same_lines_without_control_characters(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pictures")
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "8", "--checkpoint-path", "run.pth"]
    done = run_train(*flags, "--epochs", "1", cwd=tmp_path, env={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"})
    assert done.returncode == 0
    assert CONTROL.search(done.stdout + done.stderr) is None
    assert "epoch 1/1  batch 3/3" in done.stdout
    quiet = run_train(*flags, "--epochs", "2", "--resume", "--quiet", cwd=tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
