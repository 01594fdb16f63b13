"""Disks that fill up, become read-only or lose a folder while a run is going on."""

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import make_folder, run_train, start_train, train_command

from hyperfunc import checkpoint, journal

MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$0" && shift && '


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = make_folder(tmp_path_factory.mktemp("pictures"))
    return ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "8", "--schedule", "constant"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder that a file system of a given size can be put upon, for one process."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("unshare") is None or on_small_disk(folder, "64k", "true").returncode:
        pytest.skip("mounting is not permitted here")
    return folder


def on_small_disk(folder: Path, size: str, script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs a shell script that sees a small file system in the place of `folder`."""
    command = ["unshare", "-m", "sh", "-c", MOUNT + script, str(folder), size, *arguments]
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_a_disk_with_room_for_one_checkpoint_only(disk: Path, tmp_path: Path, flags: list[str]) -> None:
    kept = tmp_path / "kept"
    script = f'"$@"; code=$?; cp -a "$0" {kept}; exit $code'
    command = train_command(*flags, "--epochs", "3", "--checkpoint-path", str(disk / "run.pth"))
    done = on_small_disk(disk, "2M", script, *command)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("could not save") == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "saved" in done.stdout
    assert done.stdout.count("NOT SAVED") == 2
    assert checkpoint.load(kept / "run.pth").notes["progress"]["epoch"] == 1
    assert not list(kept.glob(".*"))
    rows = journal.read_rows(kept / "run.metrics.jsonl")
    assert [row["event"] for row in rows if row["kind"] == "event"] == ["not saved", "not saved", "end"]
    # And it can be gone on with where there is room.
    more = run_train(*flags, "--epochs", "3", "--checkpoint-path", str(kept / "run.pth"), "--resume", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert checkpoint.load(kept / "run.pth").notes["progress"]["epoch"] == 3


def test_a_disk_that_becomes_read_only(disk: Path, tmp_path: Path, flags: list[str]) -> None:
    kept = tmp_path / "kept"
    script = (
        '"$@" & while [ ! -f "$0/run.pth" ]; do sleep 0.01; done; '
        # Refused while a file is open for writing.
        'until mount -o remount,ro "$0" 2>/dev/null; do sleep 0.01; done; '
        f'wait $!; code=$?; cp -a "$0" {kept}; exit $code'
    )
    command = train_command(*flags, "--epochs", "60", "--checkpoint-path", str(disk / "run.pth"))
    done = on_small_disk(disk, "100M", script, *command)
    assert done.returncode == 1, done.stderr
    assert "could not save" in done.stderr
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("could not write") == 1
    epoch = checkpoint.load(kept / "run.pth").notes["progress"]["epoch"]
    assert 1 <= epoch < 60
    journal.read_rows(kept / "run.metrics.jsonl")


def test_a_folder_that_is_removed_is_made_again(tmp_path: Path, flags: list[str]) -> None:
    process = start_train(*flags, "--epochs", "30", "--checkpoint-path", "runs/run.pth", cwd=tmp_path)
    assert process.stdout is not None
    next(line for line in process.stdout if "saved runs/run.pth" in line)
    (tmp_path / "runs").rename(tmp_path / "away")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output
    for folder in ("runs", "away"):
        checkpoint.load(tmp_path / folder / "run.pth")
        journal.read_rows(tmp_path / folder / "run.metrics.jsonl")
    assert checkpoint.load(tmp_path / "runs/run.pth").notes["progress"]["epoch"] == 30
