"""What a run leaves beside others, and what it goes on from."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ROOT,
    RunHere,
    assert_refused,
    assert_trees_equal,
    forged,
    make_folder,
    names_in,
    run_train,
    small,
    train_command,
)

import hyperfunc as hf
import train
from hyperfunc import checkpoint, journal
from hyperfunc.files import lock_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures for three batches of 8 an epoch."""
    return make_folder(tmp_path_factory.mktemp("pictures"))


def seed_of(path: Path) -> int:
    return checkpoint.load(path).notes["config"]["seed"]


# Files beside each other


def test_an_earlier_run_is_kept_under_a_name_that_nobody_took_meanwhile(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = small(folder, "--epochs", "1", "--checkpoint-path", "k.pth")
    assert run_here(*flags, "--seed", "1").returncode == 0
    begin = train.train

    def another_comes_first(run: Any, *rest: Any) -> Any:
        (tmp_path / "k.1.pth").write_bytes(b"of another run")
        return begin(run, *rest)

    monkeypatch.setattr(train, "train", another_comes_first)
    done = run_here(*flags, "--seed", "2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "k.1.pth").read_bytes() == b"of another run"
    assert [seed_of(tmp_path / name) for name in ("k.pth", "k.2.pth")] == [2, 1]
    assert "as k.2.pth" in done.stdout or f"as {tmp_path}/k.2.pth" in done.stdout


def test_runs_of_one_stem_have_files_of_their_own(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    for seed in (1, 2):
        path = f"run.seed{seed}"
        flags = small(folder, "--epochs", "1", "--seed", str(seed), "--checkpoint-path", path)
        assert run_here(*flags, drawn=True).returncode == 0
    expected = [f"run.seed{seed}{ending}" for seed in (1, 2) for ending in ("", ".metrics.jsonl", ".png")]
    assert names_in(tmp_path) == expected


def test_a_run_that_would_share_its_journal_is_refused(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    with lock_for(tmp_path / "run.metrics.jsonl"):
        done = run_here(*small(folder, "--epochs", "1", "--checkpoint-path", "run.ckpt"))
        assert_refused(done, f"--checkpoint-path: another run is writing to {tmp_path}/run.metrics.jsonl")
    assert names_in(tmp_path) == []


def test_a_name_too_long_for_what_stands_beside_it(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    done = run_here(*small(folder, "--epochs", "1", "--checkpoint-path", "x" * 240))
    assert_refused(done, "--checkpoint-path: nothing can be written at xxx")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("path", ["new/", "new/..", ".."])
def test_a_path_that_names_no_file(folder: Path, tmp_path: Path, run_here: RunHere, path: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(*small(folder, "--checkpoint-path", path))
    assert ended.value.code == 2
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_end_a_run(folder: Path, tmp_path: Path, redirection: str) -> None:
    command = " ".join(train_command(*small(folder, "--epochs", "1", "--checkpoint-path", "run.pth")))
    done = subprocess.run(f"{command} {redirection}", shell=True, cwd=tmp_path, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert checkpoint.load(tmp_path / "run.pth").notes["progress"]["epoch"] == 1


def test_a_folder_that_is_gone_when_a_signal_comes(folder: Path, tmp_path: Path) -> None:
    """The exit code is that of a failure: 143 would say that the run is saved."""
    (tmp_path / "new").mkdir()
    body = (
        "import os, signal, sys, train\n"
        "begin = train.train\n"
        "def spoiled(*arguments):\n"
        "    os.rename('new', 'gone')\n"
        "    open('new', 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return begin(*arguments)\n"
        "train.train = spoiled\n"
        "sys.exit(train.main())"
    )
    flags = train_command(*small(folder, "--checkpoint-path", "new/run.pth"))[2:]
    env = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", body, *flags], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "stopped by SIGTERM at epoch 1, batch 1; this could not be saved" in done.stderr


# What is gone on from


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("progress", "epoch", "1"),
        ("progress", "epoch", -1),
        ("progress", "epoch", 7),
        ("progress", "batch", 99),
        ("progress", "batch", -2),
        ("progress", "batch", 1),
        ("progress", "history", []),
        ("progress", "history", [{"a": 1}]),
        ("progress", "history", [5]),
        ("progress", "seconds", None),
        ("progress", "wandb_id", 3),
        ("progress", "handed_over", [1, "2"]),
        ("progress", "best_accuracy", [1]),
        ("config", "epochs", "1"),
        ("", "progress", [1]),
        ("", "config", 5),
        ("", "classes", 5),
        ("", "data", None),
    ],
)
def test_notes_that_no_run_writes_are_refused(
    folder: Path, tmp_path: Path, run_here: RunHere, done_once: bytes, where: str, name: str, value: Any
) -> None:
    (tmp_path / "run.pth").write_bytes(done_once)
    forged(tmp_path / "run.pth", lambda notes: (notes[where] if where else notes).update({name: value}))
    before = (tmp_path / "run.pth").read_bytes()
    done = run_here(*small(folder, "--epochs", "2", "--checkpoint-path", "run.pth", "--resume"))
    assert_refused(done, "--resume: run.pth was not written by this version of train.py")
    assert (tmp_path / "run.pth").read_bytes() == before


@pytest.mark.parametrize("path", ["state/step", "state/params/primary/head.bias", "epoch_totals/loss"])
def test_a_state_that_no_run_has_is_refused(
    folder: Path, tmp_path: Path, run_here: RunHere, done_once: bytes, path: str
) -> None:
    (tmp_path / "run.pth").write_bytes(done_once)
    leaf = checkpoint.load(tmp_path / "run.pth").tensors[path]
    other = leaf + 1 if path == "state/step" else torch.full_like(leaf, torch.nan)
    forged(tmp_path / "run.pth", lambda _: None, {path: other})
    done = run_here(*small(folder, "--epochs", "2", "--checkpoint-path", "run.pth", "--resume"))
    assert_refused(done, "--resume: run.pth was not written by this version of train.py")


def test_parameters_of_another_kind_are_not_loaded(tmp_path: Path, done_once: bytes) -> None:
    (tmp_path / "run.pth").write_bytes(done_once)
    path = "best/0/primary/head.bias"
    leaf = checkpoint.load(tmp_path / "run.pth").tensors[path]
    forged(tmp_path / "run.pth", lambda _: None, {path: leaf.long()})
    with pytest.raises(ValueError, match=r"best/0/primary/head.bias is int64\[2\], expected float32\[2\]"):
        hf.load(tmp_path / "run.pth")


@pytest.fixture(scope="module")
def done_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a run of one epoch."""
    path = tmp_path_factory.mktemp("once")
    done = run_train(*small(folder, "--epochs", "1"), "--checkpoint-path", "run.pth", cwd=path)
    assert done.returncode == 0, done.stderr
    return (path / "run.pth").read_bytes()


def test_a_run_may_not_end_before_what_it_has_begun(
    folder: Path, tmp_path: Path, run_here: RunHere, done_once: bytes
) -> None:
    (tmp_path / "run.pth").write_bytes(done_once)
    tensors = {"state/step": torch.tensor(4)}
    forged(tmp_path / "run.pth", lambda notes: notes["progress"].update(batch=1), tensors)
    flags = small(folder, "--checkpoint-path", "run.pth", "--resume")
    assert_refused(
        run_here(*flags, "--epochs", "1"), "--epochs: got 1, but the run in run.pth has begun epoch 2 already"
    )
    assert "schedule     now spans 2 epochs, and not 1 as before" in run_here(*flags, "--epochs", "2").stdout


def test_a_run_keeps_its_engine(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = small(folder, "--checkpoint-path", "run.pth")
    assert "engine       eager, fp32" in run_here(*flags, "--epochs", "1").stdout
    # A run of that length would be compiled from its start.
    monkeypatch.setattr(train, "COMPILE_FROM_PICTURES", 1)
    done = run_here(*flags, "--epochs", "2", "--resume")
    assert "engine       eager, fp32" in done.stdout
    forged(tmp_path / "run.pth", lambda notes: notes["progress"].update(engine="compiled"))
    done = run_here(*flags, "--epochs", "3", "--resume", "--engine", "eager")
    assert "the engine is eager and was compiled so far: results may differ by rounding" in done.stderr


def test_auto_keeps_the_precision_that_a_run_has_had(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    flags = small(folder, "--checkpoint-path", "run.pth")
    assert "eager, fp32" in run_here(*flags, "--epochs", "1").stdout
    forged(tmp_path / "run.pth", lambda notes: notes["environment"].update(precision="bf16"))  # as of a GPU
    assert "eager, bf16" in run_here(*flags, "--epochs", "2", "--resume").stdout
    forged(tmp_path / "run.pth", lambda notes: notes["environment"].update(precision="tf32"))
    done = run_here(*flags, "--epochs", "3", "--resume")
    assert "eager, fp32" in done.stdout
    assert "the precision is fp32 and was tf32 so far, which does not work here" in done.stderr


def test_the_scale_of_the_loss_follows_the_ranks(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    """Several ranks take the gradient of a sum over the batch, and so have a scale that is smaller by its length."""
    flags = small(folder, "--precision", "fp16", "--sync-bn", "--train-size", "8", "--checkpoint-path", "run.pth")
    assert run_here(*flags, "--epochs", "1").returncode == 0
    scale = checkpoint.load(tmp_path / "run.pth").tensors["state/opt_state/scale"]
    as_of_two = {"state/opt_state/scale": scale / 8}
    forged(tmp_path / "run.pth", lambda notes: notes["environment"].update(ranks=2), as_of_two)
    assert run_here(*flags, "--epochs", "2", "--resume").returncode == 0
    found = checkpoint.load(tmp_path / "run.pth").tensors["state/opt_state/scale"]
    assert scale / 8 < found <= scale  # it may have been halved, but not yet doubled


def test_a_model_is_loaded_of_a_run_that_was_stopped_in_its_first_epoch(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What there is to load is what was trained so far, and not the parameters that it began with."""

    def stop_at_once(run: Any, interrupts: Any, reporter: Any) -> Any:
        interrupts.received = 15
        return train_on(run, interrupts, reporter)

    train_on = train.train
    monkeypatch.setattr(train, "train", stop_at_once)
    assert run_here(*small(folder, "--checkpoint-path", "run.pth")).returncode == 143
    _, params, _ = hf.load(tmp_path / "run.pth")
    state = checkpoint.load(tmp_path / "run.pth").tensors
    assert torch.equal(params.primary["head.bias"], state["state/params/primary/head.bias"])
    assert params.primary["head.bias"].any()  # it begins at zero


def test_a_stop_where_a_report_is_due_loses_none(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_rows = train.next_rows
    flags = small(folder, "--epochs", "2", "--report-every", "2")  # three batches an epoch: reports after 2, 3, 5 and 6
    assert run_here(*flags, "--checkpoint-path", "whole.pth").returncode == 0

    def stop_after(step: int) -> None:
        def stopping(run: Any, *rest: Any) -> Any:
            if run.steps_done == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)
            return next_rows(run, *rest)

        monkeypatch.setattr(train, "next_rows", stopping)

    for step in (2, 3, 5):
        stop_after(step)
        path = f"run{step}.pth"
        assert run_here(*flags, "--checkpoint-path", path).returncode == 143
        monkeypatch.setattr(train, "next_rows", next_rows)
        assert run_here(*flags, "--checkpoint-path", path, "--resume").returncode == 0
        ours, theirs = (
            [
                (row["step"], row["batch/loss"], row["batch/accuracy"])
                for row in journal.read_rows(tmp_path / f"{name}.metrics.jsonl")
                if row["kind"] == "report"
            ]
            for name in (f"run{step}", "whole")
        )
        assert ours == theirs


def test_a_checkpoint_is_kept_beside_its_journal_after_a_run_that_came_to_nothing(
    folder: Path, tmp_path: Path, run_here: RunHere
) -> None:
    flags = small(folder, "--epochs", "1", "--checkpoint-path", "k.pth")
    assert run_here(*flags, "--seed", "1").returncode == 0
    assert run_here(*flags, "--seed", "2", "--optimizer", "sgd", "--lr", "1e30").returncode == 1
    assert run_here(*flags, "--seed", "3").returncode == 0
    assert [seed_of(tmp_path / name) for name in ("k.pth", "k.1.pth")] == [3, 1]
    rows = journal.read_rows(tmp_path / "k.1.metrics.jsonl")
    assert journal.run_of(rows) == checkpoint.load(tmp_path / "k.1.pth").notes["progress"]["run"]


def test_a_path_that_utf_8_does_not_hold(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    path = os.fsdecode(b"s\xff.pth")
    flags = small(folder, "--epochs", "1", "--checkpoint-path", path)
    assert run_here(*flags).returncode == 0
    printed = subprocess.run(
        [sys.executable, "-m", "hyperfunc.checkpoint", path, "--brief"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=True,
    )
    assert b"s\\udcff.pth" in printed.stdout


def test_a_signal_during_the_calibration_loses_nothing(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    network_to_evaluate = train.network_to_evaluate

    def stop_first(run: Any, draw: Any, interrupts: Any) -> Any:
        interrupts.received = 15
        return network_to_evaluate(run, draw, interrupts)

    flags = small(folder, "--epochs", "1", "--calibrate", "3")
    assert run_here(*flags, "--checkpoint-path", "whole.pth").returncode == 0
    monkeypatch.setattr(train, "network_to_evaluate", stop_first)
    assert run_here(*flags, "--checkpoint-path", "run.pth").returncode == 143
    monkeypatch.setattr(train, "network_to_evaluate", network_to_evaluate)
    done = run_here(*flags, "--checkpoint-path", "run.pth", "--resume")
    assert done.returncode == 0, done.stderr
    ours, theirs = (checkpoint.load(tmp_path / f"{name}.pth").tensors for name in ("run", "whole"))
    assert_trees_equal(ours, theirs)


def test_a_stopped_evaluation_loses_nothing_and_its_epoch_has_no_speed(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = train.evaluate

    def stop_first(run: Any, network: Any, images: Any, interrupts: Any) -> tuple[float, float]:
        interrupts.received = 15
        return evaluate(run, network, images, interrupts)

    monkeypatch.setattr(train, "evaluate", stop_first)
    flags = small(folder, "--epochs", "1", "--checkpoint-path")
    assert run_here(*flags, "run.pth").returncode == 143
    monkeypatch.setattr(train, "evaluate", evaluate)
    done = run_here(*flags, "run.pth", "--resume")
    assert done.returncode == 0, done.stderr
    assert run_here(*flags, "whole.pth").returncode == 0
    ours, theirs = (checkpoint.load(tmp_path / f"{name}.pth").tensors for name in ("run", "whole"))
    assert_trees_equal(ours, theirs)
    assert "images/s" not in done.stdout
    (row,) = [row for row in journal.read_rows(tmp_path / "run.metrics.jsonl") if row["kind"] == "epoch"]
    assert "images_per_second" not in row
