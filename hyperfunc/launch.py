"""Which devices a run uses, and its start on several of them through torch's elastic launcher."""

import contextlib
import dataclasses
import logging
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hyperfunc.exits import AFTER_SIGNAL, EXIT_FAILED

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""What the launcher hands on to the ranks."""


def parse_devices(text: str) -> tuple[str, list[int] | int | None]:
    """Reads `--devices`: ("auto", None), ("cpu", count), ("cuda", count) or ("cuda", ids).

    Raises:
        ValueError: It is none of these.
    """
    if text == "auto":
        return "auto", None
    if match := re.fullmatch(r"cpu:([1-9][0-9]{0,3})", text):
        return "cpu", int(match[1])
    if re.fullmatch(r"[1-9][0-9]{0,3}", text):
        return "cuda", int(text)
    if re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*,?", text) and "," in text:
        ids = [int(part) for part in text.strip(",").split(",")]
        if len(set(ids)) == len(ids):
            return "cuda", ids
    raise ValueError(
        f"got {text!r}, expected auto, a number of GPUs (2), their ids (0,1 or, for a single one, 3,), "
        "or a number of ranks on the CPU (cpu:2)"
    )


def visible_gpus() -> int:
    """How many GPUs torch sees; without a driver that counts them, 0.

    Raises:
        ValueError: It sees some and can use none, as with a driver that is too old for it.
    """
    count = torch.cuda.device_count()
    if count and not torch.cuda.is_available():
        raise ValueError(
            f"--device: torch sees {count} GPUs, but can use none; python -m hyperfunc.check_gpu says why, "
            "--device cpu does without"
        )
    return count


def choose_devices(devices: str, kind: str, visible: int) -> list[torch.device]:
    """The devices on this machine, one a rank.

    Args:
        devices: `--devices`.
        kind: `--device`: "auto", "cpu" or "cuda".
        visible: How many GPUs torch sees.

    Raises:
        ValueError: They are not there, or the two flags contradict each other.
    """
    asked, which = parse_devices(devices)
    if asked == "cpu":
        if kind == "cuda":
            raise ValueError(f"--devices: got {devices} with --device cuda; omit one of them")
        assert isinstance(which, int)
        return [torch.device("cpu")] * which
    if kind == "cuda" and not visible:
        raise ValueError(
            "--device: got cuda, but torch sees no CUDA device; python -m hyperfunc.check_gpu says why, "
            "--device cpu does without"
        )
    if kind == "cpu" or not visible:
        if which not in (None, 1):
            found = "with --device cpu" if kind == "cpu" else "but torch sees no CUDA device"
            raise ValueError(f"--devices: got {devices}, {found}; cpu:2 is two ranks on the CPU")
        return [torch.device("cpu")]
    ids = list(range(visible)) if which is None else list(range(which)) if isinstance(which, int) else which
    if max(ids) >= visible:
        raise ValueError(f"--devices: got {devices}, but torch sees {visible} CUDA devices, 0 to {visible - 1}")
    return [torch.device("cuda", index) for index in ids]


def check_batch_size(batch_size: int, ranks: int) -> None:
    """Raises a ValueError, which names what is near, where a batch cannot be divided evenly over the ranks."""
    if batch_size % ranks == 0:
        return
    below, above = batch_size - batch_size % ranks, batch_size + ranks - batch_size % ranks
    sizes = " or ".join(str(size) for size in (below, above) if size)
    near = (n for n in range(1, min(batch_size, 2 * ranks) + 1) if batch_size % n == 0)
    counts = sorted(near, key=lambda n: abs(n - ranks))[:2]
    raise ValueError(
        f"--batch-size: got {batch_size} for {ranks} ranks, expected a multiple of {ranks}, for example {sizes}; "
        f"or {' or '.join(map(str, sorted(counts)))} ranks"
    )


def signals_to_hand_on() -> list[str]:
    """`SIGNALS`; but a process started by `nohup`, and its ranks with it, goes on ignoring a closed terminal."""
    hung_up = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [name for name in SIGNALS if name != "SIGHUP" or not hung_up]


@contextlib.contextmanager
def _unhandled(number: signal.Signals) -> Iterator[None]:
    """A context in which `signal.signal` sets no other handler for a signal: older versions of torch handle what they
    know, whatever they are told. To block it would not do, because a thread of some library would still take it."""
    set_handler = signal.signal

    def set_other(which: int, handler: Any) -> Any:
        return signal.getsignal(which) if which == number else set_handler(which, handler)

    signal.signal = set_other
    try:
        yield
    finally:
        signal.signal = set_handler


def has_said_why(logs: Path) -> bool:
    """Whether a rank of the last start has left the reason why it ended, by torch's elastic error file."""
    starts = {int(path.name.removeprefix("attempt_")): path for path in logs.glob("*/attempt_*")}
    return bool(starts) and any(starts[max(starts)].glob("*/error.json"))


def launch(program: str, argv: Sequence[str], ranks: int, *, max_restarts: int, say: Callable[[str], object]) -> int:
    """Runs a Python program on so many ranks of this machine and returns the exit code of them all.

    Signals are handed on to the ranks, which are killed if they have not ended 30 seconds later.

    Args:
        program: Its path.
        argv: Its arguments.
        ranks: How many.
        max_restarts: How often all are started again after one has failed.
        say: Takes the line about a rank that was killed, where none of the others has named it.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    handed_on = signals_to_hand_on()
    environment = {
        # Ranks that all compute with all cores would only wait for each other. Torch knows how many are this process's.
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks)),
        # Whoever loses the store says so in a line, without what torch's own code has to say of it.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **os.environ,
        # What older versions of torch read.
        "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(handed_on),
    }
    with tempfile.TemporaryDirectory(prefix="hyperfunc-") as logs, contextlib.ExitStack() as stack:
        known = {item.name for item in dataclasses.fields(LaunchConfig)}
        newer: dict[str, Any] = {"signals_to_handle": ",".join(handed_on)}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            **{name: value for name, value in newer.items() if name in known},
        )
        # The launcher has its environment from here and hands it on.
        stack.callback(os.environ.update, dict(os.environ))
        stack.callback(os.environ.clear)
        os.environ.update(environment)
        # The ranks say themselves what went wrong.
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        if "SIGHUP" not in handed_on:
            stack.enter_context(_unhandled(signal.SIGHUP))
        for number in map(signal.Signals.__getitem__, SIGNALS):
            stack.callback(signal.signal, number, signal.getsignal(number))
        try:
            elastic_launch(config, sys.executable)(program, *argv)
        except SignalException as stopped:
            return AFTER_SIGNAL + stopped.sigval
        except UnboundLocalError as error:
            # A signal may come while torch's own launcher is about to look at the clock, which it then reads unset.
            if not isinstance(error.__context__, SignalException):
                raise
            return AFTER_SIGNAL + error.__context__.sigval
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            if failure.exitcode >= 0:
                return failure.exitcode
            if not has_said_why(Path(logs)):
                say(f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}")
            return EXIT_FAILED
    return 0
