"""What the benchmarks on several ranks take for granted: which numbers of ranks, and the model of a step's time."""

import math

import pytest
import torch

import hyperfunc as hf
from benchmarks import ranks, scaling
from hyperfunc.sync_norm import synchronize


@pytest.mark.parametrize(
    ("gpus", "expected"), [(0, [1, 2]), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_numbers_of_ranks(gpus: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ranks.parse([]).ranks == expected


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        ranks.parse(["1", "2"])
    assert capsys.readouterr().err.endswith("error: got 2 ranks, but torch sees 1 CUDA devices\n")


def test_the_model_counts_all_that_synchronised_batch_norms_send(monkeypatch: pytest.MonkeyPatch) -> None:
    world = 4
    sent: list[int] = []
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: world)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda buffer: sent.append(buffer.numel() * 4))
    model = synchronize(hf.hyper_resnet(40))
    params, batch_stats = model.init(torch.Generator().manual_seed(0))
    pictures = torch.ones(2, 3, 8, 8)
    torch.func.grad(lambda params: model.apply(params, batch_stats, pictures, train=True)[0].sum())(params)
    assert len(sent) == 2 * scaling.NORMS
    pieces = scaling.Pieces(0.0, 0.0, latency=1.0, bandwidth=1.0, size=0, row=scaling.row_bytes(1))
    seconds = scaling.step_seconds(pieces, world, 8, sync_bn=True)
    latency = (1 + len(sent)) * math.log2(world)
    assert seconds == pytest.approx(latency + 2 * (world - 1) / world * sum(sent))
    assert scaling.step_seconds(pieces, world, 8) == math.log2(world)
