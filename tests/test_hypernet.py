import math

import oracle
import pytest
import torch
from helpers import unchecked
from torch import Generator

from hyperfunc import hypernet, tree
from hyperfunc.hypernet import (
    generate_kernel,
    generate_kernels,
    generate_kernels_at_once,
    init_embeddings,
    init_generator,
)


@pytest.mark.parametrize("window", [(3, 3), (), (5,), (1, 1), (2, 3, 4)])
@pytest.mark.parametrize("unit", [(16, 16), (4, 6)])
def test_equation_2(generator: Generator, window: tuple[int, ...], unit: tuple[int, int]) -> None:
    p = init_generator(generator, window=window, unit=unit, z_dim=7, hidden_dim=5, init="clipped-normal")
    p = tree.to(p, torch.float64)
    z = torch.randn(7, generator=generator, dtype=torch.float64)
    kernel = generate_kernel(p, z)
    assert kernel.shape == (*unit, *window)
    torch.testing.assert_close(kernel, oracle.kernel(p, z), rtol=oracle.EXACT, atol=oracle.EXACT)


def test_shapes_are_the_papers(generator: Generator) -> None:
    p = init_generator(generator, window=(3, 3), z_dim=64)
    assert [tuple(leaf.shape) for leaf in p] == [(16, 64, 64), (16, 64), (16, 3, 3, 64), (16, 3, 3)]


def test_vmapped_equals_looped(generator: Generator) -> None:
    p = tree.to(init_generator(generator, window=(3, 3), init="clipped-normal"), torch.float64)
    z = torch.randn(9, 64, generator=generator, dtype=torch.float64)
    looped = torch.stack([generate_kernel(p, row) for row in z])
    torch.testing.assert_close(generate_kernels(p, z), looped, rtol=oracle.EXACT, atol=oracle.EXACT)


@pytest.mark.parametrize("units", [3, 500])  # few, and enough for the layers to be multiplied into one
@pytest.mark.parametrize("window", [(3, 3), (), (5,)])
def test_at_once_equals_mapped_with_its_gradients(generator: Generator, window: tuple[int, ...], units: int) -> None:
    p = init_generator(generator, window=window, unit=(6, 4), z_dim=7, hidden_dim=10, init="clipped-normal")
    p = tree.to(p, torch.float64)
    z = torch.randn(units, 7, generator=generator, dtype=torch.float64)
    ours, our_backward = torch.func.vjp(generate_kernels_at_once, p, z)[:2]
    theirs, their_backward = torch.func.vjp(generate_kernels, p, z)[:2]
    torch.testing.assert_close(ours, theirs, rtol=oracle.EXACT, atol=oracle.EXACT)
    cotangent = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(tree.leaves(our_backward(cotangent)), tree.leaves(their_backward(cotangent)), strict=True):
        torch.testing.assert_close(a, b, rtol=oracle.EXACT, atol=oracle.EXACT)


def test_he_gives_every_kernel_its_scale(generator: Generator) -> None:
    p = init_generator(generator, window=(3, 3))
    std = torch.linspace(0.01, 0.3, 20)
    rms = generate_kernels(p, init_embeddings(generator, p, std)).flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(rms, std)


def test_clipped_normal_is_folded_and_far_too_large(generator: Generator) -> None:
    p = init_generator(generator, window=(3, 3), init="clipped-normal")
    z = init_embeddings(generator, p, torch.full((50,), 0.1), init="clipped-normal")
    for leaf in (*p, z):
        assert leaf.abs().max() < 2
    # The variance of a unit normal folded into (-2, 2): each fold moves the tails inwards by 2.
    folded = torch.fmod(torch.randn(10**6, generator=generator), 2).square().mean().item()
    assert p.w_in.square().mean().item() == pytest.approx(folded, rel=0.02)
    assert generate_kernels(p, z).std() > 300 * math.sqrt(2 / 144)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z_dim": 0}, "z_dim: got 0"),
        ({"hidden_dim": -1}, "hidden_dim: got -1"),
        ({"unit": (16, 0)}, r"unit: got \(16, 0\)"),
        ({"window": (3, 0)}, r"window: got \(3, 0\)"),
        ({"init": "xavier"}, "init: got 'xavier', expected one of he, clipped-normal"),
    ],
)
def test_bad_input(generator: Generator, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        # The checker of argument types would refuse the name of an unknown initialisation before the function can.
        unchecked(init_generator)(generator, **{"window": (3, 3), **arguments})


def test_module_exports() -> None:
    assert hypernet.HyperNetParams._fields == ("w_in", "b_in", "w_out", "b_out")
