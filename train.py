"""Trains a hypernetwork for a residual network on pictures: python train.py --epochs 200

Everything that a run does is wired here, top to bottom; what it is made of is in the package.
"""

import os
import signal
import sys

if __name__ == "__main__":
    # Started with a stream closed, as by `>&-`, its number would go to the next file that is opened.
    for _number, _stream in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(_number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, _stream, open(_number, "w" if _number else "r", closefd=False))  # noqa: SIM115

    if "RANK" in os.environ:
        # Read by torch when it is imported. Whoever loses the others says so in a line, without pages of C++ frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    # Importing torch takes seconds, and Ctrl-C must not end in a traceback there either.
    def _exit_before_start(number: int, _frame: object) -> None:
        os.write(2, b"stopped before anything was read or written\n")
        os._exit(128 + number)

    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(_number, _exit_before_start)

import contextlib
import itertools
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperfunc import (
    capture,
    checkpoint,
    data,
    distributed,
    launch,
    optim,
    population,
    precision,
    run_file,
    shares,
    sync_norm,
    tracking,
    training,
    tree,
)
from hyperfunc.build import build_model, build_optimizer, describe_model
from hyperfunc.config import Config, Every, parse_args, parse_every, runs_of
from hyperfunc.console import Printer, TrainingBars
from hyperfunc.environment import describe_device, environment
from hyperfunc.exits import AFTER_SIGNAL, EXIT_BAD_INPUT, EXIT_FAILED, explain, one_line
from hyperfunc.interrupt import Interrupted, Interrupts, exit_at_once, ignore
from hyperfunc.model import BatchStats, Params
from hyperfunc.report import Reporter, start_reporting
from hyperfunc.run import (
    Progress,
    Run,
    check_finite,
    learning_rate,
    loss_and_accuracy,
    no_metrics,
    not_finite,
    notes_to_compare,
    read_metrics,
)

REPLAYED_STEPS = 10
"""Steps in one CUDA graph where --steps-per-replay is 0: what the host does for a replay is then a tenth a step."""

COMPILE_FROM_STEPS, COMPILE_FROM_PICTURES = 5_000, 150_000
"""Lengths of a run from either of which compiling on the CPU, which takes one to two minutes, is sure to pay: it saves
a part of each step and a part for each picture."""

SECOND_BEST = {"compiled-graph": "graph", "graph": "compiled", "compiled": "eager"}
"""What --engine auto takes where an engine does not work: it may be the compiler that fails, or the capture."""


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
            apart = bool(config.seeds or config.sweep)
            with distributed.joined(
                device, config.timeout, lambda: interrupts.received, say_at_end, apart=apart
            ) as ranks:
                interrupts.leave_word = ranks.withdraw
                if apart:
                    program = shares.Program(check, set_up, start_engine, partial(carry_out, paints=False))
                    return shares.train_all(program, config, ranks, device, interrupts, printer)
                with run_file.locked(config, ranks):
                    speaker = printer if ranks.rank == 0 else Printer(mute=True)
                    run = set_up(config, ranks, device, speaker)
                    start_engine([run], speaker)
                    interrupts.defer()
                    ends: dict[int, int | FloatingPointError] = {}
                    population.in_step({0: carry_out(run, interrupts, speaker)}, run.step, [run.state], ends)
                    if isinstance(end := ends[0], FloatingPointError):
                        raise end
                    return end
        except distributed.Told as told:
            return told.code
        except ValueError as error:
            printer.warn(f"train.py: {one_line(error)}")
            return EXIT_BAD_INPUT
        except (OSError, FloatingPointError, RuntimeError, MemoryError) as error:
            printer.warn(f"train.py: {explain(error)}")
            return EXIT_FAILED


def start_ranks(config: Config, argv: Sequence[str] | None, printer: Printer) -> int | None:
    """Runs this program on every device that is asked for, and returns their exit code; None where this is one run."""
    try:
        count = len(devices_of(config))
        if count == 1 or distributed.rank_of_environment() is not None:
            return None
        is_population = bool(config.seeds or config.sweep)
        if is_population:
            count = min(count, len(runs_of(config)))
            if count == 1:
                return None
        else:
            launch.check_batch_size(config.batch_size, count)
    except ValueError as error:
        printer.warn(f"train.py: {one_line(error)}")
        return EXIT_BAD_INPUT
    given = sys.argv[1:] if argv is None else argv
    program = os.path.abspath(__file__)
    start = partial(launch.launch, program, given, count, max_restarts=config.max_restarts, say=say_at_end)
    return shares.launch(config, start) if is_population else start()


def farewell(number: int, config: Config) -> str:
    """The line that a run leaves with when a signal comes before there is anything to save."""
    if distributed.rank_of_environment():
        exit_at_once(number)  # rank 0 says it
    path = config.checkpoint_path
    if config.seeds or config.sweep:
        there = "what was saved before is as it was"
    else:
        there = f"the checkpoint {path} is as it was" if os.path.exists(path) else "nothing was saved yet"
    return f"stopped by {signal.Signals(number).name} before training began; {there}"


def say_at_end(line: str) -> None:
    """Says why all ranks end, from whatever thread."""
    os.write(2, f"train.py: {line}\n".encode(errors="backslashreplace"))


def devices_of(config: Config) -> list[torch.device]:
    """The devices of this machine that the flags ask for, one a rank.

    Raises:
        ValueError: They are not there.
    """
    on_cpu = config.device == "cpu" or launch.parse_devices(config.devices)[0] == "cpu"
    visible = 0 if on_cpu else launch.visible_gpus()
    return launch.choose_devices(config.devices, config.device, visible)


def choose_device(config: Config) -> torch.device:
    """The device of this process.

    Raises:
        ValueError: There are fewer than ranks on this machine.
    """
    devices = devices_of(config)
    if devices[0].type == "cpu":
        return devices[0]
    index = distributed.device_index(torch.cuda.device_count())
    if index >= len(devices):
        raise ValueError(f"--devices: this machine has {index + 1} ranks or more for {len(devices)} devices")
    torch.cuda.set_device(devices[index])
    return devices[index]


def check(
    config: Config, ranks: distributed.Ranks, device: torch.device
) -> tuple[precision.Precision, checkpoint.Checkpoint | None]:
    """What can be known to be wrong before the data is read, which may take minutes.

    Returns:
        The precision, and the checkpoint to go on from.

    Raises:
        ValueError: Something is.
    """
    launch.check_batch_size(config.batch_size, ranks.world)
    if "graph" in config.engine and device.type != "cuda":
        raise ValueError(f"--engine: got {config.engine}, which needs a GPU; on the CPU there is eager and compiled")
    number_format = precision.choose(config.precision, device)
    previous = run_file.find(config, ranks)
    if previous is not None and config.precision == "auto" and (before := run_file.noted_precision(previous)):
        with contextlib.suppress(ValueError):  # of a device that cannot do it
            number_format = precision.choose(before, device)
    if ranks.rank == 0:
        run_file.check_writable(Path(config.checkpoint_path))
    return number_format, previous


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
    number_format, previous = check(config, ranks, device)
    precision.set_float32_products(number_format)
    # cuDNN tries its ways to convolve at the first step of each shape, which is before anything is captured.
    torch.backends.cudnn.benchmark = device.type == "cuda"
    several = f", {ranks.world} ranks" if ranks.world > 1 else ""
    printer.say(f"device       {describe_device(device)}, torch {torch.__version__}{several}")

    # Which pictures are held out or left out is the seed's to say.
    if like is not None and not (config.val_size or config.train_size):
        dataset, normalization, digest = like.dataset, like.normalization, like.data_digest
    else:
        dataset = data.load_dataset(
            config.dataset,
            config.data_dir,
            val_size=config.val_size,
            train_size=config.train_size,
            seed=config.seed,
            progress=printer.track,
            notify=printer.warn,
        )
        normalization, digest = tree.to(data.measure(dataset.train), device), data.digest(dataset)
        # The training pictures come to the device with the step: see `make_step`.
        val = tree.to(dataset.val, device) if dataset.val else None
        dataset = dataset._replace(val=val, test=tree.to(dataset.test, device))
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
    optimizer = build_optimizer(config, math.ceil(count / config.batch_size), number_format, ranks.world)
    # Drawn on the CPU, so that a seed means the same network on every device.
    state = tree.to(training.init_state(model, optimizer, data.seeded_generator("init", config.seed)), device)
    printer.say(f"model        {describe_model(config, model, state.params)}")
    ran_as: dict[str, Any] = {"precision": number_format} | ({"ranks": ranks.world} if ranks.world > 1 else {})
    selection = "the held-out pictures" if dataset.val else "the test set itself, for want of --val-size"
    mean = "of averaged parameters, " if config.ema_decay else ""
    printer.say(f"best model   {mean}chosen by accuracy on {selection}")
    run = Run(
        config=config,
        ranks=ranks,
        device=device,
        dataset=dataset,
        model=model,
        precision=number_format,
        optimizer=optimizer,
        objective={
            "precision": number_format,
            "reduce": ranks.reduce,
            "decay": config.decay,
            "weight_decay": config.weight_decay if config.decay == "generated" else 0.0,
        },
        eval_step=training.make_eval_step(model, load=load_to_evaluate, precision=number_format),
        data_digest=digest,
        normalization=normalization,
        environment=environment(device, Path(__file__).parent) | ran_as,
        state=state,
        best=(state.params, state.batch_stats),
        progress=Progress(run=secrets.token_hex(4)),
        epoch_totals=no_metrics(device),
        report_totals=no_metrics(device),
    )
    if previous is not None:
        run_file.go_on(run, previous, printer)
    ranks.compare({"state": run.state, "best": run.best}, notes_to_compare(run))
    return run


def load_to_evaluate(batch: tuple[data.Images, data.Normalization]) -> tuple[Tensor, Tensor]:
    """Pictures and labels of one of `evaluation_batches`. The normalization comes with it, so that one compiled and
    captured step evaluates runs that are trained on different pictures."""
    images, normalization = batch
    return data.normalize(images.pixels, normalization), images.labels


def make_step(members: Sequence[Run]) -> training.Step[training.Metrics]:
    """The step as it is, of one run or of several at once; with it the training pictures come to the device, once for
    all runs that share them."""
    run = members[0]
    if len(members) > 1:
        load = population.make_load([one.dataset.train for one in members], [one.normalization for one in members])
        for index, one in enumerate(members):
            one.load, one.rows_of = load, partial(population.rows_of_member, index)
        return population.map_side_by_side(
            training.make_train_step(run.model, run.optimizer, load=load, **run.objective)
        )
    whole = data.make_train_load(tree.to(run.dataset.train, run.device), run.normalization)

    ranks = run.ranks  # and not the run, which would hold itself then, and its memory until Python looks for that

    def part(draw: data.Draw) -> tuple[Tensor, Tensor]:
        # A rank takes its part in here, so that compiled and captured steps see the same batches on all ranks.
        return whole(ranks.part(draw))

    run.load = part
    return training.make_train_step(run.model, run.optimizer, load=part, **run.objective)


def start_engine(members: Sequence[Run], printer: Printer) -> None:
    """Makes the steps what `--engine` wants, compiled and captured here and not in the middle of the first epoch.

    Of several runs the first one's step is that of them all.
    """
    run, config = members[0], members[0].config
    run.step = make_step(members)
    if run.progress.epoch >= config.epochs:
        return
    if config.calibrate:
        run.calibration_step = training.make_calibration_step(run.model, load=run.load, precision=run.precision)
    engine = choose_engine(run, printer)
    together = steps_per_replay(run) if "graph" in engine else 1
    started = time.perf_counter()
    made = None
    while made is None:
        try:
            made = make_engine(engine, together, members, printer)
        except (torch.OutOfMemoryError, MemoryError, ValueError):
            raise  # which no other engine would cure
        except Exception as error:  # the compiler and what it calls raise errors of many kinds
            if engine == "eager" or os.environ.get("HYPERFUNC_TRACEBACK"):
                raise  # there is none below it
            reason = one_line(error)[:200]
            # A rank cannot know whether the others go on with the same engine.
            if config.engine != "auto" or run.ranks.world > 1:
                raise OSError(f"--engine: {engine} does not work here, {SECOND_BEST[engine]} may: {reason}") from None
            failed, engine = engine, SECOND_BEST[engine]
            together = together if "graph" in engine else 1
            printer.warn(f"the engine {failed} does not work here, going on with {engine}: {reason}")
    step, eval_step, calibration_step = made
    for one in members:
        one.step, one.eval_step, one.calibration_step = step, eval_step, calibration_step
        one.steps_per_replay, one.progress.engine = together, engine
    details = [engine, run.precision]
    if "graph" in engine:
        details.append(f"{together} steps a graph")
    if engine != "eager":
        details.append(f"ready after {time.perf_counter() - started:.1f} s")
    printer.say(f"engine       {', '.join(details)}")


def choose_engine(run: Run, printer: Printer) -> str:
    """The engine that `--engine` means for this run; auto stays with the one that a run has had so far."""
    config, before, on_gpu = run.config, run.progress.engine, run.device.type == "cuda"
    engine: str = config.engine
    if engine == "auto" and before and ("graph" in before) <= on_gpu:
        return before
    if engine == "auto" and on_gpu:
        engine = "compiled-graph"
    elif engine == "auto":
        count = len(run.dataset.train.labels)
        # Every rank compiles, and has its part of the pictures.
        steps, pictures = config.epochs * math.ceil(count / config.batch_size), config.epochs * count / run.ranks.world
        is_long = steps >= COMPILE_FROM_STEPS or pictures >= COMPILE_FROM_PICTURES
        engine = "compiled" if is_long else "eager"
    if before not in ("", engine):
        printer.warn(f"the engine is {engine} and was {before} so far: results may differ by rounding")
    return engine


def steps_per_replay(run: Run) -> int:
    """Steps in one CUDA graph: no more than lie between two things that are due."""
    return min(run.config.steps_per_replay or REPLAYED_STEPS, *steps_between(run))


def steps_between(run: Run) -> list[int]:
    """How many steps of full batches lie between two of the things that are due: epochs, reports, saves by batches."""
    config, every = run.config, parse_every(run.config.checkpoint_every)
    full_batches = len(run.dataset.train.labels) // config.batch_size
    return [full_batches, config.report_every, *([every.number] if every.unit == "batches" else [])]


def other_lengths(run: Run, together: int) -> list[int]:
    """How many rows, beside those of a full replay, get a graph of their own: one batch, and the last of an epoch."""
    size, last = run.config.batch_size, len(run.dataset.train.labels) % run.config.batch_size
    single = any(number % together for number in steps_between(run))
    return [*([size] if single else []), *([last] if last else [])]


def make_engine(
    engine: str, together: int, members: Sequence[Run], printer: Printer
) -> tuple[training.Step[training.Metrics], training.EvalStep, training.CalibrationStep | None]:
    """The steps of training, of evaluation and of calibration by this engine, with so many of training in one graph."""
    run = members[0]
    step, eval_step, calibration_step, size = run.step, run.eval_step, run.calibration_step, run.config.batch_size
    if engine == "eager":
        return training.scan(step, size), eval_step, calibration_step
    is_compiled, is_captured = engine.startswith("compiled"), "graph" in engine
    count = len(run.dataset.train.labels)
    draws = [data.draw_epoch(one.config.seed, 0, count, flip=run.dataset.flip) for one in members]
    draw = population.side_by_side(draws)
    state = population.stack([one.state for one in members])
    network = run.model.weights(run.state.params), run.state.batch_stats
    pictures = next(evaluation_batches(run, run.dataset.test))
    batch = tree.to(next(data.batches(draw, size)), run.device)
    own_batch = run.rows_of(tree.to(next(data.batches(draws[0], size)), run.device))
    if is_compiled:
        printer.say(f"engine       {engine}: compiling, which takes a minute or more the first time")
        # All of it is pure: what is computed here is thrown away, and the state is as it was.
        with printer.waiting(f"compiling {engine}"):
            step = capture.compile_step(step, batch, channels_last=len(members) == 1)
            step(state, batch)
            if is_captured:
                eval_step = capture.compile_step(eval_step, pictures)
                eval_step(network, pictures)
            if is_captured and calibration_step is not None:
                calibration_step = capture.compile_step(calibration_step, own_batch)
                calibration_step(network, own_batch)
    step = training.scan(step, size)
    if is_captured:
        run.ranks.gather("")  # one may have compiled for far longer than another
        with printer.waiting("capturing"), run.ranks.at_device():
            step = capture.capture(step, state, tree.to(next(data.batches(draw, together * size)), run.device))
            for length in other_lengths(run, together):
                step(state, tree.to(next(data.batches(draw, length)), run.device))  # has a graph of its own
            eval_step = capture.capture_evaluation(eval_step, network, pictures)
            if calibration_step is not None:
                calibration_step = capture.capture(calibration_step, network, own_batch)
    return step, eval_step, calibration_step


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
        reporter.event("failed", reason=one_line(error))
        raise
    finally:
        reporter.event("end", code=code)
        if reporter.tracker is not None and run.owns_path and run.saved_best_epoch and interrupts.received is None:
            aliases = ["best", f"epoch-{run.saved_best_epoch}"]
            reporter.tracker.log_model(run.config.checkpoint_path, f"model-{reporter.tracker.id}", aliases)
        reporter.close(code, lambda: interrupts.received is not None)
    if code == 0 and interrupts.received is not None:
        printer.warn(f"stopped by {signal.Signals(interrupts.received).name} after the training was over")
        return AFTER_SIGNAL + interrupts.received
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
            pace = Pace(run.images_read)
            draw = tree.to(data.draw_epoch(config.seed, progress.epoch, count, flip=run.dataset.flip), run.device)
            bars.begin_epoch(progress.epoch, progress.batch)
            try:
                while progress.batch < run.batch_count:
                    rows, steps = next_rows(run, draw, every)
                    with run.ranks.at_device():
                        run.state, metrics = yield rows
                    run.unread.append(metrics)
                    progress.batch += steps
                    by_clock = every.unit == "seconds" and time.monotonic() - run.saved_at >= every.number
                    order = run.ranks.agree(interrupts.received or (distributed.SAVE if by_clock else None))
                    # Before a stop too: what goes on after it reports on what comes then.
                    if progress.batch % config.report_every == 0 or progress.batch == run.batch_count:
                        report(run, rows, reporter, bars, pace)
                    if order is not None and order != distributed.SAVE:
                        raise Interrupted(order)
                    bars.move(progress.epoch, progress.batch)
                    by_batches = every.unit == "batches" and run.steps_done % every.number == 0
                    if order == distributed.SAVE or by_batches:
                        progress.seconds = time.perf_counter() - started
                        run_file.save(run, reporter)
                bars.figures(epoch="evaluating")
                finish_epoch(run, draw, started, pace, every, interrupts, reporter)
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
    """Images a second since it was made, by what is known to be done.

    Args:
        images: How many were done before.
    """

    def __init__(self, images: int) -> None:
        self._started = self._last = time.perf_counter()
        self._first = self._images = images

    def note(self, images: int) -> float:
        """Images a second since the last note; so many of them are done by now, in all."""
        now = time.perf_counter()
        speed = (images - self._images) / max(now - self._last, 1e-9)
        self._last, self._images = now, images
        return speed

    @property
    def average(self) -> float:
        """Images a second up to the last note."""
        return (self._images - self._first) / max(self._last - self._started, 1e-9)


def report(run: Run, rows: data.Draw, reporter: Reporter, bars: TrainingBars, pace: Pace) -> None:
    """Shows the loss and the accuracy of the batches since the last report.

    Raises:
        FloatingPointError: A loss is not finite. Nothing has been saved since the last finite report.
    """
    config, progress = run.config, run.progress
    read_metrics(run)
    images_per_second = pace.note(run.images_read)
    loss, accuracy = loss_and_accuracy(run.report_totals)
    run.report_totals = no_metrics(run.device)
    rate = learning_rate(run)
    where = {"epoch": progress.epoch + 1, "batch": progress.batch, "step": run.steps_done}
    is_tracked = reporter.row("report", where | {"batch/loss": loss, "batch/accuracy": accuracy, "learning_rate": rate})
    shown = f"loss {loss:.4f}  accuracy {accuracy:.2f} %"
    reporter.printer.say(
        f"epoch {progress.epoch + 1}/{config.epochs}  batch {progress.batch}/{run.batch_count}  {shown}"
    )
    bars.figures(epoch=f"{shown}  lr {rate:.6g}  {images_per_second:,.0f} images/s")
    if config.histogram_every:
        reports_an_epoch = math.ceil(run.batch_count / config.report_every)
        number = progress.epoch * reports_an_epoch + math.ceil(progress.batch / config.report_every)
        # All ranks, because the gradients are of all.
        if number % config.histogram_every == 0 and run.ranks.tell(is_tracked and reporter.shows_histograms):
            show_histograms(run, rows, reporter)


def show_histograms(run: Run, rows: data.Draw, reporter: Reporter) -> None:
    """Tracks the parameters, the kernels and the gradients of the last batch. Where these do not fit into memory beside
    the step, the run goes on without."""
    params = run.state.params
    try:
        last_batch = run.rows_of(data.Draw(*(column[-run.config.batch_size :] for column in rows)))
        gradients = training.make_gradients(run.model, load=run.load, **run.objective)(run.state, last_batch)
        if reporter.tracker is not None:
            trees = {"parameters": params, "kernels": run.model.kernels(params), "gradients": gradients}
            reporter.histograms(run.steps_done, trees)
    except (RuntimeError, MemoryError) as error:
        if run.ranks.world > 1:
            raise  # the others wait for what this one was to add
        reporter.shows_histograms = False
        reporter.printer.warn(f"there are no histograms from here on: {one_line(error)}")


def finish_epoch(
    run: Run,
    draw: data.Draw,
    started: float,
    pace: Pace,
    every: Every,
    interrupts: Interrupts,
    reporter: Reporter,
) -> None:
    """Evaluates, keeps the best, saves, and shows all of it.

    Raises:
        Interrupted: A signal came before its end. Nothing has changed, and the epoch can be finished later.
        FloatingPointError: The state or a loss is not finite. Nothing was saved.
    """
    config, progress = run.config, run.progress
    check_finite(run)
    train_loss, train_accuracy = loss_and_accuracy(run.epoch_totals)
    rate = learning_rate(run)
    network = network_to_evaluate(run, draw, interrupts)
    test_loss, test_accuracy = evaluate(run, network, run.dataset.test, interrupts)
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
        row["val/loss"], row["val/accuracy"] = evaluate(run, network, run.dataset.val, interrupts)
        chosen_by = row["val/accuracy"]
    is_best = chosen_by > progress.best_accuracy
    if is_best:
        progress.best_accuracy, progress.best_epoch = chosen_by, progress.epoch + 1
        run.best = tree.clone(network)
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
        run_file.save(run, reporter)

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
    run_file.save(run, reporter)
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
    return AFTER_SIGNAL + number


def network_to_evaluate(run: Run, draw: data.Draw, interrupts: Interrupts) -> tuple[Params, BatchStats]:
    """The parameters, under --ema-decay their mean, and the statistics to evaluate them by: the running ones, under
    --calibrate after the first full batches of the epoch once more.

    Raises:
        Interrupted: A signal came.
    """
    state, calibration_step = run.state, run.calibration_step
    params = optim.mean_params(state.opt_state, state.params) if run.config.ema_decay else state.params
    if calibration_step is None:
        return params, state.batch_stats

    def step(network: Any, batch: Any) -> Any:
        with run.ranks.at_device():
            return calibration_step(network, batch)

    full = len(draw.picture) // run.config.batch_size
    batches = itertools.islice(data.batches(draw, run.config.batch_size), min(run.config.calibrate, full))
    batches = until_signal(run, map(run.rows_of, batches), interrupts)
    return params, run.ranks.mean(training.calibrate(run.model, params, state.batch_stats, batches, step=step))


def evaluation_batches(run: Run, images: data.Images) -> Iterator[tuple[data.Images, data.Normalization]]:
    """This rank's part of what is evaluated at once, with what it is normalized by."""
    for whole in data.batches(images, run.eval_batch_size * run.ranks.world):
        yield run.ranks.part(whole), run.normalization


def until_signal(run: Run, batches: Iterator[Any], interrupts: Interrupts) -> Iterator[Any]:
    """The batches.

    Raises:
        Interrupted: A signal came.
    """
    for batch in batches:
        if (order := run.ranks.agree(interrupts.received)) not in (None, distributed.SAVE):
            raise Interrupted(order)
        yield batch


def evaluate(
    run: Run, network: tuple[Params, BatchStats], images: data.Images, interrupts: Interrupts
) -> tuple[float, float]:
    """Mean loss, and accuracy in percent.

    Raises:
        Interrupted: A signal came.
        FloatingPointError: The loss is not finite.
    """
    batches = until_signal(run, evaluation_batches(run, images), interrupts)
    metrics = training.evaluate(run.model, *network, batches, eval_step=run.eval_step)
    loss, accuracy = loss_and_accuracy(run.ranks.sum(metrics))
    if not math.isfinite(loss):
        raise FloatingPointError(not_finite(run, f"the loss is {loss} in the evaluation after"))
    return loss, accuracy


if __name__ == "__main__":
    exit_code = main()
    ignore()
    if exit_code > AFTER_SIGNAL or tracking.holds_up_exit() or distributed.holds_up_exit():
        # Python's end waits for others' threads and processes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
