"""Trains a hypernetwork for a residual network on pictures: python train.py --epochs 200

Everything that a run does is wired here, top to bottom; what it is made of is in the package.
"""

import os
import signal
import stat
import sys

if __name__ == "__main__":
    # Importing torch takes seconds, and Ctrl-C must not end in a traceback there either.
    def _exit_before_start(number: int, _frame: object) -> None:
        sys.stderr.write("stopped before anything was read or written\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, _exit_before_start)
    signal.signal(signal.SIGTERM, _exit_before_start)

import argparse
import contextlib
import dataclasses
import difflib
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import torch
from filelock import Timeout

import hyperfunc as hf
from hyperfunc import capture, checkpoint, data, optim, training, tree
from hyperfunc.files import lock_for, sweep
from hyperfunc.hypernet import Init
from hyperfunc.interrupt import Interrupted, Interrupts, ignore
from hyperfunc.residual import Block, Shortcut, check_depth
from hyperfunc.tracking import Printer, WandbRun, start_wandb
from hyperfunc.training import Decay, Metrics, TrainState

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

COMPILE_FROM_STEPS = 5000
"""Length of a run from which compiling on the CPU, which takes about a minute, is sure to pay."""


def option(
    default: Any, group: str, text: str, *, at_least: float = -math.inf, at_most: float = math.inf, shapes: bool = False
) -> Any:
    """A field of `Config`: its default, its group and text in the help, its range.

    `shapes` marks what shapes the result of a run, and therefore may not change when the run is resumed.
    """
    metadata = {"group": group, "text": text, "at_least": at_least, "at_most": at_most, "shapes": shapes}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """One run. Every field is a flag of the command line, with dashes or underscores alike."""

    epochs: int = option(200, "run", "times over the training set", at_least=1, at_most=10**6)
    batch_size: int = option(
        128, "run", "pictures a step; the last batch of an epoch may be smaller", at_least=1, shapes=True
    )
    eval_batch_size: int = option(1000, "run", "pictures at once in evaluation", at_least=1)
    seed: int = option(0, "run", "of the initial parameters, the order and the augmentation", at_least=0, shapes=True)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "run", "auto takes a GPU where there is one")
    engine: Literal["auto", "eager", "compiled", "graph", "compiled-graph"] = option(
        "auto",
        "run",
        "how a step runs; auto is compiled-graph on a GPU; on the CPU it is compiled for runs long enough to earn that",
    )
    report_every: int = option(50, "run", "batches from one line of loss and accuracy to the next", at_least=1)

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
    resume: bool = option(False, "checkpoint", "go on where the checkpoint stopped")

    no_wandb: bool = option(False, "tracking", "do without Weights & Biases")
    wandb_project: str = option("hypernetworks-gpu", "tracking", "project on Weights & Biases")
    wandb_name: str = option("", "tracking", "name of the run (default: hypernetworks_b{batch_size}_lr{lr}_e{epochs})")
    wandb_entity: str = option("", "tracking", "user or team on Weights & Biases; empty means the account's default")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {' '.join(message.split())}\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, "") and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Reads the command line; what is wrong with it ends the program with exit code 2 and one line."""
    parser = Parser(
        prog="train.py",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    groups: dict[str, Any] = {}
    for item in dataclasses.fields(Config):
        group = groups.setdefault(item.metadata["group"], parser.add_argument_group(item.metadata["group"]))
        names = [f"--{item.name.replace('_', '-')}"] + (["-r"] if item.name == "resume" else [])
        text = item.metadata["text"]
        if item.type is bool:
            group.add_argument(*names, action="store_true", help=text)
        elif get_origin(item.type) is Literal:
            group.add_argument(*names, choices=get_args(item.type), default=item.default, help=text)
        else:
            group.add_argument(*names, type=item.type, default=item.default, metavar=_metavar(item.type), help=text)
    arguments = [_with_dashes(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    config = Config(**vars(namespace))
    try:
        check_config(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def check_config(config: Config) -> None:
    """Raises a ValueError that names the flag, its value and its range."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        low, high = item.metadata["at_least"], item.metadata["at_most"]
        if item.type is int:
            high = min(high, 2**62)
        if item.type in (int, float) and not low <= value <= high:
            bounds = [f"at least {low:g}"] * math.isfinite(low) + [f"at most {high:g}"] * math.isfinite(high)
            raise ValueError(f"--{item.name.replace('_', '-')}: got {value}, expected {' and '.join(bounds)}")
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"--{item.name.replace('_', '-')}: got {value!r}, which has a null character")
    check_depth(config.depth)
    path = Path(config.checkpoint_path)
    try:
        is_something_else = not stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_something_else = False
    except OSError as error:
        raise ValueError(f"--checkpoint-path: {error}") from None
    if not config.checkpoint_path or is_something_else:
        raise ValueError(f"--checkpoint-path: got {config.checkpoint_path!r}, expected the path of a file")
    if config.resume and not Path(config.checkpoint_path).is_file():
        raise ValueError(
            f"--resume: there is no checkpoint at {config.checkpoint_path}; name it with --checkpoint-path, "
            "or leave --resume away to begin anew"
        )


@dataclass
class Progress:
    """How far a run is: what a checkpoint notes beside the tensors."""

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    wandb_id: str | None = None


@dataclass
class Run:
    """A run in memory: what is fixed, and what changes."""

    config: Config
    device: torch.device
    dataset: data.Dataset
    model: hf.Model
    step: training.Step
    learning_rate: optim.Schedule
    data_digest: str
    normalization: data.Normalization
    state: TrainState
    best: tuple[hf.Params, hf.BatchStats]
    epoch_totals: Metrics
    progress: Progress
    saved: bool = True
    """Whether the last attempt to save succeeded."""
    owns_path: bool = False
    """Whether the file at the checkpoint's path is this run's, and not an earlier one's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    interrupts = Interrupts()
    interrupts.install()
    printer = Printer()
    config: Config | None = None
    try:
        config = parse_args(argv)
        with locked(config.checkpoint_path):
            run = set_up(config, printer)
            wandb_run = None if config.no_wandb else start_tracking(run, printer)
            interrupts.defer()
            code = EXIT_FAILED
            try:
                code = train(run, interrupts, printer, wandb_run)
            finally:
                if wandb_run is not None:
                    finish_tracking(run, wandb_run, code)
            return code
    except Interrupted as interrupt:
        path = config.checkpoint_path if config else ""
        there = f"; the checkpoint {path} is as it was" if path and Path(path).exists() else "; nothing was saved yet"
        printer.warn(f"stopped by {interrupt} before training began{there}")
        return 128 + interrupt.number
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


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Keeps the checkpoint for this process alone.

    Raises:
        ValueError: Another process of this machine is training into it.
    """
    lock = lock_for(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--checkpoint-path: another run is writing to {path}; wait for its end, or name another file"
        ) from None
    try:
        sweep(path)
        yield
    finally:
        lock.release()


def set_up(config: Config, printer: Printer) -> Run:
    """Reads the data, builds the network and either draws its parameters or reads them from the checkpoint."""
    device = choose_device(config.device)
    if "graph" in config.engine and device.type != "cuda":
        raise ValueError(f"--engine: got {config.engine}, which needs a GPU; on the CPU there is eager and compiled")
    printer.say(f"device       {describe_device(device)}, torch {torch.__version__}")
    # Read before the data, which may take minutes: what is wrong with it should be known at once.
    previous = read_checkpoint(config) if config.resume else None
    check_writable(Path(config.checkpoint_path))

    dataset = data.load_dataset(
        config.dataset,
        config.data_dir,
        val_size=config.val_size,
        train_size=config.train_size,
        seed=config.seed,
        progress=printer.track,
        notify=printer.warn,
    )
    count = len(dataset.train.labels)
    if config.batch_size > count:
        raise ValueError(f"--batch-size: got {config.batch_size}, expected at most the {count:,} training pictures")
    held_out = f", {len(dataset.val.labels):,} held out" if dataset.val else ""
    printer.say(
        f"data         {config.dataset}: {count:,} training pictures{held_out}, {len(dataset.test.labels):,} to test, "
        f"{len(dataset.classes)} classes"
    )

    model = build_model(config, len(dataset.classes))
    normalization, digest = data.measure(dataset.train), data.digest(dataset)
    dataset = dataset._replace(
        train=tree.to(dataset.train, device),
        val=tree.to(dataset.val, device) if dataset.val else None,
        test=tree.to(dataset.test, device),
    )
    normalization = tree.to(normalization, device)
    optimizer = build_optimizer(config, math.ceil(count / config.batch_size))
    step = training.make_train_step(
        model,
        optimizer,
        load=data.make_train_load(dataset.train, normalization),
        decay=config.decay,
        weight_decay=config.weight_decay if config.decay == "generated" else 0.0,
    )
    # Drawn on the CPU, so that a seed means the same network on every device.
    state = tree.to(training.init_state(model, optimizer, data.seeded_generator("init", config.seed)), device)
    printer.say(f"model        {describe_model(config, model, state.params)}")
    selection = "the held-out pictures" if dataset.val else "the test set itself, for want of --val-size"
    printer.say(f"best model   chosen by accuracy on {selection}")
    run = Run(
        config=config,
        device=device,
        dataset=dataset,
        model=model,
        step=step,
        learning_rate=optimizer.learning_rate,
        data_digest=digest,
        normalization=normalization,
        state=state,
        best=(state.params, state.batch_stats),
        epoch_totals=no_metrics(device),
        progress=Progress(),
    )
    if previous is not None:
        restore(run, previous)
        printer.say(
            f"resumed      from {config.checkpoint_path} at epoch {run.progress.epoch + 1}, batch {run.progress.batch}"
        )
        planned = previous.notes["config"]["epochs"]
        if planned != config.epochs:
            printer.say(f"schedule     laid over {config.epochs} epochs now, and not over {planned} as so far")
    if run.progress.epoch < config.epochs:
        run.step = start_engine(run, printer)
    return run


def start_engine(run: Run, printer: Printer) -> training.Step:
    """The step as `--engine` wants it, compiled and captured here and not in the middle of the first epoch."""
    config = run.config
    count = len(run.dataset.train.labels)
    engine = config.engine
    if engine == "auto" and run.device.type == "cuda":
        engine = "compiled-graph"
    elif engine == "auto":
        steps = config.epochs * math.ceil(count / config.batch_size)
        engine = "compiled" if steps >= COMPILE_FROM_STEPS else "eager"
    draw = data.draw_epoch(config.seed, 0, count, flip=run.dataset.flip)
    batch = tree.to(next(data.batches(draw, config.batch_size)), run.device)
    step, started = run.step, time.perf_counter()
    try:
        if engine.startswith("compiled"):
            printer.say(f"engine       {engine}: compiling, which takes a minute or more the first time")
            step = capture.compile_step(step, batch)
            # The step is pure: what this computes is thrown away, and the state is as it was.
            step(run.state, batch)
        if "graph" in engine:
            step = capture.capture(step, run.state, batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = _one_line(error)[:200]
        if config.engine != "auto":
            raise OSError(f"--engine: {engine} does not work here, eager does without: {reason}") from None
        printer.warn(f"the engine {engine} does not work here, going on with eager: {reason}")
        engine, step = "eager", run.step
    seconds = time.perf_counter() - started
    printer.say(f"engine       {engine}" + (f", ready after {seconds:.1f} s" if engine != "eager" else ""))
    return step


def train(run: Run, interrupts: Interrupts, printer: Printer, wandb_run: WandbRun | None) -> int:
    """The epochs; returns the exit code."""
    config, progress = run.config, run.progress
    if progress.epoch >= config.epochs:
        printer.say(
            f"nothing to do: the run is complete after {progress.epoch} epochs; give a larger --epochs to go on"
        )
    count = len(run.dataset.train.labels)
    batch_count = math.ceil(count / config.batch_size)
    while progress.epoch < config.epochs:
        started = time.perf_counter() - progress.seconds
        first_batch = progress.batch
        draw = tree.to(data.draw_epoch(config.seed, progress.epoch, count, flip=run.dataset.flip), run.device)
        unread: list[Metrics] = []
        for batch in data.batches(draw, config.batch_size, start=progress.batch):
            run.state, metrics = run.step(run.state, batch)
            unread.append(metrics)
            progress.batch += 1
            signaled = interrupts.received
            if progress.batch % config.report_every == 0 or progress.batch == batch_count or signaled:
                report(run, unread, batch_count, printer, wandb_run)
                unread.clear()
            if signaled:
                progress.seconds = time.perf_counter() - started
                return stop(run, signaled, printer)
        train_seconds = time.perf_counter() - started - progress.seconds
        trained = max(0, count - first_batch * config.batch_size)
        try:
            finish_epoch(run, started, trained / max(train_seconds, 1e-9), interrupts, printer, wandb_run)
        except Interrupted as interrupt:
            progress.seconds = time.perf_counter() - started
            return stop(run, interrupt.number, printer)
        if interrupts.received:
            return stop(run, interrupts.received, printer, already_saved=run.saved)
    return 0 if run.saved else EXIT_FAILED


def report(run: Run, unread: list[Metrics], batch_count: int, printer: Printer, wandb_run: WandbRun | None) -> None:
    """Reads the metrics of the batches since the last report, all at once, and shows them.

    Raises:
        FloatingPointError: A loss is not finite. Nothing has been saved since the last finite report.
    """
    progress = run.progress
    stacked = tree.map(lambda *values: torch.stack(values), *unread)
    run.epoch_totals = tree.map(lambda total, values: total + values.sum(dtype=total.dtype), run.epoch_totals, stacked)
    losses, correct, counts = (column.tolist() for column in stacked)
    first_batch = progress.batch - len(unread) + 1
    for offset, loss in enumerate(losses):
        if not math.isfinite(loss):
            progress.batch = first_batch + offset
            raise FloatingPointError(not_finite(run, f"the loss is {loss} at"))
    loss = sum(losses) / sum(counts)
    accuracy = 100 * sum(correct) / sum(counts)
    epochs = run.config.epochs
    printer.say(
        f"epoch {progress.epoch + 1}/{epochs}  batch {progress.batch}/{batch_count}  "
        f"loss {loss:.4f}  accuracy {accuracy:.2f} %"
    )
    if wandb_run is not None:
        done = progress.epoch * batch_count + progress.batch
        rate = float(run.learning_rate(run.state.step - 1))
        wandb_run.log({"step": done, "batch/loss": loss, "batch/accuracy": accuracy, "learning_rate": rate})


def finish_epoch(
    run: Run,
    started: float,
    images_per_second: float,
    interrupts: Interrupts,
    printer: Printer,
    wandb_run: WandbRun | None,
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
    row |= {"learning_rate": rate, "epoch_time": seconds, "images_per_second": images_per_second}

    progress.history.append(row)
    progress.epoch += 1
    progress.batch, progress.seconds = 0, 0.0
    run.epoch_totals = no_metrics(run.device)
    save(run, printer)

    val = f"val {row['val/accuracy']:.2f} %  " if "val/accuracy" in row else ""
    saved = f"saved {config.checkpoint_path}" + (" with a new best" if is_best else "") if run.saved else "NOT SAVED"
    printer.say(
        f"epoch {progress.epoch}/{config.epochs}  train {train_accuracy:.2f} %  {val}test {test_accuracy:.2f} %  "
        f"test loss {test_loss:.4f}  lr {rate:.6g}  {seconds:.1f} s  {images_per_second:,.0f} images/s  "
        f"best {progress.best_accuracy:.2f} % (epoch {progress.best_epoch})  {saved}"
    )
    if wandb_run is not None:
        wandb_run.log(row)
        wandb_run.summarize({"best_accuracy": progress.best_accuracy, "best_epoch": progress.best_epoch})


def stop(run: Run, number: int, printer: Printer, *, already_saved: bool = False) -> int:
    """Saves in mid-run after a signal; returns the exit code that a shell expects then.

    Raises:
        FloatingPointError: The state is not finite. Nothing was saved.
    """
    name = signal.Signals(number).name
    if not already_saved:
        check_finite(run)
        save(run, printer)
    where = f"epoch {run.progress.epoch + 1}, batch {run.progress.batch}"
    if run.saved:
        printer.warn(f"stopped by {name} at {where}; saved {run.config.checkpoint_path}, go on with --resume")
    else:
        printer.warn(f"stopped by {name} at {where}; this could not be saved")
    return 128 + number


def evaluate(run: Run, images: data.Images, interrupts: Interrupts) -> tuple[float, float]:
    """Mean loss, and accuracy in percent.

    Raises:
        Interrupted: A signal came.
        FloatingPointError: The loss is not finite.
    """

    def batches() -> Iterator[data.Images]:
        for batch in data.batches(images, run.config.eval_batch_size):
            interrupts.check()
            yield batch

    load = data.make_eval_load(run.normalization)
    metrics = training.evaluate(run.model, run.state.params, run.state.batch_stats, batches(), load=load)
    loss, accuracy = loss_and_accuracy(metrics)
    if not math.isfinite(loss):
        raise FloatingPointError(not_finite(run, f"the loss is {loss} in the evaluation after"))
    return loss, accuracy


def check_finite(run: Run) -> None:
    """Raises a FloatingPointError where the state holds a number that is not finite."""
    if not bool(torch.stack([leaf.isfinite().all() for leaf in tree.leaves(run.state)]).all()):
        raise FloatingPointError(not_finite(run, "a number that is not finite came up by"))


def save(run: Run, printer: Printer) -> None:
    """Writes the checkpoint, or says that it could not; `run.saved` tells."""
    path = Path(run.config.checkpoint_path)
    trees = {
        "state": run.state,
        "best": run.best,
        "epoch_totals": run.epoch_totals,
        "normalization": run.normalization,
    }
    notes = {
        "config": dataclasses.asdict(run.config),
        "progress": dataclasses.asdict(run.progress),
        "classes": run.dataset.classes,
        "data": run.data_digest,
    }
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        aside = unused_path(path.resolve()) if path.exists() and not run.owns_path else None
        checkpoint.save(path, trees, notes, keep_old_as=aside)
        run.saved = run.owns_path = True
        if aside is not None:
            printer.say(f"kept the earlier run of {path} as {aside}")
    except OSError as error:
        run.saved = False
        printer.warn(f"could not save {path}: {error}; trying again at the next occasion")


def unused_path(path: Path) -> Path:
    """The first of path.1, path.2 and so on that does not exist."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate


def read_checkpoint(config: Config) -> checkpoint.Checkpoint:
    """The checkpoint to go on from.

    Raises:
        ValueError: It is damaged, or the command line asks for another run than the one in it.
    """
    previous = checkpoint.load(config.checkpoint_path)
    missing = {"config", "progress", "classes", "data"} - previous.notes.keys()
    if missing or previous.notes["progress"].keys() != dataclasses.asdict(Progress()).keys():
        raise ValueError(f"--resume: {config.checkpoint_path} was not written by this version of train.py")
    before, now = previous.notes["config"], dataclasses.asdict(config)
    shaping = [item.name for item in dataclasses.fields(config) if item.metadata["shapes"]]
    different = [
        f"--{name.replace('_', '-')} is {now[name]}, was {before.get(name)}"
        for name in shaping
        if now[name] != before.get(name)
    ]
    if different:
        raise ValueError(f"--resume: {config.checkpoint_path} holds another run: {'; '.join(different)}")
    done = previous.notes["progress"]["epoch"]
    if config.epochs < done:
        raise ValueError(
            f"--epochs: got {config.epochs}, but the run in {config.checkpoint_path} has done {done} already"
        )
    return previous


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
    run.progress = Progress(**previous.notes["progress"])
    run.owns_path = True


def check_writable(path: Path) -> None:
    """Tries the checkpoint's folder, or the one that it will be made in: a run is not to find out after an epoch.

    Raises:
        ValueError: Nothing can be written there.
    """
    folder = path.resolve().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        # As long a name as the one that a save writes to first.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise ValueError(f"--checkpoint-path: nothing can be written at {path}: {error}") from None


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


def describe_model(config: Config, model: hf.Model, params: hf.Params) -> str:
    """How large it is, and how much larger the ordinary network is."""
    name = f"{config.model} {config.depth}-{config.width}"
    count, ordinary = hf.num_params(params), count_ordinary(model)
    if config.model == "plain":
        return f"{name}: {count:,} parameters"
    units = sum(len(z) for z in params.embeddings.values())
    return (
        f"{name}: {count:,} parameters ({units:,} embeddings), compression {ordinary / count:.2f} "
        f"against the {ordinary:,} of the ordinary network"
    )


def build_optimizer(config: Config, steps_per_epoch: int) -> optim.Optimizer:
    """The optimizer with its schedule over the whole run."""
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
        return optim.sgd(schedule, weight_decay=weight_decay)
    return optim.adam(schedule, weight_decay=weight_decay, decoupled=config.optimizer == "adamw")


def start_tracking(run: Run, printer: Printer) -> WandbRun | None:
    """Starts, or continues, the run on Weights & Biases."""
    config = run.config
    name = config.wandb_name or f"hypernetworks_b{config.batch_size}_lr{config.lr}_e{config.epochs}"
    wandb_run = start_wandb(
        project=config.wandb_project,
        name=name,
        entity=config.wandb_entity or None,
        config=dataclasses.asdict(config) | {"torch": torch.__version__, "hyperfunc": hf.__version__},
        run_id=run.progress.wandb_id,
        say=printer.say,
        warn=printer.warn,
    )
    if wandb_run is not None:
        run.progress.wandb_id = wandb_run.id
        total = hf.num_params(run.state.params)
        wandb_run.summarize({"total_parameters": total, "compression": count_ordinary(run.model) / total})
    return wandb_run


def finish_tracking(run: Run, wandb_run: WandbRun, code: int) -> None:
    """Sends the checkpoint with the best model, and ends the run on Weights & Biases."""
    if run.saved and run.progress.best_epoch:
        aliases = ["best", f"epoch-{run.progress.best_epoch}"]
        wandb_run.log_model(run.config.checkpoint_path, f"model-{wandb_run.id}", aliases)
    wandb_run.finish(code)


def choose_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: It asks for a GPU where torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device: got cuda, but torch sees no CUDA device; python -m hyperfunc.check_gpu says why, "
            "--device cpu does without"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """The device as a person knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


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


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _with_dashes(argument: str) -> str:
    """--batch_size=8 as --batch-size=8."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    exit_code = main()
    ignore()
    sys.exit(exit_code)
