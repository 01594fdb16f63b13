"""Trains a hypernetwork for a residual network on pictures: python train.py --epochs 200

Everything that a run does is wired here, top to bottom; what it is made of is in the package.
"""

import os
import signal
import stat
import sys

if __name__ == "__main__":
    # Started with a stream closed, as by `>&-`, its number would go to the next file that is opened.
    for _number, _stream in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(_number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, _stream, open(_number, "w" if _number else "r", closefd=False))  # noqa: SIM115

    # Importing torch takes seconds, and Ctrl-C must not end in a traceback there either.
    def _exit_before_start(number: int, _frame: object) -> None:
        os.write(2, b"stopped before anything was read or written\n")
        os._exit(128 + number)

    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(_number, _exit_before_start)

import contextlib
import dataclasses
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import Timeout
from torch import Tensor

import hyperfunc as hf
from hyperfunc import (
    capture,
    checkpoint,
    data,
    distributed,
    journal,
    launch,
    optim,
    population,
    precision,
    runs,
    sweep,
    sync_norm,
    tracking,
    training,
    tree,
)
from hyperfunc.console import Printer, TrainingBars
from hyperfunc.curves import Painter
from hyperfunc.environment import describe_device, environment
from hyperfunc.files import beside, free_name, free_number, lock_for, numbered, temporary_name
from hyperfunc.files import sweep as sweep_files
from hyperfunc.flags import EXIT_BAD_INPUT, option, parse, shaping
from hyperfunc.hypernet import Init
from hyperfunc.interrupt import Interrupted, Interrupts, exit_at_once, ignore
from hyperfunc.precision import Precision
from hyperfunc.report import Reporter, handed_over
from hyperfunc.residual import Block, Shortcut, check_depth
from hyperfunc.training import Decay, Metrics, TrainState

EXIT_FAILED = 1

REPLAYED_STEPS = 10
"""Steps in one CUDA graph where --steps-per-replay is 0: what the host does for a replay is then a tenth a step."""

COMPILE_FROM_STEPS = 5000
"""Length of a run from which compiling on the CPU, which takes about a minute, is sure to pay."""

DEFAULT_PROJECT = "hypernetworks-gpu"

EPOCH_COLUMNS = {
    *("epoch", "step", "train/accuracy", "train/loss", "test/accuracy", "test/loss"),
    *("learning_rate", "epoch_time", "best_accuracy", "best_epoch"),
}
"""What the history of a run has of every epoch."""


class Every(NamedTuple):
    """How often something is done: every so many epochs, batches or seconds."""

    number: int
    unit: Literal["epochs", "batches", "seconds"]


def parse_every(text: str) -> Every:
    """2, 500s or 100b as what they mean.

    Raises:
        ValueError: It is none of these.
    """
    match = re.fullmatch(r"0*([1-9][0-9]{0,8})([sb]?)", text)
    if match is None:
        raise ValueError(f"got {text!r}, expected epochs (2), seconds (500s) or batches (100b), at least 1")
    units: dict[str, Literal["epochs", "batches", "seconds"]] = {"": "epochs", "b": "batches", "s": "seconds"}
    return Every(int(match[1]), units[match[2]])


@dataclass(frozen=True)
class Config:
    """One run. Every field is a flag of the command line, with dashes or underscores alike."""

    epochs: int = option(200, "run", "times over the training set", at_least=1, at_most=10**6)
    batch_size: int = option(
        128, "run", "pictures a step; the last batch of an epoch may be smaller", at_least=1, shapes=True
    )
    eval_batch_size: int = option(
        0, "run", "pictures at once in evaluation; 0 means 1000 on a GPU and 100 on the CPU", at_least=0
    )
    seed: int = option(0, "run", "of the initial parameters, the order and the augmentation", at_least=0, shapes=True)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "run", "auto takes a GPU where there is one")
    engine: Literal["auto", "eager", "compiled", "graph", "compiled-graph"] = option(
        "auto",
        "run",
        "how a step runs; auto is compiled-graph on a GPU; on the CPU it is compiled for runs long enough to earn that",
    )
    steps_per_replay: int = option(
        0,
        "run",
        "steps in one CUDA graph; 0 means 10 on a GPU, and what has no graph takes one",
        at_least=0,
        at_most=1000,
    )
    precision: Literal["auto", Precision] = option(
        "auto",
        "run",
        "of products and activations; parameters stay float32. auto is bf16 on a GPU that has it, else fp32",
        shapes=True,
    )
    devices: str = option(
        "auto",
        "ranks",
        "auto takes every GPU that is seen; 2: the first two; 0,1: those; cpu:2: two ranks on the CPU; torchrun's own "
        "number of ranks comes first",
        metavar="auto|N|I,J|cpu:N",
        check=launch.parse_devices,
    )
    sync_bn: bool = option(
        False, "ranks", "batch norms over the pictures of all ranks; without it each uses its own", shapes=True
    )
    timeout: float = option(300, "ranks", "seconds that a rank waits for another", at_least=2, at_most=86400)
    max_restarts: int = option(
        0, "ranks", "how often ranks are started again after a failure, to go on", at_least=0, at_most=1000
    )
    seeds: str = option(
        "",
        "population",
        "a run for each seed, with its own checkpoint (run.seed3.pth), and a table of all; spread over the devices",
        metavar="0,1,2",
        check=sweep.parse_seeds,
    )
    sweep: str = option(
        "",
        "population",
        'a JSON file of flags with lists of values, {"lr": [0.001, 0.002], "seed": [0, 1]}: a run for each combination',
        metavar="FILE",
    )
    seeds_per_step: int = option(
        0,
        "population",
        "runs that differ in nothing but the seed and share a step; 0 means 1 on the CPU, and on a GPU as many as "
        f"there are, up to {runs.SEEDS_PER_STEP}",
        at_least=0,
        at_most=1024,
    )

    report_every: int = option(50, "run", "batches from one line of loss and accuracy to the next", at_least=1)
    quiet: bool = option(False, "run", "say nothing but what goes wrong")

    model: Literal["hyper", "plain"] = option(
        "hyper",
        "network",
        "hyper generates the 3x3 kernels; plain is the same network with ordinary weights",
        shapes=True,
    )
    depth: int = option(40, "network", "layers, 6n + 4", at_most=1204, shapes=True)
    width: int = option(1, "network", "times 16, 32 and 64 channels", at_least=1, at_most=64, shapes=True)
    z_dim: int = option(64, "network", "length of an embedding", at_least=1, at_most=4096, shapes=True)
    hidden_dim: int = option(
        0, "network", "hidden length d of the generator; 0 means z-dim", at_least=0, at_most=4096, shapes=True
    )
    init: Init = option(
        "he",
        "network",
        "he: every kernel at He's variance; clipped-normal: unit normals folded into (-2, 2)",
        shapes=True,
    )
    shortcut: Shortcut = option(
        "pad", "network", "where a block changes the shape: zeros, or a 1x1 convolution", shapes=True
    )
    block: Block = option("post", "network", "normalisation and ReLU after the convolutions, or before", shapes=True)

    dataset: data.Name = option(
        "cifar10",
        "data",
        "folder: train/<class>/* and test/<class>/* in the data dir; digits: of scikit-learn",
        shapes=True,
    )
    data_dir: str = option("./data", "data", "where the data is, or is downloaded to")
    val_size: int = option(
        0,
        "data",
        "training pictures held out at random; the best model is then chosen by them",
        at_least=0,
        shapes=True,
    )
    train_size: int = option(
        0, "data", "training pictures to use, drawn at random; 0 means all", at_least=0, shapes=True
    )

    optimizer: Literal["adam", "adamw", "sgd"] = option(
        "adam", "optimization", "sgd is with Nesterov momentum 0.9, and wants --lr 0.1", shapes=True
    )
    lr: float = option(
        0.002, "optimization", "first, or highest, learning rate", at_least=1e-12, at_most=1e30, shapes=True
    )
    weight_decay: float = option(0.0005, "optimization", "L2 penalty", at_least=0, at_most=1e30, shapes=True)
    decay: Decay = option(
        "parameters",
        "optimization",
        "what the penalty is on: all parameters, or (as in the paper) the generated kernels and the ordinary weights",
        shapes=True,
    )
    schedule: Literal["multistep", "cosine", "paper", "constant"] = option(
        "multistep",
        "optimization",
        "multistep halves the rate at 30, 60 and 80 %% of the epochs; paper is the paper's table, scaled to the run",
        shapes=True,
    )
    warmup_epochs: float = option(
        5, "optimization", "of the cosine schedule; at most a tenth of the run", at_least=0, at_most=10**6, shapes=True
    )

    checkpoint_path: str = option("./hypernetworks_cifar_gpu.pth", "checkpoint", "the one file that holds the run")
    checkpoint_every: str = option(
        "1",
        "checkpoint",
        "from one save to the next: N epochs, Ns seconds or Nb batches; the end and a signal save as well",
        metavar="N|Ns|Nb",
        check=parse_every,
    )
    resume: bool = option(False, "checkpoint", "go on where the checkpoint stopped")

    no_wandb: bool = option(False, "tracking", "do without Weights & Biases")
    wandb_mode: tracking.Mode = option(
        "auto",
        "tracking",
        "auto is what WANDB_MODE says, else online where there is a key and offline where there is none",
    )
    wandb_project: str = option(
        DEFAULT_PROJECT, "tracking", "project on Weights & Biases; in the place of the default, WANDB_PROJECT counts"
    )
    wandb_name: str = option("", "tracking", "name of the run (default: hypernetworks_b{batch_size}_lr{lr}_e{epochs})")
    wandb_entity: str = option("", "tracking", "user or team on Weights & Biases; empty means the account's default")
    histogram_every: int = option(
        20,
        "tracking",
        "reports from one set of histograms of parameters, kernels and gradients to the next; 0 means none",
        at_least=0,
    )


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Reads the command line; what is wrong with it ends the program with exit code 2 and one line."""
    description = (__doc__ or "").splitlines()[0]
    return parse(Config, argv, prog="train.py", description=description, check=check_config, short={"resume": "-r"})


def check_config(config: Config) -> None:
    """Raises a ValueError for what the range of a single flag cannot say."""
    check_depth(config.depth)
    path = Path(config.checkpoint_path)
    try:
        is_something_else = not stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_something_else = False
    except OSError as error:
        raise ValueError(f"--checkpoint-path: {error}") from None
    if path.name in ("", "..") or config.checkpoint_path.endswith(os.sep) or is_something_else:
        raise ValueError(f"--checkpoint-path: got {config.checkpoint_path!r}, expected the path of a file")
    if config.seeds or config.sweep:
        members = [member for _, member in runs_of(config)]
        if config.resume and not any(member.resume for member in members):
            raise ValueError(
                f"--resume: no run has a checkpoint; the first one's would be {members[0].checkpoint_path}"
            )
    elif config.resume and not path.is_file():
        raise ValueError(
            f"--resume: there is no checkpoint at {config.checkpoint_path}; name it with --checkpoint-path, "
            "or leave --resume away to begin anew"
        )


def runs_of(config: Config) -> list[sweep.Member]:
    """The runs of a population.

    Raises:
        ValueError: A flag, or the file of the sweep, is not what it should be.
    """
    if config.sync_bn:
        raise ValueError("--sync-bn: not with --seeds or --sweep, whose runs have one rank each")
    if config.wandb_mode not in ("auto", "disabled"):
        raise ValueError(f"--wandb-mode: got {config.wandb_mode}, but the runs of --seeds and --sweep are not tracked")
    return sweep.expand(config, ["epochs", *(name for name in shaping(Config) if name != "sync_bn")], check_config)


@dataclass
class Progress:
    """How far a run is: what a checkpoint notes beside the tensors."""

    run: str
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    engine: str = ""
    """That the steps so far ran on: another gives the same but for rounding."""
    wandb_id: str | None = None
    handed_over: tuple[int, int] = (0, 0)
    """What that run on Weights & Biases has: the last step of a report and the last epoch."""


@dataclass
class Run:
    """A run in memory: what is fixed, and what changes."""

    config: Config
    ranks: distributed.Ranks
    device: torch.device
    dataset: data.Dataset
    model: hf.Model
    precision: Precision
    step: training.Step
    """Of one batch or several, with a row of metrics for each."""
    make_step: Callable[[training.Load], training.Step]
    """That step again, of one batch, for others' pictures."""
    eval_step: training.EvalStep
    gradients: Callable[[TrainState, data.Draw], hf.Params]
    learning_rate: optim.Schedule
    data_digest: str
    normalization: data.Normalization
    environment: dict[str, Any]
    state: TrainState
    best: tuple[hf.Params, hf.BatchStats]
    progress: Progress
    epoch_totals: Metrics
    """Of the batches of this epoch that have been read."""
    report_totals: Metrics
    """Of those among them that no line has shown yet."""
    unread: list[Metrics] = field(default_factory=list)
    """Of the batches after those, a row for each; reading them means waiting for the device."""
    steps_per_replay: int = 1
    """Batches that `step` is given at once, wherever nothing is due between them."""
    saved: bool = True
    """Whether the last attempt to save succeeded."""
    saved_at: float = field(default_factory=lambda: time.monotonic())
    """When it was."""
    owns_path: bool = False
    """Whether the file at the checkpoint's path is this run's, and not an earlier one's."""
    saved_best_epoch: int = 0
    """Of the best model in that file; 0 where there is none."""
    aside: Path | None = None
    """Under what name an earlier run's file at that path is kept."""

    @property
    def batch_count(self) -> int:
        """Batches an epoch."""
        return math.ceil(len(self.dataset.train.labels) / self.config.batch_size)

    @property
    def eval_batch_size(self) -> int:
        """Pictures at once in an evaluation: on the CPU few, because a signal is obeyed between two batches."""
        return self.config.eval_batch_size or (1000 if self.device.type == "cuda" else 100)

    @property
    def steps_done(self) -> int:
        """Batches so far; equal to `state.step`, which would have to be read from the device."""
        return self.progress.epoch * self.batch_count + self.progress.batch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    printer = Printer()
    with distributed.errors_once():
        config = parse_args(argv)
        code = start_ranks(config, argv, printer)
    if code is not None:
        return code
    with Interrupts(lambda number: farewell(number, config)) as interrupts:
        try:
            printer.quiet = config.quiet
            device = choose_device(config)
            with distributed.joined(device, config.timeout, lambda: interrupts.received, say_at_end) as ranks:
                if config.seeds or config.sweep:
                    return carry_out_population(config, ranks, device, interrupts, printer)
                with locked(config, ranks):
                    speaker = printer if ranks.rank == 0 else Printer(mute=True)
                    run = set_up(config, ranks, device, speaker)
                    start_engine([run], speaker)
                    interrupts.defer()
                    (code,) = population.in_step([carry_out(run, interrupts, speaker)], run.step, [run.state])
                    if isinstance(code, FloatingPointError):
                        raise code
                    return code
        except distributed.Told as told:
            return told.code
        except ValueError as error:
            printer.warn(f"train.py: {_one_line(error)}")
            return EXIT_BAD_INPUT
        except torch.OutOfMemoryError as error:
            printer.warn(f"train.py: the device is out of memory, try a smaller --batch-size: {_one_line(error)}")
            return EXIT_FAILED
        except (OSError, FloatingPointError) as error:
            printer.warn(f"train.py: {_one_line(error)}")
            return EXIT_FAILED
        except (RuntimeError, MemoryError) as error:
            if os.environ.get("HYPERFUNC_TRACEBACK"):
                raise
            printer.warn(f"train.py: {type(error).__name__}: {_one_line(error)} (HYPERFUNC_TRACEBACK=1 shows where)")
            return EXIT_FAILED


def start_ranks(config: Config, argv: Sequence[str] | None, printer: Printer) -> int | None:
    """Runs this program on every device that is asked for, and returns their exit code; None where this is one run."""
    try:
        count = len(devices_of(config))
        is_population = bool(config.seeds or config.sweep)
        if is_population:
            count = min(count, len(runs_of(config)))
        if count == 1 or distributed.rank_of_environment() is not None:
            return None
        if not is_population:
            launch.check_batch_size(config.batch_size, count)
    except ValueError as error:
        printer.warn(f"train.py: {_one_line(error)}")
        return EXIT_BAD_INPUT
    given = sys.argv[1:] if argv is None else argv
    return launch.launch(os.path.abspath(__file__), given, count, max_restarts=config.max_restarts)


def farewell(number: int, config: Config) -> str:
    """The line that a run leaves with when a signal comes before there is anything to save."""
    if distributed.rank_of_environment():
        exit_at_once(number)  # rank 0 says it
    path = config.checkpoint_path
    there = f"the checkpoint {path} is as it was" if Path(path).exists() else "nothing was saved yet"
    return f"stopped by {signal.Signals(number).name} before training began; {there}"


def say_at_end(line: str) -> None:
    """Says why all ranks end, from whatever thread."""
    os.write(2, f"train.py: {line}\n".encode())


@contextlib.contextmanager
def locked(config: Config, ranks: distributed.Ranks) -> Iterator[None]:
    """Keeps the checkpoint and the journal for this run alone; see `locked_file`."""
    with locked_file(Path(config.checkpoint_path), ranks), locked_file(journal_beside(config), ranks):
        yield


@contextlib.contextmanager
def locked_file(path: Path, ranks: distributed.Ranks) -> Iterator[None]:
    """Keeps a file for this run alone; of its ranks the first does so for all.

    Raises:
        ValueError: Another process of this machine is training into it.
    """
    if ranks.rank:
        yield
        return
    lock = lock_for(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--checkpoint-path: another run is writing to {path}; wait for its end, or name another file"
        ) from None
    try:
        sweep_files(path)
        yield
    finally:
        lock.release()


def carry_out_population(
    config: Config, ranks: distributed.Ranks, device: torch.device, interrupts: Interrupts, printer: Printer
) -> int:
    """Trains many runs, spread over the ranks, and tells what came out of them; returns the exit code."""
    members = runs_of(config)
    table = beside(Path(config.checkpoint_path).resolve(), ".population")
    program = runs.Program(locked, set_up, start_engine, partial(carry_out, paints=False))
    with locked_file(table, ranks):
        code, results = runs.carry_out(program, members, config.seeds_per_step, ranks, device, interrupts, printer)
        if ranks.rank == 0 and len(results) == len(members):
            chosen_by = "held-out pictures" if config.val_size else "the test set itself, for want of --val-size"
            runs.write_table(table, results, chosen_by, printer)
    return code


def set_up(
    config: Config, ranks: distributed.Ranks, device: torch.device, printer: Printer, like: Run | None = None
) -> Run:
    """Reads the data, builds the network and either draws its parameters or reads them from the checkpoint.

    Args:
        config: The flags.
        ranks: That share the run.
        device: Of this one.
        printer: For the lines about it.
        like: A run of other seed on that device: what does not depend on the seed is shared with it.
    """
    launch.check_batch_size(config.batch_size, ranks.world)
    if "graph" in config.engine and device.type != "cuda":
        raise ValueError(f"--engine: got {config.engine}, which needs a GPU; on the CPU there is eager and compiled")
    number_format = precision.choose(config.precision, device)
    precision.set_float32_products(number_format)
    several = f", {ranks.world} ranks" if ranks.world > 1 else ""
    printer.say(f"device       {describe_device(device)}, torch {torch.__version__}{several}")
    # Read before the data, which may take minutes: what is wrong with it should be known at once.
    previous = read_checkpoint(config) if config.resume else None
    saved_run = ranks.saved_run(config.checkpoint_path)
    if previous is None and saved_run is not None:
        # Ranks that take the place of others go on with what those have saved.
        previous = read_checkpoint(config)
        previous = previous if previous.notes["progress"]["run"] == saved_run else None
    if ranks.rank == 0:
        check_writable(Path(config.checkpoint_path))

    # Which pictures are held out or left out is the seed's to say.
    shared = like if like is not None and not (config.val_size or config.train_size) else None
    dataset = (
        shared.dataset
        if shared
        else data.load_dataset(
            config.dataset,
            config.data_dir,
            val_size=config.val_size,
            train_size=config.train_size,
            seed=config.seed,
            progress=printer.track,
            notify=printer.warn,
        )
    )
    count = len(dataset.train.labels)
    if config.batch_size > count:
        raise ValueError(f"--batch-size: got {config.batch_size}, expected at most the {count:,} training pictures")
    held_out = f", {len(dataset.val.labels):,} held out" if dataset.val else ""
    printer.say(
        f"data         {config.dataset}: {count:,} training pictures{held_out}, {len(dataset.test.labels):,} to test, "
        f"{len(dataset.classes)} classes"
    )

    model = like.model if like else build_model(config, len(dataset.classes))
    if config.sync_bn and ranks.world > 1:
        model = sync_norm.synchronize(model)
    normalization = shared.normalization if shared else data.measure(dataset.train)
    digest = shared.data_digest if shared else data.digest(dataset)
    dataset = dataset._replace(
        train=tree.to(dataset.train, device),
        val=tree.to(dataset.val, device) if dataset.val else None,
        test=tree.to(dataset.test, device),
    )
    normalization = tree.to(normalization, device)
    optimizer = build_optimizer(config, math.ceil(count / config.batch_size), number_format)
    own_load = data.make_train_load(dataset.train, normalization)

    def load(draw: data.Draw) -> tuple[Tensor, Tensor]:
        # A rank takes its part in here, so that compiled and captured steps see the same batches on all ranks.
        return own_load(ranks.part(draw))

    objective: dict[str, Any] = {
        "precision": number_format,
        "reduce": ranks.reduce,
        "decay": config.decay,
        "weight_decay": config.weight_decay if config.decay == "generated" else 0.0,
    }
    # Drawn on the CPU, so that a seed means the same network on every device.
    state = tree.to(training.init_state(model, optimizer, data.seeded_generator("init", config.seed)), device)
    printer.say(f"model        {describe_model(config, model, state.params)}")
    selection = "the held-out pictures" if dataset.val else "the test set itself, for want of --val-size"
    printer.say(f"best model   chosen by accuracy on {selection}")
    run = Run(
        config=config,
        ranks=ranks,
        device=device,
        dataset=dataset,
        model=model,
        precision=number_format,
        step=training.make_train_step(model, optimizer, load=load, **objective),
        make_step=lambda load: training.make_train_step(model, optimizer, load=load, **objective),
        eval_step=training.make_eval_step(model, load=data.make_eval_load(normalization), precision=number_format),
        gradients=training.make_gradients(model, load=load, **objective),
        learning_rate=optimizer.learning_rate,
        data_digest=digest,
        normalization=normalization,
        environment=environment(device, Path(__file__).parent) | ({"ranks": ranks.world} if ranks.world > 1 else {}),
        state=state,
        best=(state.params, state.batch_stats),
        progress=Progress(run=secrets.token_hex(4)),
        epoch_totals=no_metrics(device),
        report_totals=no_metrics(device),
    )
    if previous is not None:
        restore(run, previous)
        printer.say(
            f"resumed      from {config.checkpoint_path} at epoch {run.progress.epoch + 1}, batch {run.progress.batch}"
        )
        planned = previous.notes["config"]["epochs"]
        if planned != config.epochs:
            printer.say(f"schedule     laid over {config.epochs} epochs now, and not over {planned} as so far")
        before = previous.notes.get("environment", {}).get("ranks", 1)
        if before != ranks.world and not config.sync_bn:
            printer.warn(
                f"resumed on {ranks.world} ranks, was {before}: without --sync-bn each rank has batch statistics of "
                "its own, so the result will not be that of before"
            )
    ranks.compare({"state": run.state, "best": run.best}, notes_to_compare(run))
    return run


def start_engine(members: Sequence[Run], printer: Printer) -> None:
    """Makes the steps what `--engine` wants, compiled and captured here and not in the middle of the first epoch.

    Of several runs the first one's step is that of them all.
    """
    run, config = members[0], members[0].config
    if run.progress.epoch >= config.epochs:
        return
    count = len(run.dataset.train.labels)
    engine = config.engine
    if engine == "auto" and run.device.type == "cuda":
        engine = "compiled-graph"
    elif engine == "auto":
        steps = config.epochs * math.ceil(count / config.batch_size)
        engine = "compiled" if steps >= COMPILE_FROM_STEPS else "eager"
    before = run.progress.engine
    if config.engine == "auto" and before and ("graph" in before) <= (run.device.type == "cuda"):
        engine = before
    elif before not in ("", engine):
        printer.warn(f"the engine is {engine} and was {before} so far: the end may differ by rounding from what it was")
    full_batches = count // config.batch_size
    together = min(config.steps_per_replay or REPLAYED_STEPS, full_batches) if "graph" in engine else 1
    draw = population.side_by_side(
        [data.draw_epoch(one.config.seed, 0, count, flip=run.dataset.flip) for one in members]
    )
    state = population.stack([one.state for one in members])
    batch = tree.to(next(data.batches(draw, config.batch_size)), run.device)
    pictures = next(data.batches(run.dataset.test, run.eval_batch_size))
    step, eval_step, started = run.step, run.eval_step, time.perf_counter()
    try:
        if engine.startswith("compiled"):
            printer.say(f"engine       {engine}: compiling, which takes a minute or more the first time")
            step = capture.compile_step(step, batch)
            # The step is pure: what this computes is thrown away, and the state is as it was.
            with printer.waiting(f"compiling {engine}"):
                step(state, batch)
        step = training.scan(step, config.batch_size)
        if "graph" in engine:
            with printer.waiting("capturing"):
                rows = tree.to(next(data.batches(draw, together * config.batch_size)), run.device)
                step = capture.capture(step, state, rows)
                network = run.model.weights(run.state.params), run.state.batch_stats
                if engine.startswith("compiled"):
                    eval_step = capture.compile_step(eval_step, pictures)
                eval_step = capture.capture_evaluation(eval_step, network, pictures)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = _one_line(error)[:200]
        # A rank cannot know whether the others go on with the same engine.
        if config.engine != "auto" or run.ranks.world > 1:
            raise OSError(f"--engine: {engine} does not work here, eager does without: {reason}") from None
        printer.warn(f"the engine {engine} does not work here, going on with eager: {reason}")
        engine, together, step, eval_step = "eager", 1, training.scan(run.step, config.batch_size), run.eval_step
    for one in members:
        one.step, one.steps_per_replay, one.progress.engine = step, together, engine
        if one.normalization is run.normalization:
            one.eval_step = eval_step
    details = [engine, run.precision]
    if "graph" in engine:
        details.append(f"{together} steps a graph")
    if engine != "eager":
        details.append(f"ready after {time.perf_counter() - started:.1f} s")
    printer.say(f"engine       {', '.join(details)}")


def carry_out(run: Run, interrupts: Interrupts, printer: Printer, *, paints: bool = True) -> population.Member:
    """Trains, and shows it; see `population.Member`."""
    if run.progress.epoch >= run.config.epochs:
        printer.say(
            f"nothing to do: the run is complete after {run.progress.epoch} epochs; give a larger --epochs to go on"
        )
        return 0
    reporter = start_reporting(run, printer, paints=paints)
    code = EXIT_FAILED
    try:
        code = yield from train(run, interrupts, reporter)
    except Exception as error:
        reporter.event("failed", reason=_one_line(error))
        raise
    finally:
        reporter.event("end", code=code)
        if reporter.tracker is not None and run.owns_path and run.saved_best_epoch and interrupts.received is None:
            aliases = ["best", f"epoch-{run.saved_best_epoch}"]
            reporter.tracker.log_model(run.config.checkpoint_path, f"model-{reporter.tracker.id}", aliases)
        reporter.close(code, lambda: interrupts.received is not None)
    if code == 0 and interrupts.received is not None:
        printer.warn(f"stopped by {signal.Signals(interrupts.received).name} after the training was over")
        return 128 + interrupts.received
    return code


def train(run: Run, interrupts: Interrupts, reporter: Reporter) -> population.Member:
    """The epochs; see `population.Member`."""
    config, progress = run.config, run.progress
    count = len(run.dataset.train.labels)
    every = parse_every(config.checkpoint_every)
    with reporter.printer.training(config.epochs, run.batch_count) as bars:
        bars.figures(run=best_so_far(progress))
        while progress.epoch < config.epochs:
            started = time.perf_counter() - progress.seconds
            pace = Pace()
            draw = tree.to(data.draw_epoch(config.seed, progress.epoch, count, flip=run.dataset.flip), run.device)
            bars.begin_epoch(progress.epoch, progress.batch)
            try:
                while progress.batch < run.batch_count:
                    rows, steps = next_rows(run, draw, every)
                    run.state, metrics = yield rows
                    run.unread.append(metrics)
                    progress.batch += steps
                    by_clock = every.unit == "seconds" and is_due(every, run)
                    order = run.ranks.agree(interrupts.received or (distributed.SAVE if by_clock else None))
                    if order is not None and order != distributed.SAVE:
                        raise Interrupted(order)
                    if progress.batch % config.report_every == 0 or progress.batch == run.batch_count:
                        report(run, rows, reporter, bars, pace)
                    bars.move(progress.epoch, progress.batch)
                    if order == distributed.SAVE or (every.unit == "batches" and is_due(every, run)):
                        progress.seconds = time.perf_counter() - started
                        save(run, reporter)
                bars.figures(epoch="evaluating")
                finish_epoch(run, started, pace, every, interrupts, reporter)
            except Interrupted as interrupt:
                progress.seconds = time.perf_counter() - started
                return stop(run, interrupt.number, reporter)
            bars.figures(run=best_so_far(progress))
            if (order := run.ranks.agree(interrupts.received)) not in (None, distributed.SAVE):
                return stop(run, order, reporter)
    return 0 if run.saved else EXIT_FAILED


def next_rows(run: Run, draw: data.Draw, every: Every) -> tuple[data.Draw, int]:
    """What the next step gets of an epoch's draw, and how many batches that is."""
    batch, size = run.progress.batch, run.config.batch_size
    room = [len(draw.picture) // size - batch, run.config.report_every - batch % run.config.report_every]
    if every.unit == "batches":
        room.append(every.number - run.steps_done % every.number)
    steps = run.steps_per_replay if min(room) >= run.steps_per_replay else 1
    return data.Draw(*(column[batch * size : (batch + steps) * size] for column in draw)), steps


class Pace:
    """Images a second since it was made, by what is known to be done."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._images = 0

    def note(self, images: int) -> float:
        """Images a second since the last note; so many of them are done since then."""
        now = time.perf_counter()
        self._last, seconds = now, now - self._last
        self._images += images
        return images / max(seconds, 1e-9)

    @property
    def average(self) -> float:
        """Images a second up to the last note."""
        return self._images / max(self._last - self._started, 1e-9)


def is_due(every: Every, run: Run) -> bool:
    """Whether it is time for a save that does not wait for the end of an epoch."""
    if every.unit == "batches":
        return run.steps_done % every.number == 0
    return every.unit == "seconds" and time.monotonic() - run.saved_at >= every.number


def read_metrics(run: Run) -> int:
    """Reads the metrics of the batches that are unread, all at once, adds them up, and returns how many images it was.

    Raises:
        FloatingPointError: A loss is not finite. Nothing has been saved since the last finite one.
    """
    if not run.unread:
        return 0
    rows = tree.map(lambda *values: torch.cat(values), *run.unread)
    sums = tree.map(lambda total, values: values.sum(dtype=total.dtype), run.epoch_totals, rows)
    run.epoch_totals = tree.map(torch.add, run.epoch_totals, sums)
    run.report_totals = tree.map(torch.add, run.report_totals, sums)
    losses, _, counts = (column.tolist() for column in rows)
    for offset, loss in enumerate(losses, 1 - len(losses)):
        if not math.isfinite(loss):
            run.progress.batch += offset
            raise FloatingPointError(not_finite(run, f"the loss is {loss} at"))
    run.unread.clear()
    return sum(counts)


def report(run: Run, rows: data.Draw, reporter: Reporter, bars: TrainingBars, pace: Pace) -> None:
    """Shows the loss and the accuracy of the batches since the last report.

    Raises:
        FloatingPointError: A loss is not finite. Nothing has been saved since the last finite report.
    """
    config, progress = run.config, run.progress
    images_per_second = pace.note(read_metrics(run))
    loss, accuracy = loss_and_accuracy(run.report_totals)
    run.report_totals = no_metrics(run.device)
    rate = float(run.learning_rate(run.state.step - 1))
    where = {"epoch": progress.epoch + 1, "batch": progress.batch, "step": run.steps_done}
    reporter.row("report", where | {"batch/loss": loss, "batch/accuracy": accuracy, "learning_rate": rate})
    shown = f"loss {loss:.4f}  accuracy {accuracy:.2f} %"
    reporter.printer.say(
        f"epoch {progress.epoch + 1}/{config.epochs}  batch {progress.batch}/{run.batch_count}  {shown}"
    )
    bars.figures(epoch=f"{shown}  lr {rate:.6g}  {images_per_second:,.0f} images/s")
    if config.histogram_every:
        reports_an_epoch = math.ceil(run.batch_count / config.report_every)
        number = progress.epoch * reports_an_epoch + math.ceil(progress.batch / config.report_every)
        # All ranks, because the gradients are of all.
        if number % config.histogram_every == 0 and run.ranks.tell(reporter.tracker is not None):
            params = run.state.params
            trees = {"parameters": params, "kernels": run.model.kernels(params)}
            last_batch = data.Draw(*(column[-config.batch_size :] for column in rows))
            reporter.histograms(run.steps_done, trees | {"gradients": run.gradients(run.state, last_batch)})


def finish_epoch(
    run: Run, started: float, pace: Pace, every: Every, interrupts: Interrupts, reporter: Reporter
) -> None:
    """Evaluates, keeps the best, saves, and shows all of it.

    Raises:
        Interrupted: A signal came during the evaluation. Nothing has changed, and the epoch can be finished later.
        FloatingPointError: The state or a loss is not finite. Nothing was saved.
    """
    config, progress = run.config, run.progress
    check_finite(run)
    train_loss, train_accuracy = loss_and_accuracy(run.epoch_totals)
    rate = float(run.learning_rate(run.state.step - 1))
    test_loss, test_accuracy = evaluate(run, run.dataset.test, interrupts)
    row: dict[str, float] = {
        "epoch": progress.epoch + 1,
        "step": run.steps_done,
        "train/accuracy": train_accuracy,
        "train/loss": train_loss,
        "test/accuracy": test_accuracy,
        "test/loss": test_loss,
    }
    chosen_by = test_accuracy
    if run.dataset.val is not None:
        row["val/loss"], row["val/accuracy"] = evaluate(run, run.dataset.val, interrupts)
        chosen_by = row["val/accuracy"]
    is_best = chosen_by > progress.best_accuracy
    if is_best:
        progress.best_accuracy, progress.best_epoch = chosen_by, progress.epoch + 1
        run.best = tree.clone((run.state.params, run.state.batch_stats))
    seconds = time.perf_counter() - started
    row |= {"learning_rate": rate, "epoch_time": seconds}
    if pace.average:
        row["images_per_second"] = pace.average
    row |= {"best_accuracy": progress.best_accuracy, "best_epoch": progress.best_epoch}

    progress.history.append(row)
    progress.epoch += 1
    progress.batch, progress.seconds = 0, 0.0
    run.epoch_totals = no_metrics(run.device)
    # Before the save: a run that goes on from that checkpoint does not show this epoch again.
    reporter.row("epoch", row)
    reporter.paint(progress.history)
    is_last = progress.epoch == config.epochs
    saves = is_last or not run.saved or (every.unit == "epochs" and progress.epoch % every.number == 0)
    if saves:
        save(run, reporter)

    # An epoch that was stopped in its evaluation has no batch left to train on.
    speed = f"{pace.average:,.0f} images/s  " if pace.average else ""
    val = f"val {row['val/accuracy']:.2f} %  " if "val/accuracy" in row else ""
    outcome = ["new best"] if is_best else []
    if saves:
        outcome.insert(0, f"saved {config.checkpoint_path}" if run.saved else "NOT SAVED")
    reporter.printer.say(
        f"epoch {progress.epoch}/{config.epochs}  train {train_accuracy:.2f} %  {val}test {test_accuracy:.2f} %  "
        f"test loss {test_loss:.4f}  lr {rate:.6g}  {seconds:.1f} s  {speed}"
        f"{best_so_far(progress)}  {' with a '.join(outcome)}".rstrip()
    )
    if reporter.tracker is not None:
        reporter.tracker.summarize({"best_accuracy": progress.best_accuracy, "best_epoch": progress.best_epoch})


def best_so_far(progress: Progress) -> str:
    """The best accuracy and its epoch, if there is one."""
    return f"best {progress.best_accuracy:.2f} % (epoch {progress.best_epoch})" if progress.best_epoch else ""


def stop(run: Run, number: int, reporter: Reporter) -> int:
    """Saves after a signal; returns the exit code that a shell expects then, or that of a failure.

    Raises:
        FloatingPointError: The state is not finite. Nothing was saved.
    """
    name = signal.Signals(number).name
    save(run, reporter)
    is_over = run.progress.epoch == run.config.epochs
    where = "the end" if is_over else f"epoch {run.progress.epoch + 1}, batch {run.progress.batch}"
    reporter.event("stopped", signal=name, step=run.steps_done)
    if not run.saved:
        reporter.printer.warn(f"stopped by {name} at {where}; this could not be saved")
        return EXIT_FAILED
    if is_over:
        reporter.printer.warn(f"stopped by {name} after the training was over; saved {run.config.checkpoint_path}")
    else:
        reporter.printer.warn(f"stopped by {name} at {where}; saved {run.config.checkpoint_path}, go on with --resume")
    return 128 + number


def evaluate(run: Run, images: data.Images, interrupts: Interrupts) -> tuple[float, float]:
    """Mean loss, and accuracy in percent.

    Raises:
        Interrupted: A signal came.
        FloatingPointError: The loss is not finite.
    """

    def batches() -> Iterator[data.Images]:
        for batch in data.batches(images, run.eval_batch_size * run.ranks.world):
            if (order := run.ranks.agree(interrupts.received)) not in (None, distributed.SAVE):
                raise Interrupted(order)
            yield run.ranks.part(batch)

    metrics = training.evaluate(run.model, run.state.params, run.state.batch_stats, batches(), eval_step=run.eval_step)
    loss, accuracy = loss_and_accuracy(run.ranks.sum(metrics))
    if not math.isfinite(loss):
        raise FloatingPointError(not_finite(run, f"the loss is {loss} in the evaluation after"))
    return loss, accuracy


def check_finite(run: Run) -> None:
    """Raises a FloatingPointError where the state holds a number that is not finite."""
    if not bool(torch.stack([leaf.isfinite().all() for leaf in tree.leaves(run.state)]).all()):
        raise FloatingPointError(not_finite(run, "a number that is not finite came up by"))


def save(run: Run, reporter: Reporter) -> None:
    """Writes the checkpoint, or says that it could not; `run.saved` tells.

    Raises:
        FloatingPointError: The state, or a loss, is not finite. Nothing was saved.
        RankLost: The states of the ranks differ. Nothing was saved.
    """
    read_metrics(run)
    check_finite(run)
    run.ranks.compare(run.state)
    if run.ranks.rank == 0:
        write(run, reporter)
    run.saved = run.ranks.tell(run.saved)
    run.owns_path = run.owns_path or run.saved
    run.saved_at = time.monotonic()


def write(run: Run, reporter: Reporter) -> None:
    """Writes the checkpoint, or says that it could not."""
    path = Path(run.config.checkpoint_path)
    if reporter.tracker is not None:
        run.progress.handed_over = reporter.handed_over
    trees = {
        "state": run.state,
        # Before the first epoch is over, what there is so far.
        "best": run.best if run.progress.best_epoch else (run.state.params, run.state.batch_stats),
        "epoch_totals": run.epoch_totals,
        "report_totals": run.report_totals,
        "normalization": run.normalization,
    }
    notes = {
        "config": dataclasses.asdict(run.config),
        "model": run.model.recipe,
        "progress": dataclasses.asdict(run.progress),
        "classes": run.dataset.classes,
        "data": run.data_digest,
        "environment": run.environment,
    }
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        aside = run.aside if path.exists() and not run.owns_path else None
        try:
            checkpoint.save(path, trees, notes, keep_old_as=aside)
        except FileExistsError:
            # Another run has begun under that name in the meantime.
            aside = free_name(path)
            checkpoint.save(path, trees, notes, keep_old_as=aside)
        run.saved = run.owns_path = True
        run.saved_best_epoch = run.progress.best_epoch
        run.ranks.note_saved(run.progress.run, run.config.checkpoint_path)
        if aside is not None:
            reporter.printer.say(f"kept the earlier run of {path} as {aside}")
    except OSError as error:
        run.saved = False
        reporter.printer.warn(f"could not save {path}: {error}; trying again at the next occasion")
        reporter.event("not saved", reason=str(error), step=run.steps_done)


def notes_to_compare(run: Run) -> dict[str, Any]:
    """What else has to be the same on all ranks: the pictures, and the flags that decide what a rank does when."""
    own = ("data_dir", "device", "devices", "quiet", "timeout")
    flags = {f"--{name.replace('_', '-')}": v for name, v in dataclasses.asdict(run.config).items() if name not in own}
    return {"the data": run.data_digest} | flags


def read_checkpoint(config: Config) -> checkpoint.Checkpoint:
    """The checkpoint to go on from.

    Raises:
        ValueError: It is damaged, or the command line asks for another run than the one in it.
    """
    previous = checkpoint.load(config.checkpoint_path)
    check_notes(previous.notes, config.checkpoint_path)
    before, now = previous.notes["config"], dataclasses.asdict(config)
    # Of flags that came later than the checkpoint.
    defaults = {item.name: item.default for item in dataclasses.fields(Config)}
    different = [
        f"--{name.replace('_', '-')} is {now[name]}, was {before.get(name, defaults[name])}"
        for name in shaping(Config)
        if now[name] != before.get(name, defaults[name])
    ]
    if different:
        raise ValueError(f"--resume: {config.checkpoint_path} holds another run: {'; '.join(different)}")
    progress = previous.notes["progress"]
    begun = progress["epoch"] + (progress["batch"] > 0)
    if config.epochs < begun:
        raise ValueError(
            f"--epochs: got {config.epochs}, but the run in {config.checkpoint_path} has begun epoch {begun} already"
        )
    return previous


def check_notes(notes: dict[str, Any], path: str) -> None:
    """Raises a ValueError for notes that this train.py does not write: of another version, or made up."""
    fields = {item.name: item.type for item in dataclasses.fields(Progress)}
    progress, config = notes.get("progress"), notes.get("config")
    numbers = int | float
    fine = (
        isinstance(config, dict)
        and isinstance(config.get("epochs"), int)
        and isinstance(notes.get("classes"), list)
        and isinstance(notes.get("data"), str)
        and isinstance(progress, dict)
        and progress.keys() == fields.keys()
        and all(isinstance(progress[name], kind) for name, kind in fields.items() if kind in (int, str))
        and all(isinstance(progress[name], numbers) for name, kind in fields.items() if kind is float)
        and isinstance(progress["wandb_id"], str | None)
        and isinstance(progress["history"], list)
        and len(progress["history"]) == progress["epoch"] <= config["epochs"]
        and progress["batch"] >= 0
        and isinstance(progress["handed_over"], list)
        and [isinstance(number, int) for number in progress["handed_over"]] == [True, True]
    )
    if fine:
        assert isinstance(progress, dict)  # for the type checker
        for epoch, row in enumerate(progress["history"], 1):
            # The columns that a run always has; what else there is may be shown, and so must be numbers.
            fine &= isinstance(row, dict) and row.get("epoch") == epoch and row.keys() >= EPOCH_COLUMNS
            fine = fine and all(isinstance(value, numbers) for value in row.values())
    if not fine:
        raise ValueError(f"--resume: {path} was not written by this version of train.py")


def restore(run: Run, previous: checkpoint.Checkpoint) -> None:
    """Puts what a checkpoint holds in the place of the fresh state.

    Raises:
        ValueError: It holds a network of other shapes, or one for other classes.
    """
    if list(run.dataset.classes) != previous.notes["classes"]:
        raise ValueError(
            f"--resume: the checkpoint was trained on the classes {', '.join(previous.notes['classes'][:5])} ..., "
            f"the data now has {', '.join(run.dataset.classes[:5])} ..."
        )
    if run.data_digest != previous.notes["data"]:
        raise ValueError(
            f"--resume: the pictures or their labels are not those that {run.config.checkpoint_path} was trained on; "
            "name the same data with --data-dir"
        )
    run.state = checkpoint.restore(previous, "state", run.state)
    run.best = checkpoint.restore(previous, "best", run.best)
    run.epoch_totals = checkpoint.restore(previous, "epoch_totals", run.epoch_totals)
    run.report_totals = checkpoint.restore(previous, "report_totals", run.report_totals)
    run.progress = Progress(**previous.notes["progress"])
    run.progress.handed_over = (run.progress.handed_over[0], run.progress.handed_over[1])  # JSON knows lists only
    run.owns_path, run.saved_best_epoch = True, run.progress.best_epoch
    finite = all(bool(leaf.isfinite().all()) for leaf in tree.leaves((run.state, run.epoch_totals, run.report_totals)))
    if run.progress.batch > run.batch_count or int(run.state.step) != run.steps_done or not finite:
        raise ValueError(f"--resume: {run.config.checkpoint_path} was not written by this version of train.py")


def check_writable(path: Path) -> None:
    """Tries the checkpoint's folder, or the one that it will be made in: a run is not to find out after an epoch.

    Raises:
        ValueError: Nothing can be written there.
    """
    try:
        folder = path.resolve().parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        # As long a name as any that the run will write to.
        longest = temporary_name(folder / numbered(beside(path, journal.ENDING), 10**4).name)
        with open(longest, "xb"):
            longest.unlink()
    except OSError as error:
        raise ValueError(f"--checkpoint-path: nothing can be written at {path}: {error}") from None


def journal_beside(config: Config) -> Path:
    """The journal of the run at the checkpoint's path."""
    return beside(Path(config.checkpoint_path).resolve(), journal.ENDING)


def build_model(config: Config, num_classes: int) -> hf.Model:
    """The network that the flags describe."""
    shape: dict[str, Any] = {"shortcut": config.shortcut, "block": config.block}
    if config.model == "plain":
        return hf.resnet(config.depth, config.width, num_classes, **shape)
    hidden_dim = config.hidden_dim or None
    return hf.hyper_resnet(
        config.depth, config.width, num_classes, config.z_dim, hidden_dim=hidden_dim, init=config.init, **shape
    )


def count_ordinary(model: hf.Model) -> int:
    """The parameters of the primary network, if all were ordinary ones."""
    return hf.num_params(dict(model.module.named_parameters()))


def describe_network(config: Config) -> str:
    """What kind of network it is, as in "hyper 40-1"."""
    return f"{config.model} {config.depth}-{config.width}"


def describe_model(config: Config, model: hf.Model, params: hf.Params) -> str:
    """How large it is, and how much larger the ordinary network is."""
    name = describe_network(config)
    count, ordinary = hf.num_params(params), count_ordinary(model)
    if config.model == "plain":
        return f"{name}: {count:,} parameters"
    units = sum(len(z) for z in params.embeddings.values())
    return (
        f"{name}: {count:,} parameters ({units:,} embeddings), compression {ordinary / count:.2f} "
        f"against the {ordinary:,} of the ordinary network"
    )


def build_optimizer(config: Config, steps_per_epoch: int, number_format: Precision) -> optim.Optimizer:
    """The optimizer with its schedule over the whole run, and for fp16 with a scale of the loss."""
    steps = config.epochs * steps_per_epoch
    if config.schedule == "multistep":
        schedule = optim.multistep(config.lr, config.epochs, steps_per_epoch)
    elif config.schedule == "cosine":
        warmup = min(round(config.warmup_epochs * steps_per_epoch), steps // 10)
        schedule = optim.cosine(config.lr, steps, warmup=warmup)
    elif config.schedule == "paper":
        schedule = optim.paper(config.lr, steps, adaptive=config.optimizer != "sgd")
    else:
        schedule = optim.constant(config.lr)
    weight_decay = config.weight_decay if config.decay == "parameters" else 0.0
    if config.optimizer == "sgd":
        optimizer = optim.sgd(schedule, weight_decay=weight_decay)
    else:
        optimizer = optim.adam(schedule, weight_decay=weight_decay, decoupled=config.optimizer == "adamw")
    return optim.scaled(optimizer) if number_format == "fp16" else optimizer


def start_reporting(run: Run, printer: Printer, *, paints: bool) -> Reporter:
    """Opens what stands beside the checkpoint, and starts or continues the run on Weights & Biases."""
    config, progress = run.config, run.progress
    if run.ranks.rank:
        painter = Painter(printer.warn)
        painter.close(0)
        nowhere = Path(os.devnull)
        return Reporter(printer, journal.Journal(nowhere, printer.warn), painter, nowhere, "", None, (0, 0))
    path = Path(config.checkpoint_path).resolve()
    journal_path, picture = journal_beside(config), beside(path, ".png")
    resumed, rows, before = run.owns_path, [], []
    number = free_number(path, journal_path, picture)
    run.aside = numbered(path, number)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_files(picture)
        if resumed:
            rows, before = journal.go_on(
                journal_path,
                progress.run,
                step=run.steps_done,
                epoch=progress.epoch,
                history=progress.history,
                warn=printer.warn,
            )
        else:
            for old in (journal_path, picture):
                if old.exists():
                    old.rename(numbered(old, number))
    except OSError as error:
        printer.warn(f"could not write {journal_path}: {error}")
    handed = handed_over(before, progress.wandb_id) or progress.handed_over
    tracker = start_tracking(run, printer)
    title = (
        f"{describe_network(config)} on {config.dataset}, batch {config.batch_size}, {config.optimizer} {config.lr:g}"
    )
    writer = journal.Journal(journal_path, printer.warn)
    writer.write(
        "resume" if resumed else "start",
        {"run": progress.run, "step": run.steps_done, "config": dataclasses.asdict(config)}
        | {"environment": run.environment},
    )
    painter = Painter(printer.warn)
    if not paints:
        painter.close(0)
    reporter = Reporter(printer, writer, painter, picture, title, tracker, handed)
    if tracker is not None:
        # What was shown while there was no tracking, because it was turned off or had failed.
        for row in rows:
            if row["kind"] in ("report", "epoch"):
                reporter.track(row["kind"], {key: value for key, value in row.items() if key not in ("kind", "time")})
    return reporter


def start_tracking(run: Run, printer: Printer) -> tracking.Tracker | None:
    """Starts, or continues, the run on Weights & Biases."""
    config, progress = run.config, run.progress
    mode = config.wandb_mode
    if config.no_wandb or mode == "disabled" or (mode == "auto" and tracking.turned_off()):
        return None
    resume = progress.wandb_id is not None
    progress.wandb_id = progress.wandb_id or tracking.new_run_id()
    name = f"hypernetworks_b{config.batch_size}_lr{config.lr}_e{config.epochs}"
    from_environment = config.wandb_project == DEFAULT_PROJECT and os.environ.get("WANDB_PROJECT")
    total = hf.num_params(run.state.params)
    tracker = tracking.Tracker(
        progress.wandb_id,
        resume=resume,
        mode=mode,
        settings={
            "project": from_environment or config.wandb_project,
            "name": config.wandb_name or os.environ.get("WANDB_NAME") or name,
            "entity": config.wandb_entity or None,
            "config": dataclasses.asdict(config) | run.environment | {"hyperfunc": hf.__version__},
        },
        say=printer.say,
        warn=printer.warn,
    )
    tracker.summarize({"total_parameters": total, "compression": count_ordinary(run.model) / total})
    return tracker


def devices_of(config: Config) -> list[torch.device]:
    """The devices of this machine that the flags ask for, one a rank.

    Raises:
        ValueError: They are not there.
    """
    visible = 0 if config.device == "cpu" else torch.cuda.device_count()
    return launch.choose_devices(config.devices, config.device, visible)


def choose_device(config: Config) -> torch.device:
    """The device of this process.

    Raises:
        ValueError: There are fewer than ranks on this machine.
    """
    devices = devices_of(config)
    index = distributed.local_rank()
    if devices[0].type == "cpu":
        return devices[0]
    if index >= len(devices):
        raise ValueError(f"--devices: this machine has {index + 1} ranks or more for {len(devices)} devices")
    torch.cuda.set_device(devices[index])
    return devices[index]


def no_metrics(device: torch.device) -> Metrics:
    """Metrics over nothing, to add others to."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return Metrics(zero.double(), zero, zero)


def loss_and_accuracy(metrics: Metrics) -> tuple[float, float]:
    """Mean loss, and accuracy in percent; reads the device."""
    loss, correct, count = torch.stack([value.double() for value in metrics]).tolist()
    return loss / count, 100 * correct / count


def not_finite(run: Run, what: str) -> str:
    """The line that explains a number that is not finite."""
    leaves = tree.named_leaves(run.state)
    first = next((path for path, leaf in leaves.items() if not bool(leaf.isfinite().all())), None)
    which = f"; {first} is not finite" if first else ""
    path = run.config.checkpoint_path
    way_on = f"{path} still holds the last good state" if run.owns_path else "nothing was saved"
    return (
        f"{what} epoch {run.progress.epoch + 1}, batch {run.progress.batch}{which}; {way_on}; "
        f"begin again with an --lr below {run.config.lr:g}"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    exit_code = main()
    ignore()
    if exit_code >= 128 or tracking.holds_up_exit() or distributed.holds_up_exit():
        # Python's end waits for others' threads and processes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
