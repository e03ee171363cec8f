"""Checks of arguments that are made once for each kind of call, and remembered.

What a check asks of a tensor (its type, device, dtype, sizes, strides, whether it needs a gradient, whether its numbers
are in memory) is looked at in every call, in C++, and makes a key with the rest of the arguments. A check says the same
of equal keys, so those that passed are remembered by key and no argument is: a tensor that was changed in place, or a
tuple with another tensor in it, has another key. What C++ does not know (a subclass of Tensor, a view that negates, an
emptied storage, a fake tensor) has no key and is checked in Python, as everything is before torch 2.10, whose tensors
cannot be read without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

try:
    from . import _C
except ImportError:  # not built: every call is checked in Python
    _C = None  # type: ignore[assignment]

Result = TypeVar("Result")
MOST = 1024  # keys of one check, of about 60 bytes a tensor
_describe = getattr(_C, "describe", None)
if _describe:
    _C.read_tensors_of(torch.Tensor, torch.nn.Parameter)


def remembered(check: Callable[..., Result]) -> Callable[..., Result]:
    """`check`, which raises or returns what is the same for all calls whose arguments are alike, and never None.

    Args:
        check: of positional arguments: tensors, None, strings, bools, tuples and lists of these. It must look neither
            at what tensors hold nor at where they lie. Nobody may change what it returns.
    """
    known: dict[Any, Result] = {}

    @functools.wraps(check)
    def checked(*arguments: Any) -> Result:
        if _describe is None or torch.compiler.is_compiling():
            return check(*arguments)
        key = _describe(torch.is_grad_enabled(), *arguments)
        result = known.get(key)
        if result is None:
            result = check(*arguments)
            if key is not None:
                if len(known) >= MOST:
                    known.clear()
                known[key] = result
        return result

    return checked
