"""Arguments by the library's own names: what a drop-in does not have is refused, and numbers in tensors are checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import shown
from .._dispatch import Unsupported


def refuse(**arguments: object) -> None:
    """Each must be left out: None, False, 0 or empty."""
    for name, x in arguments.items():
        if x is not None and (isinstance(x, Tensor) or bool(x)):
            raise Unsupported(f"{name} is not supported here, got {shown(x)}")


def refuse_but(default: object, **arguments: object) -> None:
    """Each must be None or this default."""
    for name, x in arguments.items():
        if x is not None and (isinstance(x, Tensor) or x != default):
            raise Unsupported(f"{name} must be {default!r} here, got {shown(x)}")


def readable(x: Tensor) -> bool:
    """Numbers are looked at where that costs no wait, and where they are there."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_range(name: str, x: Tensor | None, least: int, most: int | Tensor, by: str = "") -> None:
    if x is None or not readable(x) or not x.numel():
        return
    most = torch.as_tensor(most).expand_as(x)
    wrong = (x < least) | (x > most)
    if wrong.any():
        i = int(wrong.int().argmax())
        limit = f"{int(most[i])}{f', the room in {by}' * bool(by)}"
        raise ValueError(f"{name} must be from {least} to {limit}, got {int(x[i])} at [{i}]")
