"""The number formats that a network computes in. train.py keeps parameters, statistics and optimizer state in float32.

Under bf16 and fp16 the products run in the 16-bit type, by torch's autocast: the generation of the kernels, the
kernels, and the activations. Batch norms keep their sums, and the loss is computed, in float32.
"""

import contextlib
import warnings
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

LOW: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The 16-bit formats; the others differ only in how float32 is multiplied."""


def choose(name: Precision | Literal["auto"], device: torch.device) -> Precision:
    """The precision of that name, or for "auto" the device's own: bf16 on GPUs that have it, else fp32.

    Raises:
        ValueError: The name is unknown, or the device cannot do it.
    """
    if name not in ("auto", *get_args(Precision)):
        raise ValueError(f"precision: got {name!r}, expected auto, {', '.join(get_args(Precision))}")
    is_ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        return "bf16" if is_ampere else "fp32"
    needs_ampere = ("tf32", "bf16") if device.type == "cuda" else ("tf32",)
    if name in needs_ampere and not is_ampere:
        raise ValueError(
            f"precision: got {name}, which needs an NVIDIA GPU of compute capability 8.0 or more; fp32 runs anywhere"
        )
    return name


def check_precision(precision: Any) -> None:
    """Raises a ValueError where it is no `Precision`."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(get_args(Precision))}")


def set_float32_products(precision: Precision) -> None:
    """Whether this process multiplies float32 as TF32, with 10 bits of mantissa, on GPUs that can: a setting of torch,
    for all threads and whatever runs after it, so that it is for a program to make and not for a library. The advice of
    torch.compile to choose otherwise is kept quiet, likewise for the whole process."""
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context in which products are computed in 16 bits for bf16 and fp16, and which does nothing for the others."""
    if precision not in LOW:
        return contextlib.nullcontext()
    # The cache holds tensors by identity, and under torch.func those are wrappers that do not outlive the transform.
    return torch.autocast(device.type, LOW[precision], cache_enabled=False)
