"""Where pictures go besides the page: recordings, and pushes to RTMP, HLS or a file.

Each has a thread and a bounded queue, so a slow disk or a dead server costs pictures there and nothing here. An encoder
is never flushed before its stream ends: a flushed encoder takes no more pictures, and the stream would be over.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import numpy as np

from ..media import VideoWriter
from .video import choose, configure, convert

DEPTH = 64  # pictures that may wait for a thread
PATIENCE = 5.0  # seconds for a server to answer
REST = 0.5  # seconds without a new picture until the last one is sent again: servers drop who is silent
TICK = Fraction(1, 1000)  # FLV's clock


class Recorder:
    """An MP4 of what is shown of one world, at the model's own pace: pauses are left out.

    Raises:
        OSError, ValueError: the file can't be written.
    """

    def __init__(self, path: Path, world: str, fps: float, size: tuple[int, int], scale: int):
        self.name, self.world, self.frames, self.error = path.name, world, 0, ""
        self._writer = VideoWriter(path, fps, size, scale)
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(DEPTH)
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"recording {path.name}")
        self._thread.start()

    def write(self, worlds: dict[str, np.ndarray]) -> None:
        if self.world in worlds and not self.error:
            try:
                self._queue.put_nowait(worlds[self.world])
            except queue.Full:
                self.error = "the disk is too slow"

    def close(self) -> None:
        """Finish the file. Blocks for as long as the disk takes."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        with self._writer as writer:
            while (picture := self._queue.get()) is not None:
                try:
                    writer.write(picture[None])
                    self.frames = writer.frames
                except ValueError as error:
                    self.error = str(error)


class Sink:
    """Pushes pictures to a URL or path until it is closed; after a failure it tries again, without end.

    Args:
        target: rtmp://..., rtmps://..., srt://... or the path of an .m3u8 (HLS), .mp4, .ts or .flv file. A file is begun
            anew when it is opened, so only streams are opened again.
        retry: seconds before the first new attempt; doubled each time, up to ten.
    """

    def __init__(self, target: str, retry: float = 0.5):
        self.target, self.retry = target, retry
        parts = urlsplit(target)
        self.streams = bool(parts.scheme and parts.netloc)
        self.format = _format_of(target)
        # What is shown to people: not the key of a channel, which is the last part of the path.
        self.label = f"{parts.scheme}://{parts.hostname}" if self.streams else Path(target).name
        self.state, self.connections, self.frames, self.dropped = "waiting", 0, 0, 0
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(DEPTH)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._geometry: tuple[float, tuple[int, int]] | None = None
        self._told: Callable[[], None] = lambda: None

    def start(self, changed: Callable[[], None]) -> None:
        """`changed` is called, on the loop that runs now, when `state` has."""
        import asyncio

        loop = asyncio.get_running_loop()
        self._told = lambda: loop.call_soon_threadsafe(changed)

    def open(self, fps: float, size: tuple[int, int], scale: int) -> None:
        """The world is there: fps pictures per second of size (height, width), enlarged by `scale`."""
        self._geometry = fps, (size[0] * scale // 2 * 2, size[1] * scale // 2 * 2)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name=f"push to {self.label}")
            self._thread.start()

    def write(self, picture: np.ndarray) -> None:
        """Take a picture uint8 [height, width, 3]; the oldest one goes if too many wait."""
        self._put(picture)

    def _put(self, picture: np.ndarray | None) -> None:
        while True:
            try:
                return self._queue.put_nowait(picture)
            except queue.Full:
                try:
                    self._queue.get_nowait()
                    self.dropped += 1
                except queue.Empty:
                    pass

    def close(self) -> None:
        """End the stream properly, within a second if the server lets us."""
        self._closing.set()
        self._put(None)
        if self._thread is not None:
            self._thread.join(1.5)

    def _run(self) -> None:
        wait = self.retry
        while not self._closing.is_set():
            self._say("connecting")
            before = self.frames
            try:
                self._push()
            except (av.error.FFmpegError, OSError, RuntimeError) as error:
                self._say(f"lost: {str(error).splitlines()[0][:120]}" if str(error) else "lost")
            if not self.streams or self._closing.is_set():
                break
            wait = self.retry if self.frames > before else min(10.0, 2 * wait)
            self._closing.wait(wait)
        self._say("ended")

    def _push(self) -> None:
        """One connection: from its opening to its end. Its encoder lives exactly as long."""
        assert self._geometry is not None
        fps, size = self._geometry
        options = {"hls_time": "2", "hls_list_size": "0", "hls_flags": "append_list"} if self.format == "hls" else {}
        timeout = (PATIENCE, PATIENCE) if self.streams else None
        with av.open(self.target, "w", format=self.format, options=options, timeout=timeout) as container:
            name, settings = choose("h264")
            stream: Any = container.add_stream(name)
            configure(stream.codec_context, "h264", size, fps, TICK)
            stream.codec_context.options |= settings
            stream.time_base = TICK
            container.start_encoding()
            self.connections += 1
            self._drain()
            self._say("live")
            started, last, pts = time.monotonic(), None, -1
            while not self._closing.is_set():
                try:
                    picture = self._queue.get(timeout=REST)
                except queue.Empty:
                    picture = last
                if picture is None:
                    continue
                image = convert(picture, size, "h264", keyframe=last is None)
                pts = max(pts + 1, round((time.monotonic() - started) / TICK))
                image.pts, image.time_base, last = pts, TICK, picture
                for packet in stream.encode(image):
                    container.mux(packet)
                self.frames += 1
            container.mux(stream.encode(None))

    def _drain(self) -> None:
        """What waited for the connection is stale."""
        while not self._queue.empty():
            self._queue.get_nowait()

    def _say(self, state: str) -> None:
        self.state = state
        try:
            self._told()
        except RuntimeError:
            pass  # the loop has ended


def _format_of(target: str) -> str:
    scheme, suffix = urlsplit(target).scheme, Path(urlsplit(target).path).suffix.lower()
    formats = {"rtmp": "flv", "rtmps": "flv", "srt": "mpegts"} | {".m3u8": "hls", ".mp4": "mp4", ".ts": "mpegts", ".flv": "flv"}
    if scheme in formats:
        return formats[scheme]
    if not scheme and suffix in formats:
        return formats[suffix]
    raise ValueError(
        f"--push must be an rtmp://, rtmps:// or srt:// address, or a path ending in .m3u8, .mp4, .ts or .flv, got {target!r}"
    )
