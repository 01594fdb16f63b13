"""Layers that `torch.vmap` has no rule for, mapped: each member is what it is alone."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrizations

import hyperfunc as hf
from hyperfunc import ensembles, optim, training, tree
from hyperfunc.targets import Targets

EXACT = 1e-10


class Recurrent(nn.Module):
    def __init__(self, memory: nn.RNNBase) -> None:
        super().__init__()
        self.memory = memory
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0][:, -1])


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x, self.cell(x))[0])


def normalized() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 4))


def rectified() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.RReLU(), nn.Linear(8, 4))


Make = Callable[[], nn.Module]
CASES: dict[str, tuple[Make, Targets, tuple[int, ...]]] = {
    "lstm": (lambda: Recurrent(nn.LSTM(8, 8, batch_first=True)), nn.LSTM, (3, 5, 8)),
    "gru": (lambda: Recurrent(nn.GRU(8, 8, batch_first=True)), nn.GRU, (3, 5, 8)),
    "rnn": (lambda: Recurrent(nn.RNN(8, 8, batch_first=True)), "memory.weight_ih_l0", (3, 5, 8)),
    "lstm not generated": (lambda: Recurrent(nn.LSTM(8, 8, batch_first=True)), "head.weight", (3, 5, 8)),
    "lstm cell": (Cell, "cell.weight_*", (3, 8)),
    "spectral norm": (normalized, "*original", (3, 8)),
    "rrelu": (rectified, nn.Linear, (3, 8)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, generator: Generator) -> tuple[hf.Model, Tensor]:
    make, targets, shape = CASES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double()
    model = hf.hyperize(module, targets=targets, unit=(8, 8), z_dim=4)
    return model, torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_members_equal(members: hf.Ensemble, ours: object, alone: Sequence[object]) -> None:
    for index, one in enumerate(alone):
        for leaf, other in zip(tree.leaves(members.member(ours, index)), tree.leaves(one), strict=True):
            torch.testing.assert_close(leaf, other, rtol=EXACT, atol=EXACT)


def test_members_are_what_they_are_alone(case: tuple[hf.Model, Tensor], generator: Generator) -> None:
    model, x = case
    members = hf.ensemble(model, 3)
    params, batch_stats = members.init(generator)
    single = [members.member((params, batch_stats), index) for index in range(3)]
    for train in (False, True):
        seed = 1 if train else None
        ours = members.apply(params, batch_stats, x, train=train, seed=seed)
        assert_members_equal(members, ours, [model.apply(*one, x, train=train, seed=seed) for one in single])
    optimizer = optim.sgd(0.1)
    state = ensembles.init_state(members, optimizer, generator)
    step, batch = training.make_train_step(model, optimizer), (x, torch.arange(len(x)))
    after = [step(members.member(state, index), batch)[0] for index in range(3)]
    assert_members_equal(members, ensembles.map_step(step)(state, batch)[0], after)


def test_samples_are_what_they_are_alone(case: tuple[hf.Model, Tensor], generator: Generator) -> None:
    base, x = case
    model = hf.conditional(base, hf.conditions.table(2))
    params, batch_stats = model.init(generator)
    tasks = torch.tensor([0, 1, 0])
    outputs, _ = model.apply_each(params, batch_stats, tasks, x, train=False)
    for index, task in enumerate(tasks):
        alone, _ = model.apply(params, batch_stats, task, x[index : index + 1], train=False)
        torch.testing.assert_close(outputs[index : index + 1], alone, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_a_norm_that_reads_its_count_is_named(kind: type[nn.Module], generator: Generator) -> None:
    layers = [nn.Linear(8, 8), nn.Sequential(kind(8, momentum=None)), nn.Linear(8, 4)]
    model = hf.hyperize(nn.Sequential(*layers), targets=nn.Linear, unit=(8, 8), z_dim=4)
    members = hf.ensemble(model, 2)
    params, batch_stats = members.init(generator)
    x = torch.randn(3, 8, generator=generator)
    message = (
        rf"module: 1.0 \({kind.__name__}\) has momentum=None, .* give it a momentum, such as 0.1, before .* train=False"
    )
    with pytest.raises(ValueError, match=message):
        members.apply(params, batch_stats, x, train=True)
    _, single = model.init(generator)
    with pytest.raises(ValueError, match=message):
        torch.vmap(lambda p: model.apply(p, single, x, train=True))(params)
    outputs, _ = members.apply(params, batch_stats, x, train=False)
    alone, _ = model.apply(*members.member((params, batch_stats), 1), x, train=False)
    torch.testing.assert_close(outputs[1], alone)
