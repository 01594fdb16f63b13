"""Hypernetworks for PyTorch as pure functions in the style of JAX."""

from hyperfunc import (
    capture,
    checkpoint,
    conditions,
    console,
    data,
    ensembles,
    environment,
    files,
    fitting,
    flags,
    histogram,
    hypernet,
    interrupt,
    journal,
    model,
    model_file,
    optim,
    report,
    residual,
    tiling,
    tracking,
    training,
    tree,
)
from hyperfunc.conditions import Conditional, ConditionalParams, Encoder, conditional, encode_bounded
from hyperfunc.ensembles import Ensemble, ensemble
from hyperfunc.fitting import Fit, fit_embeddings
from hyperfunc.hypernet import HyperNetParams, generate_kernel, generate_kernels
from hyperfunc.model import BatchStats, Model, Params, hyper_resnet, hyperize, materialize, resnet
from hyperfunc.model_file import load, save
from hyperfunc.residual import ResNet
from hyperfunc.training import Metrics, TrainState
from hyperfunc.tree import num_params

__version__ = "0.1.0"

__all__ = [
    "BatchStats",
    "Conditional",
    "ConditionalParams",
    "Encoder",
    "Ensemble",
    "Fit",
    "HyperNetParams",
    "Metrics",
    "Model",
    "Params",
    "ResNet",
    "TrainState",
    "capture",
    "checkpoint",
    "conditional",
    "conditions",
    "console",
    "data",
    "encode_bounded",
    "ensemble",
    "ensembles",
    "environment",
    "files",
    "fit_embeddings",
    "fitting",
    "flags",
    "generate_kernel",
    "generate_kernels",
    "histogram",
    "hyper_resnet",
    "hyperize",
    "hypernet",
    "interrupt",
    "journal",
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
    "tiling",
    "tracking",
    "training",
    "tree",
]
