"""Several ranks against one, on gloo: the same program runs on all of them, started by torch's launcher."""

import math
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks_program as program
import torch
from helpers import ROOT, assert_trees_equal

from hyperfunc import data, launch, tree
from hyperfunc.distributed import describe_difference, device_index, digest, errors_once, joined, mean_over_ranks, part


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What so many ranks found."""
    path = tmp_path_factory.mktemp("ranks") / "found.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        code = launch.launch(str(Path(program.__file__)), [str(path)], request.param, max_restarts=0, say=print)
    assert code == 0
    return {"world": request.param, **torch.load(path, weights_only=False)}


@pytest.fixture(scope="module")
def draw() -> data.Draw:
    return next(data.batches(data.draw_epoch(0, 0, 29), 7))


def test_ranks_train_as_one_does(found: dict[str, Any]) -> None:
    alone = program.train_steps(program.ALONE, program.STEPS[found["world"]])
    training = program.Found(*found["training"])
    assert training.losses == pytest.approx(alone.losses, rel=1e-10)
    assert training.correct == alone.correct
    ours, theirs = tree.named_leaves(training.state), tree.named_leaves(alone.state)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        # Some gradients are sums that cancel out: there the rounding is relative to what is added up.
        torch.testing.assert_close(
            ours[path], leaf, rtol=1e-8, atol=1e-12, msg=lambda text, path=path: f"{path}: {text}"
        )


def test_without_sync_every_rank_normalises_by_its_own(found: dict[str, Any], draw: data.Draw) -> None:
    world = found["world"]
    parts = [part(draw, rank, world) for rank in range(world)]
    weights = [len(rows.picture) / len(draw.picture) for rows in parts]
    for name, reference in (("gradients", program.gradients_of), ("statistics", program.statistics_of)):
        references = [reference(program.ALONE, rows) for rows in parts]
        expected = tree.map(lambda *leaves: sum(w * x for w, x in zip(weights, leaves, strict=True)), *references)
        for path, leaf in tree.named_leaves(expected).items():
            torch.testing.assert_close(tree.named_leaves(found[name])[path], leaf, rtol=1e-9, atol=1e-13)


def test_evaluation_counts_every_picture_once(found: dict[str, Any]) -> None:
    expected = program.evaluations(program.ALONE)
    assert [row[2] for row in expected] == list(program.EVALUATED)
    for ours, theirs in zip(found["evaluations"], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_ranks_that_differ_are_named(found: dict[str, Any]) -> None:
    same, leaf, note = found["differences"]
    assert same == ""
    assert leaf == "the ranks are not equal: rank 1 differs from rank 0 in v"
    rank, other = ("1", "0") if found["world"] == 2 else ("0", "1")
    assert note == f"the ranks are not equal: rank {rank} differs from rank {other} in --lr"


def test_rank_0_tells_the_others(found: dict[str, Any]) -> None:
    assert found["flags"] == [True, False]


def test_what_each_gives_is_gathered(found: dict[str, Any]) -> None:
    assert found["gathered"] == [f"of {rank}" for rank in range(found["world"])]


def test_ranks_agree_on_a_place(found: dict[str, Any]) -> None:
    # That all ranks did the same at the same places they have compared themselves.
    assert [order for _, order in found["agreement"]] == [10, 20]


def test_reduction_weighs_by_pictures(found: dict[str, Any]) -> None:
    gradients, averages, metrics = found["reduction"]
    # Rank 0 has three pictures, a sum of gradients of 1 and a mean of 10; a third rank has two, 5 and 50.
    gradient, mean, sums = {2: (1 / 3, 10.0, [1.0, 0, 3]), 3: (6 / 5, 26.0, [6.0, 2, 5])}[found["world"]]
    assert torch.equal(gradients["a"], torch.full((2, 2), gradient))
    assert torch.equal(gradients["b"], torch.tensor([2 * gradient]))
    assert torch.equal(averages["mean"], torch.tensor([mean, mean]))
    assert averages["batches"] == 7
    assert [value.item() for value in metrics] == sums
    assert metrics.total.dtype == torch.int64


def test_means_are_over_ranks(found: dict[str, Any]) -> None:
    mean = 10.0 * (found["world"] - 1) / 2
    assert_trees_equal(found["mean"], {"mean": torch.tensor([mean, mean]), "batches": torch.tensor(7)})


def test_the_reduction_is_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda buffer: calls.append(buffer.shape))
    params, batch_stats = program.a_model(program.ALONE, sync=False).init(torch.Generator().manual_seed(0))
    metrics = tree.map(lambda _: torch.zeros(()), {"loss": torch.zeros(()), "total": torch.zeros(())})
    new, _, _ = mean_over_ranks(4, params, batch_stats, metrics)
    assert calls == [torch.Size([tree.num_params((params, batch_stats)) + 2 + 1])]
    for path, leaf in tree.named_leaves(params).items():
        assert torch.equal(tree.named_leaves(new)[path], leaf / 4)


@pytest.mark.parametrize(("count", "world"), [(12, 3), (7, 2), (7, 3), (1, 3), (0, 2)])
def test_parts_are_all_rows_in_order(count: int, world: int) -> None:
    rows = data.Images(torch.zeros(count, 1, 1, 3, dtype=torch.uint8), torch.arange(count))
    parts = [part(rows, rank, world).labels for rank in range(world)]
    assert torch.cat(parts).tolist() == list(range(count))
    assert {len(labels) for labels in parts} <= {math.floor(count / world), math.ceil(count / world)}


def test_digests_tell_bits_shapes_and_dtypes_apart() -> None:
    leaf = torch.tensor([0.0, 1.0])
    others = [torch.tensor([-0.0, 1.0]), leaf.view(2, 1), leaf.double(), torch.tensor([1.0, 0.0])]
    assert digest(leaf) == digest(leaf.clone())
    assert len({digest(other) for other in [leaf, *others]}) == 5


def test_the_odd_rank_out_is_named() -> None:
    assert (
        describe_difference([{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3}]) == "rank 2 differs from rank 0 in b"
    )
    assert describe_difference([{"a": 1}, {"a": 2}, {"a": 2}]) == "rank 0 differs from rank 1 in a"
    assert describe_difference([{"a": 1}, {"a": 1, "b": 5}]) == "rank 1 differs from rank 0 in b"


@pytest.mark.parametrize(
    ("visible", "by_torch", "expected"), [(1, False, 0), (1, True, 2), (4, False, 2), (4, True, 2), (2, False, 2)]
)
def test_a_rank_that_sees_one_device_alone_takes_it(
    visible: int, by_torch: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if by_torch:
        # Which shows all ranks the same devices: these are then too few.
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert device_index(visible) == expected


def test_ranks_with_runs_of_their_own_form_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    with joined(torch.device("cpu"), 10, lambda: None, print, apart=True) as ranks:
        assert not torch.distributed.is_initialized()
        assert ranks.gather("all there is") == ["all there is"]


def test_a_local_rank_without_a_rank_swallows_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("RANK", raising=False)
    with errors_once():
        print("wrong", file=sys.stderr)
    assert capsys.readouterr().err == "wrong\n"
