"""Augmenting a batch: an index gather on the device against torchvision's transforms, picture by picture."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.baseline import PictureDataset
from benchmarks.cases import pictures
from benchmarks.measure import compare
from hyperfunc import data

BATCH_SIZE = 128


@pytest.mark.benchmark(group=f"augmentation of {BATCH_SIZE} pictures")
@pytest.mark.parametrize("kind", ["gather", "transforms"])
def test_augmentation(benchmark: BenchmarkFixture, device: torch.device, kind: str) -> None:
    benchmark.extra_info["case"] = kind
    given = pictures(device, BATCH_SIZE)
    load = data.make_train_load(given.images, given.normalization)
    dataset = PictureDataset(given.images.pixels.cpu(), given.images.labels.cpu(), train=True)

    def gather() -> object:
        return load(given.draws[0])

    def transforms() -> object:
        return torch.stack([dataset[index][0] for index in range(BATCH_SIZE)])

    benchmark.pedantic(gather if kind == "gather" else transforms, rounds=20, iterations=1, warmup_rounds=2)
    if kind == "gather":
        benchmark.extra_info |= compare(gather, transforms, rounds=10).noted
