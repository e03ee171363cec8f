"""Threads take turns with a store: a lock and, on a GPU, the order of their streams."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class StreamTurns:
    """A lock for a store on a GPU. What a thread launches comes after what the one before it did, whatever its stream.

    The stream is the one that is current when a thread's turn begins after another's: who changes it in between must
    make the new one wait for the old.
    """

    def __init__(self, device: torch.device):
        self._lock, self._device = threading.RLock(), device
        self._thread: int | None = None
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            thread = threading.get_ident()
            if thread != self._thread:
                stream = torch.cuda.current_stream(self._device)
                if self._stream is not None and stream != self._stream:
                    stream.wait_stream(self._stream)
                self._thread, self._stream = thread, stream
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class InTurn(Protocol):
    @property
    def turn(self) -> contextlib.AbstractContextManager[Any]: ...


S = TypeVar("S", bound=InTurn)


def in_turn(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method during which no other thread uses the store."""

    @functools.wraps(method)
    def taking_turns(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.turn:
            return method(self, *args, **kwargs)

    return taking_turns
