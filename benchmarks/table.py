"""python -m benchmarks.table FILE.json: the results of a run of the benchmarks as tables in Markdown."""

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

HEADER = "| | median | against its rival | pictures a second |\n| --- | ---: | ---: | ---: |"


def tables(results: dict[str, Any]) -> str:
    """A heading that names the machine, and a table a group."""
    machine = results["machine_info"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    parts = [f"{machine['device']}; {versions}"]
    ordered = sorted(results["benchmarks"], key=lambda benchmark: benchmark["group"])
    for group, benchmarks in groupby(ordered, key=lambda benchmark: benchmark["group"]):
        rows = [row(benchmark) for benchmark in sorted(benchmarks, key=lambda b: -b["stats"]["median"])]
        parts.append("\n".join([f"**{group[0].upper()}{group[1:]}**", "", HEADER, *rows]))
    return "\n\n".join(parts)


def row(benchmark: dict[str, Any]) -> str:
    """One benchmark's line: the time of one step where a round holds several."""
    info = benchmark["extra_info"]
    seconds = benchmark["stats"]["median"] / info.get("steps_per_round", 1)
    ratio = f"{info['times_faster']:.2f} times faster ({info['pairs']} pairs)" if "times_faster" in info else ""
    speed = f"{info['images_per_second']:,}" if "images_per_second" in info else ""
    return f"| {info['case']} | {1000 * seconds:,.4g} ms | {ratio} | {speed} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="what --benchmark-json wrote")
    print(tables(json.loads(parser.parse_args().file.read_text())))


if __name__ == "__main__":
    main()
