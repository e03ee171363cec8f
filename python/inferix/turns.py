"""A world takes one call at a time. Worlds of one store may be at work in several threads, one world in one of them.

A world that several processes run together takes each call on all of them: see ranks.py.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from .ranks import Ranks

P = ParamSpec("P")
T = TypeVar("T")


class Loop(Protocol):
    busy: threading.RLock


class HasLoop(Protocol):
    ranks: Ranks | None

    @property
    def decoder(self) -> Loop: ...


S = TypeVar("S", bound=HasLoop)


def one_at_a_time(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method, or a function of a world, that raises RuntimeError, before it does anything, while another thread is in
    one of them."""

    @functools.wraps(method)
    def alone(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        busy = self.decoder.busy  # a reset gives the world another loop
        if not busy.acquire(blocking=False):
            raise RuntimeError(
                f"{method.__name__}: another thread is at work on this world, which takes one call at a time; worlds "
                "in several threads are its forks, or others"
            )
        try:
            if self.ranks is None:
                return method(self, *args, **kwargs)
            with self.ranks.together(self, alone, *args, **kwargs):
                return method(self, *args, **kwargs)
        finally:
            busy.release()

    return alone
