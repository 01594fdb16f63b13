"""The rival in the benchmarks computes what hyperfunc computes."""

import oracle
import pytest
import torch
from torch import Generator

import hyperfunc as hf
from benchmarks.baseline import LoopedHyperResNet, train_step, with_params_of
from hyperfunc import optim, training, tree


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 2)])
def test_the_baseline_is_the_same_network(generator: Generator, depth: int, width: int) -> None:
    model = hf.hyper_resnet(depth, width)
    optimizer = optim.sgd(0.1, momentum=0.0)
    state = training.init_state(model, optimizer, generator)
    step, rest = state.step, tree.to(state._replace(step=torch.zeros(())), torch.float64)
    state = rest._replace(step=step)
    network = with_params_of(LoopedHyperResNet(depth, width).double(), state.params)
    assert sum(p.numel() for p in network.parameters()) == hf.num_params(state.params)
    for ours, theirs in zip(model.kernels(state.params).values(), network.kernels(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=oracle.EXACT, atol=oracle.EXACT)

    images, labels = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64), torch.arange(4)
    their_optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    loss = train_step(network, their_optimizer, images, labels)
    state, metrics = training.make_train_step(model, optimizer)(state, (images, labels))
    assert metrics.loss.item() / 4 == pytest.approx(loss, abs=oracle.EXACT)
    after = with_params_of(LoopedHyperResNet(depth, width).double(), state.params)
    for (name, ours), theirs in zip(after.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=oracle.EXACT, atol=oracle.EXACT, msg=name)


def test_another_width_is_refused(generator: Generator) -> None:
    params, _ = hf.hyper_resnet(10, 1).init(generator)
    with pytest.raises(ValueError, match="make both of one depth and width"):
        with_params_of(LoopedHyperResNet(10, 2), params)
