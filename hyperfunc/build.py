"""The network and the optimizer that the flags describe."""

import math
from typing import Any

from hyperfunc import optim
from hyperfunc.config import Config
from hyperfunc.model import Model, Params, hyper_resnet, resnet
from hyperfunc.precision import Precision
from hyperfunc.tree import num_params


def build_model(config: Config, num_classes: int) -> Model:
    """The network that the flags describe."""
    shape: dict[str, Any] = {"shortcut": config.shortcut, "block": config.block}
    if config.model == "plain":
        return resnet(config.depth, config.width, num_classes, **shape)
    hidden_dim = config.hidden_dim or None
    return hyper_resnet(
        config.depth, config.width, num_classes, config.z_dim, hidden_dim=hidden_dim, init=config.init, **shape
    )


def count_ordinary(model: Model) -> int:
    """The parameters of the primary network, if all were ordinary ones."""
    return num_params(dict(model.module.named_parameters()))


def describe_network(config: Config) -> str:
    """What kind of network it is, as in "hyper 40-1"."""
    return f"{config.model} {config.depth}-{config.width}"


def describe_model(config: Config, model: Model, params: Params) -> str:
    """How large it is, and how much larger the ordinary network is."""
    name = describe_network(config)
    count, ordinary = num_params(params), count_ordinary(model)
    if config.model == "plain":
        return f"{name}: {count:,} parameters"
    units = sum(len(z) for z in params.embeddings.values())
    return (
        f"{name}: {count:,} parameters ({units:,} embeddings), compression {ordinary / count:.2f} "
        f"against the {ordinary:,} of the ordinary network"
    )


def build_optimizer(config: Config, steps_per_epoch: int, number_format: Precision, world: int) -> optim.Optimizer:
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
    if config.ema_decay:
        optimizer = optim.averaged(optimizer, config.ema_decay)
    return optim.scaled(optimizer, first=first_scale(config, world)) if number_format == "fp16" else optimizer


def first_scale(config: Config, world: int) -> float:
    """The scale of the loss that fp16 begins with."""
    # Ranks take the gradient of a sum over pictures: beside that of the mean, its scale begins lower by their number.
    pictures = 1 if world == 1 else 2 ** math.ceil(math.log2(config.batch_size))
    return 2.0**16 / pictures
