"""Ranks that look after each other, here as threads of one process with a store in its memory."""

import pytest
import torch

from hyperfunc.watch import _said_by


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, ValueError, FloatingPointError, OSError])
def test_an_error_keeps_its_kind_and_gets_its_rank(kind: type[Exception]) -> None:
    said = _said_by(3, kind("too much"))
    assert type(said) is kind
    assert str(said) == "rank 3: too much"
