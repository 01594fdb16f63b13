"""Attention in a form that a mode of torch can look into."""

from types import FunctionType
from typing import Any

import torch
from torch.nn import functional as F


def _check_key_padding_mask(*args: Any) -> None:
    if not torch.compiler.is_compiling():  # which cannot trace how torch words its error
        F._check_key_padding_mask(*args)  # pyright: ignore[reportAttributeAccessIssue]


# While a mode handles a call it is off, and so would miss what is called inside of this function, which is Python; and
# the function asks for a mode before anything else, so that it cannot be called with the mode on. This is the function
# with a global name of its own for that question, to which the answer is no.
attention_forward = FunctionType(
    F.multi_head_attention_forward.__code__,
    {
        **vars(F),
        "has_torch_function": lambda _: False,
        "_check_key_padding_mask": _check_key_padding_mask,
    },
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
"""`torch.nn.functional.multi_head_attention_forward`, for a mode to call while it is on."""

attention_forward.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
