import math
from typing import Any

import pytest
from helpers import unchecked
from torch import Generator, nn

import hyperfunc as hf


def test_totals_are_the_papers() -> None:
    totals = hf.summary(hf.hyper_resnet(40)).totals
    assert totals.ordinary == 562_730
    assert totals.whole == 96_570 == totals.primary + totals.generator + totals.embeddings
    assert totals.embeddings == 242 * 64
    assert totals.compression == 562_730 / 96_570


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 40, (1, 3)), nn.ConvTranspose2d(40, 24, 4, 2), nn.Flatten(), nn.Linear(24, 5)
    )


@pytest.mark.parametrize("sizes", [{}, {"z_dim": 8, "hidden_dim": 5, "unit": (8, 4)}])
def test_numbers_are_those_of_the_parameters(generator: Generator, sizes: dict[str, Any]) -> None:
    model = hf.hyperize(net(), **sizes)
    params, _ = model.init(generator)
    rows, totals = hf.summary(model)
    assert totals.ordinary == hf.num_params(dict(net().named_parameters()))
    assert totals.primary == hf.num_params(params.primary)
    assert totals.generator == hf.num_params(params.generator)
    assert totals.embeddings == hf.num_params(params.embeddings)
    assert totals.whole == hf.num_params(params)
    assert [row.name for row in rows] == ["1.weight", "2.weight"]
    assert {row.generator: row.units for row in rows} == {key: len(z) for key, z in params.embeddings.items()}


def test_standard_deviations_are_the_designed_or_the_measured(generator: Generator) -> None:
    model = hf.hyperize(net(), z_dim=32)
    params, _ = model.init(generator)
    designed, measured = hf.summary(model).rows, hf.summary(model, params).rows
    assert [row.fan_in for row in designed] == [48, 40 * 16 / 4]
    assert [row.std for row in designed] == [math.sqrt(2 / 48), math.sqrt(2 / 160)]
    kernels = model.kernels(params)
    for row, plan in zip(measured, designed, strict=True):
        assert row.std == pytest.approx(kernels[row.name].std(correction=0).item())
        assert row.std == pytest.approx(plan.std, rel=0.1)
    wild = hf.hyperize(net(), init="clipped-normal")
    assert all(math.isnan(row.std) for row in hf.summary(wild).rows)
    assert hf.summary(wild, wild.init(generator)[0]).rows[0].std > 10


def test_the_table() -> None:
    text = str(hf.summary(hf.hyperize(net(), z_dim=8)))
    assert text.splitlines()[:4] == [
        "tensor    shape      generator  grid  units  fan-in     std",
        "-----------------------------------------------------------",
        "1.weight  40x16x1x3  1x3         3x1      3      48  0.2041",
        "2.weight  40x24x4x4  4x4         2x3      6     160  0.1118",
    ]
    assert "compression" in text.splitlines()[-1]
    assert "with ordinary weights  17,917" in text
    assert " -\n" in str(hf.summary(hf.hyperize(net(), init="clipped-normal")))


def test_a_model_that_generates_nothing_has_an_empty_table() -> None:
    rows, totals = hf.summary(hf.resnet(10))
    assert rows == ()
    assert (totals.generator, totals.embeddings, totals.compression) == (0, 0, 1.0)
    assert "with ordinary weights  75,530" in str(hf.summary(hf.resnet(10)))


def test_parameters_of_another_model_are_named(generator: Generator) -> None:
    params, _ = hf.hyper_resnet(10).init(generator)
    with pytest.raises(
        ValueError, match=r"params: they hold embeddings \{'3x3': 32\} and the model needs \{'3x3': 74\}"
    ):
        hf.summary(hf.hyper_resnet(16), params)


def test_a_conditional_is_no_model() -> None:
    model = hf.conditional(hf.hyper_resnet(10), hf.conditions.table(2))
    with pytest.raises(
        ValueError, match="model: got Conditional, expected a Model; a Conditional, .* as their `model`"
    ):
        unchecked(hf.summary)(model)
