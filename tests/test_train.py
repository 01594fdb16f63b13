"""train.py as a user runs it: most tests start it as a process and read what it prints and writes."""

import dataclasses
import math
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_origin

import pytest
import torch
from helpers import (
    RunHere,
    assert_refused,
    assert_trees_equal,
    calibrated_again,
    interrupt_train,
    make_folder,
    names_in,
    note_saves,
    run_train,
    small,
    start_train,
    train_command,
)

import hyperfunc as hf
import train
from hyperfunc import checkpoint, data, journal, optim, run, run_file, training, tree
from hyperfunc.config import Config, parse_args, parse_every
from hyperfunc.files import lock_for
from hyperfunc.run import loss_and_accuracy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures enough for 11 batches of 8 and a rest of 2, an epoch."""
    return make_folder(tmp_path_factory.mktemp("pictures"), train=45, test=10)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three epochs that nothing disturbs."""
    path = tmp_path_factory.mktemp("whole")
    done = run_train(*small(folder, "--epochs", "3"), "--checkpoint-path", "whole.pth", cwd=path)
    assert done.returncode == 0, done.stderr
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The reports and epochs in a journal, without what a clock says."""
    rows = [row for row in journal.read_rows(path) if row["kind"] in ("report", "epoch")]
    return [{key: value for key, value in row.items() if key not in (*TIMING, "time")} for row in rows]


TIMING = ("epoch_time", "images_per_second")


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path).tensors


# The command line


def test_the_originals_flags_keep_their_names_and_defaults() -> None:
    config = parse_args([])
    assert (config.batch_size, config.epochs, config.lr, config.weight_decay) == (128, 200, 0.002, 0.0005)
    assert config.checkpoint_path == "./hypernetworks_cifar_gpu.pth"
    assert (config.resume, config.no_wandb, config.wandb_project) == (False, False, "hypernetworks-gpu")
    assert (config.dataset, config.data_dir, config.optimizer) == ("cifar10", "./data", "adam")
    assert (config.model, config.depth, config.width, config.init) == ("hyper", 40, 1, "he")


def test_dashes_and_underscores_are_alike() -> None:
    with_underscores = ["--batch_size", "8", "--weight_decay=0.1", "--no_wandb", "--wandb_name", "a_b"]
    with_dashes = ["--batch-size", "8", "--weight-decay=0.1", "--no-wandb", "--wandb-name", "a_b"]
    assert parse_args(with_underscores) == parse_args(with_dashes)
    assert parse_args(with_dashes).wandb_name == "a_b"


def test_help_groups_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_args(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for group in ("run", "network", "data", "optimization", "checkpoint", "tracking"):
        assert f"\n{group}:\n" in text
    text = re.sub(r"\s+", " ", text)
    assert "30, 60 and 80 % of" in text
    assert "and of what --val-size and --train-size pick (default: 0)" in text
    assert "(default: )" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", "41"], "depth: got 41, expected 6n + 4, for example 40 or 46"),
        (["--depth", "4"], "depth: got 4, expected 6n + 4, for example 10 or 16"),
        (["--depth", "x"], "argument --depth: invalid int value: 'x'"),
        (["--batch-size", "0"], "--batch-size: got 0, expected at least 1"),
        (["--batch-size", "-5"], "--batch-size: got -5, expected at least 1"),
        (["--epochs", "0"], "--epochs: got 0, expected at least 1"),
        (["--epochs", "1" + "0" * 30], "expected at least 1 and at most 1e+06"),
        (["--lr", "-0.1"], "--lr: got -0.1, expected at least 1e-12"),
        (["--lr", "0"], "--lr: got 0.0"),
        (["--lr", "nan"], "--lr: got nan"),
        (["--lr", "inf"], "--lr: got inf"),
        (["--weight-decay", "-1"], "--weight-decay: got -1.0, expected at least 0"),
        (["--width", "0"], "--width: got 0"),
        (["--width", "1000000"], "--width: got 1000000, expected at least 1 and at most 64"),
        (["--z-dim", "0"], "--z-dim: got 0"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--val-size", "-1"], "--val-size: got -1"),
        (["--ema-decay", "0.9"], "--ema-decay: got 0.9 with --calibrate 0, and the running statistics"),
        (["--seed", "9" * 30], "--seed: got 9"),
        (["--dataset", "mnist"], "argument --dataset: invalid choice: 'mnist'"),
        (["--optimizer", "lion"], "argument --optimizer: invalid choice: 'lion'"),
        (["--epoch", "3"], "unknown argument --epoch; did you mean --epochs?"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--checkpoint-every", "0"], "--checkpoint-every: got '0', expected epochs (2), seconds (500s) or batches"),
        (["--checkpoint-every=-1b"], "--checkpoint-every: got '-1b'"),
        (["--checkpoint-every", "1.5s"], "--checkpoint-every: got '1.5s'"),
        (["--checkpoint-every", "5m"], "--checkpoint-every: got '5m'"),
        (["--checkpoint-every", ""], "--checkpoint-every: got ''"),
        (["--checkpoint-every", "9" * 30], "--checkpoint-every: got '999"),
        (["--histogram-every", "-1"], "--histogram-every: got -1, expected at least 0"),
        (["--wandb-mode", "on"], "argument --wandb-mode: invalid choice: 'on'"),
        (["stray"], "unknown argument stray; see --help"),
        (["--checkpoint-path", "x" * 300], "--checkpoint-path: [Errno 36] File name too long"),
        (["--checkpoint-path", "/dev/null"], "--checkpoint-path: got '/dev/null', expected the path of a file"),
        (["two\nlines"], "unknown argument two lines; see --help"),
        (["--checkpoint-path", "/"], "--checkpoint-path: got '/', expected the path of a file"),
        (["--checkpoint-path", "nothing.pth", "--resume"], "--resume: there is no checkpoint at nothing.pth"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        parse_args(flags)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("train.py: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def wrong_values() -> list[tuple[str, str]]:
    """For every flag that takes a value: of a wrong type, sign or size."""
    cases: list[tuple[str, str]] = []
    for item in dataclasses.fields(Config):
        low, high = item.metadata["at_least"], item.metadata["at_most"]
        values: list[str] = []
        if item.type in (int, float):
            values += ["x", "", "nan", "-inf", "0x10", "1,5", "1e999", "-1" + "0" * 40]
        if item.type is int:
            values += ["1.5", "1e3", "9" * 40, *(["0"] if low >= 1 else []), *(["-1"] if low >= 0 else [])]
        if item.type is float and high < math.inf:
            values += ["1e31" if high > 1e20 else "1e9"]
        if get_origin(item.type) is Literal:
            values += ["nonsense", "", "0", "nan"]
        cases += [(f"--{item.name.replace('_', '-')}", value) for value in values]
    return cases


def test_every_flag_refuses_every_wrong_value(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cases = wrong_values()
    assert len(cases) > 200
    for flag, value in cases:
        with pytest.raises(SystemExit) as exit_info:
            parse_args([f"{flag}={value}"])
        captured = capsys.readouterr()
        assert (exit_info.value.code, captured.out) == (2, ""), (flag, value)
        assert captured.err.startswith("train.py: "), (flag, value)
        assert flag.removeprefix("--") in captured.err, (flag, value)
        assert captured.err.count("\n") == 1, (flag, value)
    assert list(tmp_path.iterdir()) == []


# A whole run


def test_a_run_prints_and_saves_what_it_should(folder: Path, tmp_path: Path) -> None:
    done = run_train(*small(folder, "--epochs", "2", "--checkpoint_path", "run.pth"), cwd=tmp_path, drawn=True)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "device       cpu" in out
    assert "79,250 parameters (32 embeddings), compression 0.95 against the 75,010 of the ordinary network" in out
    assert "best model   chosen by accuracy on the test set itself" in out
    reports = re.findall(r"^epoch (\d)/2  batch (\d+)/12  loss [\d.]+  accuracy [\d.]+ %$", out, re.MULTILINE)
    # The last, partial batch of an epoch is trained on and reported.
    assert reports == [(str(e), str(b)) for e in (1, 2) for b in (5, 10, 12)]
    epochs = re.findall(
        r"^epoch (\d)/2  train [\d.]+ %  test ([\d.]+) %  test loss [\d.]+  lr ([\d.]+)  [\d.]+ s  [\d,]+ images/s  "
        r"best ([\d.]+) % \(epoch \d\)  saved run.pth( with a new best)?$",
        out,
        re.MULTILINE,
    )
    assert [epoch for epoch, *_ in epochs] == ["1", "2"]
    assert float(epochs[-1][3]) == max(float(test) for _, test, *_ in epochs)
    assert names_in(tmp_path) == ["run.metrics.jsonl", "run.png", "run.pth"]

    loaded = checkpoint.load(tmp_path / "run.pth")
    assert loaded.notes["classes"] == ["cat", "dog"]
    assert loaded.tensors["state/step"] == 24
    assert [row["epoch"] for row in loaded.notes["progress"]["history"]] == [1, 2]


def test_the_best_model_in_the_checkpoint_has_the_accuracy_that_was_printed(
    folder: Path, tmp_path: Path, run_here: RunHere
) -> None:
    flags = small(folder, "--epochs", "2", "--val-size", "20", "--checkpoint-path", "run.pth", "--lr", "0.01")
    done = run_here(*flags)
    assert done.returncode == 0, done.stderr
    assert "20 held out" in done.stdout
    assert "best model   chosen by accuracy on the held-out pictures" in done.stdout
    loaded = checkpoint.load(tmp_path / "run.pth")
    progress = loaded.notes["progress"]
    row = progress["history"][progress["best_epoch"] - 1]
    assert row["val/accuracy"] == progress["best_accuracy"] == max(r["val/accuracy"] for r in progress["history"])

    model = hf.hyper_resnet(10, num_classes=2)
    params, batch_stats = checkpoint.restore(loaded, "best", model.init(torch.Generator()))
    dataset = data.load_dataset("folder", folder, val_size=20)
    load = data.make_eval_load(data.measure(dataset.train))
    metrics = training.evaluate(
        model, params, batch_stats, [dataset.test], eval_step=training.make_eval_step(model, load=load)
    )
    assert loss_and_accuracy(metrics)[1] == pytest.approx(row["test/accuracy"])


@pytest.mark.parametrize("ema_decay", ["0", "0.5"])
def test_calibrated_statistics_are_evaluated_and_kept_with_the_best(
    folder: Path, tmp_path: Path, run_here: RunHere, ema_decay: str
) -> None:
    """With the mean of the parameters, where one is kept; the training is as it would be without."""
    flags = small(folder, "--epochs", "1", "--seed", "7")
    for name, more in (("running", []), ("run", ["--calibrate", "3", "--ema-decay", ema_decay])):
        done = run_here(*flags, "--checkpoint-path", f"{name}.pth", *more)
        assert done.returncode == 0, done.stderr
    ours, running = (
        {path.replace("/inner/", "/"): leaf for path, leaf in state_of(tmp_path / name).items()}
        for name in ("run.pth", "running.pth")
    )
    trained = {path for path in running if path.startswith("state/")}
    assert_trees_equal({path: ours[path] for path in trained}, {path: running[path] for path in trained})

    model, params, batch_stats = hf.load(tmp_path / "run.pth")
    if float(ema_decay):
        mean, _ = tree.ravel(params)
        last, _ = tree.ravel(checkpoint.restore(checkpoint.load(tmp_path / "run.pth"), "state/params", params))
        assert torch.equal(mean, ours["state/opt_state/mean"])
        assert 0 < (mean - last).norm() < 0.1 * last.norm()
    assert_trees_equal(batch_stats, calibrated_again(tmp_path / "run.pth", folder, 3))
    dataset = data.load_dataset("folder", folder)
    step = training.make_eval_step(model, load=data.make_eval_load(data.measure(dataset.train)))
    loss, _ = loss_and_accuracy(training.evaluate(model, params, batch_stats, [dataset.test], eval_step=step))
    (row,) = checkpoint.load(tmp_path / "run.pth").notes["progress"]["history"]
    assert row["test/loss"] == pytest.approx(loss)


def test_training_is_what_the_library_does_step_by_step(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    done = run_here(*small(folder, "--epochs", "1", "--checkpoint-path", "run.pth", "--seed", "7"))
    assert done.returncode == 0, done.stderr
    dataset = data.load_dataset("folder", folder)
    model = hf.hyper_resnet(10, num_classes=2)
    optimizer = optim.adam(0.002, weight_decay=0.0005)
    state = training.init_state(model, optimizer, data.seeded_generator("init", 7))
    load = data.make_train_load(dataset.train, data.measure(dataset.train))
    step = training.make_train_step(model, optimizer, load=load)
    for batch in data.batches(data.draw_epoch(7, 0, 90), 8):
        state, _ = step(state, batch)
    saved = {path: leaf for path, leaf in state_of(tmp_path / "run.pth").items() if path.startswith("state/")}
    assert_trees_equal(saved, {f"state/{path}": leaf for path, leaf in tree.named_leaves(state).items()})


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    folder: Path, tmp_path: Path, run_here: RunHere
) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        done = run_here(*small(folder, "--epochs", "1", "--seed", seed, "--checkpoint-path", name))
        assert done.returncode == 0, done.stderr
    a, b, c = (state_of(tmp_path / name) for name in "abc")
    assert_trees_equal(a, b)
    assert not torch.equal(a["state/opt_state/m"], c["state/opt_state/m"])


def test_every_kind_of_run_starts(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    variants = [
        ["--model", "plain", "--optimizer", "sgd", "--lr", "0.1", "--schedule", "paper", "--decay", "generated"],
        ["--init", "clipped-normal", "--optimizer", "adamw", "--schedule", "cosine", "--width", "2", "--block", "pre"],
        ["--schedule", "constant", "--shortcut", "conv", "--z-dim", "16", "--hidden-dim", "8", "--train-size", "50"],
    ]
    for variant in variants:
        done = run_here(*small(folder, "--epochs", "1", "--checkpoint-path", "run.pth", *variant), drawn=True)
        assert done.returncode == 0, done.stderr
    # Each run begins anew and keeps what the one before it saved and showed. A picture may come after its run's end.
    while any(name.endswith(".tmp") for name in names_in(tmp_path)):
        time.sleep(0.1)
    assert names_in(tmp_path) == sorted(
        f"run{number}{ending}" for number in ("", ".1", ".2") for ending in (".pth", ".png", ".metrics.jsonl")
    )


@pytest.mark.parametrize(("engine", "code"), [("auto", 0), ("compiled", 1)])
def test_where_a_step_cannot_be_compiled(
    folder: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch, engine: str, code: int
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C++ compiler\nis here")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    monkeypatch.setattr(train, "COMPILE_FROM_STEPS", 1)
    done = run_here(*small(folder, "--epochs", "1", "--checkpoint-path", "run.pth", "--engine", engine))
    message = "the engine compiled does not work here, going on with eager: no C++ compiler is here"
    if code:
        message = "--engine: compiled does not work here, eager may: no C++ compiler is here"
    assert_refused(done, message, code=code)
    assert Path("run.pth").exists() == (code == 0)


def test_a_graph_needs_a_gpu(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    done = run_here(*small(folder, "--engine", "graph"))
    assert_refused(done, "--engine: got graph, which needs a GPU; on the CPU there is eager and compiled")


# Stopping and going on


@pytest.mark.parametrize(
    ("text", "every"),
    [("1", (1, "epochs")), ("020", (20, "epochs")), ("500s", (500, "seconds")), ("100b", (100, "batches"))],
)
def test_how_often_to_save(text: str, every: tuple[int, str]) -> None:
    assert parse_every(text) == every
    assert parse_args(["--checkpoint-every", text]).checkpoint_every == text


@pytest.mark.parametrize(
    ("every", "saves"),
    [
        ("1", [(1, 0), (2, 0), (3, 0)]),
        ("2", [(2, 0), (3, 0)]),
        # Of 12 batches an epoch; the end saves in any case.
        ("5b", [(0, 5), (0, 10), (1, 3), (1, 8), (2, 1), (2, 6), (2, 11), (3, 0)]),
        ("12b", [(0, 12), (1, 12), (2, 12), (3, 0)]),
        ("10000s", [(3, 0)]),
    ],
)
def test_saves_come_as_often_as_asked_for(
    folder: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch, every: str, saves: list[tuple[int, int]]
) -> None:
    found = note_saves(monkeypatch)
    done = run_here(*small(folder, "--epochs", "3", "--checkpoint-path", "run.pth", "--checkpoint-every", every))
    assert done.returncode == 0, done.stderr
    assert found == saves


def test_saves_by_the_clock(folder: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.3
        return now

    found = note_saves(monkeypatch)
    for module in (train, run, run_file):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, perf_counter=time.perf_counter))
    flags = small(folder, "--epochs", "1", "--checkpoint-path", "run.pth", "--checkpoint-every", "1s")
    assert run_here(*flags).returncode == 0
    # The clock is read at the start, after every batch, and after every save.
    assert found == [(0, 4), (0, 8), (0, 12), (1, 0)]


@pytest.mark.parametrize("kept", range(5))
def test_every_checkpoint_of_a_run_leads_to_the_same_end(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """As after a kill that came before the next save: the journal is ahead of the checkpoint."""
    flags = small(folder, "--epochs", "2", "--checkpoint-every", "5b", "--report-every", "3")
    whole = run_here(*flags, "--checkpoint-path", "whole.pth")
    assert whole.returncode == 0, whole.stderr
    save, saves = checkpoint.save, 0

    def save_some(*arguments: Any, **options: Any) -> None:
        nonlocal saves
        saves += 1
        if saves <= kept + 1:
            save(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save_some)
    assert run_here(*flags, "--checkpoint-path", "parts.pth").returncode == 0
    monkeypatch.setattr(checkpoint, "save", save)
    assert int(state_of(tmp_path / "parts.pth")["state/step"]) == min(5 * (kept + 1), 24)
    resumed = run_here(*flags, "--checkpoint-path", "parts.pth", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_trees_equal(state_of(tmp_path / "whole.pth"), state_of(tmp_path / "parts.pth"))
    assert rows_of(tmp_path / "parts.metrics.jsonl") == rows_of(tmp_path / "whole.metrics.jsonl")


def test_a_signal_ends_the_download(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code, output, seconds = interrupt_train(
            "--dataset",
            "cifar10",
            cwd=tmp_path,
            after="downloading ",
            env={"https_proxy": proxy},
            number=signal.SIGTERM,
        )
    assert code == 128 + signal.SIGTERM
    assert seconds < 5
    assert "stopped by SIGTERM before training began; nothing was saved yet" in output


def test_a_signal_ends_the_compilation(folder: Path, tmp_path: Path) -> None:
    flags = small(folder, "--checkpoint-path", "run.pth", "--engine", "compiled")
    for delay in (0.5, 4.0):
        code, output, seconds = interrupt_train(
            *flags, cwd=tmp_path, after="engine       compiled: compiling", number=signal.SIGTERM, delay=delay
        )
        assert (code, "Traceback" in output) == (128 + signal.SIGTERM, False)
        assert seconds < 5 + delay
        assert "stopped by SIGTERM" in output


def test_the_best_model_is_loaded_from_the_checkpoint_alone(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    for name, flags in (("hyper", ["--width", "2", "--block", "pre"]), ("plain", ["--model", "plain"])):
        flags = small(folder, "--epochs", "2", "--checkpoint-path", name, "--lr", "0.01", *flags)
        assert run_here(*flags).returncode == 0
        model, params, batch_stats = hf.load(tmp_path / name)
        loaded = checkpoint.load(tmp_path / name)
        progress = loaded.notes["progress"]
        dataset = data.load_dataset("folder", folder)
        load = data.make_eval_load(data.measure(dataset.train))
        metrics = training.evaluate(
            model, params, batch_stats, [dataset.test], eval_step=training.make_eval_step(model, load=load)
        )
        assert loss_and_accuracy(metrics)[1] == pytest.approx(progress["best_accuracy"])


def test_a_second_signal_ends_at_once_and_leaves_the_old_checkpoint_whole(folder: Path, tmp_path: Path) -> None:
    flags = small(folder, "--epochs", "1", "--checkpoint-path", "run.pth")
    assert run_train(*flags, cwd=tmp_path).returncode == 0
    before = (tmp_path / "run.pth").read_bytes()
    # So deep a network that a step takes seconds, which the first signal would wait for.
    process = start_train(*flags, "--depth", "1204", "--batch-size", "24", cwd=tmp_path)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("engine"))
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert (tmp_path / "run.pth").read_bytes() == before
    checkpoint.load(tmp_path / "run.pth")


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(folder: Path, whole: Path, tmp_path: Path) -> None:
    number = signal.SIGUSR1
    flags = small(folder, "--epochs", "3", "--checkpoint-path", "parts.pth")
    code, output, seconds = interrupt_train(*flags, cwd=tmp_path, after="epoch 2/3  batch 5/", number=number)
    assert code == 128 + number
    assert seconds < 5
    assert "Traceback" not in output
    stopped = re.search(r"stopped by SIGUSR1 at epoch (\d), batch (\d+); saved parts.pth, go on with --resume", output)
    assert stopped, output
    resumed = run_train(*flags, "-r", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed      from parts.pth at epoch {stopped[1]}, batch {stopped[2]}" in resumed.stdout

    assert_trees_equal(state_of(whole / "whole.pth"), state_of(tmp_path / "parts.pth"))
    paths = (whole / "whole.pth", tmp_path / "parts.pth")
    histories = [checkpoint.load(path).notes["progress"]["history"] for path in paths]
    ours, theirs = ([{k: v for k, v in row.items() if k not in TIMING} for row in h] for h in histories)
    assert ours == theirs
    # What was shown has neither a gap nor anything twice, in the middle of a report too.
    assert rows_of(tmp_path / "parts.metrics.jsonl") == rows_of(whole / "whole.metrics.jsonl")


def test_ctrl_c_before_training_says_that_nothing_was_saved(tmp_path: Path) -> None:
    many = make_folder(tmp_path / "many", train=600, test=5, size=64)
    code, output, seconds = interrupt_train(
        *small(many, "--checkpoint-path", "run.pth"), cwd=tmp_path, after="reading "
    )
    assert code == 128 + signal.SIGINT
    assert seconds < 5
    assert "stopped by SIGINT before training began; nothing was saved yet" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run.pth").exists()


def test_a_complete_run_has_nothing_to_resume_but_may_be_prolonged(
    folder: Path, tmp_path: Path, run_here: RunHere
) -> None:
    flags = small(folder, "--checkpoint-path", "run.pth", "--schedule", "constant")
    assert run_here(*flags, "--epochs", "1").returncode == 0
    before = (tmp_path / "run.pth").read_bytes()
    again = run_here(*flags, "--epochs", "1", "--resume")
    assert again.returncode == 0
    assert "nothing to do: the run is complete after 1 epochs" in again.stdout
    assert (tmp_path / "run.pth").read_bytes() == before
    assert run_here(*flags, "--epochs", "2", "--resume").returncode == 0
    whole = run_here(*flags, "--epochs", "2", "--checkpoint-path", "whole.pth")
    assert whole.returncode == 0
    assert_trees_equal(state_of(tmp_path / "run.pth"), state_of(tmp_path / "whole.pth"))


# Bad input


def test_a_checkpoint_of_another_run_is_refused(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    flags = small(folder, "--epochs", "1", "--checkpoint-path", "run.pth")
    assert run_here(*flags).returncode == 0
    before = (tmp_path / "run.pth").read_bytes()
    assert_refused(
        run_here(*flags, "--resume", "--depth", "16", "--lr", "0.1"),
        "--resume: run.pth holds another run: --depth is 16, was 10; --lr is 0.1, was 0.002",
    )
    for classes, message in (
        (("cat", "horse"), "the checkpoint was trained on the classes cat, dog ..., the data now has cat, horse ..."),
        (("cat", "dog"), "the pictures or their labels are not those that run.pth was trained on"),
    ):
        other = make_folder(tmp_path / "-".join(classes), classes=classes)
        assert_refused(run_here(*flags, "--resume", "--data-dir", str(other)), message)
    assert (tmp_path / "run.pth").read_bytes() == before
    checkpoint.save(tmp_path / "run.pth", {"state": {}}, {})
    assert_refused(run_here(*flags, "--resume"), "run.pth was not written by this version of train.py")
    (tmp_path / "run.pth").write_bytes(before[:-1])
    assert_refused(run_here(*flags, "--resume"), "run.pth is damaged")
    torch.save({"net": {}, "acc": 90.0}, tmp_path / "run.pth")
    assert_refused(run_here(*flags, "--resume"), "run.pth is a pickle")


def test_bad_data_is_refused_in_one_line(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    broken = make_folder(tmp_path / "broken")
    picture = broken / "train/cat/0003.png"
    picture.write_bytes(picture.read_bytes()[:60])
    for flags, message in (
        (["--data-dir", str(tmp_path / "nowhere")], "there is no folder"),
        (["--data-dir", str(broken)], "0003.png cannot be read as a picture"),
        (["--batch-size", "91"], "--batch-size: got 91, expected at most the 90 training pictures"),
        (["--train-size", "1"], "of the 2 classes 1 have no picture left among the 1 training pictures"),
        (["--val-size", "90"], "val_size: got 90, expected at least 0 and less than the 90"),
    ):
        assert_refused(run_here(*small(folder, *flags, "--checkpoint-path", "new/run.pth")), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_gpu_is_named(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    done = run_here(*small(folder, "--device", "cuda"))
    assert_refused(done, "--device: got cuda, but torch sees no CUDA device")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpus_that_torch_cannot_use_are_named_before_ranks_are_started(
    device: str, folder: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the driver is too old for it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run_here(*small(folder, "--device", device))
    assert_refused(done, "--device: torch sees 2 GPUs, but can use none; python -m hyperfunc.check_gpu says why")
    assert run_here(*small(folder, "--device", "cpu", "--epochs", "1")).returncode == 0


def test_no_network_for_the_download(tmp_path: Path) -> None:
    closed: dict[str, str] = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = run_train("--dataset", "cifar10", cwd=tmp_path, env=closed)
    assert done.returncode == 1
    downloading, failed = done.stderr.splitlines()
    assert downloading.startswith("downloading https://www.cs.toronto.edu/")
    assert failed.startswith("train.py: could not download https://www.cs.toronto.edu/")
    assert f"put that file at {tmp_path.resolve()}/data/cifar-10-python.tar.gz" in failed
    assert "--data-dir" in failed


def test_an_unwritable_place_is_found_out_before_training(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file/run.pth", "x" * 250):
        done = run_here(*small(folder, "--checkpoint-path", path))
        assert_refused(done, f"--checkpoint-path: nothing can be written at {path}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_second_run_on_the_same_checkpoint_is_refused(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    flags = small(folder, "--checkpoint-path", "run.pth", "--epochs", "1")
    with lock_for(tmp_path / "run.pth"):
        assert_refused(run_here(*flags), "--checkpoint-path: another run is writing to run.pth")
    assert run_here(*flags).returncode == 0


def test_a_reader_that_goes_away_does_not_end_the_run(folder: Path, tmp_path: Path) -> None:
    for name, pipe in (("a.pth", "| head -1"), ("b.pth", "2>&1 | head -1")):
        command = " ".join(train_command(*small(folder, "--checkpoint-path", name, "--epochs", "2")))
        done = subprocess.run(
            f"{command} {pipe}", shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.stdout.count("\n") == 1
        told = "nobody reads the report any more; the run goes on" in done.stderr
        assert told == ("2>" not in pipe)
        assert checkpoint.load(tmp_path / name).notes["progress"]["epoch"] == 2


def test_a_link_into_a_folder_that_is_not_there_yet(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    (tmp_path / "run.pth").symlink_to(tmp_path / "later/real.pth")
    for _ in range(2):
        assert run_here(*small(folder, "--checkpoint-path", "run.pth", "--epochs", "1")).returncode == 0
    checkpoints = [name for name in names_in(tmp_path / "later") if name.endswith(".pth")]
    assert checkpoints == ["real.1.pth", "real.pth"]


def test_a_full_disk_keeps_the_earlier_checkpoint_and_ends_with_1(folder: Path, tmp_path: Path) -> None:
    flags = small(folder, "--checkpoint-path", "run.pth", "--schedule", "constant")
    assert run_train(*flags, "--epochs", "1", cwd=tmp_path, drawn=True).returncode == 0
    before = (tmp_path / "run.pth").read_bytes()

    def fill_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    done = run_train(*flags, "--epochs", "2", "--resume", cwd=tmp_path, preexec_fn=fill_disk)
    assert done.returncode == 1
    unsaved, undrawn = done.stderr.splitlines()
    assert unsaved == "could not save run.pth: [Errno 27] File too large; trying again at the next occasion"
    assert undrawn.startswith("the curves are not drawn: [Errno 27] File too large")
    assert "NOT SAVED" in done.stdout
    assert (tmp_path / "run.pth").read_bytes() == before
    assert names_in(tmp_path) == ["run.metrics.jsonl", "run.png", "run.pth"]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    folder: Path, tmp_path: Path, run_here: RunHere
) -> None:
    flags = small(folder, "--checkpoint-path", "run.pth", "--lr", "1e20", "--optimizer", "sgd")
    done = run_here(*flags, "--epochs", "1", drawn=True)
    assert_refused(done, "the loss is nan at epoch 1, batch ", code=1)
    assert "is not finite; nothing was saved; begin again with an --lr below 1e+20" in done.stderr
    assert names_in(tmp_path) == ["run.metrics.jsonl"]
    events = [row for row in journal.read_rows(tmp_path / "run.metrics.jsonl") if row["kind"] == "event"]
    assert "the loss is nan at epoch 1" in events[0]["reason"]


def test_a_state_that_is_not_finite_is_never_saved(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    # In one step: its loss belongs to the parameters before it, and is finite.
    flags = small(folder, "--checkpoint-path", "run.pth", "--optimizer", "sgd", "--epochs", "1", "--train-size", "8")
    assert run_here(*flags, drawn=True).returncode == 0
    before = (tmp_path / "run.pth").read_bytes()
    done = run_here(*flags, "--lr", "1e30", drawn=True)
    assert_refused(done, "epoch 1, batch 1; ", code=1)
    assert "nothing was saved" in done.stderr
    assert (tmp_path / "run.pth").read_bytes() == before
    assert names_in(tmp_path) == ["run.1.metrics.jsonl", "run.1.png", "run.metrics.jsonl", "run.pth"]


def test_loss_and_accuracy_are_means() -> None:
    metrics = training.Metrics(torch.tensor(6.0), torch.tensor(1), torch.tensor(4))
    assert loss_and_accuracy(metrics) == (1.5, 25.0)


def test_the_speed_counts_pictures_that_a_save_came_upon(tmp_path: Path, run_here: RunHere) -> None:
    folder = make_folder(tmp_path / "pictures", train=60, test=1)
    flags = "--epochs", "1", "--report-every", "50", "--checkpoint-every", "1b", "--checkpoint-path", "run.pth"
    done = run_here(*small(folder, *flags))
    assert done.returncode == 0, done.stderr
    (row,) = (row for row in journal.read_rows(tmp_path / "run.metrics.jsonl") if row["kind"] == "epoch")
    # The time of the epoch holds that of its steps, and of a short evaluation.
    assert 120 <= row["images_per_second"] * row["epoch_time"] < 240
