"""Hypernetworks for PyTorch as pure functions in the style of JAX."""

from hyperfunc import (
    capture,
    checkpoint,
    data,
    files,
    hypernet,
    interrupt,
    model,
    optim,
    residual,
    tiling,
    tracking,
    training,
    tree,
)
from hyperfunc.hypernet import HyperNetParams, generate_kernel, generate_kernels
from hyperfunc.model import BatchStats, Model, Params, hyper_resnet, hyperize, materialize, resnet
from hyperfunc.residual import ResNet
from hyperfunc.training import Metrics, TrainState
from hyperfunc.tree import num_params

__version__ = "0.1.0"

__all__ = [
    "BatchStats",
    "HyperNetParams",
    "Metrics",
    "Model",
    "Params",
    "ResNet",
    "TrainState",
    "capture",
    "checkpoint",
    "data",
    "files",
    "generate_kernel",
    "generate_kernels",
    "hyper_resnet",
    "hyperize",
    "hypernet",
    "interrupt",
    "materialize",
    "model",
    "num_params",
    "optim",
    "residual",
    "resnet",
    "tiling",
    "tracking",
    "training",
    "tree",
]
