"""Spans and numbers of the profiler and where they are kept, from csrc/spans.cpp. Ring is _ring.Ring, faster."""

from collections.abc import Callable
from typing import Any

from ._ring import Sum

class Ring:
    count: int
    gpu: Any
    depth: int
    thread: int
    counts: dict[str, float]
    values: dict[str, float]
    def __init__(self, capacity: int, thread: int) -> None: ...
    def write(self, name: str, start: float, end: float, depth: int, args: dict[str, Any], /) -> None: ...
    def kept(self) -> list[tuple[str, float, float, int, dict[str, Any]]]: ...
    @property
    def open(self) -> list[Any]: ...
    def push(self, span: Any, /) -> None: ...
    def pop(self) -> Any: ...
    def remove(self, span: Any, /) -> None: ...
    def take(self) -> tuple[dict[str, Sum], int, float | None]: ...

class Spans:
    """What the functions share.

    Args:
        misplaced: (span, its ring or None), called when a span ends that is not the innermost open one of this thread.
        clock: seconds; None: the system's monotonic one.

    Attributes:
        level: 0 off, 1 block, 2 layer.
        annotated: every span is the reference's.
    """

    clock: Callable[[], float] | None
    level: int
    annotated: int
    def __init__(self, misplaced: Callable[[Any, Any], object], clock: Callable[[], float] | None) -> None: ...
    def number(self) -> int:
        """Another one whenever rings are forgotten."""

    def adopt(self, ring: Ring, number: int, /) -> None:
        """Spans of this thread go to this ring, as long as the number is what it was before the ring was looked up."""

    def forget(self) -> None:
        """No thread's ring is known any more."""

class Function:
    """One of the functions of profile.py: "span", "timed", "count" or "metric".

    Args:
        reference: called in its place wherever something is out of the common: with other arguments than one text and
            numbers and texts by name, on a thread whose ring is not known yet, with a number that this thread has not
            given yet, where a GPU times the span, too.

    Raises:
        ValueError: kind is none of these.
    """

    def __init__(self, spans: Spans, kind: str, reference: Callable[..., Any]) -> None: ...
    def __call__(self, *given: Any, **args: Any) -> Any: ...
