"""Weights & Biases: offline runs are read back, and servers that misbehave run on loopback."""

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import prepared
import pytest
import torch
from helpers import make_folder, run_train, train_command
from test_console import on_a_terminal
from wandb_server import Kind, wandb_server

import hyperfunc as hf
import train
from hyperfunc import checkpoint, journal, tracking
from hyperfunc.tracking import Tracker

OFFLINE = {"WANDB_MODE": "offline", "WANDB_API_KEY": "", "NETRC": "/dev/null"}

PATIENCE = tracking.PATIENCE_SECONDS


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of three batches an epoch, reported after the second and the third."""
    folder = make_folder(tmp_path_factory.mktemp("pictures"))
    return ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "8", "--report-every", "2"]


def tracked(*flags: str, cwd: Path, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Runs train.py with tracking, in an environment without any other setting for it."""
    return prepared.run(tracked_command(*flags), cwd=cwd, env=clean(env))


def tracked_command(*flags: str) -> list[str]:
    return [flag for flag in train_command("--checkpoint-path", "run.pth", *flags) if flag != "--no-wandb"]


def clean(env: Mapping[str, str]) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**others, **env}


def shown(folder: Path) -> list[dict[str, Any]]:
    """The rows of the journal that are tracked, as they are."""
    rows = journal.read_rows(folder / "run.metrics.jsonl")
    return [as_tracked(row) for row in rows if row["kind"] in ("report", "epoch")]


def as_tracked(row: dict[str, Any]) -> dict[str, Any]:
    leave_out = {"report": ("kind", "time", "epoch", "batch"), "epoch": ("kind", "time")}[row["kind"]]
    return {key: value for key, value in row.items() if key not in leave_out}


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


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The history of an offline run, without what wandb adds and without histograms."""
    (path,) = run.glob("*.wandb")
    rows = [items(record.history.item) for record in offline_records(path) if record.HasField("history")]
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    return [row for row in rows if "batch/loss" in row or "epoch" in row]


def runs_in(folder: Path) -> list[Path]:
    """The folders of all its runs, in the order of their start."""
    return sorted(folder.glob("wandb/*run-*"), key=lambda run: run.stat().st_mtime)


def test_an_offline_run_holds_what_the_journal_holds(tmp_path: Path, flags: list[str]) -> None:
    done = tracked(*flags, "--epochs", "2", "--histogram-every", "2", cwd=tmp_path, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 4  # of the pictures
    assert "offline, as WANDB_MODE says; to send the run later: wandb sync" in done.stdout
    (run,) = runs_in(tmp_path)
    assert rows_of(run) == shown(tmp_path)
    (path,) = run.glob("*.wandb")
    records = list(offline_records(path))

    notes = checkpoint.load(tmp_path / "run.pth").notes["progress"]
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
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert config.keys() >= {"git", "device", "hyperfunc"}

    metrics = {
        record.metric.name or record.metric.glob_name: record.metric for record in records if record.HasField("metric")
    }
    assert metrics["batch/*"].step_metric == "step"
    assert metrics["test/*"].step_metric == metrics["best_accuracy"].step_metric == "epoch"
    assert metrics["test/accuracy"].summary.max

    (artifact,) = [r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")] or [
        record.artifact for record in records if record.HasField("artifact")
    ]
    assert artifact.type == "model"
    assert set(artifact.aliases) >= {"best", f"epoch-{notes['best_epoch']}"}

    histories = [items(record.history.item) for record in records if record.HasField("history")]
    (first, second) = [row for row in histories if any(key.startswith("gradients/") for key in row)]
    assert (first["step"], second["step"]) == (3, 6)
    for name in ("parameters/generator/3x3/w_in", "kernels/blocks.0.conv1.weight", "gradients/embeddings/3x3"):
        assert first[f"{name}/_type"] == "histogram"
    assert sum(first["kernels/blocks.0.conv1.weight/values"]) == 16 * 16 * 9
    assert sum(first["gradients/embeddings/3x3/values"]) == 32 * 64


@pytest.mark.slow
def test_a_run_that_goes_on_has_every_row_once(tmp_path: Path, flags: list[str]) -> None:
    def go(epochs: int, *more: str) -> None:
        resume = ["--resume"] if (tmp_path / "run.pth").exists() else []
        arguments = [
            *flags,
            "--schedule",
            "constant",
            "--epochs",
            str(epochs),
            "--histogram-every",
            "0",
            *resume,
            *more,
        ]
        done = tracked(*arguments, cwd=tmp_path, env=OFFLINE)
        assert done.returncode == 0, done.stderr

    go(1)
    before = (tmp_path / "run.pth").read_bytes()
    go(2)
    # As after a kill: what was done since that checkpoint is done again.
    (tmp_path / "run.pth").write_bytes(before)
    go(3)
    # And an epoch without tracking, which is made up for.
    go(4, "--no-wandb")
    go(5)
    runs = runs_in(tmp_path)
    assert len({run.name.split("-")[-1] for run in runs}) == 1
    timing = ("epoch_time", "images_per_second")
    tracked_rows = [row for run in runs for row in rows_of(run)]
    ours = [{k: v for k, v in row.items() if k not in timing} for row in tracked_rows]
    theirs = [{k: v for k, v in row.items() if k not in timing} for row in shown(tmp_path)]
    assert ours == theirs
    assert [row["epoch"] for row in ours if "epoch" in row] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in ours if "batch/loss" in row] == [2, 3, 5, 6, 8, 9, 11, 12, 14, 15]


def test_nothing_is_missing_after_a_start_that_failed_nor_doubled_after_the_journal_is_lost(
    tmp_path: Path, flags: list[str]
) -> None:
    failed = tracked(*flags, "--epochs", "1", cwd=tmp_path, env=OFFLINE | {"WANDB_MODE": "foo"})
    assert failed.returncode == 0
    assert "wandb: not tracking, training goes on: 1 validation error for Settings mode" in failed.stderr
    assert "'foo'" in failed.stderr
    assert tracked(*flags, "--epochs", "2", "--resume", cwd=tmp_path, env=OFFLINE).returncode == 0
    expected = shown(tmp_path)
    (tmp_path / "run.metrics.jsonl").unlink()
    assert tracked(*flags, "--epochs", "3", "--resume", cwd=tmp_path, env=OFFLINE).returncode == 0
    expected += [row for row in shown(tmp_path) if row not in expected and row["step"] > 6]
    assert [row for run in runs_in(tmp_path) for row in rows_of(run)] == expected
    assert [row["epoch"] for row in expected if "epoch" in row] == [1, 2, 3]


def test_a_run_that_saved_nothing_has_no_best_model_to_send(tmp_path: Path, flags: list[str]) -> None:
    """The file that stands at its path is another's."""
    model = hf.resnet(10)
    hf.save(tmp_path / "run.pth", model, *model.init(torch.Generator()))
    done = tracked(*flags, "--lr", "1e20", "--optimizer", "sgd", cwd=tmp_path, env=OFFLINE)
    assert done.returncode == 1
    (run,) = runs_in(tmp_path)
    records = [record for path in run.glob("*.wandb") for record in offline_records(path)]
    assert records
    assert not any(record.HasField("artifact") or record.request.HasField("log_artifact") for record in records)


def test_the_environment_of_wandb_is_respected(tmp_path: Path, flags: list[str]) -> None:
    env = {
        "WANDB_PROJECT": "other",
        "WANDB_NAME": "name",
        "WANDB_RUN_ID": "id-of-mine",
        "WANDB_DIR": str(tmp_path / "x"),
    }
    (tmp_path / "x").mkdir()
    done = tracked(*flags, "--epochs", "1", cwd=tmp_path, env={**OFFLINE, **env})
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "x").glob("wandb/*run-*-id-of-mine/*.wandb")
    (started,) = [record.run for record in offline_records(path) if record.HasField("run")]
    assert (started.project, started.display_name, started.run_id) == ("other", "name", "id-of-mine")
    assert checkpoint.load(tmp_path / "run.pth").notes["progress"]["wandb_id"] == "id-of-mine"
    for disabled, more in (({"WANDB_MODE": "disabled"}, []), ({}, ["--wandb-mode", "disabled"])):
        done = tracked(*flags, "--epochs", "1", *more, cwd=tmp_path, env=disabled)
        assert done.returncode == 0
        assert "wandb " not in done.stdout + done.stderr
        assert "wandb:" not in done.stdout + done.stderr
        assert not (tmp_path / "wandb").exists()


def test_without_a_key_the_run_is_kept_offline_and_nothing_is_asked(tmp_path: Path, flags: list[str]) -> None:
    unset = [f"--unset={name}" for name in os.environ if name.startswith("WANDB_")]
    program = ["env", *unset, "NETRC=/dev/null", *tracked_command(*flags, "--epochs", "1")]
    code, text = on_a_terminal(program, tmp_path)
    assert code == 0, text
    assert "offline, no key was found; to send the run later: wandb sync" in " ".join(text.split())
    assert len(runs_in(tmp_path)) == 1


@pytest.mark.skipif(shutil.which("unshare") is None, reason="a small file system needs unshare")
def test_a_full_disk_for_its_files_does_not_stop_training(tmp_path: Path, flags: list[str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=16k tmpfs "$0" && exec "$@"', str(small)]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    begin = time.monotonic()
    done = subprocess.run(
        [*mount, *tracked_command(*flags, "--epochs", "1")],
        cwd=tmp_path,
        env=clean({**OFFLINE, "WANDB_DIR": str(small)}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begin < PATIENCE + 15
    assert checkpoint.load(tmp_path / "run.pth").notes["progress"]["epoch"] == 1


@pytest.mark.slow
def test_no_server_can_hold_up_or_end_a_run(tmp_path: Path, flags: list[str]) -> None:
    # All at once: they do nothing but wait.
    begin = time.monotonic()
    processes: dict[Kind, subprocess.Popen[str]] = {}
    kinds: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "works")
    with contextlib.ExitStack() as servers:
        for kind in kinds:
            env = clean(servers.enter_context(wandb_server(kind)))
            (tmp_path / kind).mkdir()
            processes[kind] = subprocess.Popen(
                tracked_command(*flags, "--epochs", "1", "--histogram-every", "0"),
                cwd=tmp_path / kind,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                text=True,
            )
        outcomes = {kind: (process.communicate(timeout=150), process) for kind, process in processes.items()}
        seconds = time.monotonic() - begin
    for kind, ((out, err), process) in outcomes.items():
        assert process.returncode == 0, (kind, err)
        assert "saved run.pth with a new best" in out, kind
        # So many at once may be late with their pictures.
        others = "reading ", "the picture of the curves is not ready"
        lines = [line for line in err.splitlines() if not line.startswith(others)]
        assert len(lines) == 1, kind + "\n" + err
        assert lines[0].startswith("wandb: "), kind
        assert f"to send it later: wandb sync {(tmp_path / kind).resolve()}/wandb/" in lines[0], kind
        # What can be sent is what was shown.
        run = Path(lines[0].split("wandb sync ")[1])
        assert rows_of(run) == shown(tmp_path / kind), kind
    assert seconds < PATIENCE + 40  # of which the four starts of Python on a busy machine are a good part


def test_a_server_that_works_gets_every_row(tmp_path: Path, flags: list[str]) -> None:
    with wandb_server("works") as env:
        done = tracked(*flags, "--epochs", "2", "--histogram-every", "0", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        received = env.requests
    assert "wandb:" not in done.stderr
    sent: list[dict[str, Any]] = []
    for path, content in received:
        if path.endswith("/file_stream"):
            lines = content.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            sent += [json.loads(line) for line in lines]
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in sent]
    assert rows == shown(tmp_path)
    (artifact,) = [c["variables"]["input"] for _, c in received if "CreateArtifact " in c.get("query", "")]
    best_epoch = checkpoint.load(tmp_path / "run.pth").notes["progress"]["best_epoch"]
    assert {alias["alias"] for alias in artifact["aliases"]} >= {"best", f"epoch-{best_epoch}"}


def test_a_signal_is_obeyed_at_once_while_a_server_is_waited_for(tmp_path: Path, flags: list[str]) -> None:
    with wandb_server("silent") as env:
        process = prepared.Process(tracked_command(*flags, "--epochs", "1"), cwd=tmp_path, env=clean(env))
        for line in process.stdout:
            if "saved run.pth" in line:
                break
        begin = time.monotonic()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert time.monotonic() - begin < 5
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after the training was over" in output
    assert checkpoint.load(tmp_path / "run.pth").notes["progress"]["epoch"] == 1


def test_training_goes_on_where_wandb_is_not_installed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pictures")
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/wandb.py").write_text("raise ImportError('no module named wandb')")
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--batch-size", "8", "--epochs", "1"]
    done = subprocess.run(
        tracked_command(*flags),
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


class FakeRun:
    """As much of a run of wandb as a tracker uses."""

    id = "abc"
    dir = "/runs/offline-abc/files"
    offline = True

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def define_metric(self, *_: object, **__: object) -> None:
        """Takes it."""

    def log(self, row: dict[str, Any]) -> None:
        if row.get("fail"):
            raise ConnectionError("the service is gone\nand more")
        while row.get("hang"):
            time.sleep(0.01)
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.summary["exit_code"] = exit_code


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    run = FakeRun()
    fake = SimpleNamespace(
        setup=lambda _settings: None,
        login=lambda **_: True,
        init=lambda **_: run,
        Settings=lambda **_: None,
        Histogram=lambda np_histogram: np_histogram,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return run


StartTracker = Callable[[list[str]], Tracker]


@pytest.fixture
def start() -> StartTracker:
    def start_it(told: list[str]) -> Tracker:
        return Tracker("abc", resume=False, mode="offline", settings={}, say=lambda _: None, warn=told.append)

    return start_it


def test_histograms_are_tracked_once_and_those_that_do_not_fit_end_no_run(
    tmp_path: Path,
    flags: list[str],
    fake_run: FakeRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def go(epochs: int, *more: str) -> int:
        each = ["--train-size", "8", "--histogram-every", "1"]  # one batch an epoch
        return train.main(tracked_command(*flags, *each, "--epochs", str(epochs), *more)[2:])

    assert go(1) == 0
    before = (tmp_path / "run.pth").read_bytes()
    assert go(2, "--resume") == 0
    (tmp_path / "run.pth").write_bytes(before)  # as after a kill: what was done since is done again
    assert go(3, "--resume") == 0
    assert [row["step"] for row in fake_run.rows if any("gradients/" in name for name in row)] == [1, 2, 3]

    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(hf.training, "make_gradients", too_large)
    capsys.readouterr()
    assert go(4, "--resume") == 0
    assert capsys.readouterr().err.count("there are no histograms from here on: too large") == 1


def test_an_error_of_wandb_is_told_once_and_ends_tracking(fake_run: FakeRun, start: StartTracker) -> None:
    told: list[str] = []
    tracker = start(told)
    tracker.log({"step": 1})
    tracker.log({"step": 2, "fail": True})
    tracker.log({"step": 3})
    tracker.finish(0, 10.0)
    assert tracker.stopped
    assert fake_run.rows == [{"step": 1}]
    assert told == [
        "wandb: stopped tracking, training goes on: the service is gone and more; "
        "to send it later: wandb sync /runs/offline-abc"
    ]


@pytest.mark.parametrize("patience", [0.0, 10.0])
def test_an_error_at_the_end_of_the_patience_is_told_once_and_whole(fake_run: FakeRun, patience: float) -> None:
    told: list[str] = []
    telling = threading.Event()

    def tell_slowly(line: str) -> None:
        telling.set()
        time.sleep(0.3)
        told.append(line)

    tracker = Tracker("abc", resume=False, mode="offline", settings={}, say=lambda _: None, warn=tell_slowly)
    tracker.log({"step": 1, "fail": True})
    assert telling.wait(10.0)
    tracker.finish(0, patience)
    assert len(told) == 1
    assert "the service is gone" in told[0]


def test_nothing_but_the_end_waits_and_that_not_for_long(fake_run: FakeRun, start: StartTracker) -> None:
    told: list[str] = []
    tracker = start(told)
    begin = time.monotonic()
    tracker.log({"step": 1, "hang": True})
    tracker.log({"step": 2})
    tracker.summarize({"x": 1.0})
    assert time.monotonic() - begin < 0.3
    tracker.finish(0, 0.5)
    assert 0.4 < time.monotonic() - begin < 3
    assert told == ["wandb: not all has been sent; to send it later: wandb sync /runs/offline-abc"]
    begin = time.monotonic()
    start(told).finish(0, 60.0, give_up=lambda: True)
    assert time.monotonic() - begin < 3


def test_the_end_of_a_run_comes_after_all_its_rows(fake_run: FakeRun, start: StartTracker) -> None:
    told: list[str] = []
    tracker = start(told)
    for step in range(1000):
        tracker.log({"step": step})
    tracker.summarize({"best": 1.0})
    tracker.finish(3, 30.0)
    assert [row["step"] for row in fake_run.rows] == list(range(1000))
    assert fake_run.summary == {"best": 1.0, "exit_code": 3}
    assert told == []


def test_ids_are_wandbs_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first, second = tracking.new_run_id(), tracking.new_run_id()
    assert first != second
    assert len(first) == 8
    assert first.isalnum()
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert tracking.new_run_id() == "mine"
