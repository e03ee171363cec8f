"""Shows pictures one by one, by the playout clock: to viewers, in a recording, and where they are pushed to."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from .playout import PlayoutClock
from .protocol import Message
from .push import Sink
from .recorder import Recorder
from .video import TICKS, Broadcast

POLL = 0.2  # seconds: how often a world at rest looks for viewers who have just come


@dataclasses.dataclass
class Picture:
    """A picture waiting to be shown."""

    frame: int
    block: int
    worlds: dict[str, np.ndarray]  # uint8 [height, width, 3] by name


class Player:
    """The queue of pictures and the clock that empties it.

    Args:
        announce: called with a `frame` message for each picture.
        shown: called when a picture has left the queue.
        failed: called with a recording that has ended by itself; its `error` says why.
        sinks: get the pictures of world "a".
    """

    def __init__(
        self,
        announce: Callable[[Message], None],
        shown: Callable[[], None],
        failed: Callable[[Recorder], None],
        sinks: tuple[Sink, ...] = (),
    ):
        self.announce, self.shown, self.failed, self.sinks = announce, shown, failed, sinks
        self.broadcast, self.clock = Broadcast(16), PlayoutClock(16)
        self.recorder: Recorder | None = None
        self.queue: deque[Picture] = deque()
        self.last: dict[str, np.ndarray] = {}  # the pictures shown last, by world
        self.paused, self.until = False, -1  # paused: blocks up to this one are shown all the same
        self.ready = asyncio.Event()  # something may be shown that could not be before
        self._newest = 0, 0  # numbers of the last picture shown and of its block

    def configure(self, fps: float, size: tuple[int, int], scale: int) -> None:
        """A world has been opened, whose pictures are these."""
        self.broadcast.fps, self.broadcast.scale, self.clock = fps, scale, PlayoutClock(fps)
        for sink in self.sinks:
            sink.open(fps, size, scale)

    def clear(self) -> None:
        """What waits will never be shown."""
        self.queue.clear()
        self.clock.rest()

    def left(self) -> float:
        """Seconds until a picture made now would be due: behind those that wait, but for what a pause holds back."""
        held = sum(not self._may_show(picture) for picture in self.queue)
        return self.clock.left(len(self.queue) - held, time.monotonic())

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if not (self.queue and self._may_show(self.queue[0])):
                await self._rest()
                continue
            due = self.clock.next(time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            if not (self.queue and self._may_show(self.queue[0])):
                continue  # rewound or paused in the meantime
            picture = self.queue.popleft()
            self.clock.show(due)
            self._newest = picture.frame, picture.block
            self.shown()
            for sink in self.sinks:
                sink.write(picture.worlds["a"])
            await self._record(picture.worlds)  # before others have their turn: worlds may be renamed then
            await self.show(picture.worlds)

    async def show(self, worlds: dict[str, np.ndarray]) -> None:
        """Send pictures to all viewers; two worlds are one picture, side by side. None: there is nothing to show."""
        if not worlds:
            return
        self.last = worlds
        pts, (frame, block) = self.ticks(), self._newest
        self.announce({"type": "frame", "frame": frame, "block": block, "pts": pts, "worlds": list(worlds)})
        pictures = [worlds[name] for name in sorted(worlds)]
        await self.broadcast.show(pictures[0] if len(pictures) == 1 else np.concatenate(pictures, 1), frame, pts)

    @staticmethod
    def ticks() -> int:
        """The clock that pictures bear."""
        return round(time.monotonic() * TICKS)

    def _may_show(self, picture: Picture) -> bool:
        return not self.paused or picture.block <= self.until

    async def _rest(self) -> None:
        self.ready.clear()
        if self.paused:
            self.clock.rest()
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self.ready.wait(), POLL)
        if self.broadcast.keyframe_wanted and self.last:
            await self.show(self.last)  # to who joins a world that stands still

    # Recording

    async def _record(self, worlds: dict[str, np.ndarray]) -> None:
        if self.recorder is None:
            return
        self.recorder.write(worlds)
        if self.recorder.error and (recorder := await self.stop_recording()):
            self.failed(recorder)

    async def stop_recording(self) -> Recorder | None:
        """Finish the recording, if there is one."""
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            await asyncio.to_thread(recorder.close)
        return recorder

    async def close(self) -> None:
        await self.stop_recording()
        await asyncio.gather(*(asyncio.to_thread(sink.close) for sink in self.sinks))
        self.broadcast.close()
