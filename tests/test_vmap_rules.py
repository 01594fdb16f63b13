"""Layers that `torch.vmap` has no rule for, mapped: each member is what it is alone."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import hyperfunc as hf
from hyperfunc import ensembles, optim, training, tree
from hyperfunc.targets import Targets
from hyperfunc.vmap_rules import VmapRules

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


def norm_of(*statistics: int, training: bool = True) -> Callable[[Tensor], Tensor]:
    """A batch norm with as many running statistics, scales and shifts as given, 0 for none."""
    counts = (*statistics, *[16] * (4 - len(statistics)))
    mean, variance, weight, bias = (torch.ones(count) if count else None for count in counts)
    return lambda x: F.batch_norm(x, mean, variance, weight, bias, training)


@pytest.mark.parametrize(
    ("norm", "shape", "message"),
    [
        (norm_of(8), (4, 16), "running_mean should contain 16 elements not 8"),
        (norm_of(16, 8), (4, 16), "running_var should contain 16 elements not 8"),
        (norm_of(16, 16, 8), (4, 16), "weight should contain 16 elements not 8"),
        (norm_of(16, 16, 16, 8), (4, 16), "bias should contain 16 elements not 8"),
        (norm_of(0, 0, training=False), (4, 16), "running_mean must be defined in evaluation mode"),
        (norm_of(), (1, 16), "Expected more than 1 value per channel when training"),
    ],
)
def test_a_batch_norm_that_cannot_be_mapped_is_refused_as_torch_refuses_it(
    norm: Callable[[Tensor], Tensor], shape: tuple[int, ...], message: str
) -> None:
    with VmapRules(), pytest.raises((RuntimeError, ValueError), match=message):
        torch.vmap(norm)(torch.ones(2, *shape))
    with VmapRules(), pytest.raises((RuntimeError, ValueError), match=message):
        norm(torch.ones(shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 16), (4, 16), (2, 16, 3), (2, 16, 3, 3)])
def test_a_batch_norm_is_that_of_torch(shape: tuple[int, ...], training: bool, generator: Generator) -> None:
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)

    def norm(x: Tensor) -> tuple[Tensor, ...]:
        mean, variance = (x.new_ones(16) + 0 * x.sum() for _ in range(2))
        output = F.batch_norm(x, mean, variance, x.new_full((16,), 2), x.new_full((16,), 3), training)
        return output, mean, variance

    with VmapRules():
        found = torch.vmap(norm)(x)
    for index, one in enumerate(x):
        alone = [leaf[index] for leaf in found]
        torch.testing.assert_close(alone, list(norm(one)), rtol=EXACT, atol=EXACT)


class Products(TorchDispatchMode):
    """Notes in which types products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "mm" in name or "convolution" in name or "attention" in name:
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, Tensor)}
        return func(*args, **(kwargs or {}))


class ByKeyword(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(weight=self.weight, input=input, bias=self.bias)


class ByMethod(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return self.bias.addmm(input, self.weight.t())


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


PRODUCTS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(8, 8, 3), (8, 8)),
    "conv2d": (lambda: nn.Conv2d(8, 8, 3, padding="same"), (8, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(8, 8, 3), (8, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(8, 8, 3), (8, 8)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(8, 8, 3), (8, 8, 8)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(8, 8, 3), (8, 4, 4, 4)),
    "linear": (lambda: nn.Linear(8, 8), (8,)),
    "linear by keyword": (lambda: ByKeyword(8, 8), (8,)),
    "linear by method": (lambda: ByMethod(8, 8), (8,)),
    "attention": (lambda: Attention(8, 2, batch_first=True), (5, 8)),
    "attention with dropout": (lambda: Attention(8, 2, dropout=0.5, batch_first=True), (5, 8)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_reaches_every_product_over_members_and_samples(
    case: str, low: torch.dtype, generator: Generator
) -> None:
    make, shape = PRODUCTS[case]
    base = hf.hyperize(make(), targets="*weight", unit=(4, 4), z_dim=4)
    members, tasks = hf.ensemble(base, 2), hf.conditional(base, hf.conditions.table(2))
    x, index = torch.randn(2, *shape, generator=generator), torch.tensor([0, 1])
    several, one = members.init(generator), tasks.init(generator)
    how = {"train": True, "seed": 0} if "dropout" in case else {"train": False}
    calls = {
        "members": lambda: members.apply(*several, x, **how)[0],
        "each member": lambda: members.apply_each(*several, torch.stack([x, x]), **how)[0],
        "samples": lambda: tasks.apply_each(*one, index, x, **how)[0],
        "mapped": lambda: torch.vmap(lambda task: tasks.apply(*one, task, x, **how)[0], randomness="same")(index),
    }
    for name, call in calls.items():
        expected = call()
        with torch.autocast("cpu", low, cache_enabled=False), Products() as products:
            found = call()
        assert products.dtypes == {low}, name
        assert (found.dtype, expected.dtype) == (low, torch.float32), name
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_autocast_leaves_float64_alone_over_members(generator: Generator) -> None:
    members = hf.ensemble(hf.hyperize(nn.Conv2d(4, 4, 3), targets="weight", unit=(4, 4), z_dim=4), 2)
    given = tree.to((*members.init(generator), torch.randn(2, 4, 8, 8, generator=generator)), torch.float64)
    expected, _ = members.apply(*given, train=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = members.apply(*given, train=False)
    assert torch.equal(found, expected)


@pytest.mark.traced
@pytest.mark.parametrize("train", [True, False])
def test_autocast_reaches_the_products_of_a_compiled_call(train: bool, generator: Generator) -> None:
    layers = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    base = hf.hyperize(nn.Sequential(*layers), targets=nn.Conv2d, unit=(4, 4), z_dim=4)
    members, tasks = hf.ensemble(base, 2), hf.conditional(base, hf.conditions.table(2))
    several, one = members.init(generator), tasks.init(generator)

    def together(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return members.apply(*several, x, train=train)[0]

    def each(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return tasks.apply_each(*one, torch.tensor([0, 1]), x, train=train)[0]

    x = torch.randn(2, 4, 8, 8, generator=generator)
    for call in together, each:
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, call(x), rtol=0.05, atol=0.05)


class Padded(nn.Module):
    """A transformer whose evaluation, where a mask hides the last places of a row, is on nested tensors by itself."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.embedding, self.encoder = nn.Embedding(5, 8), nn.TransformerEncoder(layer, 2)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        found = self.encoder(self.embedding(tokens), src_key_padding_mask=padding)
        return found.masked_fill(padding.unsqueeze(2), 0.0).sum(1)


def padded(generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randint(5, (2, 4), generator=generator), torch.tensor([[False, False, False, True], [False] * 4])


@pytest.mark.filterwarnings("ignore")  # of the nested tensors of a network alone
def test_a_padded_transformer_is_evaluated_for_each_member_and_sample(generator: Generator) -> None:
    base = hf.hyperize(Padded().double(), targets=["*linear*weight", "embedding.weight"], unit=(4, 4), z_dim=4)
    members, tasks = hf.ensemble(base, 2), hf.conditional(base, hf.conditions.table(2))
    tokens, padding = padded(generator)
    params, batch_stats = members.init(generator)
    found, _ = members.apply(params, batch_stats, tokens, padding, train=False)
    alone = [base.apply(*members.member((params, batch_stats), i), tokens, padding, train=False)[0] for i in (0, 1)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=EXACT, atol=EXACT)
    params, batch_stats = tasks.init(generator)
    found, _ = tasks.apply_each(params, batch_stats, torch.tensor([1, 0]), tokens, padding, train=False)
    alone = [
        tasks.apply(params, batch_stats, torch.tensor(1 - i), tokens[i : i + 1], padding[i : i + 1], train=False)[0]
        for i in (0, 1)
    ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=EXACT, atol=EXACT)


@pytest.mark.traced
def test_a_padded_transformer_compiles_under_a_seed(generator: Generator) -> None:
    model = hf.hyperize(Padded(), targets=["*linear*weight"], unit=(4, 4), z_dim=4)
    params, batch_stats = model.init(generator)

    def run(params: hf.Params, tokens: Tensor, padding: Tensor) -> Tensor:
        return model.apply(params, batch_stats, tokens, padding, train=True, seed=torch.tensor(1))[0]

    given = params, *padded(generator)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(found, run(*given))
