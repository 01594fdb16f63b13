"""What a compiled step would launch on a GPU, as benchmarks/kernels.py counts it."""

import pytest
import torch
from torch import nn

import hyperfunc as hf
from hyperfunc import optim, training

pytestmark = [
    pytest.mark.traced,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="imitates a GPU, and so is for machines without one"),
    pytest.mark.skipif(not torch.__version__.startswith("2.14."), reason="reaches into private parts of torch 2.14"),
]


def layers(count: int) -> nn.Module:
    """Convolutions of one shape, of several tiles, each in front of a rectifier, with one at either end that is not
    generated."""
    inner = [layer for _ in range(count) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 64, 3), *inner, nn.Flatten(), nn.Linear(64 * 36, 10))


def test_kernels_of_a_gpu_are_counted_without_one(generator: torch.Generator) -> None:
    from benchmarks.kernels import kernels  # which can be imported under that torch alone

    found = []
    for count in (9, 10):
        model = hf.hyperize(layers(count), z_dim=4)
        optimizer = optim.sgd(0.1)
        state = training.init_state(model, optimizer, generator)
        batch = torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)
        step = training.make_train_step(model, optimizer, precision="bf16")
        found.append(kernels(step, state, batch))
    fewer, more = found
    assert (fewer["convolutions"], fewer["convolutions, backward"]) == (10, 10)
    # A layer more: a convolution each way, its bias with its rectifier, and the way back; to generate it costs none.
    more.subtract(fewer)
    assert (more["convolutions"], more["convolutions, backward"], more["matrix products"]) == (1, 1, 0)
    assert more["element by element"] + more["with sums or other reductions"] <= 3


def test_no_kernel_takes_sums_both_ways(generator: torch.Generator) -> None:
    """As Inductor otherwise makes them for a large layer norm; see `capture.compile_step`."""
    from benchmarks.kernels import written

    width, count = 512, 16384
    norm = nn.Sequential(nn.Linear(16, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 64), nn.Linear(64, 10))
    model = hf.hyperize(norm, z_dim=4)
    optimizer = optim.sgd(0.1)
    state = training.init_state(model, optimizer, generator)
    batch = torch.randn(count, 16, generator=generator), torch.arange(count) % 10
    code = written(training.make_train_step(model, optimizer), state, batch)
    assert "triton_per_" in code or "triton_red_" in code
    assert "MixOrder" not in code
