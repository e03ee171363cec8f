"""What the profiler keeps, and how it adds it up: see profile.py, which fills it.

All of it is bounded: a ring of spans per thread, of which the oldest are dropped and counted; a row per block, of which
every second one is dropped when there are too many; sums by name.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Generic, TypeVar

from ._ring import SpanRow, Sum

try:
    from ._spans import Ring
except ImportError:  # not built: slower
    from ._ring import Ring  # type: ignore[assignment]

MOST_ROWS = 2048  # of blocks, before every second one is dropped
MOST_TRACKS = 64  # threads, those that have ended among them
MOST_TEXTS = 64  # different things that are said to be lost
MOST_NAMES = 1024  # of spans and metrics: more is a mistake, such as a number in a name
MOST_APART = 64  # sums that wait to be added to those of the recording

T = TypeVar("T")


@dataclasses.dataclass(slots=True)
class Row:
    """One block, as hooks are handed it. Times are seconds of `time.perf_counter`.

    Attributes:
        number: of the blocks of its thread, from 0.
        track: its thread's name.
        start, end: of the block.
        wall: seconds from the end of the block before to the end of this one, or from the thread's first span.
        frames: that the block said it made.
        spans: by name, all that ended in `wall` on this thread.
        counts: by name, what was counted in `wall` on this thread.
        values: by name, the metrics as they were last given.
    """

    number: int
    track: str
    start: float
    end: float
    wall: float
    frames: int
    spans: dict[str, Sum]
    counts: dict[str, float]
    values: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def elsewhere(self) -> float:
        """Seconds of `wall` that no span has."""
        return max(0.0, self.wall - sum(each.own for each in self.spans.values()))


class Thinned(Generic[T]):
    """A list that keeps all that is put into it until there are `most`, then every second, every fourth, ..."""

    def __init__(self, most: int = MOST_ROWS):
        self.most, self.stride, self.seen = most, 1, 0
        self.kept: list[T] = []

    def append(self, one: T) -> None:
        if self.seen % self.stride == 0:
            self.kept.append(one)
            if len(self.kept) > self.most:
                self.kept, self.stride = self.kept[::2], 2 * self.stride
        self.seen += 1


class Track:
    """The spans of one thread, and what was counted there.

    Attributes:
        ring: its spans.
        shift: seconds to add to their times: a GPU's clock has its own zero.
        overlapping: its spans may overlap without one being within the other.
        sums: by name, of those since the last block; without blocks, of all.
    """

    def __init__(self, name: str, thread: int, capacity: int, overlapping: bool = False):
        self.name, self.capacity, self.overlapping = name, capacity, overlapping
        self.ring = Ring(capacity, thread)
        self.blocks = 0
        self.counts, self.values = self.ring.counts, self.ring.values
        self.shift = 0.0
        self.owner: threading.Thread | None = None  # whose ident may be another's once it has ended
        self._before: dict[str, float] = {}  # counts at the last block
        self.ended: float | None = None  # when the last block did; before the first, when the first span began
        self.sums: dict[str, Sum] = {}

    @property
    def dropped(self) -> int:
        """Spans that the ring no longer holds."""
        return max(0, self.ring.count - self.capacity)

    def kept(self) -> list[SpanRow]:
        """The spans that the ring holds, as they ended."""
        return self.ring.kept()

    def add_up(self) -> tuple[dict[str, Sum], int]:
        """Sums of the spans that ended since the last call, which are in `sums`, too; and how many more the ring had
        dropped."""
        new, missed, began = self.ring.take()
        if self.ended is None:
            self.ended = began
        self.sums = {**self.sums, **_plus(self.sums, new)} if self.sums else new
        return new, missed

    def row(self, start: float, end: float, frames: int) -> Row:
        """The block that has just ended; what comes is the next one's."""
        counts = {name: n - self._before.get(name, 0) for name, n in self.counts.items()}
        began = start if self.ended is None else self.ended
        made = Row(self.blocks, self.name, start, end, end - began, frames, self.sums, counts, dict(self.values))
        self._before, self.sums, self.ended = dict(self.counts), {}, end
        self.blocks += 1
        return made


class Recording:
    """What was recorded since `profile.start`.

    Attributes:
        tracks: one per thread, and those with a name of their own.
        blocks: a Row per block, thinned out once there are many.
        sums: by name, of all spans up to the last `collect`.
        lost: what could not be recorded, and how often.
        perf, unix: when it began, by `time.perf_counter` and by `time.time`: what merges several processes.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.tracks: list[Track] = []
        self.blocks: Thinned[Row] = Thinned()
        self.sums: dict[str, Sum] = {}
        self.lost: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self.frames = 0
        self.lock = threading.Lock()
        self.perf, self.unix = time.perf_counter(), time.time()
        self._named: dict[str, Track] = {}
        self._counted: dict[str, float] = {}  # on tracks that are gone
        self._apart: list[dict[str, Sum]] = []  # not in `sums` yet: many at once are added faster

    def lose(self, text: str, times: int = 1) -> None:
        """Something is not recorded; the report says so."""
        if text in self.lost or len(self.lost) < MOST_TEXTS:
            self.lost[text] = self.lost.get(text, 0) + times

    def declare(self, name: str, kind: str) -> bool:
        """A name is a "count" or a "metric", and there are not too many; False: not so."""
        if name not in self.kinds and len(self.kinds) >= MOST_NAMES:
            return False
        return self.kinds.setdefault(name, kind) == kind

    def track(self, name: str | None = None, shared: bool = True) -> Track:
        """A new track, of this thread; with a name that is shared, the one of this name, which any thread may write
        to."""
        with self.lock:
            if shared and name is not None and name in self._named:
                return self._named[name]
            if len(self.tracks) >= MOST_TRACKS:
                self._forget_an_ended_one()
            thread = threading.current_thread()
            made = Track(name or thread.name, threading.get_ident(), self.capacity, overlapping=name is not None)
            made.owner = thread
            self.tracks.append(made)
            if shared and name is not None:
                self._named[name] = made
            return made

    def _forget_an_ended_one(self) -> None:
        ended = [
            track
            for track in self.tracks
            if track.owner is not None and not track.owner.is_alive() and track is not self._named.get(track.name)
        ]
        if ended:
            self._collect(ended[0])
            self._counted = _added(self._counted, ended[0].counts)
            self.tracks.remove(ended[0])
            self.lose("spans of the thread that ended first, as there were too many threads", ended[0].ring.count)

    def write(self, track: str, row: SpanRow) -> None:
        """A span that has ended, onto the track of this name."""
        where = self.track(track)
        with self.lock:
            where.ring.write(*row)

    def block(self, track: Track, start: float, end: float, frames: int) -> Row:
        """A block has ended on this track: what was measured since the one before."""
        with self.lock:
            self._collect(track)
            row = track.row(start, end, frames)
            self.blocks.append(row)
            self.frames += frames
            return row

    def collect(self) -> None:
        """Spans of all threads go into `sums`."""
        with self.lock:
            for track in self.tracks:
                self._collect(track)
            self._add_up()

    def _collect(self, track: Track) -> None:
        new, missed = track.add_up()
        if missed:
            self.lose(f"spans of {track.name} that no sum has, as more ended in a block than the ring holds", missed)
        self._apart.append(new)
        if len(self._apart) > MOST_APART:
            self._add_up()
        if not track.blocks and len(track.sums) > MOST_NAMES:
            track.sums = {}

    def _add_up(self) -> None:
        for new in self._apart:
            for name, each in _plus(self.sums, new).items():
                if name in self.sums or len(self.sums) < MOST_NAMES:
                    self.sums[name] = each
                else:
                    self.lose(f"spans of further names than the first {MOST_NAMES}", each.number)
        self._apart.clear()

    def counts(self) -> dict[str, float]:
        """By name, what was counted so far, on all threads."""
        return _added(self._counted, *(dict(track.counts) for track in self.tracks))

    def values(self) -> dict[str, float]:
        """By name, the metrics as they were last given."""
        return {name: value for track in self.tracks for name, value in dict(track.values).items()}

    def problems(self) -> list[str]:
        """A line for whatever was lost."""
        lines = [f"{text}: {times}" for text, times in self.lost.items()]
        lines += [
            f"{track.name}: the oldest {track.dropped:,} spans, as the ring holds {self.capacity:,}"
            for track in self.tracks
            if track.dropped
        ]
        rings = [(track.name, track.ring) for track in self.tracks]
        lines += [f"{name}: {span.name!r} is still open" for name, ring in rings for span in ring.open]
        lines += [
            f"{name}: {ring.gpu.lost:,} spans have no time on the GPU: events came too late, or were too few"
            for name, ring in rings
            if ring.gpu is not None and ring.gpu.lost
        ]
        return lines


def _plus(old: Mapping[str, Sum], new: Mapping[str, Sum]) -> dict[str, Sum]:
    """The sums of the names of `new`."""
    return {name: old[name].plus(each) if name in old else each for name, each in new.items()}


def _added(*all_counts: Mapping[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for counts in all_counts:
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total
