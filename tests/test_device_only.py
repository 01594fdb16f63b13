"""A step does all its work on the device that its arguments are on.

A GPU would tell by a synchronisation, or by an operation between two devices. The meta device does so on any machine:
its tensors have no values that the host could ask for, and they do not mix with those of another device.
"""

from typing import Any

import pytest
import torch
from torch import nn

import hyperfunc as hf
from hyperfunc import data, optim, population, training, tree
from hyperfunc.optim import Optimizer
from hyperfunc.training import TrainState

META = torch.device("meta")


def given() -> tuple[data.Images, data.Normalization]:
    pixels = torch.zeros(20, 32, 32, 3, dtype=torch.uint8, device=META)
    images = data.Images(pixels, torch.zeros(20, dtype=torch.int64, device=META))
    return images, data.Normalization(*torch.zeros(2, 3, device=META))


def rows() -> data.Draw:
    return tree.to(data.draw_epoch(0, 0, 20), META)


def state_of(model: hf.Model, optimizer: Optimizer) -> TrainState:
    return tree.to(training.init_state(model, optimizer, data.seeded_generator("device only")), META)


def assert_on_meta(value: Any) -> None:
    assert {leaf.device for leaf in tree.leaves(value)} == {META}


def dropping_out() -> hf.Model:
    """Its random numbers are a function of the step, which only the device knows."""
    convolutions = nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU()
    module = nn.Sequential(*convolutions, nn.Flatten(), nn.Dropout(0.3), nn.Linear(16 * 7 * 7, 10))
    return hf.hyperize(module, unit=(16, 16), z_dim=4)


ADAM = optim.adam(optim.cosine(0.002, 100, warmup=10), weight_decay=5e-4)
KINDS: dict[str, tuple[hf.Model, Optimizer, dict[str, Any]]] = {
    "adam": (hf.hyper_resnet(10), ADAM, {}),
    "the loss scaled, as for fp16": (hf.hyper_resnet(10), optim.scaled(ADAM), {}),
    "a mean of the parameters": (hf.hyper_resnet(10), optim.averaged(ADAM), {}),
    "decay of generated kernels": (hf.hyper_resnet(10), ADAM, {"decay": "generated", "weight_decay": 1e-4}),
    "other blocks": (hf.hyper_resnet(10, shortcut="conv", block="pre"), ADAM, {}),
    "dropout": (dropping_out(), ADAM, {}),
    "ordinary weights": (hf.resnet(10), ADAM, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_steps(kind: str) -> None:
    model, optimizer, settings = KINDS[kind]
    step = training.make_train_step(model, optimizer, load=data.make_train_load(*given()), **settings)
    steps = training.scan(step, 8)
    state, metrics = steps(state_of(model, optimizer), rows())
    assert_on_meta((state, metrics))
    assert metrics.loss.shape == (3,)


@pytest.mark.parametrize("each", [False, True])
def test_a_step_of_an_objective(each: bool) -> None:
    """A condition, dropout, and all that goes around an optimizer."""
    model = hf.conditional(dropping_out(), hf.conditions.bounded([0, 0], [1, 1]))
    optimizer = optim.scaled(optim.averaged(optim.frozen(optim.clipped(ADAM, 1.0), "model/primary/*")))
    apply = model.apply_each if each else model.apply

    def objective(params: Any, batch_stats: Any, batch: Any, seed: Any) -> Any:
        outputs, batch_stats = apply(params, batch_stats, *batch, train=True, seed=seed)
        loss = outputs.square().mean()
        return loss, (batch_stats, {"loss": loss})

    state = training.init_state(model, optimizer, data.seeded_generator("device only"))
    conditions = torch.rand(8, 2) if each else torch.rand(2)
    batch = tree.to((conditions, torch.zeros(8, 3, 32, 32)), META)
    step = training.make_step(objective, optimizer, seed=1)
    found = step(tree.to(state, META), batch)
    assert_on_meta(found)


def test_gradients() -> None:
    model = hf.hyper_resnet(10)
    gradients = training.make_gradients(model, load=data.make_train_load(*given()))
    assert_on_meta(gradients(state_of(model, ADAM), next(data.batches(rows(), 8))))


def test_steps_of_several_seeds() -> None:
    model = hf.hyper_resnet(10)
    images, normalization = given()
    load = population.make_load([images] * 2, [normalization] * 2)
    steps = training.scan(population.map_side_by_side(training.make_train_step(model, ADAM, load=load)), 8)
    together = population.stack([state_of(model, ADAM)] * 2)
    assert_on_meta(steps(together, population.side_by_side([rows()] * 2)))


def test_an_evaluation() -> None:
    model = hf.hyper_resnet(10)
    images, normalization = given()
    eval_step = training.make_eval_step(model, load=data.make_eval_load(normalization))
    state = state_of(model, ADAM)
    batches = data.batches(images, 8)
    assert_on_meta(training.evaluate(model, state.params, state.batch_stats, batches, eval_step=eval_step))


@pytest.mark.parametrize(
    "host",
    [
        lambda loss: loss.item(),
        lambda loss: loss if loss > 0 else -loss,
        lambda loss: loss + torch.ones(1),
        lambda loss: loss[loss > 0],
    ],
)
def test_what_needs_the_host_would_be_found(host: Any) -> None:
    model = hf.hyper_resnet(10)

    def load(draw: data.Draw) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = data.make_train_load(*given())(draw)
        host(images.mean())
        return images, labels

    step = training.make_train_step(model, ADAM, load=load)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step(state_of(model, ADAM), next(data.batches(rows(), 8)))
