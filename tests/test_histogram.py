import numpy as np
import torch
from torch import Generator

import hyperfunc as hf
from hyperfunc.histogram import BINS, histograms


def test_counts_and_edges_are_numpys(generator: Generator) -> None:
    values = torch.randn(10_000, generator=generator)
    (found,) = histograms({"x": values}).values()
    counts, edges = np.histogram(values.numpy(), BINS)
    np.testing.assert_allclose(found.edges, edges, rtol=1e-5, atol=1e-6)
    assert found.counts.sum() == len(values)
    assert np.abs(found.counts - counts).sum() <= 4  # of values on an edge, in float32


def test_every_leaf_has_one_by_its_path(generator: Generator) -> None:
    model = hf.hyper_resnet(10)
    params, _ = model.init(generator)
    found = histograms(params)
    assert "generator/3x3/w_in" in found
    assert "embeddings/3x3" in found
    assert sum(int(histogram.counts.sum()) for histogram in found.values()) == hf.num_params(params)


def test_one_value_and_no_value() -> None:
    found = histograms({"same": torch.full((5,), 3.0), "none": torch.empty(0), "nan": torch.tensor([float("nan")])})
    assert found.keys() == {"same"}
    assert found["same"].counts.sum() == 5
    assert (found["same"].edges[0], found["same"].edges[-1]) == (2.5, 3.5)


def test_what_is_not_finite_is_left_out() -> None:
    (found,) = histograms({"x": torch.tensor([1.0, 2.0, float("inf"), float("nan")])}).values()
    assert found.counts.sum() == 2
