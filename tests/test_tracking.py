import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import make_folder, run_train, train_command

from hyperfunc import checkpoint
from hyperfunc.tracking import Printer, WandbRun

ROW_OF_AN_EPOCH = {
    "epoch",
    "train/accuracy",
    "train/loss",
    "test/accuracy",
    "test/loss",
    "learning_rate",
    "epoch_time",
    "images_per_second",
}
ROW_OF_A_BATCH = {"step", "batch/loss", "batch/accuracy", "learning_rate"}


def offline_records(path: Path) -> Iterator[Any]:
    """The records of an offline run of wandb: protocol buffers in a LevelDB log, after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    new_record: Any = wandb_internal_pb2.__dict__["Record"]
    log = io.BytesIO(path.read_bytes())
    block, header = 32768, struct.Struct("<IHB")
    log.seek(7)
    record = b""
    while True:
        left = block - log.tell() % block
        if left < header.size:
            log.seek(left, io.SEEK_CUR)
        head = log.read(header.size)
        if len(head) < header.size:
            return
        _, length, kind = header.unpack(head)
        record += log.read(length)
        if kind in (1, 4):  # whole, or the last part
            parsed = new_record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


def items(records: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in records}


def test_an_offline_run_holds_what_was_printed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pictures")
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "8", "--report-every", "2"]
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_API_KEY": ""}

    def run(*more: str) -> list[Any]:
        command = [flag for flag in train_command(*flags, *more) if flag != "--no-wandb"]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "offline, as WANDB_MODE says; to send the run later: wandb sync" in done.stdout
        (path,) = (tmp_path / "wandb").glob("latest-run/*.wandb")
        return list(offline_records(path))

    records = run("--epochs", "2", "--checkpoint-path", "run.pth")
    rows = [items(record.history.item) for record in records if record.HasField("history")]
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    batches = [row for row in rows if "batch/loss" in row]
    assert [row["step"] for row in batches] == [2, 3, 5, 6]
    assert all(row.keys() == ROW_OF_A_BATCH for row in batches)
    # wandb adds the step to the row of an epoch, because that is what the learning rate is drawn over.
    epochs = [{key: value for key, value in row.items() if key != "step"} for row in rows if "epoch" in row]
    notes = checkpoint.load(tmp_path / "run.pth").notes["progress"]
    assert epochs == notes["history"]
    assert all(row.keys() == ROW_OF_AN_EPOCH for row in epochs)

    summary: dict[str, Any] = {}
    for record in records:
        if record.HasField("summary"):
            summary |= items(record.summary.update)
    assert summary["total_parameters"] == 79_250
    assert summary["compression"] == pytest.approx(75_010 / 79_250)
    assert summary["best_accuracy"] == notes["best_accuracy"]
    assert summary["best_epoch"] == notes["best_epoch"]

    (started,) = [record.run for record in records if record.HasField("run")]
    assert started.run_id == notes["wandb_id"]
    assert (started.project, started.display_name) == ("hypernetworks-gpu", "hypernetworks_b8_lr0.002_e2")
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert (config["depth"], config["batch_size"]) == (10, 8)

    (artifact,) = [r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")] or [
        record.artifact for record in records if record.HasField("artifact")
    ]
    assert artifact.type == "model"
    assert set(artifact.aliases) >= {"best", f"epoch-{notes['best_epoch']}"}

    resumed = run("--epochs", "3", "--checkpoint-path", "run.pth", "--resume", "--wandb-name", "other")
    (continued,) = [record.run for record in resumed if record.HasField("run")]
    assert continued.run_id == notes["wandb_id"]
    rows = [items(record.history.item) for record in resumed if record.HasField("history")]
    assert [row["step"] for row in rows if "batch/loss" in row] == [8, 9]


def test_training_goes_on_where_wandb_is_not_installed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pictures")
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/wandb.py").write_text("raise ImportError('no module named wandb')")
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "8", "--epochs", "1"]
    command = [flag for flag in train_command(*flags) if flag != "--no-wandb"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "absent")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert "wandb: not tracking, training goes on: no module named wandb\n" in done.stderr


def test_wandb_is_imported_only_when_used(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pictures")
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/wandb.py").write_text("raise SystemExit('wandb was imported')")
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "8", "--epochs", "1"]
    done = run_train(*flags, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "absent")})
    assert done.returncode == 0, done.stderr


class FailingRun:
    id = "abc"
    dir = "/runs/offline-abc/files"

    def __init__(self) -> None:
        self.calls = 0

    def log(self, values: dict[str, float]) -> None:
        self.calls += 1
        raise ConnectionError("the service is gone\nand more")


def test_an_error_of_wandb_is_told_once_and_ends_tracking() -> None:
    told: list[str] = []
    failing = FailingRun()
    run = WandbRun(failing, told.append)
    assert run.id == "abc"
    for _ in range(3):
        run.log({"x": 1.0})
    run.finish(0)
    assert failing.calls == 1
    assert told == [
        "wandb: stopped tracking, training goes on: the service is gone; "
        "what was logged so far: wandb sync /runs/offline-abc"
    ]
    assert run.id is None


def test_reading_is_shown_without_control_characters_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    assert list(Printer().track(range(3), "reading pictures", 3)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "reading pictures: 3 files\nreading pictures: done\n"
