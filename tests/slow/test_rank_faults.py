"""Ranks that are killed or stopped at random moments, under torchrun and under train.py's own launcher.

HYPERFUNC_RANK_KILLS says how often; the full count is 50. They take minutes, most of which the launcher waits, and are
skipped without it: what they repeat, `test_ranks` does once.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers import assert_trees_equal, make_folder
from test_ranks import Start, all_over, await_line, mark, program, rank, shown, start

from hyperfunc import checkpoint

__all__ = ["mark", "start"]

KILLS = int(os.environ.get("HYPERFUNC_RANK_KILLS", "0"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KILLS, reason="takes minutes; HYPERFUNC_RANK_KILLS=50 runs it"),
]

EPOCHS = 6
"""Of 9 steps each, every third of which is saved."""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = make_folder(tmp_path_factory.mktemp("pictures"), train=27, test=7)
    run = ["--no-wandb", "--depth", "10", "--dataset", "folder", "--data-dir", str(path), "--batch-size", "6"]
    return [*run, "--timeout", "10", "--checkpoint-every", "3b", "--epochs", str(EPOCHS), "--sync-bn"]


def test_killed_again_and_again_under_torchrun(tmp_path: Path, flags: list[str], start: Start, mark: str) -> None:
    whole = start(*program(*flags, "--devices", "cpu:2", "--checkpoint-path", "whole.pth"))
    assert whole.communicate(timeout=120)[1] is None
    assert whole.returncode == 0
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={KILLS}"]
    process = start(*torchrun, *program(*flags, "--device", "cpu", "--checkpoint-path", "run.pth"))
    rng = random.Random(0)
    output, killed = "", 0
    for _ in range(KILLS):
        output += await_line(process, "engine ")
        time.sleep(rng.uniform(0, 1.5))
        try:
            os.kill(rank(mark, rng.randrange(2)), signal.SIGKILL)
            killed += 1
        except (ValueError, ProcessLookupError):
            break  # it had come to its end
        if (tmp_path / "run.pth").exists():
            checkpoint.load(tmp_path / "run.pth")
    output += process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert output.count("train.py: rank ") == killed
    assert all_over(mark)
    ours, theirs = (checkpoint.load(tmp_path / name).tensors for name in ("run.pth", "whole.pth"))
    assert_trees_equal(ours, theirs)
    assert shown(tmp_path / "run.metrics.jsonl") == shown(tmp_path / "whole.metrics.jsonl")
    print(f"{killed} kills")


@pytest.mark.parametrize("number", [0, 1])
def test_a_stopped_rank_is_ended_by_the_launcher(
    tmp_path: Path, flags: list[str], start: Start, mark: str, number: int
) -> None:
    process = start(*program(*flags, "--devices", "cpu:2", "--epochs", "1000", "--checkpoint-path", "run.pth"))
    output = await_line(process, "epoch 2/1000")
    stopped = rank(mark, number)
    os.kill(stopped, signal.SIGSTOP)
    begin = time.monotonic()
    output += process.communicate(timeout=120)[0]
    # The launcher gives a process 30 seconds to obey it.
    assert time.monotonic() - begin < 10 + 30 + 5
    assert process.returncode == 1
    assert f"train.py: rank {number} (" in output
    assert f"process {stopped}) gave no sign of life" in output
    assert all_over(mark)
    checkpoint.load(tmp_path / "run.pth")


def test_nothing_is_left_where_the_launcher_is_killed(
    tmp_path: Path, flags: list[str], start: Start, mark: str
) -> None:
    process = start(*program(*flags, "--devices", "cpu:2", "--epochs", "1000", "--checkpoint-path", "run.pth"))
    await_line(process, "epoch 2/1000")
    process.kill()
    output = process.communicate(timeout=30)[0]
    assert "has lost the store" in output
    assert "Traceback" not in output
    assert all_over(mark)
    checkpoint.load(tmp_path / "run.pth")


def test_terminated_at_random_moments(tmp_path: Path, flags: list[str], start: Start, mark: str) -> None:
    rng = random.Random(1)
    for _ in range(KILLS):
        resume = ["--resume"] if (tmp_path / "run.pth").exists() else []
        process = start(
            *program(*flags, *("--devices", "cpu:2", "--epochs", "1000", "--checkpoint-path", "run.pth"), *resume)
        )
        await_line(process, "engine ")
        time.sleep(rng.uniform(0, 3))
        process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
        begin = time.monotonic()
        output = process.communicate(timeout=60)[0]
        assert time.monotonic() - begin < 10
        assert process.returncode > 128, output
        assert output.count("stopped by ") == 1, output
        assert all_over(mark)
        # The last line of the start is not yet the beginning of the training.
        assert resume or (tmp_path / "run.pth").exists() or "before training began; nothing was saved yet" in output
        if (tmp_path / "run.pth").exists():
            checkpoint.load(tmp_path / "run.pth")


def test_resumed_on_any_number_of_ranks(tmp_path: Path, flags: list[str], start: Start, mark: str) -> None:
    for epoch, devices in enumerate(["cpu:2", "cpu:3", "cpu:1", "cpu:2"], 1):
        resume = ["--resume"] * (epoch > 1)
        command = [*flags, "--devices", devices, "--epochs", str(epoch), "--checkpoint-path", "run.pth", *resume]
        process = start(*program(*command))
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert checkpoint.load(tmp_path / "run.pth").notes["environment"].get("ranks", 1) == int(devices[-1])
        # Its result does not depend on the ranks, and so nothing is said of them.
        assert "resumed on" not in output
    assert [row["epoch"] for row in shown(tmp_path / "run.metrics.jsonl") if row["kind"] == "epoch"] == [1, 2, 3, 4]
