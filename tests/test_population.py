"""Several runs in one step, the runs that a sweep consists of, and train.py --seeds as a user starts it."""

import gc
import itertools
import json
import math
import os
import signal
import socket
import statistics
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from helpers import (
    RunHere,
    assert_refused,
    assert_trees_equal,
    calibrated_again,
    forged,
    interrupt_train,
    make_folder,
    names_in,
    note_saves,
    run_train,
    small,
    start_train,
)

import hyperfunc as hf
import train
from hyperfunc import capture, checkpoint, data, journal, optim, population, sweep, training, tree
from hyperfunc.interrupt import Interrupted

EPOCHS, BATCH, COUNT = 2, 4, 10
MODEL = hf.hyper_resnet(10, num_classes=3, z_dim=4)
# Not Adam, which makes whole steps of rounding where a gradient is next to zero.
OPTIMIZER = optim.sgd(optim.constant(0.05), weight_decay=0.0005)


class Single:
    """A run in float64, with training pictures of its own where asked for."""

    def __init__(self, seed: int, *, own: bool = False) -> None:
        self.seed = seed
        pixels = data.seeded_generator("pixels", seed if own else 0)
        images = torch.randint(256, (COUNT, 8, 8, 3), generator=pixels, dtype=torch.uint8)
        self.images = data.Images(images, torch.arange(COUNT) % 3)
        self.normalization = tree.to(data.measure(self.images), torch.float64)
        params, batch_stats = tree.to(MODEL.init(data.seeded_generator("init", seed)), torch.float64)
        self.state = training.TrainState(torch.tensor(0), params, batch_stats, OPTIMIZER.init(params))
        self.seen: list[float] = []

    def run(self, fails_at: int | None = None, stops_at: int | None = None) -> population.Member:
        """Batches of 4, 4 and 2, and an evaluation at the end of an epoch."""
        steps = 0
        load = data.make_eval_load(self.normalization)
        for epoch in range(EPOCHS):
            for rows in data.batches(data.draw_epoch(self.seed, epoch, COUNT), BATCH):
                try:
                    self.state, metrics = yield rows
                except Interrupted as interrupt:
                    return 128 + interrupt.number
                steps += 1
                if steps == fails_at:
                    raise FloatingPointError(f"seed {self.seed}")
                if steps == stops_at:
                    return 128 + signal.SIGTERM
                self.seen += metrics.loss.tolist()
            found = training.evaluate(MODEL, self.state.params, self.state.batch_stats, [load(self.images)])
            self.seen.append(float(found.loss))
        return 0


def single_step(run: Single) -> training.Step:
    load = data.make_train_load(run.images, run.normalization)
    return training.scan(training.make_train_step(MODEL, OPTIMIZER, load=load), BATCH)


def step_of(runs: list[Single]) -> training.Step:
    load = population.make_load([runs[0].images] * len(runs), [run.normalization for run in runs])
    if runs[1].images.pixels is not runs[0].images.pixels:
        load = population.make_load([run.images for run in runs], [run.normalization for run in runs])
    return training.scan(population.map_side_by_side(training.make_train_step(MODEL, OPTIMIZER, load=load)), BATCH)


def ends_of(members: list[population.Member], step: training.Step, runs: list[Single]) -> list[Any]:
    ends: dict[int, Any] = {}
    population.in_step(dict(enumerate(members)), step, [run.state for run in runs], ends)
    return [ends[index] for index in range(len(members))]


@pytest.mark.parametrize("own", [False, True])
def test_a_member_is_the_single_run_of_its_seed(own: bool) -> None:
    alone = [Single(seed, own=own) for seed in range(3)]
    for run in alone:
        assert ends_of([run.run()], single_step(run), [run]) == [0]
    runs = [Single(seed, own=own) for seed in range(3)]
    assert ends_of([run.run() for run in runs], step_of(runs), runs) == [0, 0, 0]
    for ours, theirs in zip(runs, alone, strict=True):
        assert len(ours.seen) == EPOCHS * 4
        assert ours.seen == pytest.approx(theirs.seen, rel=1e-9)
        for path, leaf in tree.named_leaves(ours.state).items():
            torch.testing.assert_close(leaf, tree.named_leaves(theirs.state)[path], rtol=1e-7, atol=1e-9, msg=path)
    assert not math.isclose(runs[0].seen[0], runs[1].seen[0], rel_tol=1e-3)


def test_a_member_that_fails_leaves_the_others_as_they_are() -> None:
    whole = [Single(seed) for seed in range(3)]
    step = step_of(whole)
    ends_of([run.run() for run in whole], step, whole)
    runs = [Single(seed) for seed in range(3)]
    members = [run.run(fails_at=2 if run.seed == 1 else None) for run in runs]
    ends = ends_of(members, step, runs)
    assert [type(end) for end in ends] == [int, FloatingPointError, int]
    assert str(ends[1]) == "seed 1"
    for index in (0, 2):
        assert runs[index].seen == whole[index].seen
        assert_trees_equal(tree.named_leaves(runs[index].state), tree.named_leaves(whole[index].state))


def test_a_member_that_fails_is_not_kept_in_memory() -> None:
    class Large:
        """Stands for what only the frame of a member holds."""

    found: list[weakref.ref[Large]] = []

    def run(single: Single, *, fails: bool) -> population.Member:
        large = Large()
        found.append(weakref.ref(large))
        code = yield from single.run()
        if fails:
            try:
                raise ValueError(large)
            except ValueError:
                raise FloatingPointError("diverged")  # noqa: B904
        return code

    runs = [Single(seed) for seed in range(2)]
    gc.collect()
    gc.disable()
    try:
        members = [run(one, fails=one.seed == 1) for one in runs]
        ends = ends_of(members, step_of(runs), runs)
        assert (ends[0], str(ends[1])) == (0, "diverged")
        assert found[1]() is None
    finally:
        gc.enable()


def test_all_members_stop_at_the_same_step() -> None:
    runs = [Single(seed) for seed in range(3)]
    members = [run.run(stops_at=2 if run.seed == 1 else None) for run in runs]
    ends = ends_of(members, step_of(runs), runs)
    assert ends == [128 + signal.SIGTERM] * 3
    assert [int(run.state.step) for run in runs] == [2, 2, 2]


def test_an_error_of_the_step_reaches_all_that_are_left_and_takes_no_end_away() -> None:
    runs = [Single(seed) for seed in range(3)]
    step, told, ends = step_of(runs), [], {}

    def noting(run: Single) -> population.Member:
        try:
            return (yield from run.run(fails_at=2 if run.seed == 1 else None))
        except RuntimeError as error:
            told.append((run.seed, str(error)))
            raise

    def breaks(state: Any, rows: Any) -> Any:
        if int(state.step[0]) == 3:
            raise RuntimeError("the device is gone")
        return step(state, rows)

    with pytest.raises(RuntimeError, match="the device is gone"):
        population.in_step({4 + run.seed: noting(run) for run in runs}, breaks, [run.state for run in runs], ends)
    assert told == [(0, "the device is gone"), (2, "the device is gone")]
    assert [(index, str(end)) for index, end in ends.items()] == [(5, "seed 1")]


# Which runs there are, and the table


def test_combinations_and_names() -> None:
    found = sweep.combinations({"seed": [0, 1], "lr": [0.1, 0.2]})
    assert [sweep.name_of(flags) for flags in found] == ["lr0.1.seed0", "lr0.1.seed1", "lr0.2.seed0", "lr0.2.seed1"]
    assert sweep.path_of("a/run.pth", {"batch_size": 8, "seed": 1}) == "a/run.batch-size8.seed1.pth"
    assert sweep.path_of("a/run.1", {"seed": 1}) == "a/run.1.seed1"
    groups = sweep.groups([(flags, None) for flags in found], 2)
    assert [[sweep.name_of(flags) for flags, _ in group] for group in groups] == [
        ["lr0.1.seed0", "lr0.1.seed1"],
        ["lr0.2.seed0", "lr0.2.seed1"],
    ]
    for runs, at_once, world, sizes in (
        (5, 2, 1, [2, 2, 1]),
        (10, 8, 1, [5, 5]),
        (20, 8, 2, [5, 5, 5, 5]),
        (3, 8, 2, [2, 1]),
        (1, 8, 2, [1]),
        (3, 1, 2, [1, 1, 1]),
    ):
        alike = [({"seed": seed}, None) for seed in range(runs)]
        groups = sweep.groups(alike, at_once, world)
        assert [len(group) for group in groups] == sizes
        assert [*itertools.chain(*groups)] == alike
    for rates, runs, world, sizes in ((2, 4, 8, [1] * 8), (2, 8, 4, [4] * 4), (3, 4, 8, [2] * 6), (3, 4, 1, [4] * 3)):
        members = [({"lr": lr, "seed": seed}, None) for lr in range(rates) for seed in range(runs)]
        assert [len(group) for group in sweep.groups(members, 8, world)] == sizes


def test_the_table_has_mean_and_sample_deviation_of_those_that_came_to_an_end(tmp_path: Path) -> None:
    results = [
        sweep.Result({"lr": 0.1, "seed": 0}, "a.pth", 90.0, 91.0, 3),
        sweep.Result({"lr": 0.1, "seed": 1}, "b.pth", 92.0, 92.5, 4),
        sweep.Result({"lr": 0.1, "seed": 2}, "c.pth", None, None, 0, "not finite"),
        sweep.Result({"lr": 9.0, "seed": 0}, "d.pth", 10.0, 10.0, 1),
    ]
    first, second = sweep.lines(results)
    assert (first.n, first.failed, first.flags) == (2, 1, {"lr": 0.1})
    assert first.last == (91.0, pytest.approx(math.sqrt(2)))
    assert first.best == (91.75, pytest.approx(statistics.stdev([91.0, 92.5])))
    assert second.n == 1
    assert math.isnan(second.last[1])
    sweep.write_table(tmp_path / "run.population", results)
    content = json.loads((tmp_path / "run.population.json").read_text())
    assert content["table"][1]["last"] == {"mean": 10.0, "std": None}
    assert content["runs"][2]["failed"] == "not finite"
    shown = (tmp_path / "run.population.md").read_text()
    assert "| 91.00 ± 1.41 %" in shown
    assert "| 10.00 % " in shown


def test_the_table_says_for_each_line_what_its_best_epoch_was_chosen_by() -> None:
    results = [
        sweep.Result({"val_size": size, "seed": 0}, "a.pth", 90.0, 91.0, 3, chosen_by=chosen_by)
        for size, chosen_by in ((0, "the test set"), (8, "others"))
    ]
    header, _, first, second, *rest = sweep.markdown(results).splitlines()
    assert header.endswith("| best epoch chosen by |")
    assert [row.split("|")[-2].strip() for row in (first, second)] == ["the test set", "others"]
    assert "Mean ± sample standard deviation over n runs." in rest
    assert [line.chosen_by for line in sweep.lines(results)] == ["the test set", "others"]


# The program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures for three batches of 8 an epoch."""
    return make_folder(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "--sweep: g.json: cannot be read as JSON: "),
        ("[]", "--sweep: g.json: expected flags with lists of values"),
        ('{"lr": 0.1}', "--sweep: g.json: lr: got 0.1, expected a list of values"),
        ('{"lr": []}', "--sweep: g.json: lr: got [], expected a list of values"),
        ('{"lr": ["a"]}', "--sweep: g.json: argument --lr: invalid float value: 'a'"),
        ('{"lr": [-1]}', "--sweep: g.json: --lr: got -1.0, expected at least 1e-12"),
        ('{"depth": [11]}', "--sweep: g.json: depth: got 11"),
        ('{"optimizer": ["sdg"]}', "--sweep: g.json: argument --optimizer: invalid choice: 'sdg'"),
        ('{"device": ["cpu"]}', "--sweep: g.json: device: not a flag that a sweep can have"),
        ('{"lr": [0.1], "lr": [0.2]}', "--sweep: g.json: cannot be read as JSON: a key is there twice"),
        ('{"lr": [1, 1.0]}', "--sweep: g.json: two of the runs are the same"),
        ('{"seed": [0, 0]}', "--sweep: g.json: seed: got [0, 0], where a value is given twice"),
    ],
)
def test_a_sweep_is_checked_as_the_command_line_is(
    tmp_path: Path, run_here: RunHere, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "g.json").write_text(content)
    refused(run_here, capsys, ["--sweep", "g.json"], message)
    assert names_in(tmp_path) == ["g.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", ""], "--seeds: got an empty text, as of a variable that is not set"),
        (["--seeds", "1", "--sweep="], "--sweep: got an empty text, as of a variable that is not set"),
        (["--seeds", "0,"], "--seeds: got '0,', expected seeds with commas between"),
        (["--seeds", "1,1"], "--seeds: got '1,1', where a seed is given twice"),
        (["--seeds", "1,2", "--seed", "3"], "--seed: got 3 beside other seeds"),
        (["--seeds", "1,2", "--resume"], "--resume: no run has a checkpoint"),
        (["--seeds", "1", "--sync-bn"], "--sync-bn: not with --seeds"),
        (["--seeds", "1", "--wandb-mode", "online"], "--wandb-mode: got online, but"),
        (["--sweep", "none.json"], "--sweep: none.json: cannot be read as JSON: "),
    ],
)
def test_flags_that_do_not_go_together(
    run_here: RunHere, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    refused(run_here, capsys, flags, message)


def test_too_many_runs_are_refused_before_they_are_counted_out(
    tmp_path: Path, run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = [f"{number}e-5" for number in range(1, 401)]
    (tmp_path / "g.json").write_text(json.dumps({"lr": rates, "seed": list(range(400)), "epochs": [1, 2]}))
    message = "--sweep: g.json: asks for 320,000 runs, expected at most 100,000"
    refused(run_here, capsys, ["--sweep", "g.json"], message)
    seeds = ",".join(map(str, range(100_001)))
    refused(run_here, capsys, ["--seeds", seeds], "--seeds: asks for 100,001 runs, expected at most 100,000")


def refused(run_here: RunHere, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(*flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def results(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["runs"]


def first_report(path: Path) -> dict[str, Any]:
    return next(row for row in journal.read_rows(path) if row["kind"] == "report")


def test_seeds_are_the_single_runs_with_checkpoint_journal_and_table(
    folder: Path, tmp_path: Path, run_here: RunHere
) -> None:
    """Held-out pictures are other ones for every seed, and so is the normalization."""
    flags = small(folder, "--epochs", "1", "--val-size", "4", "--report-every", "1", "--calibrate", "2")
    flags += ["--ema-decay", "0.5"]
    done = run_here(*flags, "--seeds", "3,5", "--seeds-per-step", "2", "--checkpoint-path", "run.pth", drawn=True)
    assert done.returncode == 0, done.stderr
    of_runs = [f"run.seed{seed}{ending}" for seed in (3, 5) for ending in (".metrics.jsonl", ".pth")]
    assert names_in(tmp_path) == ["run.population.json", "run.population.md", *of_runs]
    for seed, found in zip((3, 5), results(tmp_path / "run.population.json"), strict=True):
        assert run_here(*flags, "--seed", str(seed), "--checkpoint-path", "one.pth").returncode == 0
        ours, theirs = (first_report(tmp_path / f"{name}.metrics.jsonl") for name in (f"run.seed{seed}", "one"))
        assert ours["batch/loss"] == pytest.approx(theirs["batch/loss"], rel=1e-5)
        assert ours["batch/accuracy"] == theirs["batch/accuracy"]
        path = tmp_path / f"run.seed{seed}.pth"
        assert_trees_equal(hf.load(path)[2], calibrated_again(path, folder, 2, val_size=4))
        progress = checkpoint.load(path).notes["progress"]
        assert found["last"] == progress["history"][-1]["test/accuracy"]
        assert (found["best_epoch"], found["flags"]) == (1, {"seed": seed})


def test_runs_on_other_pictures_are_evaluated_by_one_step_and_each_as_alone(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    start = train.start_engine

    def start_and_keep(members: Any, *rest: Any) -> None:
        start(members, *rest)
        runs.extend(members)

    monkeypatch.setattr(train, "start_engine", start_and_keep)
    flags = small(folder, "--epochs", "1", "--val-size", "4", "--calibrate", "2", "--seeds", "3,5")
    assert run_here(*flags, "--seeds-per-step", "2", "--checkpoint-path", "run.pth").returncode == 0
    first, second = runs
    assert (first.eval_step, first.calibration_step) == (second.eval_step, second.calibration_step)
    assert not torch.equal(first.normalization.mean, second.normalization.mean)
    for run in runs:
        params, batch_stats = run.best
        eval_step = training.make_eval_step(run.model, load=data.make_eval_load(run.normalization))
        metrics = training.evaluate(run.model, params, batch_stats, [run.dataset.test], eval_step=eval_step)
        assert run.progress.history[0]["test/loss"] == pytest.approx(float(metrics.mean_loss), rel=1e-5)


@pytest.mark.parametrize("seeds", [["--seed", "5"], ["--seeds", "3,5", "--seeds-per-step", "2"]])
def test_by_graphs_runs_train_and_evaluate_as_without(
    seeds: list[str], folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = small(folder, *seeds, "--epochs", "2", "--val-size", "5", "--calibrate", "2", "--ema-decay", "0.5")
    flags += ["--eval-batch-size", "6", "--lr", "0.0001"]
    histories: list[Any] = []
    for engine in ("eager", "graph"):
        with monkeypatch.context() as patch:
            recorded.install(patch)
            patch.setattr(train, "choose_engine", lambda _run, _printer, engine=engine: engine)
            done = run_here(*flags, "--checkpoint-path", f"{engine}/run.pth")
        assert done.returncode == 0, done.stderr
        assert (" steps a graph" in done.stdout) == (engine == "graph")
        paths = sorted((tmp_path / engine).glob("*.pth"))
        histories.append([checkpoint.load(path).notes["progress"]["history"] for path in paths])
    eager, graph = histories
    assert len(eager) == len(graph) == len(seeds) // 2
    for ours, theirs in zip(itertools.chain(*graph), itertools.chain(*eager), strict=True):
        for name in ("train/loss", "val/loss", "test/loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_graphs_of_several_steps_end_where_something_is_due(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.install(monkeypatch)
    saved = note_saves(monkeypatch)
    flags = small(folder, "--epochs", "2", "--batch-size", "2", "--steps-per-replay", "2", "--lr", "0.0001")
    flags += ["--checkpoint-every", "4b", "--report-every", "3"]
    shown: list[list[tuple[Any, ...]]] = []
    for engine in ("eager", "graph"):
        monkeypatch.setattr(train, "choose_engine", lambda _run, _printer, engine=engine: engine)
        done = run_here(*flags, "--checkpoint-path", f"{engine}.pth")
        assert done.returncode == 0, done.stderr
        assert ("2 steps a graph" in done.stdout) == (engine == "graph")
        rows = journal.read_rows(tmp_path / f"{engine}.metrics.jsonl")
        shown.append([(row["step"], row["batch"]) for row in rows if row["kind"] == "report"])
    assert len(saved) > 2
    assert saved[len(saved) // 2 :] == saved[: len(saved) // 2]
    assert len(shown[0]) > 2
    assert shown[0] == shown[1]


def test_what_cannot_be_captured_is_still_compiled(
    folder: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.install(monkeypatch)
    compiled: list[object] = []
    before: list[int] = []

    def fail(*_: object) -> None:
        before.append(len(compiled))
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    monkeypatch.setattr(capture, "capture", fail)
    monkeypatch.setattr(train, "choose_engine", lambda *_: "compiled-graph")
    done = run_here(*small(folder, "--epochs", "1", "--checkpoint-path", "run.pth"))
    assert done.returncode == 0, done.stderr
    assert [line.split("here, ")[1] for line in done.stderr.splitlines() if "does not work" in line] == [
        "going on with graph: no graphs here",
        "going on with compiled: no graphs here",
    ]
    assert "engine       compiled, fp32" in done.stdout
    assert before[0] == before[1] < len(compiled)  # compiled-graph, graph, compiled


def test_one_seed_a_step_is_the_single_run_to_the_bit(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    flags = small(folder, "--epochs", "1")
    (tmp_path / "g.json").write_text('{"lr": [0.01], "seed": [4]}')
    assert run_here(*flags, "--sweep", "g.json", "--checkpoint-path", "run.pth").returncode == 0
    assert run_here(*flags, "--seed", "4", "--lr", "0.01", "--checkpoint-path", "one.pth").returncode == 0
    ours, theirs = (checkpoint.load(tmp_path / name).tensors for name in ("run.lr0.01.seed4.pth", "one.pth"))
    assert_trees_equal(ours, theirs)


@pytest.mark.parametrize("held_out", [0, 4])
def test_pictures_are_held_once_for_all_runs_that_share_them(
    folder: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch, held_out: int
) -> None:
    """With their frame, as a step holds them; three runs that hold out pictures of their own have others each."""
    found: list[list[int]] = []
    begin = train.train

    def count(*arguments: Any) -> Any:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dtype == torch.uint8]
        framed = {t.data_ptr(): len(t) for t in tensors if t.shape[1:] == (40, 40, 3)}
        found.append(list(framed.values()))
        return begin(*arguments)

    monkeypatch.setattr(train, "train", count)
    flags = small(folder, "--epochs", "1", "--val-size", str(held_out), "--checkpoint-path", "run.pth")
    assert run_here(*flags, "--seeds", "0,1,2", "--seeds-per-step", "3").returncode == 0
    assert found == [[24 if not held_out else 3 * (24 - held_out)]] * 3


def test_stopped_and_resumed_is_as_if_undisturbed(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    """Three runs in groups of two: when the signal comes the second group has not begun."""
    flags = small(folder, "--epochs", "3", "--seeds", "0,1,2", "--seeds-per-step", "2", "--report-every", "1")
    assert run_here(*flags, "--checkpoint-path", "whole.pth").returncode == 0
    stopped = [*flags, "--checkpoint-path", "run.pth"]
    code, output, _ = interrupt_train(*stopped, cwd=tmp_path, after="seed0  epoch 2/3", number=signal.SIGTERM)
    assert code == 143, output
    notes = [checkpoint.load(tmp_path / f"run.seed{s}.pth").notes["progress"] for s in (0, 1)]
    assert notes[0]["epoch"] == notes[1]["epoch"] >= 1
    assert notes[0]["batch"] == notes[1]["batch"]
    assert not (tmp_path / "run.seed2.pth").exists()
    assert not (tmp_path / "run.population.json").exists()
    done = run_here(*stopped, "--resume")
    assert done.returncode == 0, done.stderr
    for seed in range(3):
        ours, theirs = (checkpoint.load(tmp_path / f"{name}.seed{seed}.pth").tensors for name in ("run", "whole"))
        assert_trees_equal(ours, theirs)
    ours, theirs = (results(tmp_path / f"{name}.population.json") for name in ("run", "whole"))
    assert [row["last"] for row in ours] == [row["last"] for row in theirs]
    again = run_here(*stopped, "--resume")
    assert again.returncode == 0
    assert again.stdout.count("nothing to do") == 3
    assert "; the best epoch was chosen by the test set itself, for want of --val-size." in again.stdout


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_signal_in_an_evaluation_takes_the_calibration_of_no_other_run(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """The first run has done its evaluation after the first epoch, which may be the last, and the other has not."""
    flags = small(folder, "--epochs", str(epochs), "--calibrate", "2", "--seeds", "0,1", "--seeds-per-step", "2")
    assert run_here(*flags, "--checkpoint-path", "whole.pth").returncode == 0
    evaluate = train.evaluate

    def signalled(run: Any, network: Any, images: Any, interrupts: Any) -> Any:
        found = evaluate(run, network, images, interrupts)
        interrupts.received = signal.SIGTERM
        return found

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", signalled)
        assert run_here(*flags, "--checkpoint-path", "run.pth").returncode == 143
    assert [checkpoint.load(tmp_path / f"run.seed{s}.pth").notes["progress"]["epoch"] for s in (0, 1)] == [1, 0]
    resumed = run_here(*flags, "--checkpoint-path", "run.pth", "--resume")
    assert (resumed.returncode, resumed.stdout.count("nothing to do")) == (0, int(epochs == 1))
    for seed in (0, 1):
        ours, theirs = (checkpoint.load(tmp_path / f"{name}.seed{seed}.pth").tensors for name in ("run", "whole"))
        assert_trees_equal(ours, theirs)


def test_a_signal_while_runs_are_set_up_ends_them(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up = train.set_up

    def signalled(config: Any, *rest: Any) -> Any:
        if config.seed == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        return set_up(config, *rest)

    monkeypatch.setattr(train, "set_up", signalled)
    flags = small(
        folder, "--epochs", "1", "--seeds", "0,1,2,3", "--seeds-per-step", "2", "--checkpoint-path", "run.pth"
    )
    assert run_here(*flags).returncode == 143
    assert [path.name for path in sorted(tmp_path.glob("run.seed?.pth"))] == ["run.seed0.pth", "run.seed1.pth"]
    monkeypatch.setattr(train, "set_up", set_up)
    assert run_here(*flags, "--resume").returncode == 0
    assert len(results(tmp_path / "run.population.json")) == 4


def test_runs_that_compute_in_other_precisions_do_not_share_a_step(
    folder: Path, tmp_path: Path, run_here: RunHere
) -> None:
    """As where one of them was begun on a GPU, whose bf16 it keeps."""
    flags = small(folder, "--checkpoint-path", "run.pth", "--seeds", "0,1", "--seeds-per-step", "2")
    assert run_here(*flags, "--epochs", "1").returncode == 0
    forged(tmp_path / "run.seed0.pth", lambda notes: notes["environment"].update(precision="bf16"))
    done = run_here(*flags, "--epochs", "2", "--resume")
    assert done.returncode == 0, done.stderr
    assert "seed0  engine       eager, bf16" in done.stdout
    assert "seed1  engine       eager, fp32" in done.stdout


def test_a_run_that_fails_by_itself_does_not_take_the_end_of_another(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = train.evaluate

    def breaks(run: Any, *rest: Any) -> Any:
        if run.config.seed == 1:
            raise RuntimeError("the device is gone")
        return evaluate(run, *rest)

    monkeypatch.setattr(train, "evaluate", breaks)
    flags = small(folder, "--epochs", "1", "--seeds", "0,1", "--seeds-per-step", "2", "--checkpoint-path", "run.pth")
    assert run_here(*flags).returncode == 1
    assert [row["failed"] for row in results(tmp_path / "run.population.json")] == [
        "",
        "RuntimeError: the device is gone (HYPERFUNC_TRACEBACK=1 shows where)",
    ]


def test_a_run_that_diverges_is_in_the_table_and_the_exit_code(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    (tmp_path / "g.json").write_text('{"lr": [0.002, 1e9], "epochs": [1]}')
    done = run_here(*small(folder, "--sweep", "g.json", "--checkpoint-path", "run.pth"))
    assert done.returncode == 1
    good, bad = results(tmp_path / "run.population.json")
    assert (good["failed"], bad["last"]) == ("", None)
    assert "the loss is" in bad["failed"]
    assert "is not finite" in done.stderr


def test_a_run_that_cannot_begin_leaves_the_others_as_they_are(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    """24 pictures to train on, and another process at the checkpoint of one of the others."""
    (tmp_path / "g.json").write_text('{"batch_size": [64, 8], "seed": [0, 1, 2], "epochs": [1]}')
    flags = small(folder, "--sweep", "g.json", "--seeds-per-step", "3", "--checkpoint-path", "run.pth")
    with hf.files.lock_for(tmp_path / "run.batch-size8.epochs1.seed0.pth"):
        done = run_here(*flags)
    assert done.returncode == 1
    too_large = "--batch-size: got 64, expected at most the 24 training pictures"
    reasons = [row["failed"] for row in results(tmp_path / "run.population.json")]
    assert reasons[:3] == [too_large] * 3
    assert "another run is writing to" in reasons[3]
    assert reasons[4:] == ["", ""]
    assert f"batch-size64.epochs1.seed2  failed: {too_large}\n" in done.stderr
    assert "| batch-size 8, epochs 1  | 2 | 1 " in done.stdout


def test_runs_that_do_not_fit_together_into_memory(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = train.train

    def too_much(run: Any, *rest: Any) -> Any:
        if run.config.seed == 1:
            torch.empty(2**60, dtype=torch.uint8)
        return (yield from begin(run, *rest))

    monkeypatch.setattr(train, "train", too_much)
    flags = small(folder, "--seeds", "0,1,2", "--epochs", "1")
    assert run_here(*flags, "--seeds-per-step", "2", "--checkpoint-path", "two.pth").returncode == 1
    rows = results(tmp_path / "two.population.json")
    assert [row["failed"].partition(": ")[0] for row in rows] == [
        "the device is out of memory, try a smaller --seeds-per-step",
        "the device is out of memory, try a smaller --seeds-per-step",
        "",
    ]
    assert run_here(*flags, "--seeds-per-step", "1", "--checkpoint-path", "one.pth").returncode == 1
    rows = results(tmp_path / "one.population.json")
    assert [row["failed"].partition(": ")[0] for row in rows] == [
        "",
        "the device is out of memory, try a smaller --batch-size",
        "",
    ]


def test_what_can_be_known_before_is_known_before_the_first_run(
    folder: Path, tmp_path: Path, run_here: RunHere
) -> None:
    (tmp_path / "g.json").write_text('{"lr": [0.002], "seed": [0, 1]}')
    flags = small(folder, "--sweep", "g.json", "--checkpoint-path", "run.pth")
    assert run_here(*flags, "--epochs", "1").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = tmp_path / "run.lr0.002.seed1.pth"
    more = [*flags, "--epochs", "2", "--resume"]
    assert_refused(run_here(*more, "--decay", "generated"), "--resume: run.lr0.002.seed0.pth holds another run")
    for wrong, message in (
        (before[second.name][:-1] + b"x", "run.lr0.002.seed1.pth is damaged"),
        (before["run.population.json"], "run.lr0.002.seed1.pth is damaged, or is not a file of hyperfunc"),
    ):
        second.write_bytes(wrong)
        assert_refused(run_here(*more), message)
        second.write_bytes(before[second.name])
    assert_refused(run_here(*flags, "--engine", "graph"), "--engine: got graph, which needs a GPU")
    (tmp_path / "h.json").write_text('{"precision": ["fp32", "tf32"]}')
    assert_refused(run_here(*small(folder, "--sweep", "h.json")), "precision: got tf32, which needs an NVIDIA GPU")
    (tmp_path / "h.json").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_ranks_take_shares_of_the_runs_and_a_signal_ends_all(folder: Path, tmp_path: Path) -> None:
    flags = small(folder, "--epochs", "2", "--seeds", "0,1,2", "--timeout", "10", "--checkpoint-path", "run.pth")
    done = run_train(*flags, "--devices", "cpu:2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Mean ± sample") == 1
    assert run_train(*flags, "--checkpoint-path", "one.pth", cwd=tmp_path).returncode == 0
    for seed in range(3):
        ours, theirs = (checkpoint.load(tmp_path / f"{name}.seed{seed}.pth").tensors for name in ("run", "one"))
        assert_trees_equal(ours, theirs)
    flags = [*flags, "--checkpoint-path", "two.pth", "--epochs", "60", "--devices", "cpu:2"]
    # With a moment for the other rank to begin its own.
    stop = {"after": "seed1  epoch 2/60", "number": signal.SIGTERM, "delay": 1.0}
    code, output, _ = interrupt_train(*flags, cwd=tmp_path, **stop)
    assert code == 143, output
    for seed in (0, 1):
        progress = checkpoint.load(tmp_path / f"two.seed{seed}.pth").notes["progress"]
        assert (0, 0) < (progress["epoch"], progress["batch"]) < (60, 0)


def two_ranks(first: list[str], second: list[str], cwd: Path) -> str:
    """What two ranks write that are started one by one, each with flags of its own, and end with exit code 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    started = [
        start_train(*flags, cwd=cwd, env={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, flags in enumerate((first, second))
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [1, 1], outputs
    return "".join(outputs)


@pytest.mark.slow
def test_ranks_with_other_flags_do_not_begin(folder: Path, tmp_path: Path) -> None:
    flags = small(folder, "--epochs", "1", "--timeout", "10", "--checkpoint-path", "run.pth")
    output = two_ranks([*flags, "--seeds", "0,1"], [*flags, "--seeds", "2,3"], tmp_path)
    assert "train.py: the ranks are not equal: rank 1 differs from rank 0 in --seeds\n" in output
    for name, rates in (("g.json", [0.1, 0.2]), ("h.json", [0.1, 0.3])):
        (tmp_path / name).write_text(json.dumps({"lr": rates}))
    output = two_ranks([*flags, "--sweep", "g.json"], [*flags, "--sweep", "h.json"], tmp_path)
    assert "train.py: the ranks are not equal: rank 1 differs from rank 0 in the runs\n" in output
    assert names_in(tmp_path) == ["g.json", "h.json"]


@pytest.mark.slow
def test_ranks_with_other_pictures_have_no_table_in_common(folder: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", test=7)
    flags = small(folder, "--epochs", "1", "--val-size", "4", "--timeout", "10", "--seeds", "0,1")
    output = two_ranks(flags, [*flags, "--data-dir", str(other)], tmp_path)
    assert "the ranks are not equal: rank 1 differs from rank 0 in the pictures to test of folder; each run" in output
    assert not list(tmp_path.glob("*.population.*"))
    assert len(list(tmp_path.glob("*.seed*.pth"))) == 2


@pytest.mark.slow
def test_a_run_that_diverged_is_not_tried_again(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text('{"lr": [0.002, 1e9], "epochs": [1]}')
    flags = small(folder, "--sweep", "g.json", "--devices", "cpu:2", "--max-restarts", "2")
    done = run_train(*flags, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("lr1000000000.0.epochs1.seed0  failed: ") == 1
    assert done.stdout.count("Mean ± sample") == 1


@pytest.mark.slow
def test_a_signal_ends_a_rank_without_a_run_as_well(folder: Path, tmp_path: Path) -> None:
    flags = small(folder, "--epochs", "500", "--seeds", "0,1", "--seeds-per-step", "2", "--checkpoint-path", "run.pth")
    code, output, seconds = interrupt_train(
        *flags, "--devices", "cpu:2", cwd=tmp_path, after="seed1  epoch 2/500", number=signal.SIGTERM
    )
    assert code == 143, output
    assert seconds < 20
    assert output.count("go on with --resume") == 2


def test_what_is_wrong_for_all_runs_ends_as_a_single_run_does(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = small(folder, "--seeds", "0,1", "--checkpoint-path", "run.pth")
    assert run_here(*flags, "--epochs", "1").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for wrong, message in (
        (["--data-dir", "nowhere"], "train.py: data_dir: there is no folder 'nowhere'"),
        (["--batch-size", "64"], "train.py: --batch-size: got 64, expected at most the 24 training pictures"),
    ):
        done = run_here(*flags, *wrong)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(message)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def load_nothing(*_: Any, **__: Any) -> None:
        raise OSError("there is no network")

    monkeypatch.setattr(data, "load_dataset", load_nothing)
    done = run_here(*flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "train.py: there is no network"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_table_of_earlier_runs_is_kept_as_their_checkpoints_are(
    folder: Path, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = small(folder, "--seeds", "0", "--checkpoint-path", "run.pth")
    assert run_here(*flags, "--epochs", "1").returncode == 0
    old = (tmp_path / "run.population.md").read_bytes()
    done = run_here(*flags, "--epochs", "1")
    assert f"kept a table of earlier runs as {tmp_path}/run.1.population.md" in done.stdout
    tables = [f"run{number}.population.{ending}" for number in (".1", "") for ending in ("json", "md")]
    assert [name for name in names_in(tmp_path) if "population" in name] == tables
    assert (tmp_path / "run.1.population.md").read_bytes() == old
    # The table of what is taken up again is not kept: its checkpoints are about to be written over.
    begin = train.train
    meanwhile: list[bool] = []

    def look(*arguments: Any) -> Any:
        meanwhile.extend((tmp_path / name).exists() for name in tables[2:])
        return begin(*arguments)

    monkeypatch.setattr(train, "train", look)
    assert run_here(*flags, "--epochs", "2", "--resume").returncode == 0
    assert meanwhile == [False, False]
    assert [name for name in names_in(tmp_path) if "population" in name] == tables


def test_the_table_says_which_runs_had_another_schedule(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    flags = small(folder, "--checkpoint-path", "run.pth")
    assert run_here(*flags, "--epochs", "2", "--seeds", "0").returncode == 0
    done = run_here(*flags, "--epochs", "4", "--seeds", "0,1", "--resume")
    assert done.stdout.endswith("\n\nseed 0: up to epoch 2 it had the learning rates of another --epochs.\n")
    assert done.stdout.count("another --epochs") == 1
    assert [row["rescheduled"] for row in results(tmp_path / "run.population.json")] == [2, 0]
    # Also when it is all over, and the checkpoint was written under these flags.
    again = run_here(*flags, "--epochs", "4", "--seeds", "0,1", "--resume")
    assert again.stdout.count("up to epoch 2 it had") == 1


def test_a_table_has_one_writer(folder: Path, tmp_path: Path, run_here: RunHere) -> None:
    with hf.files.lock_for(tmp_path / "run.population"):
        done = run_here(*small(folder, "--seeds", "0,1", "--checkpoint-path", "run.pth"))
    assert_refused(done, "another run is writing to")
