"""The spans of one thread. What csrc/spans.cpp does faster, where the extension is built; tests compare the two."""

from __future__ import annotations

from typing import Any, NamedTuple

DEEPEST = 64  # spans within each other whose own times are told apart
SpanRow = tuple[str, float, float, int, dict[str, Any]]  # name, start, end, how many spans it is within, arguments


class Sum(NamedTuple):
    """Spans of one name.

    Attributes:
        own: seconds, without those of the spans within.
        seconds: with them.
        number: of spans.
    """

    own: float = 0.0
    seconds: float = 0.0
    number: int = 0

    def plus(self, other: Sum) -> Sum:
        return Sum(self.own + other.own, self.seconds + other.seconds, self.number + other.number)


class Ring:
    """The spans of one thread that are open, and those that ended, the newest over the oldest.

    Args:
        capacity: spans that are kept, a power of two.
        thread: `threading.get_ident` of the thread.

    Attributes:
        count: spans that ended so far.
        depth: number of spans that are under way.
        gpu: a GpuTimes, which times them on a GPU as well; None: nothing does.
        counts, values: what was counted on this thread, and its metrics, by name.

    Raises:
        ValueError: capacity is no power of two.
    """

    __slots__ = ("_added", "_mask", "_open", "_rows", "_since", "_within", "count", "counts", "gpu", "thread", "values")

    def __init__(self, capacity: int, thread: int):
        if capacity < 1 or capacity & (capacity - 1):
            raise ValueError(f"capacity must be a power of two, got {capacity}")
        self.count, self.thread = 0, thread
        self._open: list[Any] = []
        self.gpu: Any = None
        self.counts: dict[str, float] = {}
        self.values: dict[str, float] = {}
        self._mask, self._added = capacity - 1, 0
        self._rows: list[Any] = [None] * capacity
        self._within = [0.0] * (DEEPEST + 2)  # seconds of the spans at each depth since one closed around them
        self._since = [0.0] * (DEEPEST + 2)  # when the first of these began

    @property
    def open(self) -> list[Any]:
        """Spans that are under way, the innermost last."""
        return list(self._open)

    @property
    def depth(self) -> int:
        return len(self._open)

    def push(self, span: Any) -> None:
        """A span begins, within all others."""
        self._open.append(span)

    def pop(self) -> Any:
        """The innermost one, which is under way no more."""
        return self._open.pop()

    def remove(self, span: Any) -> None:
        """It is under way no more."""
        self._open.remove(span)

    def write(self, name: str, start: float, end: float, depth: int, args: dict[str, Any]) -> None:
        """A span has ended."""
        self._rows[self.count & self._mask] = (str(name), start, end, depth, args)  # of no subclass
        self.count += 1

    def kept(self) -> list[SpanRow]:
        """The spans that are kept, as they ended."""
        return [self._rows[i & self._mask] for i in range(max(0, self.count - self._mask - 1), self.count)]

    def take(self) -> tuple[dict[str, Sum], int, float | None]:
        """What ended since the last call.

        Returns:
            By name; how many more ended, but are kept no longer; when the first one that is within no other began,
            None without one.
        """
        first, last = max(self._added, self.count - self._mask - 1), self.count
        missed, self._added = first - self._added, last
        within, since, began = self._within, self._since, None
        sums: dict[str, Sum] = {}
        for i in range(first, last):
            name, start, end, depth, _ = self._rows[i & self._mask]
            if began is None and depth == 0:
                began = start
            depth = min(depth, DEEPEST)
            seconds, inner = end - start, depth + 1
            own = seconds - within[inner] if since[inner] >= start else seconds  # else: what was around them is lost
            within[inner] = 0.0
            if not within[depth]:
                since[depth] = start
            within[depth] += seconds
            sums[name] = sums.get(name, Sum()).plus(Sum(own, seconds, 1))
        return sums, missed, began
