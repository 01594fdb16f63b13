"""The flags of train.py: what each means, which values it takes, and which of them go together."""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from hyperfunc import data, launch, sweep, tracking
from hyperfunc.flags import option, parse, shaping
from hyperfunc.hypernet import Init
from hyperfunc.precision import Precision
from hyperfunc.residual import Block, Shortcut, check_depth
from hyperfunc.training import Decay

DESCRIPTION = "Trains a hypernetwork for a residual network on pictures: python train.py --epochs 200"

DEFAULT_PROJECT = "hypernetworks-gpu"

SEEDS_PER_STEP = 8
"""Runs in one step on a GPU unless said otherwise; on the CPU such a step takes longer than as many single ones."""


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

    epochs: int = option(200, "run", "passes over the training set", at_least=1, at_most=10**6)
    batch_size: int = option(
        128,
        "run",
        "pictures per step, of all ranks together; the last batch of an epoch may be smaller",
        at_least=1,
        shapes=True,
    )
    eval_batch_size: int = option(
        0, "run", "pictures at once in evaluation, of each rank; 0 means 1000 on a GPU and 100 on the CPU", at_least=0
    )
    calibrate: int = option(
        0,
        "run",
        "training batches, at most those of an epoch, that the statistics of batch norms go through once more before "
        "each evaluation, when the parameters stand still",
        at_least=0,
        shapes=True,
    )
    seed: int = option(
        0,
        "run",
        "of the initial parameters, the order and the augmentation, and of what --val-size and --train-size pick",
        at_least=0,
        shapes=True,
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "run", "auto takes a GPU where there is one")
    engine: Literal["auto", "eager", "compiled", "graph", "compiled-graph"] = option(
        "auto",
        "run",
        "how a step runs: eager; compiled by torch.compile; graph, captured as a CUDA graph; compiled-graph, both. "
        "auto is compiled-graph on a GPU; on the CPU it is compiled for runs long enough to earn that, else eager",
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
        "auto takes every GPU that is seen; 2: the first two; 0,1: those; cpu:2: two ranks on the CPU; under torchrun "
        "its number of ranks counts",
        metavar="auto|N|I,J|cpu:N",
        check=launch.parse_devices,
    )
    sync_bn: bool = option(
        False, "ranks", "batch norms over the pictures of all ranks; without it each uses its own", shapes=True
    )
    timeout: float = option(300, "ranks", "seconds that a rank waits for another", at_least=2, at_most=86400)
    max_restarts: int = option(
        0, "ranks", "how often the ranks are started again after a failure", at_least=0, at_most=1000
    )
    seeds: str = option(
        "",
        "population",
        "a run for each seed, with its own checkpoint (run.seed3.pth), and a table of all; spread over the devices",
        metavar="0,1,2",
        check=sweep.parse_seeds,
        may_be_empty=False,
    )
    sweep: str = option(
        "",
        "population",
        'a JSON file of flags with lists of values, {"lr": [0.001, 0.002], "seed": [0, 1]}: a run for each combination',
        metavar="FILE",
        may_be_empty=False,
    )
    seeds_per_step: int = option(
        0,
        "population",
        "runs that differ in nothing but the seed and share a step; 0 means 1 on the CPU, and on a GPU its share of "
        f"the runs, up to {SEEDS_PER_STEP}",
        at_least=0,
        at_most=1024,
    )

    report_every: int = option(50, "run", "batches from one line of loss and accuracy to the next", at_least=1)
    quiet: bool = option(False, "run", "print only warnings and errors")

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

    ema_decay: float = option(
        0,
        "optimization",
        "of an exponential moving average (EMA) of the parameters, which then is evaluated and kept as the best model: "
        "0.99 for example, with --calibrate 40; 0 means none",
        at_least=0,
        at_most=0.999999,
        shapes=True,
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
    return parse(Config, argv, prog="train.py", description=DESCRIPTION, check=check_config, short={"resume": "-r"})


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
    if config.ema_decay and not config.calibrate:
        raise ValueError(
            f"--ema-decay: got {config.ema_decay:g} with --calibrate 0, and the running statistics of batch norms are "
            "not those of averaged parameters; give --calibrate 40, for example"
        )
    if config.seeds or config.sweep:
        members = [member for _, member in runs_of(config)]
        if config.resume and not any(member.resume for member in members):
            raise ValueError(
                f"--resume: no run has a checkpoint; the first one's would be {members[0].checkpoint_path}"
            )
    elif config.resume and not path.is_file():
        raise ValueError(
            f"--resume: there is no checkpoint at {config.checkpoint_path}; name it with --checkpoint-path, "
            "or omit --resume to begin anew"
        )


def runs_of(config: Config) -> list[sweep.Planned]:
    """The runs of a population.

    Raises:
        ValueError: A flag, or the file of the sweep, is not what it should be.
    """
    if config.sync_bn:
        raise ValueError("--sync-bn: not with --seeds or --sweep, whose runs have one rank each")
    if config.wandb_mode not in ("auto", "disabled"):
        raise ValueError(f"--wandb-mode: got {config.wandb_mode}, but the runs of --seeds and --sweep are not tracked")
    return sweep.expand(config, ["epochs", *(name for name in shaping(Config) if name != "sync_bn")], check_config)
