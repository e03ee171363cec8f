"""What a drop-in does not have, refused by the library's own name of the argument."""

from __future__ import annotations

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
