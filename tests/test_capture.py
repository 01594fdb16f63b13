import contextlib
import gc
import itertools
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import recorded
import torch
from helpers import assert_trees_equal, unchecked
from torch import Tensor, nn

import hyperfunc as hf
import train
from hyperfunc import capture, data, optim, training, tree
from hyperfunc.precision import Precision
from hyperfunc.training import EvalStep, Step, TrainState


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU, and the CPU with graphs that are recordings."""
    if request.param == "recorded":
        recorded.install(monkeypatch)
        return "cpu"
    return request.param


class Problem(NamedTuple):
    step: Step
    state: TrainState
    batches: list[Any]


def small() -> hf.Model:
    """A network that takes less long to compile than a residual one."""
    first, second = ((nn.Conv2d(count, 16, 3), nn.BatchNorm2d(16), nn.ReLU()) for count in (3, 16))
    return hf.hyperize(
        nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), targets="3.weight"
    )


def problem(
    device: str,
    dtype: torch.dtype = torch.float64,
    precision: Precision = "fp32",
    model: hf.Model | None = None,
) -> Problem:
    """The whole step, augmentation and optimizer included, and the batches of an epoch, the last a short one."""
    pixels = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8, generator=data.seeded_generator("pixels"))
    images = data.Images(pixels, torch.arange(20) % 10)
    normalization = tree.to(data.measure(images), device, dtype)
    model = model or hf.hyper_resnet(10)
    # Where a gradient is next to zero, a small eps would blow its rounding up to a whole step.
    optimizer = optim.adam(optim.cosine(0.002, 100, warmup=10), weight_decay=5e-4, eps=1e-3)
    state = training.init_state(model, optimizer, data.seeded_generator("init"))
    step, rest = state.step, tree.to(state._replace(step=torch.zeros(())), device, dtype)
    load = data.make_train_load(tree.to(images, device), normalization)
    draw = tree.to(data.draw_epoch(0, 0, 20), device)
    return Problem(
        training.make_train_step(model, optimizer, load=load, precision=precision),
        rest._replace(step=step.to(device)),
        list(data.batches(draw, 8)),
    )


def problem_of_an_objective(device: str) -> Problem:
    """A loss that is no cross-entropy, of a network for each sample that its condition makes, with dropout."""
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
    base = hf.hyperize(module.double(), targets=["*.weight"], unit=(1, 8), z_dim=4)
    model, optimizer = hf.conditional(base, hf.conditions.bounded([0, 0], [1, 1])), optim.adam(0.01, eps=1e-3)

    def objective(params: Any, batch_stats: Any, batch: Any, seed: Tensor) -> tuple[Tensor, tuple[Any, Any]]:
        conditions, inputs = batch
        outputs, batch_stats = model.apply_each(params, batch_stats, conditions, inputs, train=True, seed=seed)
        errors = (outputs[:, 0] - conditions.sum(1)).square()
        return errors.mean(), (batch_stats, {"worst": errors.max()})

    generator = data.seeded_generator("objective")
    state = tree.to(training.init_state(model, optimizer, generator), device)
    conditions, inputs = (torch.rand(20, size, generator=generator, dtype=torch.float64) for size in (2, 8))
    batches = list(data.batches(tree.to((conditions, inputs), device), 8))
    return Problem(training.make_step(objective, optimizer, seed=1), state, batches)


def evaluation(device: str) -> tuple[EvalStep, Any, tuple[Tensor, Tensor]]:
    """An evaluation step, its network, and a batch."""
    model = small()
    generator = data.seeded_generator("evaluation")
    images = torch.randn(6, 3, 32, 32, generator=generator, dtype=torch.float64).to(device)
    params, batch_stats = tree.to(model.init(generator), device, torch.float64)
    network = model.weights(params), batch_stats
    return training.make_eval_step(model), network, (images, torch.arange(6, device=device))


class Calibration(NamedTuple):
    model: hf.Model
    step: training.CalibrationStep
    params: hf.Params
    batch_stats: hf.BatchStats
    batches: list[tuple[Tensor, Tensor]]


def calibration(device: str) -> Calibration:
    model, generator = small(), data.seeded_generator("calibration")
    params, batch_stats = tree.to(model.init(generator), device, torch.float64)
    images = torch.randn(3, 6, 3, 16, 16, generator=generator, dtype=torch.float64)
    batches = [(part.to(device), torch.arange(6, device=device)) for part in images]
    return Calibration(model, training.make_calibration_step(model), params, batch_stats, batches)


def assert_same_calibration(ours: training.CalibrationStep, c: Calibration) -> None:
    """Each time from its own statistics on."""
    for batches in (c.batches, c.batches[1:]):
        found, expected = (
            training.calibrate(c.model, c.params, c.batch_stats, batches, step=step) for step in (ours, c.step)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def run(step: Step, p: Problem) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    state, metrics = p.state, []
    for batch in p.batches * 2:
        state, row = step(state, batch)
        metrics.append(tree.named_leaves(row))
    return tree.named_leaves(tree.clone(state)), metrics


def assert_same_training(ours: Step, p: Problem) -> None:
    """Equal to the plain step up to rounding in float64, over full batches and short ones."""
    (state, metrics), (expected_state, expected_metrics) = run(ours, p), run(p.step, p)
    for row, expected in zip(metrics, expected_metrics, strict=True):
        for name, value in row.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
    for path, leaf in state.items():
        torch.testing.assert_close(leaf, expected_state[path], rtol=1e-9, atol=1e-9)


def test_without_cuda_capture_gives_the_step_itself() -> None:
    p = problem("cpu")
    assert capture.capture(p.step, p.state, p.batches[0]) is p.step


def test_without_cuda_a_captured_evaluation_is_the_evaluation_itself() -> None:
    function, network, batch = evaluation("cpu")
    assert capture.capture_evaluation(function, network, batch) is function


def test_a_number_among_the_tensors_is_named_where_there_is_no_cuda_too() -> None:
    p, (function, network, batch) = problem("cpu"), evaluation("cpu")
    with pytest.raises(ValueError, match="state, batch: got a float at 1/0, expected tensors at the leaves"):
        unchecked(capture.capture)(p.step, p.state, (0.1, *p.batches[0]))
    with pytest.raises(ValueError, match="network, batch: got a float at 1/0, expected tensors at the leaves"):
        unchecked(capture.capture_evaluation)(function, network, (0.1, *batch))
    with pytest.raises(ValueError, match="batch: got a float at 0, expected tensors at the leaves"):
        unchecked(capture.compile_step)(p.step, (0.1, *p.batches[0]))


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_kernels")
def test_a_compiled_calibration_equals_the_eager_one() -> None:
    c = calibration("cpu")
    assert_same_calibration(capture.compile_step(c.step, c.batches[0]), c)


def test_a_captured_calibration_equals_the_eager_one(device: str) -> None:
    c = calibration(device)
    network = c.model.weights(c.params), c.batch_stats
    before = tree.named_leaves(tree.clone(network))
    assert_same_calibration(capture.capture(c.step, network, c.batches[0]), c)
    assert_trees_equal(tree.named_leaves(network), before)


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager_in_low_precision() -> None:
    """Both round to 8 bits, but not in the same places. They are nearer to each other than to float32."""
    model = small()
    p = problem("cpu", torch.float32, precision="bf16", model=model)
    compiled = capture.compile_step(p.step, p.batches[0])
    new, metrics = compiled(p.state, p.batches[0])
    expected, expected_metrics = p.step(p.state, p.batches[0])
    exact, _ = problem("cpu", torch.float32, model=model).step(p.state, p.batches[0])
    assert abs(metrics.loss - expected_metrics.loss) < 0.01 * expected_metrics.loss
    ours, theirs, exact = (state.opt_state.m for state in (new, expected, exact))
    assert (ours - theirs).norm() < 0.5 * (theirs - exact).norm()


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of its own parts
def test_compiled_equals_eager() -> None:
    # What other tests compiled of the same function would count as recompilations of this one.
    torch._dynamo.reset()
    p = problem("cpu")
    compiled = capture.compile_step(p.step, p.batches[0])
    before = tree.named_leaves(tree.clone((p.state, p.batches[0])))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_training(compiled, p)
    assert_trees_equal(before, tree.named_leaves((p.state, p.batches[0])))


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_kernels")
def test_a_compiled_step_of_an_objective_equals_the_eager_one() -> None:
    p = problem_of_an_objective("cpu")
    assert_same_training(capture.compile_step(p.step, p.batches[0]), p)


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_kernels")
def test_any_number_of_steps_can_be_compiled() -> None:
    batch = torch.ones(2)

    def make(factor: int) -> capture.Step:
        return lambda state, batch: (state + factor * batch, batch.sum())

    # All of one code, but for what they close over; and nobody may get another's.
    steps = [capture.compile_step(make(factor), batch) for factor in range(4)]
    with torch._dynamo.config.patch(recompile_limit=2):  # it is 8, and so many would take long
        for _ in range(2):
            for factor, step in enumerate(steps):
                assert step(batch, batch)[0].tolist() == [1 + factor] * 2


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_kernels")
def test_a_compiled_step_looks_at_its_state_at_every_call() -> None:
    """Though not at what it consists of."""
    batch = torch.ones(2)
    step = capture.compile_step(lambda state, batch: (state["a"] * 2, batch.sum()), batch)
    for state in ({"a": torch.ones(3)}, {"a": torch.ones(4)}, {"b": torch.ones(1), "a": torch.ones(3).int()}):
        assert torch.equal(step(state, batch)[0], state["a"] * 2)


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_kernels")
def test_a_compiled_step_tells_its_state_from_what_it_closes_over() -> None:
    """Also where they were one object at the first call."""
    batch, origin = torch.ones(2), torch.zeros(3)
    step = capture.compile_step(lambda state, batch: ((state - origin).square(), batch.sum()), batch)
    for state in (origin, torch.ones(3), origin):
        assert torch.equal(step(state, batch)[0], state)


def test_copying_over_a_state_reads_what_it_overwrites_first() -> None:
    own = {"now": torch.tensor([1.0, 2.0]), "before": torch.tensor([0.0, 0.0]), "step": torch.tensor(3)}
    swapped, metrics = {"now": own["now"] * 10, "before": own["now"], "step": own["step"] + 1}, own["step"]
    metrics = capture._move_into(tree.leaves(own), tree.leaves(swapped), metrics)
    assert own["now"].tolist() == [10, 20]
    assert own["before"].tolist() == [1, 2]
    assert (own["step"], metrics) == (4, 3)


def test_what_differs_from_the_captured_is_named() -> None:
    expected = {"a": torch.zeros(3, 2), "b": torch.zeros(1)}
    assert (
        len(capture._leaves_like("batch", {"a": torch.zeros(5, 2), "b": torch.zeros(4)}, expected, but_length=True))
        == 2
    )
    found = {"a": torch.zeros(3, 4), "c": torch.zeros(1)}
    message = (
        r"batch: not what was captured: b is missing; c is new; "
        r"a is float32\[n, 4\] on cpu, was float32\[n, 2\] on cpu; capture it again"
    )
    with pytest.raises(ValueError, match=message):
        capture._leaves_like("batch", found, expected, but_length=True)


def test_captured_equals_eager(device: str) -> None:
    p = problem(device)
    assert_same_training(capture.capture(p.step, p.state, p.batches[0]), p)


def test_a_captured_step_of_an_objective_equals_the_eager_one(device: str) -> None:
    p = problem_of_an_objective(device)
    assert_same_training(capture.capture(p.step, p.state, p.batches[0]), p)


@pytest.mark.gpu
@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
def test_compiled_and_captured_equals_eager() -> None:
    p = problem("cuda")
    compiled = capture.compile_step(p.step, p.batches[0])
    assert_same_training(capture.capture(compiled, p.state, p.batches[0]), p)


def test_several_captured_steps_equal_eager_ones(device: str) -> None:
    p = problem(device)
    rows = data.Draw(*(torch.cat(columns) for columns in zip(*p.batches, strict=True)))
    scan = training.scan(p.step, 8)
    captured = capture.capture(scan, p.state, rows)
    state, metrics = captured(captured(p.state, rows)[0], rows)
    expected, expected_metrics = scan(scan(p.state, rows)[0], rows)
    for ours, theirs in ((state, expected), (metrics, expected_metrics)):
        for path, leaf in tree.named_leaves(ours).items():
            torch.testing.assert_close(leaf, tree.named_leaves(theirs)[path], rtol=1e-9, atol=1e-9)


def test_a_captured_evaluation_equals_the_eager_one(device: str) -> None:
    function, network, (images, labels) = evaluation(device)
    before = tree.named_leaves(tree.clone(network))
    captured = capture.capture_evaluation(function, network, (images, labels))
    kept = captured(network, (images, labels))
    other = (tree.map(lambda leaf: leaf * 1.5, network[0]), network[1])
    for weights in (network, other, network):
        for count in (6, 4, 6):
            found = captured(weights, (images[:count], labels[:count]))
            expected = function(weights, (images[:count], labels[:count]))
            torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tuple(kept), tuple(function(network, (images, labels))), rtol=1e-9, atol=1e-9)
    assert_trees_equal(before, tree.named_leaves(network))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_captured_low_precision_equals_eager_low_precision(device: str, precision: Precision) -> None:
    p = problem(device, torch.float32, precision, model=small())  # a CPU imitates fp16, slowly
    captured = capture.capture(p.step, p.state, p.batches[0])
    state, metrics = captured(p.state, p.batches[0])
    expected, expected_metrics = p.step(p.state, p.batches[0])
    assert abs(metrics.loss - expected_metrics.loss) < 0.01 * expected_metrics.loss
    difference = tree.ravel(state.opt_state)[0] - tree.ravel(expected.opt_state)[0]
    assert difference.norm() < 0.25 * tree.ravel(expected.opt_state)[0].norm()


def test_capture_writes_no_argument_but_the_state_that_it_returned(device: str) -> None:
    p = problem(device)
    before = tree.named_leaves(tree.clone((p.state, p.batches)))
    captured = capture.capture(p.step, p.state, p.batches[0])
    state, metrics = captured(p.state, p.batches[0])
    kept = tree.clone(metrics)
    again, _ = captured(state, p.batches[1])
    assert again is state
    assert_trees_equal(before, tree.named_leaves((p.state, p.batches)))
    assert_trees_equal(tree.named_leaves(kept), tree.named_leaves(metrics))
    # From a state of the caller's own, in the middle of a run.
    _, from_the_start = captured(p.state, p.batches[0])
    torch.testing.assert_close(tuple(from_the_start), tuple(kept), rtol=1e-9, atol=1e-9)


def test_capture_names_what_changed(device: str) -> None:
    p = problem(device)
    captured = capture.capture(p.step, p.state, p.batches[0])
    with pytest.raises(ValueError, match=r"state: not what was captured: step is int32\[\] on \S+, was int64"):
        captured(p.state._replace(step=p.state.step.int()), p.batches[0])
    with pytest.raises(ValueError, match=r"batch: not what was captured: top is float32\[n\] on \S+, was int64"):
        captured(p.state, p.batches[0]._replace(top=p.batches[0].top.float()))


def test_a_dict_may_have_its_keys_in_another_order(device: str) -> None:
    a, b = (torch.full((1,), number, device=device) for number in (5.0, 3.0))

    def step(state: Any, batch: Any) -> tuple[Any, Tensor]:
        return {"v": state["v"] * 10 + batch["a"] - batch["b"], "m": state["m"] + 1}, batch["a"] - batch["b"]

    captured = capture.capture(step, {"m": a, "v": b}, {"a": a, "b": b})
    for state in ({"m": a, "v": b}, {"v": b, "m": a}):
        for batch in ({"a": a, "b": b}, {"b": b, "a": a}):
            new, metrics = captured(state, batch)
            assert (new["m"].item(), new["v"].item(), metrics.item()) == (6, 32, 2)
    evaluation = capture.capture_evaluation(
        lambda network, batch: network["a"] * 10 + network["b"], {"a": a, "b": b}, a
    )
    for network in ({"a": a, "b": b}, {"b": b, "a": a}):
        assert evaluation(network, a).item() == 53


def test_a_step_whose_state_changes_its_form_is_refused(device: str) -> None:
    state = torch.zeros(3, device=device)
    message = r"step: must return a state like the one that it takes, but  is float64\[\] on \S+, was float32\[3\]"
    with pytest.raises(ValueError, match=message):
        capture.capture(lambda state, batch: (state.double().sum(), batch), state, state)


def test_a_state_that_keeps_its_past_is_captured_whole(device: str) -> None:
    """A new state may share memory with the old one, and so may metrics."""
    one = torch.ones(2, device=device)

    def step(state: Any, batch: Tensor) -> tuple[Any, Tensor]:
        return {"now": state["now"] + batch, "before": state["now"]}, state["now"][:1]

    captured, state = capture.capture(step, {"now": one, "before": one}, one), {"now": one, "before": one}
    for count in range(1, 4):
        state, metrics = captured(state, one)
        found = [state["now"][0].item(), state["before"][0].item(), metrics.item()]
        assert found == [1 + count, count, count]


def test_a_state_made_of_parts_of_the_last_one_may_have_them_in_other_places(device: str) -> None:
    one, two = torch.ones(2, device=device), torch.full((2,), 2.0, device=device)
    captured = capture.capture(lambda state, batch: (state, state["a"] * batch), {"a": one, "b": two}, one)
    state, _ = captured({"a": one, "b": two}, one)
    state, seen = captured({"a": state["b"], "b": state["a"]}, one)
    assert (state["a"].tolist(), state["b"].tolist(), seen.tolist()) == ([2, 2], [1, 1], [2, 2])


def problem_of_an_evaluation(device: str) -> tuple[EvalStep, list[Any], list[Any]]:
    """As train.py evaluates; and networks, and batches of runs that are trained on different pictures."""
    model = small()
    eval_step = training.make_eval_step(model, load=train.load_to_evaluate)
    networks: list[Any] = []
    batches: list[Any] = []
    for seed in range(2):
        generator = data.seeded_generator("evaluation", seed)
        params, batch_stats = tree.to(model.init(generator), device, torch.float64)
        networks.append((model.weights(params), batch_stats))
        pixels = torch.randint(100 + 100 * seed, (6, 12, 12, 3), dtype=torch.uint8, generator=generator)
        images = data.Images(pixels, torch.arange(6))
        batches.append(tree.to((images, data.measure(images)), device, torch.float64))
    return eval_step, networks, batches


def test_one_captured_evaluation_serves_runs_on_other_pictures(device: str) -> None:
    eval_step, networks, batches = problem_of_an_evaluation(device)
    captured = capture.capture_evaluation(eval_step, networks[0], batches[0])
    for network, (images, normalization) in itertools.product(networks, itertools.product(*zip(*batches, strict=True))):
        found, expected = (run(network, (images, normalization)) for run in (captured, eval_step))
        torch.testing.assert_close(found, expected)


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_kernels")
def test_one_compiled_evaluation_serves_runs_on_other_pictures() -> None:
    eval_step, networks, batches = problem_of_an_evaluation("cpu")
    compiled = capture.compile_step(eval_step, batches[0])
    for network, batch in itertools.product(networks, batches):
        torch.testing.assert_close(compiled(network, batch), eval_step(network, batch), rtol=1e-9, atol=1e-9)


def test_what_a_step_leaves_alone_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded.install(monkeypatch)
    copied: list[int] = []
    overwrite = capture._overwrite

    def count(into: list[Tensor], values: list[Tensor]) -> None:
        copied.append(len(into))
        overwrite(into, values)

    monkeypatch.setattr(capture, "_overwrite", count)

    def step(state: dict[str, Tensor], batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        # Of the first two each becomes what the other was.
        return {"a": state["b"], "b": state["a"], "sum": state["sum"] + batch, "fixed": state["fixed"]}, state["fixed"]

    state = {name: torch.full((2,), float(value)) for value, name in enumerate(("a", "b", "sum", "fixed"))}
    captured = capture.capture(step, state, torch.ones(2))
    assert copied[-1] == 3
    mine, seen = captured(state, torch.ones(2))
    assert [float(leaf[0]) for leaf in mine.values()] == [1, 0, 3, 3]
    mine, _ = captured(mine, torch.ones(2))
    assert [float(leaf[0]) for leaf in mine.values()] == [0, 1, 4, 3]
    assert seen.untyped_storage().data_ptr() != mine["fixed"].untyped_storage().data_ptr()


def test_what_was_captured_is_not_captured_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recordings = []
    record = capture._record
    monkeypatch.setattr(capture, "_record", lambda *given: (recordings.append(given), record(*given))[1])
    batch = torch.ones(4, device=device)
    captured = capture.capture(lambda state, batch: (state + batch.sum(), batch.sum()), batch.sum(), batch)
    batch *= 2
    for length in (4, 3, 4, 3):
        assert captured(batch.sum(), batch[:length])[1] == 2 * length
    assert len(recordings) == 2


def test_a_network_of_which_a_part_was_copied_is_not_taken_for_the_last_one(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (torch.full((2,), number, device=device) for number in (1.0, 2.0))
    captured = capture.capture_evaluation(lambda network, batch: network * batch, first, first)
    assert captured(first, first).tolist() == [1, 1]

    def break_off(into: Any, values: Any) -> None:
        into[0][:1].copy_(values[0][:1])
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(capture, "_overwrite", break_off)
        with pytest.raises(torch.OutOfMemoryError):
            captured(second, first)
    assert captured(first, first).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"network: not what was captured:  is float32\[3\]"):
        captured(torch.ones(3, device=device), first)


class Secret:
    """What a step holds."""


@pytest.mark.parametrize("where", ["warm-up", "call", "end"])
def test_a_capture_that_fails_leaves_nothing_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own part of it imitated: of a broken capture the end is an error, too."""
    states: list[str] = []
    closed: list[Any] = []
    stream = SimpleNamespace(device=torch.device("cuda", 0), wait_stream=lambda _other: None)

    class Record:
        """As torch's, a class: the frame of a generator would hold the error that goes through it."""

        def __init__(self, graph: Secret, **options: Any) -> None:
            assert options["capture_error_mode"] == "thread_local"
            closed.append(graph)

        def __enter__(self) -> None: ...

        def __exit__(self, *_error: object) -> None:
            if where == "end":
                raise RuntimeError("operation failed due to a previous error during capture")

    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _which: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", Record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: "random state")
    monkeypatch.setattr(torch.cuda, "set_rng_state", states.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Secret)
    monkeypatch.setattr(capture, "_failed", failed := [])
    monkeypatch.setattr(capture, "_abandon", unchecked(capture._abandon))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: closed.append(given), raising=False)
    monkeypatch.delattr(torch._C, "_cuda_endAllocateCurrentStreamToPool", raising=False)

    def fail() -> weakref.ref[Secret]:
        secret = Secret()

        def call(part: str) -> Secret:
            if part == where or (part, where) == ("call", "end"):
                raise ArithmeticError("the reason")
            return secret

        with pytest.raises(ArithmeticError, match="the reason"):
            unchecked(capture._record)(partial(call, "warm-up"), partial(call, "call"), (0, 7), stream)
        return weakref.ref(secret)

    gc.disable()  # what is in no cycle is gone without it
    try:
        assert fail()() is None
    finally:
        gc.enable()
    assert states == ["random state"]
    assert len(failed) == (where == "end")
    if where == "end":
        broken, pool, another = closed
        assert (pool, broken is failed[0], another is broken) == ((0, (0, 7)), True, False)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_a_step_that_waits_for_the_device_is_named_and_the_next_capture_works() -> None:
    state = torch.ones(4, device="cuda")

    def waits(state: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        return state * batch.sum().item(), batch

    captured = capture.capture(lambda state, batch: (state + torch.rand_like(state), batch.sum()), state, state)
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing|captur"):
        capture.capture(waits, state, state)
    assert torch.cuda.current_stream() == before
    assert torch.rand(3, device="cuda").shape == (3,)
    assert captured(state, state)[1] == 4
    again = capture.capture(lambda state, batch: (state + batch, batch.sum()), state, state)
    assert again(state, state)[0].tolist() == [2] * 4


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype, it says
def test_a_step_does_not_wait_for_the_device() -> None:
    p = problem("cuda")
    p.step(p.state, p.batches[0])
    try:
        torch.cuda.set_sync_debug_mode("error")
        p.step(p.state, p.batches[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
