"""Pushing what is shown to RTMP, SRT, HLS or a file.

Each target has a process, for as long as a connection lasts: PyAV has no time limit for writing, so a server that
takes a connection and then says nothing would hold a thread for ever, but a process can be ended. In it is one encoder,
which is flushed when the stream ends and never before: a flushed encoder takes no more pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import numpy as np

from inferix_kernels.files import require_writable

from ..media.output_file import OutputFile
from ..media.video_writer import LEAST_BYTES
from .video import choose, configure, convert

DEPTH = 64  # pictures that may wait
START = 60.0  # seconds for our own process to be there, on a machine that is busy
PATIENCE = 8.0  # seconds for a server to take a connection or a picture
FAREWELL = 1.2  # seconds to end a stream properly
REST = 0.5  # seconds without a new picture until the last one is sent again: servers drop who is silent
TICK = Fraction(1, 1000)  # FLV's clock


class Sink:
    """Pushes pictures to a URL or path until it is closed. A stream that fails is tried again, a file is not.

    Args:
        target: rtmp://..., rtmps://..., srt://... or the path of an .m3u8 (HLS), .mp4, .ts or .flv file.
        retry: seconds before the first new attempt; doubled each time, up to ten.

    Raises:
        ValueError: the target is none of these, or a file that can't be written.
    """

    def __init__(self, target: str, retry: float = 0.5):
        self.target, self.retry, self.format = target, retry, _format_of(target)
        parts = urlsplit(target)
        self.streams = bool(parts.scheme)
        if not self.streams:
            self.target = str(require_writable(target, "push"))
        # What is shown to people: not the key of a channel, which is the last part of the path.
        self.label = f"{parts.scheme}://{parts.hostname}" if self.streams else Path(target).name
        self.state, self.connections, self.frames, self.dropped = "waiting", 0, 0, 0
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(DEPTH)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._notify: Callable[[], None] = lambda: None

    def start(self, changed: Callable[[], None]) -> None:
        """`changed` is called, on the loop that runs now, when `state` has."""
        loop = asyncio.get_running_loop()

        def notify() -> None:
            loop.call_soon_threadsafe(changed)

        self._notify = notify

    def open(self, fps: float, size: tuple[int, int], scale: int) -> None:
        """The world is there: fps pictures per second of size (height, width), enlarged by `scale`."""
        if self._thread is None:
            geometry = fps, (size[0] * scale // 2 * 2, size[1] * scale // 2 * 2)
            self._thread = threading.Thread(target=self._run, args=geometry, daemon=True, name=f"push to {self.label}")
            self._thread.start()

    def write(self, picture: np.ndarray | None) -> None:
        """Take a picture uint8 [height, width, 3]; the oldest one goes if too many wait."""
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
        """End the stream properly, if the server lets us."""
        self._closing.set()
        self.write(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, fps: float, size: tuple[int, int]) -> None:
        wait, end = self.retry, "ended"
        while not self._closing.is_set():
            self._say("connecting")
            before = self.frames
            reason = self._connect(fps, size)
            if self._closing.is_set():
                break
            if not self.streams:
                end = f"ended: {reason}"
                break
            self._say(f"lost: {reason}")
            wait = self.retry if self.frames > before else min(10.0, 2 * wait)
            self._closing.wait(wait)
        self._say(end)

    def _connect(self, fps: float, size: tuple[int, int]) -> str:
        """One connection, from its beginning to its end; says why it ended."""
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        arguments = (theirs, self.target, self.format, fps, size)
        process = context.Process(target=push, args=arguments, daemon=True, name=f"push to {self.label}")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for us to follow
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        try:
            return self._feed(pipe)
        except (EOFError, OSError):
            return "the pushing process ended"
        finally:
            process.join(FAREWELL if self._closing.is_set() else 0.0)
            process.kill()
            process.join()
            process.close()
            pipe.close()

    def _feed(self, pipe: Connection) -> str:
        """Give a picture whenever one is asked for."""
        live, last = False, None
        if not self._ready(pipe, START):
            return "the pushing process did not start"
        pipe.recv()
        while True:
            if not self._ready(pipe, PATIENCE):
                return "no answer" if not self._closing.is_set() else "closed"
            error = pipe.recv()
            if error is not None:
                return str(error)
            if live:
                self.frames += 1
            else:
                live = True
                self.connections += 1
                while not self._queue.empty():  # what waited for the connection is stale
                    self._queue.get_nowait()
                self._say("live")
            picture = None
            while picture is None and not self._closing.is_set():
                try:
                    picture = self._queue.get(timeout=REST)
                except queue.Empty:
                    picture = last
            last = picture
            pipe.send(picture)
            if picture is None:
                return "closed"

    def _ready(self, pipe: Connection, patience: float) -> bool:
        """Has the process said something in time? It has less of it once we are closing."""
        deadline = time.monotonic() + patience
        while not pipe.poll(0.1):
            if time.monotonic() > deadline:
                return False
            if self._closing.is_set():
                deadline = min(deadline, time.monotonic() + FAREWELL)
        return True

    def _say(self, state: str) -> None:
        self.state = state
        with contextlib.suppress(RuntimeError):  # the loop may have ended
            self._notify()


def push(pipe: Connection, target: str, format: str, fps: float, size: tuple[int, int]) -> None:
    """The process: sends None to say that it is there, and once more for each picture that it can take, which it then
    encodes and sends on; a picture that is None ends the stream. A text instead says what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(None)
    options = {"hls_time": "2", "hls_list_size": "0", "hls_flags": "append_list"} if format == "hls" else {}
    try:
        # HLS is many files, which libavformat opens itself, and about whose errors it says nothing.
        file = OutputFile(target, "push") if format != "hls" and not urlsplit(target).scheme else None
        with av.open(file or target, "w", format=format, options=options) as container:
            name, settings = choose("h264")
            stream: Any = container.add_stream(name)
            configure(stream.codec_context, "h264", size, fps, TICK)
            stream.codec_context.options |= settings
            stream.time_base = TICK
            container.start_encoding()
            started, pts = time.monotonic(), -1
            pipe.send(None)
            while (picture := pipe.recv()) is not None:
                image = convert(picture, size, "h264", keyframe=pts < 0)
                pts = max(pts + 1, round((time.monotonic() - started) / TICK))
                image.pts, image.time_base = pts, TICK
                container.mux(stream.encode(image))
                if file and file.error:
                    raise file.error
                if format == "hls" and shutil.disk_usage(Path(target).parent).free < LEAST_BYTES:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                pipe.send(None)
            container.mux(stream.encode(None))
    except EOFError:
        pass  # the server is gone
    except (av.error.FFmpegError, OSError, RuntimeError, ValueError) as error:
        # Everyone is shown this: without the target, which str(error) ends with and which may hold a channel's key.
        text = str(error).removeprefix("push: ").replace(repr(target), Path(target).name)
        pipe.send((getattr(error, "strerror", None) or text)[:200])


def _format_of(target: str) -> str:
    scheme, suffix = urlsplit(target).scheme, Path(urlsplit(target).path).suffix.lower()
    schemes = {"rtmp": "flv", "rtmps": "flv", "srt": "mpegts"}
    suffixes = {".m3u8": "hls", ".mp4": "mp4", ".ts": "mpegts", ".flv": "flv"}
    if scheme in schemes and urlsplit(target).hostname:
        return schemes[scheme]
    if not scheme and suffix in suffixes:
        return suffixes[suffix]
    raise ValueError(
        f"push must be an rtmp://, rtmps:// or srt:// address or end in {', '.join(suffixes)}, got {target!r}"
    )
