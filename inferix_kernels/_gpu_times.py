"""When spans were at work on a GPU, without waiting for it. Never run on a GPU: its tests bring events of their own.

A span leaves an event on the stream where it begins and one where it ends. They are looked at a block or more later,
when they have long happened; one that has not is looked at again. Nothing here synchronizes.

A GPU's events say only how far they are apart. Where they lie on the host's clock follows from what must hold: a span
begins on the GPU no earlier than it was launched. The largest (launch - position) is that bound, and it is met exactly
by any span that found the GPU idle.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

EVENTS = 4096  # at most, two for a span
EVERY = 8  # blocks: spans within steps are timed in one of so many, as two events cost more than the span itself
ANCHOR = 1000.0  # ms: farther from its anchor an event's float32 milliseconds are not exact to a microsecond


class Event(Protocol):
    """As torch.cuda.Event(enable_timing=True)."""

    def record(self) -> Any: ...

    def query(self) -> bool:
        """Has it happened?"""

    def elapsed_time(self, end_event: Any) -> float:
        """ms from this one to another; both have happened."""


class _Pending(NamedTuple):
    name: str
    launched: float
    start: Event
    end: Event
    depth: int
    args: Any


class GpuTimes:
    """Times the spans of one thread on its GPU.

    Args:
        make: a new event.
        keep: called with a row (name, start, end, depth, args), in seconds of the GPU's own clock.
        capturing: is a CUDA graph being captured? Nothing can be timed within one: its launch is one span.
        size: events at most.
        clock: of the host.

    Attributes:
        shift: seconds from the GPU's clock to the host's; None before the first span has ended.
        lost: spans that were not timed: their events never happened, or there were none left.
    """

    def __init__(
        self,
        make: Callable[[], Event],
        keep: Callable[[tuple[str, float, float, int, Any]], None],
        capturing: Callable[[], bool] = lambda: False,
        size: int = EVENTS,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._make, self._keep, self._capturing, self._clock = make, keep, capturing, clock
        self.lost = 0
        self.shift: float | None = None
        self.active = True  # in this block all spans are timed, not only those of a whole block
        self._left, self._free = size, list[Event]()
        self._most = size // 2
        self._pending: deque[_Pending] = deque()
        self._anchor: Event | None = None
        self._anchored = 0.0  # seconds, on the GPU's clock
        self._blocks = 0

    def begin(self) -> tuple[float, Event] | None:
        """A span begins: (now, its first event)."""
        if self._capturing():
            return None
        event = self._take()
        if event is None:
            self.lost += 1
            return None
        now = self._clock()
        event.record()
        return now, event

    def end(self, began: tuple[float, Event], name: str, depth: int, args: Any) -> None:
        """It ends."""
        launched, start = began
        event = None if self._capturing() else self._take()
        if event is None:
            self.lost += 1
            self._free.append(start)
            return
        event.record()
        self._pending.append(_Pending(name, launched, start, event, depth, args))

    def block(self) -> None:
        """A block has ended: spans that have happened are kept."""
        self._blocks += 1
        self.active = self._blocks % EVERY == 0
        waiting: deque[_Pending] = deque()
        for span in self._pending:
            if not (span.end.query() and span.start.query()):
                waiting.append(span)
            else:
                self._happened(span)
        while len(waiting) > self._most // 2:  # as good as never: others may have new events in place of these
            waiting.popleft()
            self._left += 2
            self.lost += 1
        self._pending = waiting

    def _happened(self, span: _Pending) -> None:
        if self._anchor is None:
            self._anchor = span.start
        away = self._anchor.elapsed_time(span.start)
        start = self._anchored + 1e-3 * away
        end = start + 1e-3 * span.start.elapsed_time(span.end)
        bound = span.launched - start
        self.shift = bound if self.shift is None else max(self.shift, bound)
        self._keep((span.name, start, end, span.depth, span.args))
        self._free.append(span.end)
        if away > ANCHOR:
            self._free.append(self._anchor)
            self._anchor, self._anchored = span.start, start
        elif span.start is not self._anchor:
            self._free.append(span.start)

    def _take(self) -> Event | None:
        if self._free:
            return self._free.pop()
        if not self._left:
            return None
        self._left -= 1
        return self._make()
