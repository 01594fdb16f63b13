"""Batch norms over ranks, here over one; test_distributed has them over several."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

import hyperfunc as hf
from hyperfunc import sync_norm


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("mean", [0.0, 500.0])
def test_it_is_torchs_own_on_one_rank_also_far_from_zero(mean: float, generator: Generator) -> None:
    """Where squares of the mean would drown the variance in float32."""
    x = mean + 0.01 * torch.randn(64, 3, 4, 4, generator=generator)
    ours, theirs = sync_norm.convert(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)
    weights = torch.randn(x.shape, generator=generator)

    def value_and_gradient(norm: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        output = norm(leaf)
        (output * weights).sum().backward()
        assert leaf.grad is not None
        return output.detach(), leaf.grad

    # A hundredth of the spread, where float32 holds the values themselves to 6e-5 of it only.
    for found, expected in zip(value_and_gradient(ours), value_and_gradient(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.std()))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_an_input_of_16_bits_stays_one(generator: Generator) -> None:
    norm = sync_norm.convert(nn.BatchNorm2d(3))
    output = norm(torch.randn(8, 3, 4, 4, generator=generator).bfloat16())
    assert output.dtype == torch.bfloat16
    assert norm.get_buffer("running_var").dtype == torch.float32


@pytest.mark.usefixtures("one_rank")
def test_one_example_over_all_ranks_leaves_the_statistics_finite() -> None:
    norm = sync_norm.convert(nn.BatchNorm1d(3))
    assert norm(torch.ones(1, 3)).isfinite().all()
    assert norm.get_buffer("running_var").tolist() == pytest.approx([0.9] * 3)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (OwnNorm(16), "module: 0 is a OwnNorm, and what it does besides normalising is not known"),
        (nn.BatchNorm2d(16, momentum=None), "module: 0 has no momentum, no parameters or no running statistics"),
        (nn.BatchNorm2d(16, affine=False), "module: 0 has no momentum, no parameters or no running statistics"),
    ],
)
def test_what_cannot_be_replaced_is_named(norm: nn.Module, message: str) -> None:
    model = hf.hyperize(nn.Sequential(norm, nn.Conv2d(16, 16, 3)), targets=["1.weight"])
    with pytest.raises(ValueError, match=message):
        sync_norm.synchronize(model)
