import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_equal, unchecked
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hyperfunc as hf
from hyperfunc import optim, training, tree


def a_batch(generator: Generator, count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(count) % 10


def in_float64(model: Any, generator: Generator) -> tuple[Any, hf.BatchStats]:
    return tree.to(model.init(generator), torch.float64)


def dropping_out() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Linear(16, 2))


def test_training_by_an_optimizer_of_torch_is_that_by_our_steps(generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    net = hf.as_module(model, *in_float64(model, generator))
    theirs, ours = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True), optim.sgd(0.1)
    state = training.TrainState(torch.tensor(0), *tree.clone(net.trees()), None)
    state = state._replace(opt_state=ours.init(state.params))
    step = training.make_train_step(model, ours)
    batches = [a_batch(generator) for _ in range(3)]
    for images, labels in batches:
        state, metrics = step(state, (images, labels))
        loss = F.cross_entropy(net(images), labels)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        torch.testing.assert_close(loss.detach(), metrics.mean_loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.trees(), state[1:3], rtol=1e-9, atol=1e-9)
    images, before = batches[0][0], tree.named_leaves(tree.clone(net.trees()[1]))
    expected, _ = model.apply(state.params, state.batch_stats, images, train=False)
    torch.testing.assert_close(net.eval()(images), expected, rtol=1e-9, atol=1e-9)
    assert_trees_equal(tree.named_leaves(net.trees()[1]), before)


def test_its_tensors_are_copies_that_are_named_moved_and_loaded_as_of_any_module(generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    params, batch_stats = model.init(generator)
    net = hf.as_module(model, params, batch_stats)
    assert not any(leaf.requires_grad for leaf in tree.leaves(net.trees()))
    before = tree.clone((params, batch_stats))
    for leaf in tree.leaves(net.trees()):
        leaf.add_(1)
    assert_trees_equal(tree.named_leaves((params, batch_stats)), tree.named_leaves(before))
    net = hf.as_module(model, params, batch_stats)
    names = net.state_dict().keys()
    assert {"params.generator.3x3.w_in", "params.embeddings.3x3", "params.primary.head.bias"} <= names
    assert "batch_stats.blocks.0.bn1.running_mean" in names
    assert sum(parameter.numel() for parameter in net.parameters()) == hf.num_params(params)
    assert "Model of ResNet: hyper_resnet(depth=10" in repr(net)
    other = hf.as_module(model, *model.init(generator))
    other.load_state_dict(net.state_dict())
    assert_trees_equal(tree.named_leaves(other.trees()), tree.named_leaves((params, batch_stats)))
    images = a_batch(generator)[0]
    copy.deepcopy(net).double()(images)
    net.double()(images)
    assert not torch.equal(net.trees()[1]["blocks.0.bn1.running_mean"], torch.zeros(16))
    assert {leaf.dtype for leaf in tree.leaves(net.trees())} == {torch.float64}
    assert_trees_equal(tree.named_leaves(other.trees()), tree.named_leaves((params, batch_stats)))


def test_it_can_be_saved_and_materialized(generator: Generator, tmp_path: Path) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    net = hf.as_module(model, *in_float64(model, generator)).eval()
    images = a_batch(generator)[0]
    hf.save(tmp_path / "model", model, *net.trees())
    loaded, params, batch_stats = hf.load(tmp_path / "model")
    expected = net(images)
    assert torch.equal(loaded.apply(params, batch_stats, images, train=False)[0], expected)
    torch.testing.assert_close(hf.materialize(model, *net.trees()).eval()(images), expected, rtol=1e-9, atol=1e-9)


def test_dropout_draws_from_the_global_generator_in_training(generator: Generator) -> None:
    model = hf.hyperize(dropping_out(), z_dim=4)
    net = hf.as_module(model, *model.init(generator))
    x = torch.randn(4, 8, generator=generator)

    def draw(number: int) -> list[Tensor]:
        torch.manual_seed(number)
        return [net(x), net(x)]

    first, second = draw(0)
    assert not torch.equal(first, second)
    assert all(map(torch.equal, draw(0), (first, second)))
    assert torch.equal(net(x, seed=3), net(x, seed=3))
    before = torch.get_rng_state()
    assert torch.equal(net.eval()(x), net(x))
    assert torch.equal(torch.get_rng_state(), before)


class Unusual(nn.Module):
    """Of its parameters one is fixed, of its buffers one is not saved, and one changes its shape and type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.first.bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen.float(), x.mean().reshape(1)])
        return self.second(self.first(x) * self.scale)


def test_flags_of_its_tensors_are_those_of_the_module(generator: Generator) -> None:
    model = hf.hyperize(Unusual(), targets="*weight", z_dim=4)
    net = hf.as_module(model, *model.init(generator))
    fixed = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    assert fixed == ["params.primary.first.bias"]
    assert "batch_stats.scale" not in net.state_dict()
    assert "batch_stats.scale" in dict(net.named_buffers())
    for _ in range(2):
        net(torch.ones(2, 16))
    assert torch.equal(net.trees()[1]["seen"], torch.tensor([0.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("names", "path"), [(("train",), "encoder/train"), (("a", "a.b"), "encoder/a.b"), (("",), "encoder/")]
)
def test_paths_that_cannot_be_names_are_refused(names: tuple[str, ...], path: str, generator: Generator) -> None:
    encoder = hf.Encoder(lambda _: {name: torch.ones(2) for name in names}, lambda p, c: c * p[names[0]], 2)
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), encoder)
    with pytest.raises(ValueError, match=f"params: {path} cannot be the name of a tensor in a module, because"):
        hf.as_module(model, *model.init(generator))


def test_conditions_and_members(generator: Generator) -> None:
    base = hf.hyperize(dropping_out(), z_dim=4)
    tasks, x = torch.tensor([0, 1, 1, 0]), torch.randn(4, 8, generator=generator)
    conditional = hf.conditional(base, hf.conditions.from_module(nn.Embedding(2, 3), code_dim=3))
    params, batch_stats = conditional.init(generator)
    net = hf.as_module(conditional, params, batch_stats, apply=conditional.apply_each)
    net(tasks, x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    expected, _ = conditional.apply_each(params, batch_stats, tasks, x, train=False)
    torch.testing.assert_close(net.eval()(tasks, x), expected)
    members = hf.ensemble(base, 3)
    assert hf.as_module(members, *members.init(generator))(x).shape == (3, 4, 2)


def test_a_gradient_is_averaged_by_distributed_data_parallel(generator: Generator, tmp_path: Path) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    net = hf.as_module(model, *in_float64(model, generator))
    images, labels = a_batch(generator)
    alone = copy.deepcopy(net)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net)
        F.cross_entropy(wrapped(images), labels).backward()
    finally:
        torch.distributed.destroy_process_group()
    F.cross_entropy(alone(images), labels).backward()
    for ours, theirs in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.traced
def test_it_compiles_as_one_graph(generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    net = hf.as_module(model, *in_float64(model, generator))
    images, other = a_batch(generator)[0], copy.deepcopy(net)
    outputs = torch.compile(net, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(outputs, other(images))
    outputs.square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    torch.testing.assert_close(net.trees()[1], other.trees()[1])


def test_bad_input(generator: Generator) -> None:
    model = hf.hyper_resnet(10, z_dim=4)
    params, batch_stats = model.init(generator)
    as_module = unchecked(hf.as_module)
    with pytest.raises(ValueError, match="model: got Linear, expected a Model; hyperize makes one of a module"):
        as_module(nn.Linear(2, 2), params, batch_stats)
    with pytest.raises(ValueError, match="batch_stats: got a NoneType, expected a dict, as the model's init gives it"):
        as_module(model, params, None)
    with pytest.raises(ValueError, match="params: got a dict, expected a Params, as the model's init gives it"):
        as_module(model, batch_stats, params)
    with pytest.raises(ValueError, match="batch_stats: got a NoneType at a, expected tensors at the leaves"):
        as_module(model, params, {"a": None})
    with pytest.raises(ValueError, match=r"train: got it by keyword, .* the methods train\(\) and eval\(\) set it"):
        hf.as_module(model, params, batch_stats)(torch.ones(2, 3, 8, 8), train=False)
    with pytest.raises(ValueError, match="params: got a NoneType at primary, expected tensors at the leaves"):
        as_module(model, params._replace(primary=None), batch_stats)


def test_what_is_saved_is_not_asked_of_the_modules_own_code(generator: Generator) -> None:
    """Which may rename what it gives, and read values that a module on the meta device has not."""

    class Own(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)
            self._register_state_dict_hook(
                lambda _self, found, prefix, _local: [
                    found.__setitem__(f"own.{name}", found.pop(name)) for name in list(found) if name.startswith("1.")
                ]
            )

        def get_extra_state(self) -> float:
            return float(next(self.parameters()).sum())

    model = hf.hyperize(Own(), targets="2.weight", z_dim=4)
    saved = hf.as_module(model, *model.init(generator)).state_dict()
    assert {name for name in saved if name.startswith("batch_stats")} == {
        f"batch_stats.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
