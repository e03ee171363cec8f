"""A file in the making, under a temporary name: what writers of videos and latents share.

After an error it is closed and keeps the temporary name: what was there before stays what it was. While it is written
the temporary file is locked: a second writer of the same video is refused.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from inferix_kernels.files import open_locked, write_all


def partial_path(path: Path) -> Path:
    """Where a video is while it is made; `path` is no link."""
    return path.with_name(f".{path.name}.part")


class OutputFile:
    """A file for PyAV to write to (`av.open(OutputFile(...), "w", ...)`) through which no error reaches libavformat.

    PyAV's next `mux` would write a header again that could not be written, over state that libavformat has freed by
    then: a segmentation fault. So this takes all it is given; the first failure is kept as `error`, after which nothing
    is written any more: the file keeps what it had. Who writes must look at `error`.

    Args:
        path: emptied if it exists, and locked until it is closed.
        argument, target: of the caller, that errors name: `path` is a temporary name of `target`.

    Raises:
        ValueError: the file can not be opened, or is being written by someone else.
    """

    def __init__(self, path: str | Path, argument: str, target: str | Path | None = None):
        self.error: Exception | None = None
        self._file, self._position = open_locked(path, argument, target), 0
        self._file.truncate(0)

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.seek(self._position)
                write_all(self._file, data)
            except Exception as error:  # the file system's, or ours: none may reach the C code that calls this
                self.error = error
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """From the beginning or from here: libavformat never counts from the end of what it writes."""
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def sync(self) -> None:
        """Wait until it is on the disk, which may be found full only now."""
        if self.error is None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self.error = error

    @property
    def closed(self) -> bool:
        """PyAV writes no trailer to a closed file."""
        return self._file.closed

    def close(self) -> None:
        """Close and unlock the file; what is written after this is dropped."""
        self._file.close()


@contextlib.contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end of the block. Within, libavformat calls Python, out of which no exception could come
    without leaving a hole in the file."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    asked: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *said: asked.append(said))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if asked:
        previous(*asked[0])
