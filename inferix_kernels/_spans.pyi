"""Spans of the profiler and where they are kept, from csrc/spans.cpp. Ring is _ring.Ring, faster."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

class Ring:
    count: int
    gpu: Any
    depth: int
    thread: int
    def __init__(self, capacity: int, thread: int) -> None: ...
    def write(self, name: str, start: float, end: float, depth: int, args: dict[str, Any], /) -> None: ...
    def kept(self) -> list[tuple[str, float, float, int, dict[str, Any]]]: ...
    @property
    def open(self) -> list[Any]: ...
    def push(self, span: Any, /) -> None: ...
    def pop(self) -> Any: ...
    def remove(self, span: Any, /) -> None: ...
    def take(self) -> tuple[dict[str, tuple[float, float, int]], int, float | None]: ...

class Spans:
    """A function that makes spans.

    Args:
        reference: called in its place wherever something is out of the common: with other arguments than one text and
            numbers and texts by name, on a thread whose ring is not known yet, where a GPU times the span, too.
        misplaced: (span, its ring or None), called when a span ends that is not the innermost open one of this thread.
        clock: seconds; None: the system's monotonic one.

    Attributes:
        mode: what a call does: 0 nothing, 1 a span, 2 what the reference does.
    """

    clock: Callable[[], float] | None
    mode: int
    def __init__(
        self,
        reference: Callable[..., AbstractContextManager[Any]],
        misplaced: Callable[[Any, Any], object],
        clock: Callable[[], float] | None,
    ) -> None: ...
    def __call__(self, name: str, **args: Any) -> AbstractContextManager[Any]: ...
    def number(self) -> int:
        """Another one whenever rings are forgotten."""

    def adopt(self, ring: Ring, number: int, /) -> None:
        """Spans of this thread go to this ring, as long as the number is what it was before the ring was looked up."""

    def forget(self) -> None:
        """No thread's ring is known any more."""
