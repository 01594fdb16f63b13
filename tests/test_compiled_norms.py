"""The batch norms of a compiled step are torch's own."""

import oracle
import pytest
import torch
from helpers import assert_trees_equal
from torch import Generator, Tensor, nn
from torch.func import vjp
from torch.nn import functional as F

import hyperfunc as hf
from hyperfunc import capture, compiled_norms

SHAPES = [(4, 3, 5, 6), (1, 16, 8, 8), (6, 2, 1, 1), (2, 64, 40, 40)]
"""The last is too large for a part to be a whole picture."""


def outcome(norm: object, x: Tensor, affine: bool) -> tuple[Tensor, ...]:
    """The output, the gradients, and the running statistics that are written."""
    start = torch.linspace(0.5, 2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    mean, variance = start.clone(), start.flip(0)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        statistics = mean.clone(), variance.clone()
        parameters = (weight, bias) if affine else (None, None)
        return norm(x, *statistics, *parameters, True, 0.3, 1e-3), statistics  # pyright: ignore[reportCallIssue]

    answer = vjp(function, x, start, start.square(), has_aux=True)
    output, pull_back, statistics = answer  # pyright: ignore[reportAssignmentType]
    # Of numbers that all types hold.
    cotangent = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape).cos().bfloat16()
    return (output, *pull_back(cotangent.to(x.dtype)), *statistics)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_torchs_own(
    shape: tuple[int, ...], affine: bool, memory_format: torch.memory_format, generator: Generator
) -> None:
    x = 3 + torch.randn(shape, generator=generator, dtype=torch.float64).to(memory_format=memory_format)
    ours, theirs = outcome(compiled_norms.batch_norm, x, affine), outcome(F.batch_norm, x, affine)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=oracle.EXACT, atol=oracle.EXACT)


def test_second_derivatives_are_torchs_own(generator: Generator) -> None:
    x = torch.randn(3, 2, 2, 2, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def function(norm: object) -> Tensor:
        def value(x: Tensor) -> Tensor:
            running = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
            return (norm(x, *running, None, None, True) * cotangent).sum()  # pyright: ignore[reportCallIssue]

        return torch.func.jacrev(torch.func.grad(value))(x)

    ours, theirs = function(compiled_norms.batch_norm), function(F.batch_norm)
    torch.testing.assert_close(ours, theirs, rtol=oracle.EXACT, atol=oracle.EXACT)


def test_a_mean_far_from_zero_does_not_drown_the_variance(generator: Generator) -> None:
    x = 500 + 0.01 * torch.randn(64, 3, 4, 4, generator=generator)
    ours, expected = outcome(compiled_norms.batch_norm, x, True), outcome(F.batch_norm, x.double(), True)
    # A hundredth of the spread: float32 holds the numbers themselves to 6e-3 of it only.
    for found, reference in ((ours[0], expected[0]), (ours[-1], expected[-1])):
        torch.testing.assert_close(found.double(), reference, rtol=2e-2, atol=2e-2 * float(reference.std()))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_float32(low: torch.dtype, generator: Generator) -> None:
    x = (3 + torch.randn(4, 3, 16, 16, generator=generator)).to(low)
    ours, exact = outcome(compiled_norms.batch_norm, x, True), outcome(F.batch_norm, x.double(), True)
    # The pictures and their gradient come in 16 bits, rounded once or twice; sums do not.
    tolerances = [2 * torch.finfo(low).eps, 2 * torch.finfo(low).eps, *[1e-5] * 4]
    for found, expected, tolerance in zip(ours, exact, tolerances, strict=True):
        assert found.dtype == (low if found.dim() == 4 else torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("norm", "x", "is_ours"),
    [
        (nn.BatchNorm2d(3), torch.ones(2, 3, 2, 2), True),
        (nn.BatchNorm2d(3).eval(), torch.ones(2, 3, 2, 2), False),
        (nn.BatchNorm2d(3, track_running_stats=False), torch.ones(2, 3, 2, 2), False),
        (nn.BatchNorm2d(3, momentum=None), torch.ones(2, 3, 2, 2), True),
        (nn.BatchNorm1d(3), torch.ones(2, 3), False),
        (nn.BatchNorm1d(3), torch.ones(2, 3, 2), False),
        (nn.BatchNorm2d(3), torch.ones(2, 3, 2, 2).bfloat16(), True),
        (nn.BatchNorm2d(3).bfloat16(), torch.ones(2, 3, 2, 2).bfloat16(), False),
    ],
)
def test_only_what_it_is_made_for_is_taken(
    norm: nn.Module, x: Tensor, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    original = compiled_norms.batch_norm

    def noting(*args: object, **kwargs: object) -> Tensor:
        calls.append(x)
        return original(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(compiled_norms, "batch_norm", noting)
    with compiled_norms.CompiledNorms():
        assert norm(x).shape == x.shape
    assert bool(calls) == is_ours


def small_network() -> nn.Module:
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)
    return nn.Sequential(*layers).double()


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_kernels")
def test_a_compiled_network_takes_it(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of a compiled step are new ones, and the old are left alone."""
    model = hf.hyperize(small_network(), targets=["3.weight"])
    state = model.init(generator)
    images = torch.randn(4, 3, 9, 9, generator=generator, dtype=torch.float64)

    def step(state: tuple[hf.Params, hf.BatchStats], images: Tensor) -> tuple[Tensor, hf.BatchStats]:
        return model.apply(*state, images, train=True)

    before = {name: value.clone() for name, value in state[1].items()}
    found, expected = capture.compile_step(step, images)(state, images), step(state, images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert_trees_equal(before, state[1])

    monkeypatch.setattr(compiled_norms, "batch_norm", lambda input, *_: input)
    assert not torch.allclose(capture.compile_step(step, images)(state, images)[0], expected[0])


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_kernels")
def test_it_can_be_mapped_when_compiled(generator: Generator) -> None:
    model = hf.ensemble(hf.hyperize(small_network(), targets=["3.weight"]), 2)
    state = model.init(generator)
    images = torch.randn(4, 3, 9, 9, generator=generator, dtype=torch.float64)

    def step(state: tuple[hf.Params, hf.BatchStats], images: Tensor) -> object:
        return model.apply(*state, images, train=True)

    found, expected = capture.compile_step(step, images)(state, images), step(state, images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_kernels")
def test_norms_over_samples_stay_what_they_are_when_compiled(generator: Generator) -> None:
    """Those of `apply_each` span the samples that vmap hides."""
    model = hf.conditional(hf.hyperize(small_network(), targets=["3.weight"]), hf.conditions.table(3))
    state = model.init(generator)
    batch = torch.arange(3), torch.randn(3, 3, 9, 9, generator=generator, dtype=torch.float64)

    def step(state: tuple[hf.ConditionalParams, hf.BatchStats], batch: tuple[Tensor, Tensor]) -> object:
        return model.apply_each(*state, *batch, train=True)

    found, expected = capture.compile_step(step, batch)(state, batch), step(state, batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
