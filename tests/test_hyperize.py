"""Any module as primary network: a hyperized resnet18 of torchvision under every transformation, and odd modules."""

# torch.compile cannot trace the evaluation of an annotation, and functions are defined inside of what it traces.
from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from helpers import assert_trees_equal, of_jvp
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import hyperfunc as hf
from hyperfunc import capture, optim, training, tree

of_pool = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
"""vmap has no rule for a part of adaptive pooling over tensors in channels_last, and loops."""


class Problem(NamedTuple):
    model: hf.Model
    params: hf.Params
    batch_stats: hf.BatchStats
    images: Tensor
    labels: Tensor

    def loss(self, params: hf.Params, train: bool = True) -> Tensor:
        logits, _ = self.model.apply(params, self.batch_stats, self.images, train=train)
        return F.cross_entropy(logits, self.labels)

    def with_row(self, row: Tensor, train: bool) -> Tensor:
        """Two logits as a function of one embedding."""
        z = self.params.embeddings["1x1"]
        embeddings = {**self.params.embeddings, "1x1": torch.cat([row[None], z[1:]])}
        params = self.params._replace(embeddings=embeddings)
        return self.model.apply(params, self.batch_stats, self.images, train=train)[0][0, :2]


@pytest.fixture(scope="module")
def module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torchvision.models.resnet18(num_classes=10)


Pair = tuple[hf.Params, hf.BatchStats]


def in_dtype(pair: Pair, dtype: torch.dtype) -> Pair:
    """Counts of batches stay whole numbers."""
    return tree.map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, pair)


@pytest.fixture(scope="module")
def problem(module: nn.Module) -> Problem:
    """In float64, so that two ways to compute the same can be told from two that are not the same."""
    generator = Generator().manual_seed(0)
    model = hf.hyperize(module, z_dim=16, hidden_dim=8)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    params, batch_stats = in_dtype(model.init(generator), torch.float64)
    images = images.double()
    # Statistics that change the values in evaluation too.
    _, batch_stats = model.apply(params, batch_stats, images, train=True)
    return Problem(model, params, batch_stats, images, torch.tensor([3, 7]))


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-8) -> None:
    """Leaf by leaf, to this part of a leaf's norm."""
    found, expected = tree.named_leaves(ours), tree.named_leaves(theirs)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        difference = (leaf - expected[path]).double().norm().item()
        assert difference <= tolerance * expected[path].double().norm().item(), path


def test_the_module_stays_as_it_is(module: nn.Module) -> None:
    module.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = hf.hyperize(module)
    params, batch_stats = model.init(Generator().manual_seed(0))
    model.apply(params, batch_stats, torch.ones(2, 3, 32, 32), train=True)
    assert_trees_equal(dict(module.state_dict()), before)
    assert not module.training
    assert torch.equal(params.primary["conv1.weight"], before["conv1.weight"])
    assert params.primary["conv1.weight"] is not module.get_parameter("conv1.weight")
    assert all(p.device.type == "cpu" and p.grad is None for p in module.parameters())
    module.train()


@pytest.mark.parametrize("train", [True, False])
def test_apply_is_the_module_with_the_generated_weights(module: nn.Module, problem: Problem, train: bool) -> None:
    own = torchvision.models.resnet18(num_classes=10).double()
    own.load_state_dict({**problem.model.weights(problem.params), **problem.batch_stats})
    logits, batch_stats = problem.model.apply(problem.params, problem.batch_stats, problem.images, train=train)
    assert_close(logits, own.train(train)(problem.images))
    assert_close(batch_stats, dict(own.named_buffers()))


@of_jvp
def test_directional_derivatives_agree_forwards_and_backwards(problem: Problem) -> None:
    generator = Generator().manual_seed(1)
    direction = tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype), problem.params)
    gradient = torch.func.grad(problem.loss)(problem.params)
    along = sum((g * d).sum() for g, d in zip(tree.leaves(gradient), tree.leaves(direction), strict=True))
    slope = torch.func.jvp(problem.loss, (problem.params,), (direction,))[1]
    assert_close(along, slope)


@of_jvp
@of_pool
@pytest.mark.parametrize("train", [True, False])
def test_jacobians_agree_forwards_and_backwards(problem: Problem, train: bool) -> None:
    row = problem.params.embeddings["1x1"][0]
    backwards = torch.func.jacrev(lambda row: problem.with_row(row, train))(row)
    assert backwards.shape == (2, 16)
    assert backwards.abs().min() > 0
    assert_close(
        backwards[:, 3],
        torch.func.jvp(lambda row: problem.with_row(row, train), (row,), (F.one_hot(torch.tensor(3), 16).double(),))[1],
    )


@of_pool
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("part", ["embeddings", "all"])
def test_mapped_over_parameters_each_member_is_what_it_is_alone(problem: Problem, train: bool, part: str) -> None:
    parts = {"embeddings": problem.params.embeddings} if part == "embeddings" else problem.params._asdict()
    members = [parts, tree.map(lambda leaf: leaf * 1.1, parts)]

    def run(parts: dict[str, Any]) -> tuple[Tensor, hf.BatchStats]:
        # Statistics are not mapped: each member starts from the same, and gets its own.
        params = problem.params._replace(**parts)
        return problem.model.apply(params, problem.batch_stats, problem.images, train=train)

    mapped = torch.vmap(run)(tree.map(lambda *leaves: torch.stack(leaves), *members))
    assert_close(mapped, tree.map(lambda *leaves: torch.stack(leaves), *map(run, members)))


@of_pool
def test_gradients_map_over_embeddings(problem: Problem) -> None:
    def loss(embeddings: dict[str, Tensor]) -> Tensor:
        return problem.loss(problem.params._replace(embeddings=embeddings))

    members = [problem.params.embeddings, tree.map(lambda leaf: leaf * 0.9, problem.params.embeddings)]
    mapped = torch.vmap(torch.func.grad(loss))(tree.map(lambda *leaves: torch.stack(leaves), *members))
    assert_close(mapped, tree.map(lambda *leaves: torch.stack(leaves), *map(torch.func.grad(loss), members)))


def test_autocast_computes_in_bfloat16_and_stays_near(problem: Problem) -> None:
    params, batch_stats = in_dtype((problem.params, problem.batch_stats), torch.float32)
    images = problem.images.float()

    def loss(params: hf.Params) -> tuple[Tensor, Tensor]:
        logits, _ = problem.model.apply(params, batch_stats, images, train=False)
        return F.cross_entropy(logits.float(), problem.labels), logits

    exact, expected = torch.func.grad(loss, has_aux=True)(params)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, logits = torch.func.grad(loss, has_aux=True)(params)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()
    for ours, theirs in zip(tree.leaves(rounded.embeddings), tree.leaves(exact.embeddings), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.3 * theirs.norm()


def test_autocast_leaves_alone_what_it_does_not_convert(generator: Generator) -> None:
    norm, bilinear = nn.GroupNorm(4, 16), nn.Bilinear(16, 16, 16)
    model = hf.hyperize(Pairs(norm, bilinear), targets="*", z_dim=8)
    params, batch_stats = model.init(generator)
    x = torch.randn(3, 16, generator=generator)
    expected, _ = model.apply(params, batch_stats, x, train=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model.apply(params, batch_stats, x, train=True)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of its own parts
def test_compiled_in_one_graph_equals_eager(problem: Problem) -> None:
    def run(params: hf.Params, batch_stats: hf.BatchStats, images: Tensor) -> tuple[hf.Params, hf.BatchStats]:
        def loss(params: hf.Params) -> tuple[Tensor, hf.BatchStats]:
            logits, stats = problem.model.apply(params, batch_stats, images, train=True)
            return F.cross_entropy(logits, problem.labels), stats

        return torch.func.grad(loss, has_aux=True)(params)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    arguments = (problem.params, problem.batch_stats, problem.images)
    assert_close(compiled(*arguments), run(*arguments))


def step_of(problem: Problem) -> tuple[training.Step, training.TrainState, tuple[Tensor, Tensor]]:
    optimizer = optim.sgd(optim.constant(0.01), momentum=0.0)
    state = training.TrainState(
        torch.zeros((), dtype=torch.int64), problem.params, problem.batch_stats, optimizer.init(problem.params)
    )
    return training.make_train_step(problem.model, optimizer), state, (problem.images, problem.labels)


def test_a_step_descends_the_gradient_and_passes_through_capture(problem: Problem) -> None:
    step, state, batch = step_of(problem)
    after, metrics = capture.capture(step, state, batch)(state, batch)
    gradient = torch.func.grad(problem.loss)(problem.params)
    assert_close(after.params, tree.map(lambda leaf, slope: leaf - 0.01 * slope, problem.params, gradient))
    assert_close(metrics.loss, 2 * problem.loss(problem.params))
    assert_close(after.batch_stats, problem.model.apply(problem.params, state.batch_stats, batch[0], train=True)[1])


@pytest.mark.gpu
def test_a_captured_step_equals_an_eager_one(problem: Problem) -> None:
    step, state, batch = step_of(problem)
    state, batch = tree.to(state, "cuda"), tree.to(batch, "cuda")
    captured = capture.capture(step, state, batch)
    ours, theirs = tree.clone(captured(state, batch)), step(state, batch)
    assert_close(ours, theirs, tolerance=1e-6)


class Pairs(nn.Module):
    def __init__(self, norm: nn.Module, bilinear: nn.Module) -> None:
        super().__init__()
        self.norm, self.bilinear = norm, bilinear

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, self.norm(x))


class TwoInTwoOut(nn.Module):
    """Several inputs, one of them by name, a plain number among them, and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(16, 32)
        self.right = nn.Linear(8, 32)
        self.norm = nn.GroupNorm(4, 32)
        self.last = nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.full((32,), 2.0), persistent=False)

    def forward(self, x: Tensor, y: Tensor, *, power: int = 1, mask: Tensor | None = None) -> dict[str, object]:
        self.calls += 1
        h = self.norm(self.left(x) + self.right(y)) * self.scale
        h = h if mask is None else h * mask
        return {"sum": self.last(h) ** power, "parts": (h, [x, None])}


def test_several_inputs_and_outputs_pass_through(generator: Generator) -> None:
    module = TwoInTwoOut()
    model = hf.hyperize(module, targets=nn.Linear, z_dim=8)
    params, batch_stats = model.init(generator)
    x, y = torch.randn(4, 16, generator=generator), torch.randn(4, 8, generator=generator)
    mask = torch.ones(4, 1)
    output, stats = model.apply(params, batch_stats, x, y, power=2, mask=mask, train=True)
    own = TwoInTwoOut()
    own.load_state_dict({**model.weights(params), "calls": torch.zeros((), dtype=torch.int64)})
    expected = own(x, y, power=2, mask=mask)
    torch.testing.assert_close(output["sum"], expected["sum"])
    torch.testing.assert_close(output["parts"][0], expected["parts"][0])
    assert output["parts"][1][0] is x
    assert output["parts"][1][1] is None
    assert (batch_stats["calls"], stats["calls"]) == (0, 1)


@pytest.mark.parametrize("train", [True, False])
def test_buffers_of_every_kind_of_norm_work_in_both_modes(generator: Generator, train: bool) -> None:
    module = nn.Sequential(
        nn.Conv1d(4, 16, 3),
        nn.BatchNorm1d(16, momentum=None),
        nn.Conv1d(16, 16, 3),
        nn.InstanceNorm1d(16, affine=True, track_running_stats=True),
        nn.GroupNorm(4, 16),
        nn.Conv1d(16, 6, 1),
        nn.LayerNorm(12),
    )
    model = hf.hyperize(module, z_dim=8)
    params, batch_stats = model.init(generator)
    x = torch.randn(3, 4, 16, generator=generator)
    own = hf.materialize(model, params, batch_stats).train(train)
    for _ in range(2):
        output, batch_stats = model.apply(params, batch_stats, x, train=train)
        torch.testing.assert_close(output, own(x))
        assert_close(batch_stats, dict(own.named_buffers()), tolerance=1e-6)


def test_a_language_model_of_attention_and_recurrence(generator: Generator) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 32, padding_idx=0)
            self.attention = nn.MultiheadAttention(32, 4, kdim=16, vdim=16, add_bias_kv=True)
            self.memory = nn.GRU(32, 16, num_layers=2)
            self.head = nn.Linear(16, 50)

        def forward(self, tokens: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            h = self.table(tokens)
            h = h + self.attention(h, context, context)[0]
            h, last = self.memory(h)
            return self.head(h), last

    module = Tokens()
    model = hf.hyperize(module, targets=[nn.Embedding, nn.MultiheadAttention, nn.GRU], z_dim=8)
    assert len(model.tiling.names) == 1 + 4 + 4
    params, batch_stats = model.init(generator)
    tokens, context = torch.randint(50, (6, 3), generator=generator), torch.randn(7, 3, 16, generator=generator)
    (logits, last), _ = model.apply(params, batch_stats, tokens, context, train=True)
    own = Tokens()
    own.load_state_dict(hf.materialize(model, params, batch_stats).state_dict())
    expected, expected_last = own(tokens, context)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(last, expected_last)


class Rebinding(nn.Module):
    """Keeps one mean by a new tensor, and a count in place, as modules do either."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("ema", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training:
            self.ema = 0.5 * self.ema + y.mean().detach()
            self.count += 1
        return y


def test_a_buffer_that_forward_replaces_is_returned(generator: Generator) -> None:
    model = hf.hyperize(Rebinding(), targets="linear.weight", unit=(4, 4), z_dim=4)
    params, batch_stats = model.init(generator)
    x = torch.randn(2, 3, 4, generator=generator)

    def loss(params: hf.Params, x: Tensor) -> tuple[Tensor, hf.BatchStats]:
        output, new_stats = model.apply(params, batch_stats, x, train=True)
        return output.sum(), new_stats

    def expected(x: Tensor) -> Tensor:
        return model.apply(params, batch_stats, x, train=False)[0].mean()

    _, once = model.apply(params, batch_stats, x[0], train=True)
    _, twice = model.apply(params, once, x[1], train=True)
    assert (once["count"].item(), twice["count"].item(), batch_stats["ema"].item()) == (1, 2, 0)
    torch.testing.assert_close(once["ema"], expected(x[0]))
    torch.testing.assert_close(twice["ema"], 0.5 * once["ema"] + expected(x[1]))
    _, under_grad = torch.func.grad(loss, has_aux=True)(params, x[0])
    assert_trees_equal(under_grad, once)
    _, mapped = torch.vmap(loss, in_dims=(None, 0))(params, x)
    torch.testing.assert_close(mapped["ema"], torch.stack([expected(x[0]), expected(x[1])]))
    assert all(buffer.is_meta for buffer in model.module.buffers())


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of its own parts
def test_a_buffer_that_forward_replaces_is_returned_by_a_compiled_model(generator: Generator) -> None:
    model = hf.hyperize(Rebinding(), targets="linear.weight", unit=(4, 4), z_dim=4)
    params, batch_stats = model.init(generator)
    x = torch.randn(3, 4, generator=generator)
    compiled = torch.compile(model.apply, fullgraph=True, backend="aot_eager")
    expected = model.apply(params, batch_stats, x, train=True)[1]
    torch.testing.assert_close(compiled(params, batch_stats, x, train=True)[1], expected)


@pytest.mark.traced
@pytest.mark.parametrize("train", ["no", None, torch.tensor(True)])
def test_a_mode_that_is_neither_is_refused(train: Any, generator: Generator) -> None:
    """Without the checks of types, which would refuse it before the model can."""
    model = hf.hyper_resnet(10, z_dim=4)
    with pytest.raises(ValueError, match="train: got .*, expected True or False"):
        model.apply(*model.init(generator), torch.ones(2, 3, 8, 8), train=train)
