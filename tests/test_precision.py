import pytest
import torch
from helpers import unchecked
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import hyperfunc as hf
from hyperfunc import optim, precision, training, tree
from hyperfunc.precision import LOW, Precision

CPU = torch.device("cpu")

ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""The relative error of one rounding."""

GRADIENT_ERROR = {"bf16": 0.25, "fp16": 0.1}
"""Of the whole gradient, relative to its length. Rounding the kernels alone gives 0.11 and 0.04 in a fresh network of
ten layers on random pictures, because it moves activations over the edge of a ReLU."""


def a_problem(generator: Generator) -> tuple[hf.Model, training.TrainState, tuple[Tensor, Tensor]]:
    model = hf.hyper_resnet(10)
    state = training.init_state(model, optim.sgd(1.0, momentum=0.0), generator)
    return model, state, (torch.randn(32, 3, 16, 16, generator=generator), torch.arange(32) % 10)


@pytest.mark.parametrize("low", sorted(LOW))
@pytest.mark.parametrize("decay", ["parameters", "generated"])
def test_low_precision_stays_close_to_float32(low: Precision, decay: training.Decay, generator: Generator) -> None:
    model, state, batch = a_problem(generator)
    weight_decay = 0.01 if decay == "generated" else 0.0

    def gradient_and_loss(number_format: Precision) -> tuple[Tensor, Tensor]:
        objective = {"decay": decay, "weight_decay": weight_decay, "precision": number_format}
        gradients = training.make_gradients(model, **objective)(state, batch)
        step = training.make_train_step(model, optim.sgd(1.0, momentum=0.0), **objective)
        new_state, metrics = step(state, batch)
        assert {leaf.dtype for leaf in tree.leaves((new_state.params, new_state.batch_stats))} == {torch.float32}
        assert metrics.loss.dtype == torch.float32
        descended = tree.map(torch.sub, state.params, gradients)
        torch.testing.assert_close(tree.ravel(new_state.params)[0], tree.ravel(descended)[0])
        return tree.ravel(gradients)[0].double(), metrics.loss.double()

    expected, expected_loss = gradient_and_loss("fp32")
    found, loss = gradient_and_loss(low)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < GRADIENT_ERROR[low] * expected.norm()
    assert abs(loss - expected_loss) < 2 * ROUNDING[low] * expected_loss


@pytest.mark.parametrize("low", sorted(LOW))
def test_kernels_and_activations_are_of_the_low_type(low: Precision, generator: Generator) -> None:
    model, state, (images, _) = a_problem(generator)
    with precision.autocast(low, CPU):
        weights = model.weights(state.params)
        logits, batch_stats = model.forward(weights, state.batch_stats, images, train=True)
    assert {weights[name].dtype for name in model.tiling.names} == {LOW[low]}
    assert logits.dtype == LOW[low]
    assert {leaf.dtype for leaf in batch_stats.values()} == {torch.float32}


@pytest.mark.parametrize("low", sorted(LOW))
def test_evaluation_in_low_precision(low: Precision, generator: Generator) -> None:
    model, state, batch = a_problem(generator)
    arguments = (model, state.params, state.batch_stats, [batch])
    expected = training.evaluate(*arguments)
    found = training.evaluate(*arguments, eval_step=training.make_eval_step(model, precision=low))
    assert found.loss.dtype == torch.float32
    assert found.loss != expected.loss
    assert abs(found.loss - expected.loss) < 2 * ROUNDING[low] * expected.loss


@pytest.mark.parametrize("dtype", LOW.values())
def test_losses_of_a_model_in_16_bits_are_added_up_in_32(dtype: torch.dtype, generator: Generator) -> None:
    layers = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
    model = hf.hyperize(nn.Sequential(*layers), z_dim=4)
    params, batch_stats = tree.to(model.init(generator), dtype)
    x, labels = torch.randn(40_000, 16, generator=generator).to(dtype), torch.arange(40_000) % 10
    batches = zip(x.split(100), labels.split(100), strict=True)
    logits, _ = model.apply(params, batch_stats, x, train=False)
    expected = F.cross_entropy(logits.double(), labels)
    metrics = training.evaluate(model, params, batch_stats, batches)
    assert float(metrics.mean_loss) == pytest.approx(float(expected), rel=1e-4)
    optimizer = optim.sgd(0.1)
    state = tree.to(training.init_state(model, optimizer, generator), dtype)
    assert training.make_train_step(model, optimizer)(state, (x[:8], labels[:8]))[1].loss.dtype == torch.float32


def test_fp16_learns_under_a_scaled_loss(generator: Generator) -> None:
    model, _, (images, labels) = a_problem(generator)
    batch = images[:8, :, ::2, ::2], labels[:8]  # a CPU imitates fp16, slowly
    optimizer = optim.scaled(optim.adam(0.002), first=2.0**24)
    state = training.init_state(model, optimizer, generator)
    step = training.make_train_step(model, optimizer, precision="fp16")
    losses: list[float] = []
    for _ in range(25):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss) / 8)
    # The first scale overflows, and is found to; the losses shown are those before any scale.
    assert state.opt_state.scale < 2.0**24
    assert losses[0] == pytest.approx(2.3, abs=0.5)
    assert losses[-1] < 0.3 * losses[0]


def test_the_loss_that_is_shown_is_not_scaled(generator: Generator) -> None:
    model, state, batch = a_problem(generator)
    plain, scaled = optim.sgd(0.1), optim.scaled(optim.sgd(0.1), first=2.0**10)
    one, expected = training.make_train_step(model, plain)(state._replace(opt_state=plain.init(state.params)), batch)
    other, found = training.make_train_step(model, scaled)(state._replace(opt_state=scaled.init(state.params)), batch)
    assert found.loss == expected.loss
    torch.testing.assert_close(tree.ravel(other.params)[0], tree.ravel(one.params)[0])


def test_unknown_names_are_refused() -> None:
    model = hf.hyper_resnet(10)
    expected = "precision: got 'bfloat16', expected one of fp32, tf32, bf16, fp16"
    with pytest.raises(ValueError, match=expected):
        unchecked(training.make_train_step)(model, optim.adam(0.1), precision="bfloat16")
    with pytest.raises(ValueError, match=expected):
        unchecked(training.make_eval_step)(model, precision="bfloat16")


def test_choosing() -> None:
    assert precision.choose("auto", CPU) == "fp32"
    assert [precision.choose(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    with pytest.raises(ValueError, match=r"precision: got tf32, which needs an NVIDIA GPU of compute capability 8\.0"):
        precision.choose("tf32", CPU)
    with pytest.raises(ValueError, match=r"precision: got 'fp8', expected auto, fp32, tf32, bf16, fp16"):
        unchecked(precision.choose)("fp8", CPU)


def test_products_of_float32() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        precision.set_float32_products("tf32")
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        precision.set_float32_products("bf16")
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
