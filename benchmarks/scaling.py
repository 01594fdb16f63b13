"""python -m benchmarks.scaling FILE: what a step takes on 1 to 1,024 ranks, by the model of docs/scaling.md.

FILE holds the lines that `benchmarks.ranks` printed, for two or more batch sizes and for 1 and 2 ranks or more.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import hyperfunc as hf
from benchmarks.ranks import LARGE_BYTES

NORMS = 37
"""Batch norms of depth 40."""

PAYS = 1.1
"""Twice the ranks pay where they make a step faster by this factor at least."""


class Pieces(NamedTuple):
    """What the model is made of, in seconds and bytes."""

    fixed: float
    per_picture: float
    latency: float
    bandwidth: float
    size: int
    row: int
    """Bytes that `sync_norm` gathers of a rank in the batch norms of one pass, forward or backward."""


def fit(found: Sequence[dict[str, Any]]) -> Pieces:
    """The pieces from measurements: a straight line through the compute times, and the all-reduces of 2 ranks.

    Raises:
        ValueError: The measurements are of one part size only, or hold no two ranks.
    """
    parts = [one["batch_size"] / one["ranks"] for one in found]
    reduced = [one for one in found if one["ranks"] == 2]
    if len(set(parts)) < 2 or not reduced:
        raise ValueError("expected measurements of 2 ranks, and of two sizes of a rank's part at least")
    per_picture, fixed = np.polyfit(parts, [one["compute"] for one in found], 1)
    latency = float(np.median([one["reduce_one_number"] for one in reduced]))
    large = float(np.median([one["reduce_large"] for one in reduced]))
    # On two ranks each sends half of the bytes, and then the other half: 2 (W - 1) / W is one.
    first = found[0]
    row = row_bytes(first["width"])
    return Pieces(max(0.0, float(fixed)), float(per_picture), latency, LARGE_BYTES / large, first["bytes"], row)


def row_bytes(width: int) -> int:
    """Of all batch norms: a mean and squares of each channel, and a count, in float32."""
    _, batch_stats = hf.hyper_resnet(40, width).init(torch.Generator().manual_seed(0))
    return 4 * (hf.num_params(batch_stats) + NORMS)


def step_seconds(pieces: Pieces, ranks: int, batch_size: int, *, sync_bn: bool = False) -> float:
    """t(W, B) = compute(B / W) + alpha(W) + 2 (W - 1) / W bytes / bandwidth, with alpha(W) = alpha(2) log2 W.

    With synchronised batch norms the bytes of each pass are a row of every rank's.
    """
    compute = pieces.fixed + pieces.per_picture * batch_size / ranks
    if ranks == 1:
        return compute
    collectives = 1 + 2 * NORMS * sync_bn
    latency = pieces.latency * math.log2(ranks) * collectives
    size = pieces.size + 2 * ranks * pieces.row * sync_bn
    return compute + latency + 2 * (ranks - 1) / ranks * size / pieces.bandwidth


def table(pieces: Pieces, batch_sizes: Sequence[int], *, sync_bn: bool) -> str:
    """Times faster than one rank, for every batch size that the ranks divide."""
    lines = ["| ranks | " + " | ".join(f"batch {size:,}" for size in batch_sizes) + " |"]
    lines.append("| ---: |" + " ---: |" * len(batch_sizes))
    for ranks in (2**n for n in range(11)):
        cells: list[str] = []
        for size in batch_sizes:
            if size % ranks:
                cells.append("")
                continue
            now = step_seconds(pieces, ranks, size, sync_bn=sync_bn)
            gain = step_seconds(pieces, 1, size, sync_bn=sync_bn) / now
            cells.append(f"{_three_digits(1000 * now)} ms, {_three_digits(gain)} times")
        lines.append(f"| {ranks:,} | " + " | ".join(cells) + " |")
    last = [f"batch {size:,}: {last_that_pays(pieces, size, sync_bn=sync_bn):,}" for size in batch_sizes]
    return "\n".join([*lines, "", f"Doubling pays up to this many ranks: {'; '.join(last)}."])


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def last_that_pays(pieces: Pieces, batch_size: int, *, sync_bn: bool) -> int:
    """The most ranks that twice fewer are slower than by a factor of `PAYS`."""
    ranks = 1
    while batch_size % (2 * ranks) == 0 and ranks < 1024:
        now, then = (step_seconds(pieces, count, batch_size, sync_bn=sync_bn) for count in (ranks, 2 * ranks))
        if now < PAYS * then:
            break
        ranks *= 2
    return ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="what benchmarks.ranks printed")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 1024, 8192, 131072])
    parser.add_argument("--sync-bn", action="store_true")
    given = parser.parse_args()
    pieces = fit([json.loads(line) for line in given.file.read_text().splitlines()])
    print(
        f"compute(b) = {1000 * pieces.fixed:.3g} ms + b {1000 * pieces.per_picture:.3g} ms; "
        f"alpha(2) = {1e6 * pieces.latency:.3g} us; {pieces.bandwidth / 1e9:.3g} GB/s; {pieces.size:,} bytes\n"
    )
    print(table(pieces, given.batch_sizes, sync_bn=given.sync_bn))


if __name__ == "__main__":
    main()
