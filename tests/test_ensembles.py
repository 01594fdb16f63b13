from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from helpers import assert_trees_equal, unchecked
from torch import Generator, Tensor, nn

import hyperfunc as hf
from hyperfunc import data, ensembles, optim, training, tree
from hyperfunc.precision import Precision
from hyperfunc.training import TrainState

SIZE = 3
STEPS = 4

ADAM = optim.adam(optim.piecewise([0.01, 0.001], [2]), weight_decay=0.01, eps=1e-3)
"""With an eps that rounding cannot reach: the bias before a batch norm has no other gradient."""


def in_float64(state: TrainState) -> TrainState:
    return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, state)


def a_batch(generator: Generator, count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(count) % 10


def counted() -> hf.Model:
    """Batch norms that count their batches, as torchvision's do, and a layer norm."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)]
    return hf.hyperize(nn.Sequential(*layers, nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 10)), unit=(8, 8), z_dim=4)


@pytest.mark.parametrize("own_batches", [False, True])
@pytest.mark.parametrize(
    ("make", "optimizer", "options"),
    [
        (lambda: hf.hyper_resnet(10, z_dim=4), ADAM, {}),
        (counted, optim.sgd(optim.cosine(0.1, 10, warmup=2)), {"decay": "generated", "weight_decay": 0.01}),
    ],
    ids=["adam", "sgd"],
)
def test_each_member_equals_itself_trained_alone(
    make: Any, optimizer: optim.Optimizer, options: dict[str, Any], own_batches: bool, generator: Generator
) -> None:
    model = make()
    members = hf.ensemble(model, SIZE)
    state = in_float64(ensembles.init_state(members, optimizer, generator))
    step = training.make_train_step(model, optimizer, **options)
    mapped = ensembles.map_step_each(step) if own_batches else ensembles.map_step(step)
    alone = [members.member(state, index) for index in range(SIZE)]
    for _ in range(STEPS):
        batches = [a_batch(generator) for _ in range(SIZE)]
        given = tree.map(lambda *leaves: torch.stack(leaves), *batches) if own_batches else batches[0]
        state, metrics = mapped(state, given)
        steps = [step(one, batches[index] if own_batches else batches[0]) for index, one in enumerate(alone)]
        alone = [one for one, _ in steps]
        assert metrics.loss.shape == (SIZE,)
        torch.testing.assert_close(metrics.loss, torch.stack([one.loss for _, one in steps]), rtol=1e-9, atol=1e-9)
    assert state.step.tolist() == [STEPS] * SIZE
    for index, one in enumerate(alone):
        ours = tree.named_leaves(members.member(state, index))
        for path, leaf in tree.named_leaves(one).items():
            torch.testing.assert_close(ours[path], leaf, rtol=1e-8, atol=1e-9, msg=path)
    first, second = (tree.ravel(members.member(state.params, index))[0] for index in (0, 1))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_members_train_in_16_bits_as_alone(precision: Precision, generator: Generator) -> None:
    model, optimizer = hf.hyper_resnet(10, z_dim=4), optim.sgd(0.01)
    if precision == "fp16":
        optimizer = optim.scaled(optimizer, first=64)
    members = hf.ensemble(model, SIZE)
    state = ensembles.init_state(members, optimizer, generator)
    step = training.make_train_step(model, optimizer, precision=precision)
    images, labels = a_batch(generator)
    batch = images.float(), labels
    found, metrics = ensembles.map_step(step)(state, batch)
    for index in range(SIZE):
        expected, alone = step(members.member(state, index), batch)
        torch.testing.assert_close(metrics.loss[index], alone.loss, rtol=0.01, atol=0)
        ours, theirs = (tree.ravel(one.params)[0] for one in (members.member(found, index), expected))
        moved = theirs - tree.ravel(members.member(state, index).params)[0]
        assert (ours - theirs).norm() < 0.25 * moved.norm()


@pytest.mark.traced
def test_a_step_of_all_members_compiles_as_one_graph(generator: Generator) -> None:
    model = counted()
    state = in_float64(ensembles.init_state(hf.ensemble(model, SIZE), ADAM, generator))
    step, given = ensembles.map_step(training.make_train_step(model, ADAM)), a_batch(generator)
    ours = torch.compile(step, fullgraph=True, backend="aot_eager")(state, given)
    for leaf, other in zip(tree.leaves(ours), tree.leaves(step(state, given)), strict=True):
        torch.testing.assert_close(leaf, other, rtol=oracle.EXACT, atol=oracle.EXACT)


def test_members_start_as_the_model_does_and_do_not_depend_on_their_number() -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    few, many = (hf.ensemble(model, n) for n in (2, 4))
    of_few, of_many = (members.init(Generator().manual_seed(3)) for members in (few, many))
    alone = model.init(Generator().manual_seed(3))
    assert_trees_equal(tree.named_leaves(few.member(of_few, 0)), tree.named_leaves(alone))
    for index in range(2):
        ours, theirs = few.member(of_few, index), many.member(of_many, index)
        assert_trees_equal(tree.named_leaves(ours), tree.named_leaves(theirs))


def test_apply_and_predict_are_loops_over_members(generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    members = hf.ensemble(model, SIZE)
    params, batch_stats = tree.to(members.init(generator), torch.float64)
    images, _ = a_batch(generator)
    own = torch.stack([images + index for index in range(SIZE)])
    for train in (True, False):
        same, same_stats = members.apply(params, batch_stats, images, train=train)
        each, each_stats = members.apply_each(params, batch_stats, own, train=train)
        for index in range(SIZE):
            one = members.member((params, batch_stats), index)
            for ours, given in (((same, same_stats), images), ((each, each_stats), own[index])):
                alone = tree.leaves(model.apply(*one, given, train=train))
                for leaf, other in zip(tree.leaves(members.member(ours, index)), alone, strict=True):
                    torch.testing.assert_close(leaf, other, rtol=oracle.EXACT, atol=oracle.EXACT)
    predicted = members.predict(params, batch_stats, images)
    logits = [model.apply(*members.member((params, batch_stats), i), images, train=False)[0] for i in range(SIZE)]
    expected = sum(one.softmax(dim=1) for one in logits) / SIZE
    torch.testing.assert_close(predicted, expected, rtol=oracle.EXACT, atol=oracle.EXACT)


def test_members_train_on_augmented_pictures(generator: Generator) -> None:
    pixels = torch.randint(256, (16, 32, 32, 3), generator=generator, dtype=torch.uint8)
    images = data.Images(pixels, torch.arange(16) % 10)
    model = hf.hyper_resnet(10, z_dim=4)
    members, optimizer = hf.ensemble(model, 2), optim.adam(0.002)
    step = training.make_train_step(model, optimizer, load=data.make_train_load(images, data.measure(images)))
    state = ensembles.init_state(members, optimizer, generator)
    draws = [next(data.batches(data.draw_epoch(seed, 0, 16), 4)) for seed in range(2)]
    given = tree.map(lambda *leaves: torch.stack(leaves), *draws)
    _, metrics = ensembles.map_step_each(step)(state, given)
    losses = [step(members.member(state, index), draw)[1].loss for index, draw in enumerate(draws)]
    torch.testing.assert_close(metrics.loss, torch.stack(losses), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own_batches", [False, True])
def test_a_members_dropout_is_what_it_would_be_alone(own_batches: bool, generator: Generator) -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)).double()
    model, optimizer = hf.hyperize(module, targets=["0.weight"], z_dim=4), optim.sgd(0.1)
    members = hf.ensemble(model, SIZE)
    state = in_float64(ensembles.init_state(members, optimizer, generator))
    step = training.make_train_step(model, optimizer, seed=3)
    batch = (torch.randn(4, 16, generator=generator, dtype=torch.float64), torch.arange(4))
    mapping = ensembles.map_step_each if own_batches else ensembles.map_step
    given = tree.map(lambda leaf: torch.stack([leaf] * SIZE), batch) if own_batches else batch
    _, metrics = mapping(step)(state, given)
    losses = torch.stack([step(members.member(state, index), batch)[1].loss for index in range(SIZE)])
    torch.testing.assert_close(metrics.loss, losses, rtol=oracle.EXACT, atol=oracle.EXACT)
    networks = state.params, state.batch_stats
    own = torch.arange(SIZE) + 5
    for seed, seeds in ((1, [1] * SIZE), (torch.tensor(1), [1] * SIZE), (own, own.tolist())):
        outputs, _ = members.apply(*networks, batch[0], train=True, seed=seed)
        alone = [model.apply(*members.member(networks, i), batch[0], train=True, seed=seeds[i])[0] for i in range(SIZE)]
        torch.testing.assert_close(outputs, torch.stack(alone), rtol=oracle.EXACT, atol=oracle.EXACT)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("targets", [["1.weight", "2.weight"], ["*.weight"]], ids=["some", "all"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_gradients_of_members_over_batches_of_one_are_right(
    dtype: torch.dtype, tolerance: float, targets: list[str], memory_format: torch.memory_format, generator: Generator
) -> None:
    """Where torch's own convolutions on the CPU go wrong over kernels in channels_last order, generated or not."""
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 4, 1)]
    module = nn.Sequential(*layers, nn.Flatten()).to(dtype).to(memory_format=memory_format)
    model = hf.hyperize(module, targets=targets, unit=(8, 8), z_dim=4)
    members = hf.ensemble(model, SIZE)
    params, batch_stats = members.init(generator)
    images = a_batch(generator, 1)[0].repeat(1, 1, 2, 2).to(dtype)

    def loss(params: hf.Params, batch_stats: hf.BatchStats) -> Tensor:
        return model.apply(params, batch_stats, images, train=True)[0].square().sum()

    ours = torch.func.grad(lambda p: members.apply(p, batch_stats, images, train=True)[0].square().sum())(params)
    inside = torch.vmap(torch.func.grad(loss))(params, batch_stats)
    for index in range(SIZE):
        alone = tree.named_leaves(torch.func.grad(loss)(*members.member((params, batch_stats), index)))
        for found in (ours, inside):
            for path, leaf in tree.named_leaves(members.member(found, index)).items():
                torch.testing.assert_close(leaf, alone[path], rtol=tolerance, atol=tolerance, msg=path)


def test_a_member_can_be_taken_out_and_saved(generator: Generator, tmp_path: Path) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    members = hf.ensemble(model, SIZE)
    params, batch_stats = members.init(generator)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    outputs, _ = members.apply(params, batch_stats, images, train=False)
    mine = members.member((params, batch_stats), 1)
    torch.testing.assert_close(hf.materialize(model, *mine).eval()(images), outputs[1], rtol=1e-4, atol=1e-5)
    hf.save(tmp_path / "member.pth", model, *mine)
    _, *found = hf.load(tmp_path / "member.pth")
    assert_trees_equal(tree.named_leaves(tuple(found)), tree.named_leaves(mine))


def test_bad_input(generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    with pytest.raises(ValueError, match="n: got 0, expected at least 1"):
        hf.ensemble(model, 0)
    with pytest.raises(ValueError, match="n: got 2.5, expected at least 1, as a whole number"):
        unchecked(hf.ensemble)(model, 2.5)
    with pytest.raises(
        ValueError, match="model: got Conditional, expected a Model; .* there are no ensembles of others"
    ):
        unchecked(hf.ensemble)(hf.conditional(model, hf.conditions.table(2)), 2)
    members = hf.ensemble(model, 2)
    with pytest.raises(
        ValueError, match=r"members: got Model, expected an Ensemble, as ensemble\(model, n\) makes one"
    ):
        unchecked(ensembles.init_state)(model, optim.adam(0.1), generator)
    with pytest.raises(ValueError, match="optimizer: got a SGD, expected an Optimizer of hyperfunc.optim"):
        unchecked(ensembles.init_state)(members, torch.optim.SGD([torch.zeros(1)]), generator)
    params, batch_stats = members.init(generator)
    single, single_stats = model.init(generator)
    images = torch.zeros(4, 3, 8, 8)
    expected = "expected the 2 members as first dimension"
    with pytest.raises(ValueError, match=rf"params: generator/3x3/w_in has the shape \(16, 4, 4\), {expected}"):
        members.apply(single, batch_stats, images, train=False)
    with pytest.raises(ValueError, match=rf"batch_stats: blocks.0.bn1.running_mean has the shape \(16,\), {expected}"):
        members.apply(params, single_stats, images, train=False)
    with pytest.raises(ValueError, match=rf"args: 0 has the shape \(4, 3, 8, 8\), {expected}"):
        members.apply_each(params, batch_stats, images, train=False)
    with pytest.raises(ValueError, match=rf"stacked: generator/3x3/w_in has the shape \(16, 4, 4\), {expected}"):
        members.member(single, 1)
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"index: got {index}, expected a member from 0 to 1"):
            members.member(params, index)


@pytest.mark.parametrize("map_step", [ensembles.map_step, ensembles.map_step_each])
def test_the_state_of_one_network_is_no_state_of_members(map_step: Any, generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    state = training.init_state(model, ADAM, generator)
    with pytest.raises(
        ValueError, match="state: got none of members, expected a TrainState with the members as first dim"
    ):
        map_step(training.make_train_step(model, ADAM))(state, a_batch(generator))
    with pytest.raises(ValueError, match="state: got none of members"):
        unchecked(map_step(training.make_train_step(model, ADAM)))(a_batch(generator), state)


def test_one_batch_is_no_batch_for_each_member(generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    state = ensembles.init_state(hf.ensemble(model, 2), ADAM, generator)
    expected = (
        r"batch: got a leaf of shape \(6, 3, 8, 8\) for 2 members, .* with the same batch for all there is map_step"
    )
    with pytest.raises(ValueError, match=expected):
        ensembles.map_step_each(training.make_train_step(model, ADAM))(state, a_batch(generator))


def test_no_probabilities_are_made_of_what_are_no_classes(generator: Generator) -> None:
    one_output = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), (3, 8), r"\(3, 1\)"
    pixels = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)), (3, 16, 4, 4), r"\(3, 5, 4, 4\)"
    for network, shape, outputs in (one_output, pixels):
        members = hf.ensemble(hf.hyperize(network, targets="0.weight"), 2)
        with pytest.raises(ValueError, match=rf"predict: got {outputs} from each .* \(n, classes\), of"):
            members.predict(*members.init(generator), torch.ones(shape))
