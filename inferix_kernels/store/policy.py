"""What a world keeps of its past, and how: data, not code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from .._check import check_counts, is_whole

TIMES = ("absolute", "relative")
MOST_BIAS = 3.4028234663852886e38  # float32, in which kernels are given it, ends here


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a block sees of the past: the first `sink` frames, and recent frames up to `window` with its own.

    With window 18, sink 3 and blocks of 3, the block of frames 30..32 sees 0..2 and 15..32.

    Attributes:
        window: frames, the block's own included; None keeps all.
        sink: first frames, which are never evicted and are protected from being rewritten.
        format: in which a block is committed; None: the store's first pool.
        sink_format: the same for frames of the sink; None: as the others.
        older: (age, format): past so many recent frames, the block's own included, a frame is held in this format.
            With format "int8" and older (9, "int4"), the last 9 frames are int8 and the rest of the window int4.
        undo: frames kept out of sight behind the window, so that `rewind` by as many finds what was seen then.
        past_bias: added to the scaled scores of all that a block sees of the past while it is denoised, but for the
            sink: below 0, the past counts less. log 0.3 gives its keys 0.3 of their weight against the block's own.
            Clean passes see the past as it is.
        time: when rotary positions are counted. "absolute": as frames are made, without end. "relative": anew for each
            block, through the frames that it sees and its own, 0, 1, 2 ..., so that the sink moves along. Keys stay as
            they were rotated, and queries are turned instead; no mean is taken off such keys.
        archive: frames that leave the window go to host memory instead of being forgotten.
        on_evict: called as on_evict(table, frame) before a frame leaves the window; it may rewrite the sink, convert,
            pin, fork and so on, but neither open, seal or forget blocks of this world nor rewind it.
        pins_in_window: pinned frames that the window has left behind take their room from it: a block sees no more than
            sink + window frames. Otherwise they are seen besides these.

    Example:
        >>> policy = Policy(window=18, sink=3, format="int8", older=(9, "int4"))
        >>> policy.format_of(frame=20, block_end=33), policy.format_of(frame=30, block_end=33)
        ('int4', 'int8')
    """

    window: int | None = None
    sink: int = 0
    format: str | None = None
    sink_format: str | None = None
    older: tuple[int, str] | None = None
    undo: int = 0
    past_bias: float = 0.0
    time: str = "absolute"
    archive: bool = False
    on_evict: Callable[[Any, int], None] | None = None
    pins_in_window: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "sink", "undo"):
            frames = getattr(self, name)
            if not is_whole(frames) and not (name == "window" and frames is None):
                raise ValueError(f"{name} must be a whole number of frames, got {frames!r}")
            if frames is not None:  # NumPy's, too; files hold Python's
                object.__setattr__(self, name, int(frames))
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 frame, got {self.window}")
        for name, frames in (("sink", self.sink), ("undo", self.undo)):
            if frames < 0:
                raise ValueError(f"{name} must be 0 or more frames, got {frames}")
        if self.older is not None:
            if not isinstance(self.older, tuple) or len(self.older) != 2 or not isinstance(self.older[1], str):
                raise ValueError(f"older must be (frames, format), got {self.older!r}")
            if not is_whole(self.older[0]) or self.older[0] < 1:
                raise ValueError(f"older must begin after at least 1 frame, got {self.older[0]!r}")
            object.__setattr__(self, "older", (int(self.older[0]), self.older[1]))
        for name in ("format", "sink_format"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be the name of a format, got {getattr(self, name)!r}")
        if isinstance(self.past_bias, bool) or not isinstance(self.past_bias, int | float):
            raise ValueError(f"past_bias must be a number, got {self.past_bias!r}")
        if not abs(self.past_bias) <= MOST_BIAS:
            raise ValueError(
                f"past_bias must be finite in float32, got {self.past_bias}: what is not to be seen is out of the "
                "window"
            )
        if self.time not in TIMES:
            raise ValueError(f"time must be one of {', '.join(TIMES)}, got {self.time!r}")
        for name in ("archive", "pins_in_window"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.on_evict is not None and not callable(self.on_evict):
            raise ValueError(f"on_evict must be a function of (table, frame), got {self.on_evict!r}")

    def sees(self, frame: int, block_end: int) -> bool:
        """Does a block that ends before frame `block_end` attend to the past frame `frame`?

        Example:
            >>> policy = Policy(window=18, sink=3)
            >>> [frame for frame in range(33) if policy.sees(frame, block_end=33)] == [0, 1, 2, *range(15, 33)]
            True
        """
        return self.window is None or frame < self.sink or frame >= block_end - self.window

    def keeps(self, frame: int, block_end: int) -> bool:
        return self.window is None or frame < self.sink or frame >= block_end - self.window - self.undo

    def crowded(self, block_end: int, pinned: Iterable[int]) -> int:
        """How many frames pinned ones take from the window of a block that ends before `block_end`: it sees, and the
        world keeps, the recent frames of a block that ends so many later.

        Example:
            >>> policy = Policy(window=12, sink=4, pins_in_window=True)
            >>> policy.crowded(20, pinned=range(8, 12)), policy.crowded(24, pinned=range(8, 12))
            (0, 4)
        """
        taken = 0
        if self.pins_in_window and self.window is not None:
            for frame in sorted(pinned):
                taken += self.sink <= frame < block_end - self.window + taken
        return taken

    def format_of(self, frame: int, block_end: int) -> str:
        """The format of a frame while the block that ends before `block_end` is made.

        Example:
            >>> Policy(sink=3, format="int8", sink_format="bf16").format_of(frame=0, block_end=33)
            'bf16'
        """
        if self.format is None:
            raise ValueError("format must be named in the policy, or by the store that a world is opened in, got None")
        if frame < self.sink and self.sink_format is not None:
            return self.sink_format
        if self.older is not None and frame < block_end - self.older[0]:
            return self.older[1]
        return self.format

    def capacity(self, frames: int | None = None) -> dict[str, int]:
        """format -> frames of it that one world holds at most: what KVStore(pools=...) wants.

        Args:
            frames: length of the video, for policies that keep all; otherwise a bound that may be left out.

        Example:
            >>> Policy(window=18, sink=3, format="int8", older=(9, "int4")).capacity()
            {'int4': 12, 'int8': 9}
        """
        if self.window is None and frames is None:
            raise ValueError("frames must be given for a policy without a window: it keeps all of them")
        if frames is not None:
            check_counts({"frames": frames}, least=0)
        length = frames if self.window is None else self.window + self.undo + self.sink
        assert length is not None
        length = length if frames is None else min(length, frames)
        # Formats change at the end of the sink and where frames are old, and nowhere between.
        sink = min(self.sink, length) if self.sink_format is not None else 0
        old = max(sink, length - self.older[0]) if self.older is not None else sink
        sizes: dict[str, int] = {}
        for first, end in ((0, sink), (sink, old), (old, length)):
            if first < end:
                format = self.format_of(first, length)
                sizes[format] = sizes.get(format, 0) + end - first
        return sizes
