"""A run that is killed again and again, at random moments, ends as if nothing had been.

HYPERFUNC_KILLS and HYPERFUNC_TERMINATIONS say how often; the full counts are 200 and 100.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import assert_trees_equal, make_folder, run_train, start_train

import hyperfunc as hf
from hyperfunc import checkpoint, journal

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("HYPERFUNC_KILLS", "3"))
TERMINATIONS = int(os.environ.get("HYPERFUNC_TERMINATIONS", "2"))

EPOCHS = 20
"""Of 12 steps each, every one of which is saved."""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = make_folder(tmp_path_factory.mktemp("pictures"), train=45, test=10)
    run = ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "8", "--epochs", str(EPOCHS)]
    return [*run, "--report-every", "5", "--checkpoint-every", "1b"]


def rows_of(path: Path) -> list[dict[str, object]]:
    left_out = ("time", "epoch_time", "images_per_second")
    rows = [row for row in journal.read_rows(path) if row["kind"] in ("report", "epoch")]
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def moments(count: int, seed: int) -> Iterator[tuple[int, float, bool]]:
    """For each try its number, the seconds to wait, and whether to wait from the first sign of training on."""
    rng = random.Random(seed)
    for number in range(count):
        from_training = rng.random() < 0.8
        yield number, rng.uniform(0, 1.5) if from_training else rng.uniform(0.05, 4), from_training


def test_killed_at_random_moments(tmp_path: Path, flags: list[str]) -> None:
    whole = run_train(*flags, "--checkpoint-path", "whole.pth", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    expected, rows = checkpoint.load(tmp_path / "whole.pth").tensors, rows_of(tmp_path / "whole.metrics.jsonl")
    path = tmp_path / "run.pth"
    killed = ended = leftovers = 0
    for number, seconds, from_training in moments(KILLS, seed=0):
        resume = ["--resume"] if path.exists() else []
        process = start_train(*flags, "--checkpoint-path", path.name, *resume, cwd=tmp_path)
        assert process.stdout is not None
        if from_training:
            next((line for line in process.stdout if line.startswith(("epoch ", "engine "))), None)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        assert process.returncode in (-signal.SIGKILL, 0), output
        killed += process.returncode == -signal.SIGKILL
        leftovers += len(list(tmp_path.glob(".run.pth.*.tmp")))
        if path.exists():
            checkpoint.load(path)
            hf.load(path)
            journal.read_rows(tmp_path / "run.metrics.jsonl")
        last = number == KILLS - 1
        if last:
            resume = ["--resume"] if path.exists() else []
            done = run_train(*flags, "--checkpoint-path", path.name, *resume, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        if last or (path.exists() and checkpoint.load(path).notes["progress"]["epoch"] == EPOCHS):
            assert_trees_equal(checkpoint.load(path).tensors, expected)
            assert rows_of(tmp_path / "run.metrics.jsonl") == rows
            assert not list(tmp_path.glob(".run.pth.*.tmp")) or not last
            ended += 1
            for old in tmp_path.glob("*run.*"):
                old.unlink()
    assert killed
    print(f"{killed} kills, {leftovers} of them in a save, {ended} runs to their end")


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_terminated_at_random_moments(tmp_path: Path, flags: list[str], engine: str) -> None:
    longest = 0.0
    outcomes: dict[str, int] = {}
    rng = random.Random(1)
    count = TERMINATIONS // 2 + (engine == "eager") * (TERMINATIONS % 2)
    for number in range(count):
        path = tmp_path / "run.pth"
        process = start_train(
            *flags,
            *("--engine", engine, "--checkpoint-path", path.name),
            *(["--resume"] if path.exists() and rng.random() < 0.7 else []),
            cwd=tmp_path,
        )
        # From 50 ms after the start on; the first 4 s are imports, data and, if so, compilation.
        time.sleep(rng.uniform(0.05, 6 if engine == "eager" else 25))
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        longest = max(longest, time.monotonic() - begin)
        where = (
            "over" if process.returncode == 0 else next(iter(output.splitlines()[-1:]), "in the interpreter's start")
        )
        assert "Traceback" not in output
        # Before the first line of train.py the interpreter itself decides, and a shell sees the same number.
        expected = (128 + signal.SIGTERM, -signal.SIGTERM) if not output else (128 + signal.SIGTERM,)
        assert process.returncode in (*expected, 0), (number, output)
        if process.returncode == 0:
            assert f"epoch {EPOCHS}/{EPOCHS}" in output or "nothing to do: the run is complete" in output
        if path.exists():
            hf.load(path)
        assert time.monotonic() - begin < 5, output
        assert not list(tmp_path.glob(".run.pth.*.tmp"))
        outcomes[where.split(" at ")[0]] = outcomes.get(where.split(" at ")[0], 0) + 1
    print(f"{engine}: {count} terminations, the longest took {longest:.2f} s: {outcomes}")
