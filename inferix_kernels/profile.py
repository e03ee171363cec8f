"""Where the time of a block goes: spans, metrics and hooks, cheap enough to be left on. Needs nothing but Python; the
extension does the common case where it is built (csrc/spans.cpp). Long because half of it is docstrings.

    recording = profile.start("layer")
    with profile.span("attention", layer=3):          # recorded at level "layer"
        ...
    with profile.timed("denoise") as denoise:         # at levels "block" and "layer"; measured at any
        ...
    with profile.block() as block:                    # one block: a row of the report, and the hooks
        block.frames = 3
    profile.count("pages evicted", 4)                 # added up
    profile.metric("queue", 2)                        # as it is now
    profile.stop()

Level "block" has a few spans per block, "layer" has one for each step, each layer and its parts. It can be changed at
any time (`set_level`), and is "off" until there is a recording. A mistake, such as a span that is left open, ends
nothing: it is counted, and the report says so in a line. What is made of a recording (traces, reports, comparisons) is
in the package inferix.profile.

Spans belong to the thread that they were opened on. Across an `await`, where another task may come in between, use
`record` with the two times.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from sys import float_info
from threading import get_ident
from time import perf_counter as clock
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, overload

from ._gpu_times import GpuTimes
from ._recording import Recording, Ring, Row, Track

try:
    from ._spans import Function, Spans
except ImportError:  # not built: all is done by the functions below
    Spans = None  # type: ignore[assignment,misc]

__all__ = [
    "LEVELS",
    "Block",
    "Recording",
    "Row",
    "Timed",
    "block",
    "clock",
    "count",
    "level",
    "metric",
    "on_block",
    "profiled",
    "record",
    "recording",
    "set_level",
    "span",
    "start",
    "stop",
    "timed",
]

LEVELS = ("off", "block", "layer")
OFF, BLOCK, LAYER = range(3)
CAPACITY = 1 << 15  # spans of a thread
LARGEST = float_info.max
P = ParamSpec("P")
T = TypeVar("T")
Hook = Callable[[Row], object]

_level = OFF
_recording: Recording | None = None
_local = threading.local()  # .track; another one for each recording
_hooks: list[Hook] = []


# A recording


def start(level: str = "block", capacity: int = CAPACITY) -> Recording:
    """Begin to record.

    Args:
        level: "off", "block" or "layer".
        capacity: spans that are kept of each thread, a power of two; older ones are in the sums alone.

    Raises:
        RuntimeError: there is a recording already.
        ValueError: there is no such level, or the capacity is none.

    Example:
        >>> from inferix_kernels import profile
        >>> recording = profile.start("layer", capacity=1024)
        >>> with profile.span("attention", layer=3):
        ...     pass
        >>> _ = profile.stop()
        >>> recording.collect()
        >>> recording.sums["attention"].number
        1
    """
    global _recording, _local
    if _recording is not None:
        raise RuntimeError("start: a recording is under way: stop it, or use set_level")
    if capacity < 1 or capacity & (capacity - 1):
        raise ValueError(f"capacity must be a power of two, got {capacity}")
    number = _number_of(level)
    _watch_forks()
    _recording, _local = Recording(capacity), threading.local()
    if _fast is not None:
        _fast.forget()
    _set(number)
    return _recording


def stop() -> Recording | None:
    """End the recording, which is returned; None: there was none. Spans that are open now belong to none."""
    global _recording
    ended, _recording = _recording, None
    _set(OFF)
    return ended


def recording() -> Recording | None:
    """The one that is under way."""
    return _recording


def level() -> str:
    """What is recorded now."""
    return LEVELS[_level]


def set_level(level: str) -> None:
    """Record this much from now on; nothing that is recorded is lost.

    Raises:
        ValueError: there is no such level. RuntimeError: there is no recording.
    """
    number = _number_of(level)
    if _recording is None:
        raise RuntimeError("set_level: there is no recording: start one")
    _set(number)


def _number_of(level: str) -> int:
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    return LEVELS.index(level)


def _set(number: int) -> None:
    global _level
    _level = number
    if _fast is not None:
        _fast.level, _fast.annotated = number, _annotated is not None


def _annotate(make: Callable[[str, dict[str, Any]], Any] | None) -> None:
    """Have spans made by this, while torch.profiler runs."""
    global _annotated
    _annotated = make
    _set(_level)


@functools.cache
def _watch_forks() -> None:
    """A process that is forked off records nothing until it starts a recording of its own: what is under way is its
    parent's, and a lock may be held by a thread that it does not have."""

    def forked() -> None:
        global _local
        if (parents := stop()) is not None:
            parents.lock, _local = threading.Lock(), threading.local()
        _annotate(None)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forked)


def _track() -> Track:
    """This thread's; without a recording, one that nobody will look at."""
    number = None if _fast is None else _fast.number()  # another one if a recording begins meanwhile
    try:
        track: Track = _local.track
    except AttributeError:
        local, current = _local, _recording
        track = Track("", 0, 1) if current is None else current.track()
        local.track = track
    if _fast is not None:
        _fast.adopt(track.ring, number)
    return track


def _lose(text: str) -> None:
    if _recording is not None:
        _recording.lose(text)


# Spans


class Span:
    """A stretch of time on one thread, which begins when `span` gives it: a context that ends it.

    Where the extension is built, most spans are its own, which are the same (csrc/spans.cpp).
    """

    __slots__ = ("args", "end", "gpu", "name", "ring", "start")
    name: str
    args: dict[str, Any]
    start: float
    end: float

    # What `with` calls and nobody needs: a function in C, of any arguments, as one in Python costs as much as the rest.
    __enter__ = staticmethod("".format)

    def __init__(self, name: str, args: dict[str, Any]):
        self.name, self.args = _checked(name), args
        self.ring: Ring | None = None  # while it is open
        self.gpu: Any = None  # what times it there

    def begin(self, ring: Ring, on_gpu: bool) -> None:
        """It begins, within those that are open."""
        self.ring = ring
        if on_gpu and ring.gpu is not None:
            self.gpu = ring.gpu.begin()
        self.start = clock()
        ring.push(self)

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self.end = end = clock()
        ring: Any = self.ring
        self.ring = None
        innermost = ring is not None and ring.open[-1:] == [self] and ring.thread == get_ident()
        if not innermost and not _misplaced(self, ring):
            return
        ring.pop()
        if self.gpu is not None:
            ring.gpu.end(self.gpu, self.name, ring.depth, self.args)
            self.gpu = None
        ring.write(self.name, self.start, end, ring.depth, self.args)


def _misplaced(span: Any, ring: Ring | None) -> bool:
    """A span is not the innermost open one of this thread: say what is wrong. True if it is open, and can be kept."""
    if ring is None or span not in ring.open:
        _lose(f"{span.name!r} was closed without being open")
        return False
    if ring.thread != get_ident():
        _lose(f"{span.name!r} was closed on another thread than it was opened on")
        ring.remove(span)
        return False
    while ring.open[-1] is not span:
        _lose(f"{ring.pop().name!r} was left open")
    return True


def _checked(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}")
    return name


class Timed(Span):
    """A span that measures whether or not it is recorded. `timed` makes it, and it begins there.

    Attributes:
        seconds: that it took, once it has ended.
    """

    __slots__ = ("measured",)

    def __init__(self, name: str, args: dict[str, Any]):
        super().__init__(name, args)
        self.measured = not _level  # it is under way, and not recorded
        if self.measured:
            self.start = clock()
        else:
            self.begin(_track().ring, on_gpu=True)

    def __enter__(self) -> Timed:  # type: ignore[override]
        return self

    def __exit__(self, *error: Any) -> None:
        if self.measured:
            self.measured, self.end = False, clock()
        else:
            super().__exit__(*error)

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Block:
    """A block of a world, or a step of one that has several in flight. `block` makes it, and it begins there.

    Attributes:
        frames: that came out; who makes the block sets it.
        row: what was measured, once it has ended; None: nothing is recorded, or the block failed.
    """

    __slots__ = ("_timed", "frames", "row")

    def __init__(self) -> None:
        self.frames = 0
        self.row: Row | None = None
        self._timed = timed("block")

    def __enter__(self) -> Block:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        ring = self._timed.ring
        self._timed.__exit__()
        if ring is None or _recording is None or kind is not None:
            return
        for track in _recording.tracks:
            if track.ring is ring:  # else: of a recording that was stopped meanwhile
                self.row = _ended(_recording, track, self._timed, self.frames)
                return


class _Nothing:
    """A span that is not recorded."""

    __slots__ = ()
    __enter__ = __exit__ = staticmethod("".format)  # whose "" swallows no exception


_NOTHING: Any = _Nothing()
_PLAIN = frozenset((int, float, bool, str))
_annotated: Callable[[str, dict[str, Any]], Any] | None = None


def span(name: str, **args: Any) -> AbstractContextManager[Any]:
    """A context whose time is recorded at level "layer". It begins here: open it where it is made, by `with`.

    Args:
        name: one of a few: what changes from span to span is an argument.
        args: numbers and short texts that the trace shows with it.

    Raises:
        TypeError: name is no str, at any level.

    Example:
        >>> from inferix_kernels import profile
        >>> with profile.span("attention", layer=3):  # nothing is recorded: this costs 0.06 microseconds
        ...     pass
    """
    _checked(name)
    if _level < LAYER:
        return _NOTHING
    args = _without_others(name, args)
    if _annotated is not None:
        return _annotated(name, args)
    ring, one = _track().ring, Span(name, args)
    one.begin(ring, on_gpu=ring.gpu is not None and ring.gpu.active)
    return one


def _without_others(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Arguments that a trace can hold; that there were others is said."""
    if all(value.__class__ in _PLAIN for value in args.values()):
        return args
    _lose(f"arguments of {name!r} that are neither numbers nor texts")
    return {key: value for key, value in args.items() if value.__class__ in _PLAIN}


def timed(name: str, device: Any = None, **args: Any) -> Timed:
    """A context that says how long it took, recorded from level "block" on: for a few spans per block. It begins here.

    Args:
        name, args: as for `span`.
        device: torch.device of the work, on a thread that makes no blocks; on "cuda" it is timed there as well.

    Example:
        >>> from inferix_kernels import profile
        >>> with profile.timed("denoise") as denoise:
        ...     pass
        >>> 0 < denoise.seconds < 1
        True
    """
    if _level and device is not None and device.type == "cuda":
        track = _track()
        if track.ring.gpu is None:
            _use_gpu(track)
        else:  # where blocks are made, `block` looks at the events of those before
            track.ring.gpu.block()
    return Timed(name, _without_others(name, args))


@overload
def profiled(what: Callable[P, T]) -> Callable[P, T]: ...


@overload
def profiled(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]: ...


def profiled(what: Any) -> Any:
    """A function, each call of which is a span of its name, or of the name given.

    Example:
        >>> from inferix_kernels import profile
        >>> @profile.profiled
        ... def project(x):
        ...     return 2 * x
        >>> @profile.profiled("norm")
        ... def layer_norm(x):
        ...     return x
        >>> project(layer_norm(3))
        6
    """
    if isinstance(what, str):
        return lambda function: _profiled(function, what)
    if not callable(what) or not hasattr(what, "__name__"):
        raise TypeError(f"what must be a name, or a function that has one, got {what!r}")
    return _profiled(what, what.__name__)


def _profiled(function: Callable[P, T], name: str) -> Callable[P, T]:
    @functools.wraps(function)
    def measured(*args: P.args, **kwargs: P.kwargs) -> T:
        if _level < LAYER:
            return function(*args, **kwargs)
        with span(name):
            return function(*args, **kwargs)

    return measured


def record(name: str, start: float, end: float, track: str, **args: Any) -> None:
    """A stretch of time that has passed, by `profile.clock`, from level "block" on.

    Args:
        track: of its own in the trace, where spans may overlap.

    Example:
        >>> from inferix_kernels import profile
        >>> begun = profile.clock()
        >>> profile.record("send", begun, profile.clock(), track="viewers")
    """
    _checked(name)
    if _level and _recording is not None:
        _recording.write(track, (name, start, end, 0, _without_others(name, args)))


# Blocks


def block(device: Any = None) -> Block:
    """A context for the making of one block: what was measured in it becomes a Row, which hooks are handed.

    Args:
        device: torch.device of the work; on "cuda", spans of this thread are timed there as well.

    Example:
        >>> from inferix_kernels import profile
        >>> with profile.block() as made:
        ...     made.frames = 3
    """
    if _level and device is not None and device.type == "cuda":
        _use_gpu(_track())
    return Block()


def on_block(hook: Hook) -> Callable[[], None]:
    """Have `hook` called with the Row of each block that is recorded, on the thread that made it. Its own time is a
    span, "hook NAME". One that fails is not called again.

    Returns:
        What ends this.

    Example:
        >>> from inferix_kernels import profile
        >>> seen = []
        >>> end = profile.on_block(seen.append)
        >>> _ = profile.start("block")
        >>> with profile.block() as made:
        ...     made.frames = 3
        >>> _ = profile.stop(), end()
        >>> seen[0].frames, list(seen[0].spans)
        (3, ['block'])
    """
    _hooks.append(hook)

    def end() -> None:
        if hook in _hooks:
            _hooks.remove(hook)

    return end


def _ended(recording: Recording, track: Track, made: Timed, frames: int) -> Row:
    """Adds a block up, and calls the hooks."""
    with timed("profiler"):
        if track.ring.gpu is not None:
            track.ring.gpu.block()
        row = recording.block(track, made.start, made.end, frames)
    for hook in tuple(_hooks):
        name = getattr(hook, "__name__", type(hook).__name__)
        try:
            with timed(f"hook {name}"):
                hook(row)
        except Exception as error:
            recording.lose(f"hook {name} failed ({type(error).__name__}: {error}) and is not called again")
            if hook in _hooks:  # it may have ended itself
                _hooks.remove(hook)
    return row


def _use_gpu(track: Track) -> None:
    if track.ring.gpu is not None or _recording is None:
        return
    import torch

    on_gpu = _recording.track(f"GPU of {track.name}", shared=False)  # a GPU's clock has a zero for each thread

    def keep(row: Any) -> None:
        on_gpu.ring.write(*row)
        on_gpu.shift = (track.ring.gpu and track.ring.gpu.shift) or 0.0

    def make() -> Any:
        return torch.cuda.Event(enable_timing=True)

    track.ring.gpu = GpuTimes(make, keep, torch.cuda.is_current_stream_capturing)


# Metrics


def count(name: str, amount: float = 1) -> None:
    """Add to what has been counted under this name.

    Example:
        >>> from inferix_kernels import profile
        >>> profile.count("pages evicted", 4)
    """
    if _level:
        _give(name, amount, "count", _track().counts)


def metric(name: str, value: float) -> None:
    """A number as it is now: of the next row, and of those after it until it is given again.

    Example:
        >>> from inferix_kernels import profile
        >>> profile.metric("pictures waiting", 2)
    """
    if _level:
        _give(name, value, "metric", _track().values)


def _give(name: str, given: Any, kind: str, numbers: dict[str, float]) -> None:
    """A number, if it is one and the name is of this kind."""
    if type(given) not in (int, float):
        try:
            given = None if isinstance(given, str | bool) else float(given)
        except (TypeError, ValueError, OverflowError):
            given = None
    if given is None or not abs(given) <= LARGEST:  # NaN is not, either
        _lose(f"{name!r} was given what is no finite number")
        return
    if not isinstance(name, str):
        _lose(f"{name!r} was given as the name of a {kind}, and is no text")
        return
    name = str(name)  # of no subclass, whose hash may be anything
    if name not in numbers and not (_recording is not None and _recording.declare(name, kind)):
        _lose(f"{name!r} was given as a {kind}, and was something else before or is one name too many")
        return
    numbers[name] = numbers.get(name, 0) + given if kind == "count" else given


# The common case, in C

_fast: Any = None
if Spans is not None:
    _fast = Spans(_misplaced, None if sys.platform == "linux" else clock)

    def _in_c(reference: Callable[P, T]) -> Callable[P, T]:
        made: Any = Function(_fast, reference.__name__, reference)
        return functools.update_wrapper(made, reference)

    span, timed, count, metric = _in_c(span), _in_c(timed), _in_c(count), _in_c(metric)
