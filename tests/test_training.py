import gc
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from helpers import assert_trees_equal, of_jvp, unchecked
from torch import Generator, Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hyperfunc as hf
from hyperfunc import optim, training, tree
from hyperfunc.model import Model
from hyperfunc.residual import Block, Shortcut

WEIGHT_DECAY = 0.01


class Examples(NamedTuple):
    images: Tensor
    labels: Tensor


def _examples(examples: Examples) -> tuple[Tensor, Tensor]:
    return examples.images, examples.labels


def a_batch(generator: Generator, count: int = 8) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 10


def a_state(model: Model, optimizer: optim.Optimizer) -> training.TrainState:
    state = training.init_state(model, optimizer, torch.Generator().manual_seed(1))
    params = tree.to(state.params, torch.float64)
    return training.TrainState(
        state.step, params, tree.to(state.batch_stats, torch.float64), tree.to(state.opt_state, torch.float64)
    )


def test_a_step_leaves_its_inputs_unchanged(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    optimizer = optim.adam(0.002, weight_decay=0.0005)
    state, batch = a_state(model, optimizer), a_batch(generator)
    before = tree.named_leaves(tree.clone((state, batch)))
    training.make_train_step(model, optimizer)(state, batch)
    assert_trees_equal(before, tree.named_leaves((state, batch)))


def test_a_step_is_the_same_where_autograd_is_off() -> None:
    model, optimizer = hf.hyper_resnet(10), optim.adam(0.002)
    batch, step = a_batch(Generator().manual_seed(0)), training.make_train_step(model, optimizer)
    expected = tree.named_leaves(step(a_state(model, optimizer), batch))
    assert not any(leaf.requires_grad for leaf in expected.values())
    state = a_state(model, optimizer)
    with torch.no_grad():
        assert_trees_equal(tree.named_leaves(step(state, batch)), expected)
    with torch.inference_mode():
        assert_trees_equal(tree.named_leaves(step(state, batch)), expected)
        copy = tree.map(torch.clone, (state, batch))  # of which autograd would not have any
    assert_trees_equal(tree.named_leaves(step(state, copy[1])), expected)
    assert_trees_equal(tree.named_leaves(step(*copy)), expected)


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
@pytest.mark.parametrize("block", ["post", "pre"])
def test_biases_before_norms_have_the_gradient_that_is_not_computed(
    block: Block, shortcut: Shortcut, generator: Generator
) -> None:
    model = hf.hyper_resnet(10, block=block, shortcut=shortcut)
    state, (images, labels) = a_state(model, optim.sgd(0.1)), a_batch(generator)
    generator.manual_seed(1)
    params = tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), state.params)
    state = state._replace(params=params)

    def loss(params: hf.Params) -> Tensor:
        return F.cross_entropy(model.apply(params, state.batch_stats, images, train=True)[0], labels)

    expected, found = grad(loss)(params), training.make_gradients(model)(state, (images, labels))
    for path, leaf in tree.named_leaves(found).items():
        torch.testing.assert_close(
            leaf, tree.named_leaves(expected)[path], rtol=oracle.EXACT, atol=oracle.EXACT, msg=path
        )
    silent = hf.ResNet(10, block=block, shortcut=shortcut).biases_before_norms
    assert len(silent) == {"post": 7, "pre": 3}[block]
    assert not any(found.primary[name].any() for name in silent)


def test_steps_equal_ordinary_training_of_an_ordinary_module(generator: Generator) -> None:
    model = hf.resnet(10)
    optimizer = optim.adam(0.002, weight_decay=0.0005)
    state = a_state(model, optimizer)
    step = training.make_train_step(model, optimizer)
    network = hf.materialize(model, state.params, state.batch_stats)
    theirs = torch.optim.Adam(network.parameters(), lr=0.002, weight_decay=0.0005)
    for _ in range(3):
        images, labels = a_batch(generator)
        state, metrics = step(state, (images, labels))
        logits = network(images)
        loss = F.cross_entropy(logits, labels)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        torch.testing.assert_close(metrics.loss / metrics.total, loss.detach(), rtol=1e-9, atol=1e-9)
        assert metrics.correct == (logits.argmax(1) == labels).sum()
        assert metrics.total == len(labels)
    assert state.step == 3
    for name, value in network.state_dict().items():
        ours = state.params.primary.get(name, state.batch_stats.get(name))
        # Adam divides by the root of tiny second moments, so that rounding is magnified; still far below a step.
        torch.testing.assert_close(ours, value, rtol=1e-6, atol=1e-7)


def test_the_plain_network_decays_alike_both_ways(generator: Generator) -> None:
    model = hf.resnet(10)
    batch = a_batch(generator)
    by_optimizer = optim.sgd(0.1, weight_decay=WEIGHT_DECAY)
    by_loss = optim.sgd(0.1)
    ours, _ = training.make_train_step(model, by_optimizer)(a_state(model, by_optimizer), batch)
    step = training.make_train_step(model, by_loss, decay="generated", weight_decay=WEIGHT_DECAY)
    theirs, _ = step(a_state(model, by_loss), batch)
    for path, leaf in tree.named_leaves(ours.params).items():
        torch.testing.assert_close(leaf, tree.named_leaves(theirs.params)[path], rtol=oracle.EXACT, atol=oracle.EXACT)


def test_decay_of_generated_kernels_is_the_gradient_of_their_squares(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    batch = a_batch(generator)
    optimizer = optim.sgd(1.0, momentum=0.0)
    state = a_state(model, optimizer)
    without, _ = training.make_train_step(model, optimizer)(state, batch)
    with_decay, metrics = training.make_train_step(model, optimizer, decay="generated", weight_decay=WEIGHT_DECAY)(
        state, batch
    )
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), state.params)
    weights = leaves.primary | oracle.resnet_kernels(leaves, 10, 1)
    (0.5 * WEIGHT_DECAY * torch.stack([weight.square().sum() for weight in weights.values()]).sum()).backward()
    for path, leaf in tree.named_leaves(leaves).items():
        difference = tree.named_leaves(without.params)[path] - tree.named_leaves(with_decay.params)[path]
        torch.testing.assert_close(difference, leaf.grad, rtol=oracle.EXACT, atol=oracle.EXACT)
    # The reported loss is the cross-entropy alone, so that runs with different decays can be compared.
    logits, _ = model.apply(state.params, state.batch_stats, batch[0], train=True)
    torch.testing.assert_close(metrics.loss / metrics.total, F.cross_entropy(logits, batch[1]))


def test_metrics_of_parts_add_up_to_those_of_the_whole(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    state = a_state(model, optim.adam(0.1))
    images, labels = a_batch(generator, 10)
    whole = training.evaluate(model, state.params, state.batch_stats, [(images, labels)])
    parts = [(images[i : i + 4], labels[i : i + 4]) for i in (0, 4, 8)]
    in_parts = training.evaluate(model, state.params, state.batch_stats, parts)
    torch.testing.assert_close(tuple(in_parts), tuple(whole), rtol=oracle.EXACT, atol=oracle.EXACT)


def test_evaluation_uses_the_running_statistics_and_leaves_them(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    state = a_state(model, optim.adam(0.1))
    images, labels = a_batch(generator)
    before = tree.named_leaves(tree.clone(state))
    metrics = training.evaluate(model, state.params, state.batch_stats, [(images, labels)])
    assert_trees_equal(before, tree.named_leaves(state))
    weights = state.params.primary | oracle.resnet_kernels(state.params, 10, 1)
    logits = oracle.resnet_logits(weights, images, 10, state.batch_stats)
    torch.testing.assert_close(metrics.loss, F.cross_entropy(logits, labels, reduction="sum"))


def test_calibration_is_the_way_forward_of_so_many_steps(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    state = a_state(model, optim.adam(0.1))
    batches = [a_batch(generator) for _ in range(3)]
    before = tree.named_leaves(tree.clone(state))
    found = training.calibrate(model, state.params, state.batch_stats, batches)
    assert_trees_equal(before, tree.named_leaves(state))
    # As SGD by a rate of 0 leaves them, step by step.
    still = optim.sgd(0.0)
    step, resting = training.make_train_step(model, still), state._replace(opt_state=still.init(state.params))
    for batch in batches:
        resting, _ = step(resting, batch)
    torch.testing.assert_close(found, resting.batch_stats)
    assert_trees_equal(training.calibrate(model, state.params, state.batch_stats, []), state.batch_stats)


def test_calibration_forgets_what_other_parameters_had_left(generator: Generator) -> None:
    """Whatever the statistics were, after many batches they are those of the batches, in which the network then is as
    in training."""
    model = hf.hyper_resnet(10)
    state = a_state(model, optim.adam(0.1))
    images, labels = a_batch(generator, 16)
    stale = {name: leaf * 50 if leaf.is_floating_point() else leaf for name, leaf in state.batch_stats.items()}
    found = training.calibrate(model, state.params, stale, [(images, labels)] * 200)
    in_training, _ = model.apply(state.params, state.batch_stats, images, train=True)
    evaluated, _ = model.apply(state.params, found, images, train=False)
    # But for the unbiased variance that is kept, over 16 times 64 pixels and more.
    torch.testing.assert_close(evaluated, in_training, rtol=0.02, atol=0.02)
    before, _ = model.apply(state.params, stale, images, train=False)
    assert (before - in_training).abs().max() > 0.5


def test_calibration_of_a_network_that_draws(generator: Generator) -> None:
    layers = nn.Conv2d(3, 16, 3), nn.Dropout(0.5), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Flatten()
    model = hf.hyperize(nn.Sequential(*layers, nn.Linear(16 * 16, 10)), targets="2.weight", z_dim=4)
    params, batch_stats = model.init(generator)
    batch = torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)
    found = [training.calibrate(model, params, batch_stats, [batch]) for _ in range(2)]
    assert_trees_equal(*found)


def test_a_scan_is_the_steps_in_turn(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    optimizer = optim.adam(0.002)
    step, state = training.make_train_step(model, optimizer, load=_examples), a_state(model, optimizer)
    examples = Examples(*a_batch(generator, 10))
    expected, rows = state, []
    for i in (0, 4, 8):
        expected, metrics = step(expected, Examples(examples.images[i : i + 4], examples.labels[i : i + 4]))
        rows.append(metrics)
    found, metrics = training.scan(step, 4)(state, examples)
    assert_trees_equal(tree.named_leaves(found), tree.named_leaves(expected))
    assert_trees_equal(tree.named_leaves(metrics), tree.named_leaves(tree.map(lambda *row: torch.stack(row), *rows)))
    assert metrics.total.tolist() == [4, 4, 2]

    pairs = training.make_train_step(model, optimizer)
    found, _ = training.scan(pairs, 4)(state, (examples.images, examples.labels))
    assert_trees_equal(tree.named_leaves(found), tree.named_leaves(expected))


def test_metrics_per_example(generator: Generator) -> None:
    model, (images, labels) = hf.hyper_resnet(10), tree.to(a_batch(generator, 6), torch.float32)
    params, batch_stats = model.init(generator)
    metrics = training.evaluate(model, params, batch_stats, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    logits, _ = model.apply(params, batch_stats, images, train=False)
    torch.testing.assert_close(metrics.mean_loss, torch.nn.functional.cross_entropy(logits, labels))
    torch.testing.assert_close(metrics.accuracy, (logits.argmax(1) == labels).float().mean())


@of_jvp
@pytest.mark.parametrize("outside", ["func", "autograd", "vmap", "forward"])
def test_a_step_can_be_differentiated(generator: Generator, outside: str) -> None:
    """The parameters after two steps by the learning rate's logarithm, against a difference quotient."""
    model = hf.hyper_resnet(10)
    batch = a_batch(generator)
    state = a_state(model, optim.sgd(0.0, momentum=0.0))

    def size_after(log_rate: Tensor) -> Tensor:
        optimizer = optim.sgd(lambda _: log_rate.exp(), momentum=0.0)
        step = training.make_train_step(model, optimizer)
        # The second gradient depends on the rate of the first step.
        return tree.ravel(step(step(state, batch)[0], batch)[0].params)[0].square().sum()

    at = torch.tensor(-4.0, dtype=torch.float64)
    expected = (size_after(at + 1e-5) - size_after(at - 1e-5)) / 2e-5
    if outside == "func":
        found = torch.func.grad(size_after)(at)
    elif outside == "autograd":
        leaf = at.clone().requires_grad_()
        (found,) = torch.autograd.grad(size_after(leaf), leaf)
    elif outside == "vmap":
        found = torch.vmap(torch.func.grad(size_after))(at.expand(2))[1]
    else:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(size_after(forward_ad.make_dual(at, torch.ones_like(at)))).tangent
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)


class Frozen(nn.Sequential):
    """Its output depends on no parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).detach()


def test_the_gradient_of_what_depends_on_nothing_is_zero(generator: Generator) -> None:
    model = hf.hyperize(Frozen(*[nn.Linear(16, 16) for _ in range(3)]), z_dim=4)
    state = training.init_state(model, optim.sgd(0.1), generator)
    found = training.make_gradients(model)(state, (torch.ones(2, 16), torch.arange(2)))
    assert not any(leaf.any() or leaf.requires_grad for leaf in tree.leaves(found))


class PartlyUsed(nn.Module):
    """It has a parameter that its output does not depend on, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        calls.append(x.shape)
        return self.layers(x)


calls: list[torch.Size] = []


def test_a_network_with_an_unused_parameter_is_run_once_a_step(generator: Generator) -> None:
    model, batch = hf.hyperize(PartlyUsed(), z_dim=4), (torch.ones(2, 16), torch.arange(2))
    state = training.init_state(model, optim.sgd(0.1), generator)
    gradients = training.make_gradients(model)
    first = gradients(state, batch)  # by which it is found
    assert not first.primary["unused"].any()
    calls.clear()
    assert_trees_equal(tree.named_leaves(gradients(state, batch)), tree.named_leaves(first))
    assert len(calls) == 1


class Checkpointed(nn.Module):
    """It runs a part again on the way back."""

    def __init__(self, part: str, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.part, self.reentrant, self.dropout = part, reentrant, nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        if self.part == "layers":
            return self.last(checkpoint(lambda x: self.second(self.first(x)), x, use_reentrant=self.reentrant))
        return self.last(checkpoint(self.dropout, self.second(self.first(x)), use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("part", "reentrant"), [("layers", True), ("layers", False), ("dropout", False)])
def test_a_network_that_runs_parts_again_is_refused(part: str, reentrant: bool, generator: Generator) -> None:
    model = hf.hyperize(Checkpointed(part, reentrant), z_dim=4)
    state = training.init_state(model, optim.sgd(0.1), generator)
    message = "must override the setup_context" if reentrant else "cannot go through torch.utils.checkpoint"
    with pytest.raises(RuntimeError, match=message):
        training.make_gradients(model, seed=0)(state, (torch.ones(2, 16), torch.arange(2)))


def cross_entropy(model: Model) -> training.Objective:
    """What `make_train_step` descends, as an objective of one's own."""

    def objective(params: Any, batch_stats: Any, batch: Any, **drawn: Any) -> tuple[Tensor, tuple[Any, Any]]:
        images, labels = batch
        logits, batch_stats = model.apply(params, batch_stats, images, train=True, **drawn)
        loss = F.cross_entropy(logits, labels)
        correct = (logits.argmax(1) == labels).sum()
        return loss, (batch_stats, training.Metrics(loss * len(labels), correct, torch.tensor(len(labels))))

    return objective


def drawing_network() -> Model:
    convolutions = nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.BatchNorm2d(16), nn.Flatten()
    module = nn.Sequential(*convolutions, nn.Dropout(0.5), nn.Linear(144, 10)).double()
    return hf.hyperize(module, targets="2.weight", z_dim=4)


@pytest.mark.parametrize("optimizer", [optim.sgd(0.1), optim.scaled(optim.sgd(0.1))], ids=["plain", "scaled"])
@pytest.mark.parametrize(("make", "seed"), [(drawing_network, 3), (lambda: hf.hyper_resnet(10, z_dim=4), None)])
def test_a_step_of_an_objective_is_the_step_of_its_loss(
    make: Any, seed: int | None, optimizer: optim.Optimizer, generator: Generator
) -> None:
    model = make()
    state, batch = a_state(model, optimizer), a_batch(generator)
    step = training.make_step(cross_entropy(model), optimizer, seed=seed)
    expected_step = training.make_train_step(model, optimizer, seed=seed)
    before = tree.named_leaves(tree.clone((state, batch)))
    found, expected = state, state
    for _ in range(3):
        (found, metrics), (expected, expected_metrics) = step(found, batch), expected_step(expected, batch)
        torch.testing.assert_close((metrics, found), (expected_metrics, expected), rtol=1e-9, atol=1e-9)
        assert not any(leaf.requires_grad for leaf in tree.leaves((found, metrics)))
    assert_trees_equal(before, tree.named_leaves((state, batch)))


@pytest.mark.parametrize("each", [False, True])
def test_a_step_of_a_conditional_model_is_that_of_its_gradient(each: bool, generator: Generator) -> None:
    model, optimizer = hf.conditional(hf.hyper_resnet(10, z_dim=4), hf.conditions.table(3)), optim.adam(0.01)
    state = training.init_state(model, optimizer, generator)
    apply = model.apply_each if each else model.apply
    tasks = torch.tensor([0, 2, 1, 2, 0, 1]) if each else torch.tensor(2)
    images, targets = torch.randn(6, 3, 8, 8, generator=generator), torch.randn(6, 10, generator=generator)

    def objective(params: Any, batch_stats: Any, batch: Any) -> tuple[Tensor, tuple[Any, Any]]:
        tasks, images, targets = batch
        outputs, batch_stats = apply(params, batch_stats, tasks, images, train=True)
        errors = (outputs - targets).square().mean(1)
        return errors.mean(), (batch_stats, {"worst": errors.max()})

    step = training.make_step(objective, optimizer)
    found, metrics = step(state, (tasks, images, targets))

    def loss(params: Any) -> Tensor:
        outputs, _ = apply(params, state.batch_stats, tasks, images, train=True)
        return F.mse_loss(outputs, targets)

    grads = grad(loss)(state.params)
    expected, _ = optimizer.update(grads, state.opt_state, state.params, state.step)
    torch.testing.assert_close(found.params.model.embeddings, expected.model.embeddings)
    outputs, _ = apply(state.params, state.batch_stats, tasks, images, train=True)
    torch.testing.assert_close(metrics["worst"], (outputs - targets).square().mean(1).max())


@pytest.mark.parametrize("map_it", [False, True])
def test_an_objective_by_which_nothing_would_be_learned_is_refused(map_it: bool, generator: Generator) -> None:
    model, optimizer = hf.hyper_resnet(10, z_dim=4), optim.sgd(0.1)
    members = hf.ensemble(model, 2)
    state = hf.ensembles.init_state(members, optimizer, generator)
    state = state if map_it else members.member(state, 0)
    right, batch = cross_entropy(model), tree.to(a_batch(generator), torch.float32)

    def detached(params: Any, batch_stats: Any, batch: Any) -> Any:
        loss, beside = right(params, batch_stats, batch)
        return loss.detach(), beside

    def other(params: Any, batch_stats: Any, batch: Any) -> Any:
        return right(tree.map(torch.zeros_like, params), batch_stats, batch)

    for objective in (detached, torch.no_grad()(right), other):
        step = training.make_step(objective, optimizer)
        with pytest.raises(ValueError, match="objective: returned a loss that does not depend on params"):
            (hf.ensembles.map_step(step) if map_it else step)(state, batch)


def test_what_is_no_state_of_one_network_is_refused(generator: Generator) -> None:
    model, optimizer = hf.hyper_resnet(10, z_dim=4), optim.sgd(0.1)
    state, batch = training.init_state(model, optimizer, generator), a_batch(generator)
    several = hf.ensembles.init_state(hf.ensemble(model, 2), optimizer, generator)
    for step in training.make_train_step(model, optimizer), training.make_step(cross_entropy(model), optimizer):
        step = unchecked(step)
        with pytest.raises(ValueError, match=r"state: got a tuple, expected .* called as step\(state, batch\)"):
            step(batch, state)
        with pytest.raises(ValueError, match="state: got a Params, expected a TrainState whose step is a tensor"):
            step(state.params, batch)
        with pytest.raises(ValueError, match="state: got the step 0, expected a TrainState whose step is a tensor"):
            step(unchecked(state._replace)(step=0), batch)
        with pytest.raises(ValueError, match="state: got that of 2 members, .* map the step, by ensembles.map_step"):
            step(several, batch)


def test_a_step_keeps_no_graph_of_what_its_objective_closes_over(generator: Generator) -> None:
    """Nor what an autocast around it makes of the parameters."""
    model, optimizer = hf.hyperize(PartlyUsed(), z_dim=4), optim.sgd(0.1)
    teacher = nn.Linear(16, 16)

    def objective(params: Any, batch_stats: Any, batch: Any) -> tuple[Tensor, tuple[Any, Any]]:
        outputs, batch_stats = model.apply(params, batch_stats, batch, train=True)
        loss = (outputs - teacher(batch)).square().mean()
        return loss, (batch_stats, {"loss": loss})

    state, step = training.init_state(model, optimizer, generator), training.make_step(objective, optimizer)
    for _ in range(2):
        state, metrics = step(state, torch.ones(2, 16))
        assert not any(leaf.requires_grad for leaf in tree.leaves((state, metrics)))
    counts = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(6):
            state, _ = training.make_step(cross_entropy(model), optimizer)(state, (torch.ones(2, 16), torch.arange(2)))
            counts.append(sum(issubclass(type(found), Tensor) for found in gc.get_objects()))
    assert counts[-1] <= counts[1]


def test_members_of_a_step_of_an_objective(generator: Generator) -> None:
    model, optimizer = hf.hyper_resnet(10, z_dim=4), optim.sgd(0.1)
    members = hf.ensemble(model, 2)
    state, batch = hf.ensembles.init_state(members, optimizer, generator), tree.to(a_batch(generator), torch.float32)
    step = training.make_step(cross_entropy(model), optimizer)
    found, _ = hf.ensembles.map_step(step)(state, batch)
    expected, _ = step(members.member(state, 1), batch)
    torch.testing.assert_close(members.member(found, 1).batch_stats, expected.batch_stats)
    torch.testing.assert_close(members.member(found, 1).params.embeddings, expected.params.embeddings)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda loss, stats: loss, r"objective: returned Tensor, expected \(loss, \(new batch_stats, metrics\)\)"),
        (lambda loss, stats: (loss, stats), r"objective: returned \(Tensor, dict\), expected"),
        (lambda loss, stats: (loss, stats, {}), r"objective: returned \(Tensor, dict, dict\), expected"),
        (lambda loss, stats: (0.5, (stats, {})), r"objective: returned \(float, \(dict, dict\)\), expected"),
        (lambda loss, stats: (loss.expand(4), (stats, {})), r"loss of float32\[4\], expected a single number"),
        (lambda loss, stats: (loss, (stats, {"a": 1.0})), "objective's metrics: got a float at a, expected tensors"),
        (
            lambda loss, stats: (loss, ({**stats, "head": 0}, {})),
            "objective: returned other batch_stats than it was given",
        ),
        (
            lambda loss, stats: (loss, ({"loss": loss}, stats)),
            "objective: returned other batch_stats than it was given",
        ),
        (
            lambda loss, stats: (loss, (dict.fromkeys(stats), {})),
            "objective's batch_stats: got a NoneType at blocks.0.bn1",
        ),
        (
            lambda loss, stats: (loss, (stats, {}, loss)),
            r"objective: returned \(Tensor, \(dict, dict, Tensor\)\), expected",
        ),
        (lambda loss, stats: (loss.long(), (stats, {})), r"loss of int64\[\], expected a single number"),
    ],
)
def test_an_objective_that_returns_something_else_is_refused(answer: Any, message: str, generator: Generator) -> None:
    model, optimizer = hf.hyper_resnet(10, z_dim=4), optim.sgd(0.1)
    state = training.init_state(model, optimizer, generator)

    def objective(params: Any, batch_stats: Any, batch: Any) -> Any:
        return answer(params.primary["head.weight"].sum(), batch_stats)

    with pytest.raises(ValueError, match=message):
        unchecked(training.make_step)(objective, optimizer)(state, torch.zeros(2))


def test_training_learns(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    optimizer = optim.adam(0.002)
    state = training.init_state(model, optimizer, generator)
    step = training.make_train_step(model, optimizer)
    images, labels = a_batch(generator, 32)
    losses = []
    for _ in range(15):
        state, metrics = step(state, (images.float(), labels))
        losses.append(metrics.loss.item() / 32)
    assert losses[-1] < 0.2 * losses[0]


def test_bad_input(generator: Generator) -> None:
    model, optimizer = hf.hyper_resnet(10), optim.adam(0.1)
    with pytest.raises(ValueError, match="decay: got 'all', expected one of parameters, generated"):
        unchecked(training.make_train_step)(model, optimizer, decay="all")
    with pytest.raises(ValueError, match=r"weight_decay: got 0.1 with decay='parameters'"):
        training.make_train_step(model, optimizer, weight_decay=0.1)
    conditional = hf.conditional(model, hf.conditions.table(2))
    for make in unchecked(training.make_gradients), unchecked(training.make_eval_step):
        with pytest.raises(
            ValueError, match="model: got Conditional, expected a Model; a Conditional, .* have one as their `model`"
        ):
            make(conditional)
    init_state, make_train_step = unchecked(training.init_state), unchecked(training.make_train_step)
    for other in conditional, hf.ensemble(model, 2):
        expected = (
            f"model: got {type(other).__name__}, expected a Model; .* for an Ensemble .* for a Conditional .* make_step"
        )
        with pytest.raises(ValueError, match=expected):
            make_train_step(other, optimizer)
    with pytest.raises(
        ValueError, match="got Ensemble, expected a Model; .* for an Ensemble there is ensembles.init_state"
    ):
        init_state(hf.ensemble(model, 2), optimizer, generator)
    for what, kind in (optim.adam, "function"), (torch.optim.Adam([torch.zeros(1)]), "Adam"):
        expected = rf"optimizer: got a {kind}, expected an Optimizer of hyperfunc.optim, as adam\(0.002\)"
        with pytest.raises(ValueError, match=expected):
            make_train_step(model, what)
        with pytest.raises(ValueError, match=expected):
            init_state(model, what, generator)
        with pytest.raises(ValueError, match=expected):
            unchecked(training.make_step)(cross_entropy(model), what)
        with pytest.raises(ValueError, match=expected):
            unchecked(optim.scaled)(what)
    params, batch_stats = model.init(generator)
    with pytest.raises(ValueError, match="batches: got none"):
        training.evaluate(model, params, batch_stats, [])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            torch.zeros(2, 3, 8, 8),
            r"batch: got a Tensor, expected a pair \(images, labels\); `load` makes it of another",
        ),
        ({"images": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2)}, "batch: got a dict of 2, expected a pair"),
        ((torch.zeros(2, 3, 8, 8),), "batch: got a tuple of 1, expected a pair"),
        (
            (torch.zeros(2, 3, 8, 8), torch.zeros(2, 10)),
            r"labels: got float32\[2, 10\], expected the number of a class",
        ),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), r"labels: got float32\[2\], expected"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2, 1).long()), r"labels: got int64\[2, 1\], expected"),
    ],
)
def test_a_batch_that_is_no_pair_of_images_and_class_numbers_is_refused(
    generator: Generator, batch: Any, message: str
) -> None:
    model, optimizer = hf.hyper_resnet(10, z_dim=4), optim.adam(0.1)
    state = training.init_state(model, optimizer, generator)
    steps = training.make_train_step(model, optimizer), unchecked(training.make_gradients)(model)
    for step in steps:
        with pytest.raises(ValueError, match=message):
            step(state, batch)
    with pytest.raises(ValueError, match=message):
        training.evaluate(model, state.params, state.batch_stats, [batch])


def test_a_model_that_puts_out_more_than_logits_is_refused(generator: Generator) -> None:
    class Pair(nn.Linear):
        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            output = super().forward(input)
            return output, output

    model, optimizer = hf.hyperize(Pair(16, 16), targets="weight", z_dim=4), optim.adam(0.1)
    state = training.init_state(model, optimizer, generator)
    batch = torch.zeros(2, 16), torch.arange(2)
    with pytest.raises(
        ValueError, match="model: its output is a tuple, expected one tensor of logits; .* by make_step"
    ):
        training.make_train_step(model, optimizer)(state, batch)
    with pytest.raises(ValueError, match="model: its output is a tuple"):
        training.evaluate(model, state.params, state.batch_stats, [batch])
