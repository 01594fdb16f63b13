"""How many operations are dispatched: what an eager step costs where launches and not arithmetic are the limit."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._python_dispatch import TorchDispatchMode

import hyperfunc as hf
from hyperfunc import data, optim, training

AT_MOST_FOR_A_STEP = 350


class OperationCounter(TorchDispatchMode):
    """Counts what does work: no views, no detaching, and no empty tensors, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in ("detach", "empty", "_unsafe_view"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def total(self) -> int:
        return sum(self.counts.values())


def operations_of_generation(depth: int, width: int) -> int:
    model = hf.hyper_resnet(depth, width)
    params, _ = model.init(data.seeded_generator("operations"))
    generated = params._replace(primary={})
    cotangents = {name: torch.randn_like(kernel) for name, kernel in model.kernels(params).items()}
    with OperationCounter() as counter:
        vjp(model.kernels, generated)[1](cotangents)
    print(f"\ngeneration of {depth}-{width}, forward and backward: {counter.total()} operations {dict(counter.counts)}")
    return counter.total()


@pytest.mark.parametrize(("width", "at_most"), [(1, 25), (2, 30)])
def test_generation_costs_operations_by_group_of_layers(width: int, at_most: int) -> None:
    """And not by layer, or by unit."""
    assert operations_of_generation(100, width) == operations_of_generation(40, width) <= at_most


def test_a_whole_step_stays_within_its_bound() -> None:
    pixels = torch.zeros(256, 32, 32, 3, dtype=torch.uint8)
    images = data.Images(pixels, torch.arange(256) % 10)
    model = hf.hyper_resnet(40)
    optimizer = optim.adam(optim.multistep(0.002, 200, 391), weight_decay=5e-4)
    state = training.init_state(model, optimizer, data.seeded_generator("operations"))
    load = data.make_train_load(images, data.measure(images))
    step = training.make_train_step(model, optimizer, load=load)
    batch = next(data.batches(data.draw_epoch(0, 0, 256), 128))
    with OperationCounter() as counter:
        step(state, batch)
    print(f"\nthe step of 40-1: {counter.total()} operations {dict(counter.counts)}")
    assert counter.total() <= AT_MOST_FOR_A_STEP


def test_the_counter_counts_loops(generator: torch.Generator) -> None:
    x: Tensor = torch.randn(3, generator=generator)
    with OperationCounter() as counter:
        for _ in range(5):
            x = x.view(3, 1).view(3) + 1
    assert counter.counts == {"add": 5}
