"""Recordings: what is shown of one world, as an MP4 on the server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..media.video_writer import VideoWriter

DEPTH = 64  # pictures that may wait for the disk


class Recorder:
    """An MP4 of what is shown of one world, at the model's own pace: pauses are left out. One that meets its bound ends
    there, whole; one that meets an error keeps what could be written under a hidden name.

    Args:
        path: of the file; its folder is nobody's business, so errors name the file alone.
        world: which is recorded.
        fps, size, scale: as for a VideoWriter.
        room: says how many bytes may still be written; asked once a second of video.

    Raises:
        ValueError: the file can't be written, or no thread can be started for it.
    """

    def __init__(
        self, path: Path, world: str, fps: float, size: tuple[int, int], scale: int, room: Callable[[], int] = lambda: 1
    ):
        self.name, self.world, self.frames, self.error = path.name, world, 0, ""
        self._path, self._room, self._second = path, room, max(1, round(fps))
        try:
            self._writer = VideoWriter(path, fps, size, scale)
        except ValueError as error:
            raise ValueError(self._words(error)) from None
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(DEPTH)
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"recording {path.name}")
        try:
            self._thread.start()
        except RuntimeError as error:
            self._writer.close(whole=False)
            raise ValueError(str(error)) from None

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
        """Takes pictures until the last one, whatever happens: who closes us waits for it."""
        try:
            with self._writer as writer:
                while (picture := self._queue.get()) is not None:
                    if not self.error:
                        self._write(writer, picture)
        except Exception as error:  # the file could not be finished
            self.error = self.error or self._words(error)

    def _write(self, writer: VideoWriter, picture: np.ndarray) -> None:
        try:
            writer.write(picture[None])
            self.frames = writer.frames
        except Exception as error:
            self.error = self._words(error)
            return
        if self.frames % self._second == 0 and self._room() <= 0:
            self.error = f"{self.name} ends here: there is no room for more recordings, see play --max-gb"

    def _words(self, error: Exception) -> str:
        text = str(error).removeprefix("path: ") or type(error).__name__
        return text.replace(repr(str(self._path)), self.name)
