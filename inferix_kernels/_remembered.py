"""Calls whose arguments are checked and packed once for each kind, and then only run again.

What a check asks of a tensor (its type, device, dtype, sizes, strides, whether it needs a gradient, whether its numbers
are in memory) is looked at in every call, in C++, and makes a key with the other arguments. A check says the same of
equal keys, so what passed is remembered by key, and no argument is: a tensor that was changed in place, or a tuple with
another tensor in it, has another key. What C++ does not know (a subclass of Tensor, a view that negates, an emptied
storage, a fake tensor) has no key and is checked in Python, as everything is before torch 2.10, whose tensors cannot be
read without it.

Of the struct that a CPU kernel is given, too, all but the addresses follows from the key. It is kept beside what the
check returned, with the fields that are addresses of arguments, and a call of the same kind fills in its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Sizes = Mapping[str, int]  # what the letters of an op's shapes stand for in a call
MOST = 1024  # kinds of calls of one op, of about 60 bytes a tensor


@functools.cache
def describer() -> Callable[..., Any]:
    """_C's, which is loaded when an op is first called; where it is not built no call has a key."""
    try:
        from . import _C
    except ImportError:
        return lambda *_: None
    _C.read_tensors_of(Tensor, torch.nn.Parameter, dtype=torch.dtype)
    return _C.describe


class Accepted:
    """A kind of calls that passed the checks.

    Attributes:
        sizes: what the check returned.
        replay: makes a call of this kind again, of the arguments that _library.call was given; False if it cannot. None
            where there is none.
        wanted: whether a replay is still to be made.
        elsewhere: whether such calls are known to be of no CPU: there are no replays of them.
        traced: whether torch.compile is at work: the call is to be recorded.
        order: in which backends are tried on a GPU, and by which proofs (_dispatch.order_of).
    """

    __slots__ = ("elsewhere", "order", "replay", "sizes", "traced", "wanted")

    def __init__(self, sizes: Sizes, wanted: bool, traced: bool = False):
        self.sizes, self.wanted, self.traced, self.elsewhere = sizes, wanted, traced, False
        self.order: tuple[object, Sequence[tuple[str, str]]] | None = None
        self.replay: Callable[[Sequence[Any]], bool] | None = None


def remembered(check: Callable[..., Sizes]) -> Callable[..., Accepted]:
    """`check`, made once for all calls whose arguments are alike.

    Args:
        check: of positional arguments: tensors, numbers, strings, dtypes, None, tuples and lists of these. It
            raises, or returns the call's sizes. It looks neither at what tensors hold nor at where they lie, and
            takes no tensor in place of a number.
    """
    known: dict[Any, Accepted] = {}

    @functools.wraps(check)
    def checked(*arguments: Any) -> Accepted:
        if torch.compiler.is_compiling():
            return Accepted(check(*arguments), False, traced=True)
        key = describer()(torch.is_grad_enabled(), *arguments)
        accepted = known.get(key)
        if accepted is None:
            accepted = Accepted(check(*arguments), key is not None)
            if key is not None:
                if len(known) >= MOST:
                    known.clear()
                known[key] = accepted
        return accepted

    checked.known, checked.forget = known, known.clear  # type: ignore[attr-defined]
    return checked


class Call(NamedTuple):
    """A call that is being made, of which a replay is wanted."""

    op: str
    accepted: Accepted
    arguments: Sequence[Any]


class _Recording(threading.local):
    call: Call | None = None


recording = _Recording()


class Place(int):
    """An address that knows its tensor."""

    tensor: Tensor


def tensors_of(values: Sequence[Any]) -> Iterator[Tensor]:
    """As a replay counts them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_of(value)
