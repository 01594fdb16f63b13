"""Histograms of every tensor of a pytree, as numbers that can be shown, stored or sent."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from hyperfunc import tree

BINS = 64
"""Of each histogram."""


class Histogram(NamedTuple):
    """How many values lie between each two edges."""

    counts: Int[np.ndarray, "bins"]
    edges: Float[np.ndarray, "bins+1"]


def histograms(values: Any) -> dict[str, Histogram]:
    """A histogram of each leaf over its own range, by the leaf's path.

    Numbers that are not finite are left out, and so is a leaf without any other.
    """
    found: dict[str, Histogram] = {}
    host = tree.map(torch.Tensor.double, tree.fetch(values))  # in which the range of no float32 overflows
    for path, leaf in tree.named_leaves(host).items():
        leaf = leaf[leaf.isfinite()]
        if not leaf.numel():
            continue
        low, high = (float(edge) for edge in leaf.aminmax())
        if low == high:
            low, high = low - 0.5, high + 0.5
        counts, edges = torch.histogram(leaf, BINS, range=(low, high))
        found[path] = Histogram(counts.long().numpy(), edges.numpy())
    return found
