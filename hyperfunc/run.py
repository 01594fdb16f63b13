"""A run in memory: what it has been told, what it consists of, how far it is, and what it has seen so far."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hyperfunc import data, distributed, optim, training, tree
from hyperfunc.config import Config
from hyperfunc.flags import flag
from hyperfunc.model import BatchStats, Model, Params
from hyperfunc.precision import Precision
from hyperfunc.training import Metrics, TrainState


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
    model: Model
    precision: Precision
    optimizer: optim.Optimizer
    objective: dict[str, Any]
    """What `training.make_train_step` and `training.make_gradients` are to be told alike."""
    step: training.Step[Metrics] = field(init=False)
    """Of one batch or several, with a row of metrics for each; made last, with the engine."""
    eval_step: training.EvalStep
    data_digest: str
    normalization: data.Normalization
    environment: dict[str, Any]
    state: TrainState
    best: tuple[Params, BatchStats]
    progress: Progress
    epoch_totals: Metrics
    """Of the batches of this epoch that have been read."""
    report_totals: Metrics
    """Of those among them that no line has shown yet."""
    images_read: int = 0
    """Of the batches, since the program began, whose metrics have been read."""
    unread: list[Metrics] = field(default_factory=list)
    """Of the batches after those, a row for each; reading them means waiting for the device."""
    calibration_step: training.CalibrationStep | None = None
    """Of a batch for `load`; made with the engine, None without --calibrate."""
    load: training.Load = field(init=False)
    """Makes the pictures of a batch of `rows_of` a draw; made with `step`."""
    rows_of: Callable[[data.Draw], Any] = field(default=lambda draw: draw)
    """Says whose a draw is where several runs share `load`."""
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
        """Batches per epoch."""
        return math.ceil(len(self.dataset.train.labels) / self.config.batch_size)

    @property
    def eval_batch_size(self) -> int:
        """Pictures at once in an evaluation: on the CPU few, because a signal is obeyed between two batches."""
        return self.config.eval_batch_size or (1000 if self.device.type == "cuda" else 100)

    @property
    def steps_done(self) -> int:
        """Batches so far; equal to `state.step`, which would have to be read from the device."""
        return self.progress.epoch * self.batch_count + self.progress.batch


def notes_to_compare(run: Run) -> dict[str, Any]:
    """What else has to be the same on all ranks: the pictures, and what decides what a rank does when, and how."""
    return {"the data": run.data_digest} | flags_to_compare(run.config) | {"--precision": run.precision}


def flags_to_compare(config: Config) -> dict[str, Any]:
    """The flags that have to be the same on all ranks."""
    own = ("data_dir", "device", "devices", "quiet", "timeout")
    return {flag(name): value for name, value in dataclasses.asdict(config).items() if name not in own}


def no_metrics(device: torch.device) -> Metrics:
    """Metrics over nothing, to add others to."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return Metrics(zero.double(), zero, zero)


def loss_and_accuracy(metrics: Metrics) -> tuple[float, float]:
    """Mean loss, and accuracy in percent; reads the device."""
    loss, correct, count = torch.stack([value.double() for value in metrics]).tolist()
    return loss / count, 100 * correct / count


def learning_rate(run: Run) -> float:
    """Of the last step; computed on the CPU, without waiting for the device."""
    return float(run.optimizer.learning_rate(torch.tensor(run.steps_done - 1)))


def read_metrics(run: Run) -> None:
    """Reads the metrics of the batches that are unread, all at once, and adds them up.

    Raises:
        FloatingPointError: A loss is not finite. Nothing has been saved since the last finite one.
    """
    if not run.unread:
        return
    rows = tree.map(lambda *values: torch.cat(values), *run.unread)
    sums = tree.map(lambda total, values: values.sum(dtype=total.dtype), run.epoch_totals, rows)
    run.epoch_totals = tree.map(torch.add, run.epoch_totals, sums)
    run.report_totals = tree.map(torch.add, run.report_totals, sums)
    with run.ranks.at_device():
        losses, _, counts = torch.stack([column.double() for column in rows]).tolist()  # which waits once
    for offset, loss in enumerate(losses, 1 - len(losses)):
        if not math.isfinite(loss):
            run.progress.batch += offset
            raise FloatingPointError(not_finite(run, f"the loss is {loss} at"))
    run.unread.clear()
    run.images_read += round(sum(counts))


def check_finite(run: Run) -> None:
    """Raises a FloatingPointError where the state holds a number that is not finite."""
    if not bool(torch.stack([vector.isfinite().all() for vector in tree.vectors(run.state)]).all()):
        raise FloatingPointError(not_finite(run, "a number that is not finite appeared by"))


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
