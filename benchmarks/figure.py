"""python -m benchmarks.figure FILE.json -o FILE.png: pictures a second by engine and batch size, against the floor."""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.cases import ENGINES

GROUP = "training step of 40-"


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel for every width and batch size that was measured, a bar for every engine.

    Raises:
        ValueError: The results hold no training step.
    """
    steps = [b for b in results["benchmarks"] if b["group"].startswith(GROUP) and "bytes_floor" in str(b["extra_info"])]
    sizes = sorted({(b["extra_info"]["width"], b["extra_info"]["batch_size"]) for b in steps})
    if not sizes:
        raise ValueError("results: hold no training step; run benchmarks/test_step.py with --benchmark-json")
    figure = Figure(figsize=(3.2 * len(sizes), 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (width, batch_size) in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        found = {b["extra_info"]["case"]: b["extra_info"] for b in steps if _size(b) == (width, batch_size)}
        names = [name for name in ENGINES if name in found]
        speeds = [found[name]["images_per_second"] for name in names]
        bars = axes.bar(names, speeds, color=["0.6" if name in ("looped", "plain") else "C0" for name in names])
        axes.bar_label(bars, [f"{speed:,}" for speed in speeds], fontsize=8)
        # Of the fastest number format in the picture; ordinary weights have less to do.
        limits = [info for name, info in found.items() if name != "plain"] or list(found.values())
        for kind, style in (("flop", "--"), ("bytes", ":")):
            floor = max(info[f"{kind}_floor_images_per_second"] for info in limits)
            axes.axhline(floor, color="C3", linestyle=style, label=f"{kind}: {floor:,}")
        axes.set_yscale("log")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.6)
        axes.set_ylabel("pictures a second")
        axes.set_title(f"40-{width}, batch {batch_size}", fontsize=10)
        axes.tick_params(axis="x", rotation=40, labelsize=8)
        axes.legend(title="limit of the machine", fontsize=7, title_fontsize=7)
    machine = results["machine_info"]
    figure.suptitle(f"{machine['device']}, torch {machine['versions']['torch']}", fontsize=10)
    figure.savefig(path)


def _size(benchmark: dict[str, Any]) -> tuple[int, int]:
    return benchmark["extra_info"]["width"], benchmark["extra_info"]["batch_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture, .png or .svg")
    arguments = parser.parse_args()
    draw(json.loads(arguments.file.read_text()), arguments.output)


if __name__ == "__main__":
    main()
