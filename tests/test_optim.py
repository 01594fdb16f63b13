import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_trees_equal, unchecked
from torch import Generator, Tensor

from hyperfunc import optim, tree
from hyperfunc.optim import Optimizer, Schedule

STEPS = 100


def problem(generator: Generator) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]:
    """Parameters of several shapes and a loss of them that is no quadratic."""
    params = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in (("a", (3, 4)), ("b", (5,)), ("c", (2, 3, 2)))
    }
    target = torch.randn(29, generator=generator, dtype=torch.float64)

    def loss(p: dict[str, Tensor]) -> Tensor:
        vector = torch.cat([leaf.reshape(-1) for leaf in p.values()])
        return ((vector - target) ** 4).sum() + torch.sin(3 * vector).sum()

    return params, loss


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (optim.adam(0.002, weight_decay=0.0005), lambda p: torch.optim.Adam(p, lr=0.002, weight_decay=0.0005)),
        (optim.adam(0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
        (
            optim.adam(0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-3, decoupled=True),
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-3),
        ),
        (
            optim.sgd(0.001, weight_decay=0.0005),
            lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, weight_decay=0.0005, nesterov=True),
        ),
    ],
    ids=["adam-l2", "adam", "adamw", "sgd"],
)
def test_equals_torch_over_100_steps(
    generator: Generator, ours: Optimizer, theirs: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> None:
    params, loss = problem(generator)
    their_params = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    their_optimizer = theirs(list(their_params.values()))
    state = ours.init(params)
    for step in range(STEPS):
        grads = torch.func.grad(loss)(params)
        params, state = ours.update(grads, state, params, torch.tensor(step))
        their_optimizer.zero_grad()
        loss(their_params).backward()
        their_optimizer.step()
    for name, leaf in params.items():
        torch.testing.assert_close(leaf, their_params[name].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", [optim.adam(0.1, weight_decay=0.1), optim.sgd(0.1)], ids=["adam", "sgd"])
def test_update_writes_none_of_its_arguments(generator: Generator, optimizer: Optimizer) -> None:
    params, loss = problem(generator)
    state = optimizer.init(params)
    step = torch.tensor(3)
    arguments = (torch.func.grad(loss)(params), state, params, step)
    before = tree.named_leaves(tree.clone(arguments))
    optimizer.update(*arguments)
    assert_trees_equal(before, tree.named_leaves(arguments))


def rates(schedule: Schedule, steps: int) -> list[float]:
    return [schedule(torch.tensor(step)).item() for step in range(steps)]


def test_float32_parameters_stay_float32() -> None:
    optimizer = optim.adam(0.1)
    params = {"a": torch.ones(3)}
    params, state = optimizer.update({"a": torch.ones(3)}, optimizer.init(params), params, torch.tensor(0))
    assert {leaf.dtype for leaf in tree.leaves((params, state))} == {torch.float32}


def test_multistep_halves_at_30_60_80_percent() -> None:
    found = rates(optim.multistep(0.002, 200, 3), 600)
    steps = [0] + [step for step in range(1, 600) if found[step] != found[step - 1]]
    assert steps == [0, 60 * 3, 120 * 3, 160 * 3]
    assert [found[step] for step in steps] == [0.002, 0.001, 0.0005, 0.00025]


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_multistep_of_a_short_run_begins_with_the_given_rate(epochs: int) -> None:
    assert rates(optim.multistep(0.002, epochs, 2), 2) == [0.002, 0.002]


def test_paper_tables_scale_to_the_run() -> None:
    found = rates(optim.paper(0.002, 8), 8)
    assert found == pytest.approx([0.002] * 2 + [0.001] * 2 + [0.0002] * 2 + [0.00005] * 2)
    found = rates(optim.paper(0.1, 5, adaptive=False), 5)
    assert found == pytest.approx([0.1, 0.02, 0.004, 0.0008, 0.00016])


def test_cosine_with_warmup() -> None:
    found = rates(optim.cosine(1.0, 100, warmup=10), 200)
    assert found[100:] == [0.0] * 100
    found = found[:100]
    assert found[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert found[10] == 1.0
    assert found[55] == pytest.approx(0.5)
    assert found[99] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 89 / 90))
    assert all(later < earlier for earlier, later in itertools.pairwise(found[10:]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.adam(-0.1), "learning_rate: got -0.1, expected a finite number of at least 0"),
        (lambda: optim.adam(math.nan), "learning_rate: got nan"),
        (lambda: unchecked(optim.cosine)("0.1", 9), "learning_rate: got '0.1', expected a finite number of at least 0"),
        (lambda: optim.adam(0.1, weight_decay=-1.0), "weight_decay: got -1.0"),
        (lambda: optim.adam(0.1, betas=(0.9, 1.0)), "betas: got 1.0, expected at least 0 and less than 1"),
        (lambda: optim.adam(0.1, eps=-1e-8), "eps: got -1e-08"),
        (lambda: optim.sgd(0.1, momentum=1.0), "momentum: got 1.0"),
        (lambda: optim.sgd(math.inf), "learning_rate: got inf"),
        (lambda: optim.piecewise([0.1], [5]), "values: got 1 for 1 boundaries, expected one more value"),
        (lambda: optim.piecewise([0.1, 0.2, 0.3], [5, 4]), r"boundaries: got \[5, 4\], expected steps in growing"),
        (lambda: optim.cosine(0.1, 10, warmup=10), "warmup: got 10, expected at least 0 and less than the 10 steps"),
        (lambda: optim.cosine(0.1, 0), "steps: got 0"),
        (lambda: optim.multistep(0.1, 0, 5), "epochs: got 0"),
        (lambda: optim.multistep(0.1, 100, 5, at=(30, 60, 80)), "at: got 30, expected at least 0 and less than 1"),
        (lambda: optim.paper(0.1, -1), "steps: got -1"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("elementwise", [True, False])
def test_a_scaled_optimizer_does_what_the_optimizer_does(elementwise: bool, generator: Generator) -> None:
    inner = optim.adam(0.01, weight_decay=0.1)._replace(elementwise=elementwise)
    ours = optim.scaled(inner, first=2.0**10)
    params = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
    state, expected_state, expected = ours.init(params), inner.init(params), params
    for step in range(5):
        grads = tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator), params)
        expected, expected_state = inner.update(grads, expected_state, expected, torch.tensor(step))
        # Times a power of two: dividing it away again is exact.
        scaled = tree.map(lambda leaf: leaf * 2.0**10, grads)
        params, state = ours.update(scaled, state, params, torch.tensor(step))
    assert_trees_equal(tree.named_leaves((params, state.inner)), tree.named_leaves((expected, expected_state)))
    assert (state.scale, state.streak) == (2.0**10, 5)


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_gradients_that_overflow_change_nothing_but_the_scale(
    bad: float, elementwise: bool, generator: Generator
) -> None:
    optimizer = optim.scaled(optim.adam(0.01)._replace(elementwise=elementwise), first=8.0)
    params = {"a": torch.randn(3, generator=generator)}
    grads = {"a": torch.tensor([1.0, bad, 1.0])}
    state = optimizer.init(params)._replace(streak=torch.tensor(7))
    new_params, new_state = optimizer.update(grads, state, params, torch.tensor(0))
    assert_trees_equal(tree.named_leaves((new_params, new_state.inner)), tree.named_leaves((params, state.inner)))
    assert (new_state.scale, new_state.streak) == (4.0, 0)


def test_the_scale_moves_as_that_of_torch(generator: Generator) -> None:
    """The rule itself, as torch's own operation has it, over random overflows; within the bounds that we set."""
    ours = optim.scaled(optim.sgd(0.1), first=2.0**10, grow_after=3)
    params = {"a": torch.zeros(1)}
    state = ours.init(params)
    scale, streak = torch.tensor(2.0**10), torch.tensor(0, dtype=torch.int32)
    for step, chance in enumerate(torch.rand(60, generator=generator)):
        overflows = chance < 0.25
        grads = {"a": torch.tensor([math.inf if overflows else 1.0])}
        params, state = ours.update(grads, state, params, torch.tensor(step))
        torch.ops.aten._amp_update_scale_(scale, streak, overflows.float(), 2.0, 0.5, 3)
        assert (state.scale, state.streak) == (scale, streak)


def test_the_scale_stays_within_bounds() -> None:
    ours = optim.scaled(optim.sgd(0.1), first=1.0, grow_after=1)
    params = {"a": torch.zeros(1)}
    state = ours.init(params)
    for _ in range(60):
        _, state = ours.update({"a": torch.full((1,), math.inf)}, state, params, torch.tensor(0))
    assert 0 < state.scale < 1e-3
    for _ in range(60):
        _, state = ours.update({"a": torch.ones(1)}, state, params, torch.tensor(0))
    assert state.scale == 2.0**24


def test_a_scale_that_cannot_be() -> None:
    for first in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"first: got {first}, expected a finite number above 0"):
            optim.scaled(optim.sgd(0.1), first=first)
    with pytest.raises(ValueError, match="grow_after: got 0, expected at least 1"):
        optim.scaled(optim.sgd(0.1), grow_after=0)
    twice = optim.scaled(optim.clipped(optim.scaled(optim.sgd(0.1)), 1.0))
    for optimizer in (twice, optim.scaled(optim.scaled(optim.sgd(0.1)))):
        with pytest.raises(ValueError, match="optimizer: got a scaled one, "):
            optimizer.init({"w": torch.ones(2)})


@pytest.mark.parametrize("optimizer", [optim.adam(0.1), optim.sgd(0.1), optim.adam(optim.cosine(0.1, 9))])
def test_a_number_as_step_is_refused(optimizer: Optimizer) -> None:
    params = {"a": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"step: got 0, expected a tensor, such as torch.tensor\(0\), which"):
        unchecked(optimizer.update)(params, optimizer.init(params), params, 0)


def test_clipping_equals_that_of_torch(generator: Generator) -> None:
    ours = optim.clipped(optim.adam(0.01, weight_decay=0.1), 300.0)
    params, loss = problem(generator)
    their_params = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    theirs = torch.optim.Adam(their_params.values(), lr=0.01, weight_decay=0.1)
    state, norms = ours.init(params), []
    for step in range(STEPS):
        params, state = ours.update(torch.func.grad(loss)(params), state, params, torch.tensor(step))
        theirs.zero_grad()
        loss(their_params).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(their_params.values(), 300.0).item())
        theirs.step()
    assert max(norms) > 300 > min(norms)
    for name, leaf in params.items():
        torch.testing.assert_close(leaf, their_params[name].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elementwise", [True, False])
def test_clipping_under_a_scale_is_that_of_the_gradients_themselves(elementwise: bool, generator: Generator) -> None:
    inner = optim.clipped(optim.sgd(0.1)._replace(elementwise=elementwise), 0.5)
    params = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
    grads = tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator), params)
    expected, _ = inner.update(grads, inner.init(params), params, torch.tensor(0))
    change = tree.ravel(expected)[0] - tree.ravel(params)[0]
    torch.testing.assert_close(change.norm(), torch.tensor(0.1 * 1.9 * 0.5), rtol=1e-5, atol=0)  # 1 + momentum
    ours = optim.scaled(inner, first=2.0**10)
    found, _ = ours.update(tree.map(lambda leaf: leaf * 2.0**10, grads), ours.init(params), params, torch.tensor(0))
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"optimizer: got a scaled one, .* expected scaled\(clipped\("):
        optim.clipped(optim.scaled(optim.sgd(0.1)), 0.5).init(params)


@pytest.mark.parametrize("names", ["b", ["b"], ["[b]*", "b"], lambda path: path == "b"])
@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_what_is_frozen_is_as_if_it_were_not_there(
    names: optim.Names, scale: float | None, generator: Generator
) -> None:
    inner = optim.clipped(optim.adam(optim.cosine(0.01, 9), weight_decay=0.1), 0.5)
    given = iter(names) if isinstance(names, list) else names
    ours = optim.frozen(inner if scale is None else optim.scaled(inner, first=scale), given)
    assert ours.learning_rate(torch.tensor(8)) == inner.learning_rate(torch.tensor(8)) > 0
    params, loss = problem(generator)
    rest = {name: leaf for name, leaf in params.items() if name != "b"}
    fixed, state, rest_state = params["b"].clone(), ours.init(params), inner.init(rest)
    for step in range(3):
        expected = torch.func.grad(lambda rest: loss({"a": rest["a"], "b": fixed, "c": rest["c"]}))(rest)
        rest, rest_state = inner.update(expected, rest_state, rest, torch.tensor(step))
        grads = tree.map(lambda leaf: leaf * (scale or 1), torch.func.grad(loss)(params))
        params, state = ours.update(grads, state, params, torch.tensor(step))
    torch.testing.assert_close(params, {"a": rest["a"], "b": fixed, "c": rest["c"]})
    assert torch.equal(params["b"], fixed)
    assert sum(leaf.numel() for leaf in tree.leaves(rest_state)) == 2 * (12 + 12)


@pytest.mark.traced
@pytest.mark.parametrize("names", ["b", lambda path: path == "b"])
def test_what_is_frozen_is_left_out_of_a_compiled_update(names: optim.Names, generator: Generator) -> None:
    optimizer = optim.frozen(optim.clipped(optim.adam(0.01), 0.5), names)
    params, loss = problem(generator)
    given = torch.func.grad(loss)(params), optimizer.init(params), params, torch.tensor(0)
    compiled = torch.compile(optimizer.update, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), optimizer.update(*given))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("d", "names: no parameter is called 'd', expected a path or glob pattern of these: a, b, c"),
        (["a", "d*"], r"names: no parameter is called 'd\*'"),
        ("*", r"names: got '\*', which leaves no parameter to train"),
        (lambda path: path == "d", "names: got <function .*, which freezes none of these: a, b, c"),
        ([], r"names: got \[\], which freezes none of these: a, b, c"),
    ],
)
def test_names_that_freeze_nothing_or_everything_are_refused(
    names: optim.Names, message: str, generator: Generator
) -> None:
    params, _ = problem(generator)
    with pytest.raises(ValueError, match=message):
        optim.frozen(optim.sgd(0.1), names).init(params)


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match="names: got a int, expected a glob pattern, several, or a predicate on a path"
    ):
        unchecked(optim.frozen)(optim.sgd(0.1), 3)
    with pytest.raises(ValueError, match=r"names: got a Tensor, expected a glob pattern"):
        unchecked(optim.frozen)(optim.sgd(0.1), ["a", torch.ones(1)])


@pytest.mark.parametrize("elementwise", [True, False])
def test_the_mean_of_the_parameters_weighs_each_update_by_its_age(elementwise: bool, generator: Generator) -> None:
    inner = optim.adam(0.01, weight_decay=0.1)._replace(elementwise=elementwise)
    ours = optim.averaged(inner, 0.9)
    params, loss = problem(generator)
    state, expected, expected_state, seen = ours.init(params), params, inner.init(params), list[Tensor]()
    assert tree.equal(optim.mean_params(state, params), params)
    for step in range(STEPS):
        grads = torch.func.grad(loss)(params)
        params, state = ours.update(grads, state, params, torch.tensor(step))
        expected, expected_state = inner.update(grads, expected_state, expected, torch.tensor(step))
        seen.append(tree.ravel(params)[0])
        weights = 0.9 ** torch.arange(step, -1, -1, dtype=torch.float64)
        mean = (weights @ torch.stack(seen)) / weights.sum()
        torch.testing.assert_close(tree.ravel(optim.mean_params(state, params))[0], mean, rtol=1e-12, atol=1e-12)
    assert tree.equal((params, state.inner), (expected, expected_state))


def test_updates_that_overflow_count_for_nothing_in_the_mean(generator: Generator) -> None:
    ours = optim.scaled(optim.averaged(optim.frozen(optim.clipped(optim.sgd(0.1), 0.5), "b"), 0.5), first=8.0)
    params, _ = problem(generator)
    grads = tree.map(torch.ones_like, params)
    state = ours.init(params)
    first, state = ours.update(grads, state, params, torch.tensor(0))
    assert tree.equal(optim.mean_params(state, first), first)
    same, state = ours.update(grads | {"a": grads["a"] * math.inf}, state, first, torch.tensor(1))
    assert tree.equal((same, optim.mean_params(state, same)), (first, first))
    last, state = ours.update(grads, state, same, torch.tensor(2))
    mean = tree.map(lambda early, late: (early + 2 * late) / 3, first, last)
    torch.testing.assert_close(optim.mean_params(state, last), mean)
    assert torch.equal(mean["b"], params["b"])


def test_the_mean_of_parameters_in_16_bits_is_kept_in_32() -> None:
    ours = optim.averaged(optim.sgd(1.0, momentum=0.0), 0.999)
    params = {"a": torch.full((1,), 256, dtype=torch.bfloat16)}
    state = ours.init(params)
    for step in range(100):
        params, state = ours.update({"a": params["a"] * 0 - 2}, state, params, torch.tensor(step))
    weights = 0.999 ** torch.arange(99, -1, -1)
    expected = (weights @ torch.arange(258.0, 458.0, 2)) / weights.sum()
    torch.testing.assert_close(state.mean, expected.view(1))
    found = optim.mean_params(state, params)["a"]
    assert (found.dtype, found) == (torch.bfloat16, expected.bfloat16())


def test_the_mean_of_each_member_of_an_ensemble(generator: Generator) -> None:
    ours = optim.averaged(optim.adam(0.1), 0.5)
    params = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(3, 2, 2, generator=generator)}
    state = torch.vmap(ours.init)(params)
    for step in range(3):
        grads = tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator), params)
        params, state = torch.vmap(ours.update)(grads, state, params, torch.full((3,), step))
    found = torch.vmap(optim.mean_params)(state, params)
    for index in range(3):
        one = tree.map(lambda leaf, index=index: leaf[index], (state, params))
        assert tree.equal(optim.mean_params(*one), tree.map(lambda leaf, index=index: leaf[index], found))
    with pytest.raises(ValueError, match=r"opt_state: got a mean of shape \(3, 6\) for 18 parameters; expected .*vmap"):
        optim.mean_params(state, params)


@pytest.mark.traced
def test_a_compiled_update_keeps_the_mean(generator: Generator) -> None:
    optimizer = optim.scaled(optim.averaged(optim.frozen(optim.adam(0.01), "b"), 0.5), first=8.0)
    params, loss = problem(generator)
    given = torch.func.grad(loss)(params), optimizer.init(params), params, torch.tensor(0)
    compiled = torch.compile(optimizer.update, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), optimizer.update(*given))


def test_the_mean_is_a_copy() -> None:
    """A captured step writes over its state."""
    ours, params = optim.averaged(optim.sgd(0.1)), {"a": torch.ones(2)}
    state = ours.init(params)
    before = tree.clone((state, params))
    optim.mean_params(state, params)["a"].zero_()
    ours.update(params, state, params, torch.tensor(0))
    assert tree.equal((state, params), before)


def test_a_mean_that_cannot_be() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    for decay in (1.0, -0.1, math.nan, None):
        with pytest.raises(ValueError, match=f"decay: got {decay}, expected at least 0 and less than 1"):
            unchecked(optim.averaged)(optim.sgd(0.1), decay)
    with pytest.raises(ValueError, match=r"optimizer: got a scaled one, .* expected scaled\(averaged\("):
        optim.averaged(optim.scaled(optim.sgd(0.1))).init(params)
    with pytest.raises(ValueError, match="opt_state: got a Momentum, expected that of an optimizer under averaged"):
        optim.mean_params(optim.scaled(optim.sgd(0.1)).init(params), params)
    within = optim.frozen(optim.averaged(optim.sgd(0.1)), "a")
    with pytest.raises(ValueError, match=r"opt_state: got a mean of shape \(3,\) for 5 .* to go around frozen"):
        optim.mean_params(within.init(params), params)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan, None])
def test_a_norm_that_cannot_be(max_norm: Any) -> None:
    with pytest.raises(ValueError, match=f"max_norm: got {max_norm}, expected a finite number above 0"):
        unchecked(optim.clipped)(optim.sgd(0.1), max_norm)


def test_the_state_of_another_optimizer_is_refused() -> None:
    params, step, adam, sgd = {"a": torch.zeros(2)}, torch.tensor(0), optim.adam(0.1), optim.sgd(0.1)
    with pytest.raises(ValueError, match="opt_state: got a Moments, expected the Momentum that the optimizer's own"):
        unchecked(sgd.update)(params, adam.init(params), params, step)
    with pytest.raises(ValueError, match="opt_state: got a Scaled, expected the Moments"):
        unchecked(adam.update)(params, optim.scaled(adam).init(params), params, step)
    both = {**params, "b": torch.ones(3)}
    frozen = optim.frozen(adam, "b")
    with pytest.raises(ValueError, match="opt_state: got that of 5 parameters for 2, expected .* others are frozen"):
        frozen.update(both, adam.init(both), both, step)
