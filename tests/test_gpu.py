"""On a GPU as on the CPU: what is mapped over members or samples, what draws, and train.py with each of its engines."""

import signal
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
from helpers import RunHere, interrupt_train, make_folder, run_train, small
from torch import Generator, Tensor, nn

import hyperfunc as hf
from hyperfunc import capture, checkpoint, conditions, ensembles, optim, training, tree
from hyperfunc.precision import Precision

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
MEMBERS = 3


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Leaf by leaf, to this part of the largest number in a leaf; on the CPU."""
    found, expected = tree.named_leaves(tree.to(ours, "cpu")), tree.named_leaves(tree.to(theirs, "cpu"))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        bound = tolerance * max(1.0, leaf.double().abs().max().item())
        torch.testing.assert_close(found[path], leaf, rtol=0, atol=bound, msg=lambda text, path=path: f"{path}: {text}")


def pictures(count: int = 6, size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, size, size, generator=Generator().manual_seed(1)), torch.arange(count) % 10


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_an_ensemble(train: bool, dtype: torch.dtype, tolerance: float, generator: Generator) -> None:
    members = hf.ensemble(hf.hyper_resnet(10, z_dim=4), MEMBERS)
    params, batch_stats = tree.to(members.init(generator), dtype)
    images = pictures()[0].to(dtype)
    expected = members.apply(params, batch_stats, images, train=train)
    found = members.apply(*tree.to((params, batch_stats, images), CUDA), train=train)
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05), ("fp16", 0.05)])
def test_a_step_of_an_ensemble(precision: Precision, tolerance: float, generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    optimizer = optim.sgd(0.1)
    if precision == "fp16":
        optimizer = optim.scaled(optim.averaged(optimizer), first=2.0**12)  # the largest gradient is near 1
    members = hf.ensemble(model, MEMBERS)
    state = tree.to(ensembles.init_state(members, optimizer, generator), CUDA)
    step = training.make_train_step(model, optimizer, precision=precision)
    batch = tree.to(pictures(), CUDA)
    captured = capture.capture(ensembles.map_step(step), state, batch)
    found, metrics = captured(state, batch)
    for index in range(MEMBERS):
        before, ours = members.member(state, index), members.member(found, index)
        theirs, alone = step(before, batch)
        assert_close(metrics.loss[index], alone.loss, tolerance)
        was, new, expected = (tree.ravel(one.params)[0] for one in (before, ours, theirs))
        # In 16 bits two orders of the same sums differ by so much after a whole way back.
        assert (new - expected).norm() < 5 * tolerance * (expected - was).norm()
        assert_close(ours.batch_stats, theirs.batch_stats, tolerance)


@pytest.mark.parametrize("train", [True, False])
def test_a_condition_for_each_sample(train: bool, generator: Generator) -> None:
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), conditions.table(3))
    params, batch_stats = tree.to(model.init(generator), torch.float64)
    given = params, batch_stats, torch.tensor([0, 2, 1, 2, 0, 1]), pictures()[0].double()
    assert_close(
        model.apply_each(*tree.to(given[:2], CUDA), given[2].to(CUDA), given[3].to(CUDA), train=train),
        model.apply_each(*given, train=train),
        1e-9,
    )


def test_dropout_in_a_graph_is_that_of_its_step(generator: Generator) -> None:
    layers = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)]
    model = hf.hyperize(nn.Sequential(*layers, nn.Linear(16 * 3 * 3, 10)), z_dim=4)
    optimizer = optim.sgd(0.1)
    state = training.init_state(model, optimizer, generator)
    batch = pictures()
    step = training.make_train_step(model, optimizer)
    captured = capture.capture(step, *tree.to((state, batch), CUDA))
    ours, theirs = tree.to(state, CUDA), state
    for _ in range(3):
        ours, metrics = captured(ours, tree.to(batch, CUDA))
        theirs, expected = step(theirs, batch)
        assert_close(metrics, expected, 1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures"), train=30, test=8)


def gpu(folder: Path, *flags: str) -> list[str]:
    return small(folder, "--device", "cuda", "--epochs", "2", *flags)


def losses(path: Path, *names: str) -> list[float]:
    history = checkpoint.load(path).notes["progress"]["history"]
    return [row[name] for row in history for name in names or ["train/loss"]]


@pytest.mark.parametrize(
    "engine",
    [
        "graph",
        pytest.param("compiled", marks=pytest.mark.traced),
        pytest.param("compiled-graph", marks=pytest.mark.traced),
    ],
)
def test_every_engine_trains_as_the_eager_one(
    engine: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "SECONDS", 900)  # the compiler tries out every product, once for each step
    for name in ("eager", engine):
        flags = gpu(folder, "--precision", "fp32", "--engine", name, "--checkpoint-path", name)
        done = run_train(*flags, "--steps-per-replay", "3", "--calibrate", "3", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"engine       {name}, fp32" in done.stdout
    both = (losses(tmp_path / name, "train/loss", "test/loss") for name in (engine, "eager"))
    for ours, theirs in zip(*both, strict=True):
        assert abs(ours - theirs) < 0.05 * theirs


def test_what_cannot_be_compiled_is_still_captured(
    folder: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C compiler is here")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    done = run_here(*gpu(folder, "--checkpoint-path", "run.pth"))
    assert done.returncode == 0, done.stderr
    assert "the engine compiled-graph does not work here, going on with graph: no C compiler is here" in done.stderr
    assert "steps a graph" in done.stdout


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_several_seeds_in_one_graph(precision: Precision, folder: Path, tmp_path: Path) -> None:
    flags = gpu(folder, "--engine", "graph", "--precision", precision, "--val-size", "4", "--calibrate", "2")
    done = run_train(*flags, "--seeds", "0,1", "--checkpoint-path", "both.pth", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_train(*flags, "--seed", "1", "--checkpoint-path", "alone.pth", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for ours, theirs in zip(losses(tmp_path / "both.seed1.pth"), losses(tmp_path / "alone.pth"), strict=True):
        assert abs(ours - theirs) < 0.1 * theirs


def test_a_stopped_run_goes_on(folder: Path, tmp_path: Path) -> None:
    flags = gpu(folder, "--engine", "graph", "--precision", "fp32", "--checkpoint-path", "run")
    code, output, _ = interrupt_train(*flags, cwd=tmp_path, after="epoch 1/2  batch 5/8", number=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, output
    done = run_train(*flags, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_train(*flags[:-1], "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for ours, theirs in zip(losses(tmp_path / "run"), losses(tmp_path / "whole"), strict=True):
        assert abs(ours - theirs) < 0.05 * theirs
