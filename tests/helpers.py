"""Small tools of the tests."""

import copy
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
from PIL import Image
from torch import Tensor

import hyperfunc as hf
from hyperfunc import checkpoint, data, distributed, files, training

ROOT = Path(__file__).resolve().parent.parent

RunHere = Callable[..., "subprocess.CompletedProcess[str]"]
"""What the fixture `run_here` gives."""

of_jvp = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
"""torch's own, when it loads its rules for forward derivatives; its category is not the same in all versions."""


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the tests' own type checker, which would refuse an unknown name before the function can."""
    return getattr(function, "__wrapped__", function)


def assert_trees_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Equal bit for bit, leaf by leaf."""
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert torch.equal(leaf, theirs[path]), path


def make_folder(
    path: Path, *, classes: tuple[str, ...] = ("cat", "dog"), train: int = 12, test: int = 6, size: int = 32
) -> Path:
    """A folder of small pictures, a colour a class, as --dataset folder reads them."""
    generator = data.seeded_generator("folder")
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            folder = path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(60, (size, size, 3), generator=generator, dtype=torch.uint8)
                noise[..., label % 3] += 150
                Image.fromarray(noise.numpy()).save(folder / f"{index:04}.png")
    return path


def train_command(*flags: str) -> list[str]:
    """train.py with flags that make it small, unless others are given."""
    return [sys.executable, str(ROOT / "train.py"), "--no-wandb", "--device", "cpu", "--depth", "10", *flags]


def run_train(
    *flags: str, cwd: Path, env: Mapping[str, str] | None = None, drawn: bool = False, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Runs train.py to its end as a user would; in a process started for it where options of subprocess are given, or
    variables that Python reads when it starts. These draw their curves, the others where that is asked for."""
    env = env or {}
    whole = {**os.environ, **env}
    if not options and not any(name.startswith("PYTHON") for name in env):
        return prepared.run(train_command(*flags), cwd=cwd, env=whole, drawn=drawn)
    return subprocess.run(
        train_command(*flags),
        cwd=cwd,
        env=whole,
        capture_output=True,
        text=True,
        timeout=prepared.SECONDS,
        check=False,
        **options,
    )


def start_train(*flags: str, cwd: Path, env: Mapping[str, str] | None = None) -> prepared.Process:
    """Starts train.py, with all that it writes in one stream."""
    return prepared.Process(train_command(*flags), cwd=cwd, env={**os.environ, **(env or {})})


def interrupt_train(
    *flags: str,
    cwd: Path,
    after: str,
    number: int = signal.SIGINT,
    delay: float = 0.0,
    env: Mapping[str, str] | None = None,
) -> tuple[int, str, float]:
    """Starts train.py, sends a signal once a line starts with `after`; returns exit code, output, seconds from then on.

    The seconds include the `delay` between that line and the signal.
    """
    process = start_train(*flags, cwd=cwd, env=env)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(after):
            break
    seen = time.monotonic()
    time.sleep(delay)
    process.send_signal(number)
    output += process.communicate(timeout=60)[0]
    assert process.returncode is not None
    return process.returncode, output, time.monotonic() - seen


def assert_compiled_run_equals_eager_one(*flags: str, cwd: Path) -> None:
    """Up to what rounding does: in float32 Adam makes percents of it within a few steps."""
    losses: list[float] = []
    for engine in ("eager", "compiled"):
        done = run_train(*flags, "--epochs", "1", "--checkpoint-path", engine, "--engine", engine, cwd=cwd)
        assert done.returncode == 0, done.stderr
        assert f"engine       {engine}" in done.stdout
        losses.append(checkpoint.load(cwd / engine).notes["progress"]["history"][0]["train/loss"])
    eager, compiled = losses
    assert abs(compiled - eager) < 0.05 * eager


def calibrated_again(
    path: Path, folder: Path, batches: int, *, size: int = 8, val_size: int = 0, rank: int = 0, world: int = 1
) -> hf.BatchStats:
    """What --calibrate makes of the last statistics of a run of one epoch, whose best model is therefore its last; in a
    rank of so many."""
    loaded = checkpoint.load(path)
    model, params, _ = hf.load(path)
    seed = loaded.notes["config"]["seed"]
    pictures = data.load_dataset("folder", folder, val_size=val_size, seed=seed).train
    draws = itertools.islice(data.batches(data.draw_epoch(seed, 0, len(pictures.labels)), size), batches)
    prefix = "state/batch_stats/"
    last = {name.removeprefix(prefix): leaf for name, leaf in loaded.tensors.items() if name.startswith(prefix)}
    step = training.make_calibration_step(model, load=data.make_train_load(pictures, data.measure(pictures)))
    return training.calibrate(model, params, last, (distributed.part(draw, rank, world) for draw in draws), step=step)


def note_saves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Gets epoch and batch of every checkpoint that is saved in this process from now on."""
    found: list[tuple[int, int]] = []
    save = checkpoint.save

    def note(path: Path, trees: Any, notes: Any, **options: Any) -> None:
        found.append((notes["progress"]["epoch"], notes["progress"]["batch"]))
        save(path, trees, notes, **options)

    monkeypatch.setattr(checkpoint, "save", note)
    return found


def assert_refused(done: subprocess.CompletedProcess[str], message: str, code: int = 2) -> None:
    """One line on standard error that says what is wrong, and nothing like a traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("reading ")]
    assert len(lines) == 1, lines


def small(folder: Path, *flags: str) -> list[str]:
    return ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "8", "--report-every", "5", *flags]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def forged(path: Path, change: Callable[[dict[str, Any]], None], tensors: dict[str, Tensor] | None = None) -> None:
    """A checkpoint whose checksum is right, with other notes in it."""
    found = checkpoint.load(path)
    notes = copy.deepcopy(found.notes)
    change(notes)
    files.write_tensors(path, found.tensors | (tensors or {}), {"format": checkpoint.FORMAT, "notes": notes})
