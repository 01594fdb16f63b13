"""python -m benchmarks.ranks 1 2 4: the time of a step on so many ranks, and of the pieces that it is made of.

Without numbers on one rank, on two and so on up to all GPUs; else on one and two of the CPU, whose cores are divided
among the ranks. What it prints, `benchmarks.scaling` reads.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import traceback
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import hyperfunc as hf
from benchmarks.cases import STEPS_A_REPLAY, Race, make_training, pictures, with_engine
from benchmarks.measure import seconds
from hyperfunc import distributed, launch, precision, sync_norm, tree

ROOT = Path(__file__).resolve().parent.parent
LARGE_BYTES = 2**26
"""Of a reduction that is all bandwidth."""


def numbers_of_ranks(gpus: int) -> list[int]:
    """1, 2, 4 and so on up to as many as there are GPUs, and that number itself; without a GPU one rank and two."""
    return sorted({*(2**n for n in range(gpus.bit_length())), gpus}) if gpus else [1, 2]


def say(line: str) -> None:
    print(f"ranks.py: {line}", file=sys.stderr)


def measure(program: "argparse.Namespace", ranks: int) -> dict[str, Any]:
    """What the ranks measured, in seconds: rank 0's clock, of each round; started by torch's launcher."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        flags = ["--rank", str(found), "--width", str(program.width), "--batch-size", str(program.batch_size)]
        flags += ["--rounds", str(program.rounds), "--engine", program.engine, *["--sync-bn"] * program.sync_bn]
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(ROOT)
        try:
            code = launch.launch(__file__, flags, ranks, max_restarts=0, say=say)
        finally:
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before
        if code:
            raise RuntimeError(f"the ranks ended with exit code {code}")
        return json.loads(found.read_text())


def make_step(ranks: distributed.Ranks, device: torch.device, program: argparse.Namespace, *, reduced: bool) -> Race:
    """Training with this rank's part of each batch."""
    steps = STEPS_A_REPLAY if "graph" in program.engine else 1
    given = pictures(device, steps * program.batch_size)
    model = hf.hyper_resnet(40, program.width)
    if program.sync_bn and reduced:
        model = sync_norm.synchronize(model)
    number_format = precision.choose("auto", device)
    step, state = make_training(model, given, number_format, part=ranks.part, reduce=ranks.reduce if reduced else None)
    step = with_engine(step, program.engine, state, given.draws[0], program.batch_size)
    draws = cycle(given.draws)

    def run() -> None:
        nonlocal state
        state, _ = step(state, next(draws))

    return Race(run, steps)


def rank_main(program: argparse.Namespace) -> None:
    """What every rank does; rank 0 writes what it measured."""
    device = torch.device("cuda", distributed.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # as train.py has it
    with distributed.joined(device, 300, lambda: None, say) as ranks:
        params, batch_stats = hf.hyper_resnet(40, program.width).init(torch.Generator().manual_seed(0))
        numbers = tree.num_params((params, batch_stats)) + 4
        buffers = [torch.zeros(size, device=device) for size in (1, numbers, LARGE_BYTES // 4)]
        repeat = 20 if device.type == "cuda" else 1

        def rounds(race: Race, count: int) -> list[float]:
            for _ in range(3):
                race.call()
            times: list[float] = []
            for _ in range(count):
                dist.barrier()
                times.append(seconds(race.call, repeat) / race.steps)
            return times

        compute = rounds(make_step(ranks, device, program, reduced=False), program.rounds)
        found: dict[str, Any] = {
            "ranks": ranks.world,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "precision": precision.choose("auto", device),
            "width": program.width,
            "batch_size": program.batch_size,
            "bytes": 4 * numbers,
            "step": compute,
            "compute": statistics.median(compute),
        }
        if ranks.world > 1:
            found["step"] = rounds(make_step(ranks, device, program, reduced=True), program.rounds)
            for name, buffer in zip(("one_number", "buffer", "large"), buffers, strict=True):
                found[f"reduce_{name}"] = statistics.median(
                    rounds(Race(lambda buffer=buffer: dist.all_reduce(buffer)), 100 if buffer.numel() < 10**6 else 10)
                )
        if ranks.rank == 0:
            Path(program.rank).write_text(json.dumps(found))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ranks", nargs="*", type=int, default=numbers_of_ranks(gpus := torch.cuda.device_count()))
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--engine", default="compiled-graph" if torch.cuda.is_available() else "eager")
    parser.add_argument("--sync-bn", action="store_true")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if gpus and max(given.ranks) > gpus:
        parser.error(f"got {max(given.ranks)} ranks, but torch sees {gpus} CUDA devices")
    return given


def main() -> None:
    program = parse()
    if program.rank:
        code = 0
        try:
            rank_main(program)
        except distributed.Told as told:
            code = told.code
        except Exception:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        # Python's end would wait for NCCL, which waits for the end of every captured graph.
        os._exit(code)
    for ranks in program.ranks:
        found = measure(program, ranks)
        print(json.dumps({**found, "step": statistics.median(found["step"])}), flush=True)


if __name__ == "__main__":
    main()
