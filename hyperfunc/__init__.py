"""Hypernetworks for PyTorch as pure functions in the style of JAX."""

from hyperfunc import (
    capture,
    checkpoint,
    console,
    data,
    distributed,
    environment,
    files,
    flags,
    histogram,
    hypernet,
    interrupt,
    journal,
    launch,
    model,
    model_file,
    optim,
    report,
    residual,
    sync_norm,
    tiling,
    tracking,
    training,
    tree,
    watch,
)
from hyperfunc.hypernet import HyperNetParams, generate_kernel, generate_kernels
from hyperfunc.model import BatchStats, Model, Params, hyper_resnet, hyperize, materialize, resnet
from hyperfunc.model_file import load, save
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
    "console",
    "data",
    "distributed",
    "environment",
    "files",
    "flags",
    "generate_kernel",
    "generate_kernels",
    "histogram",
    "hyper_resnet",
    "hyperize",
    "hypernet",
    "interrupt",
    "journal",
    "launch",
    "load",
    "materialize",
    "model",
    "model_file",
    "num_params",
    "optim",
    "report",
    "residual",
    "resnet",
    "save",
    "sync_norm",
    "tiling",
    "tracking",
    "training",
    "tree",
    "watch",
]
