"""Latents as a NumPy array file, written while they are made."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np

from inferix_kernels.files import open_locked, require_space, require_writable, unwritable, write_all

from .output_file import delayed_interrupts, partial_path

HEADER_BYTES = 246  # of a .npy file, so that the numbers begin at 256


class LatentWriter:
    """A NumPy array file in the making, [frames, ...] float32; a context manager. For models without a decoder.

    It is written under a temporary name, and holds at any time what was written so far, whole frames. Like a
    VideoWriter's, that file is locked while it is written, and kept after an error.

    Args:
        path: replaced, if it exists, when the file is closed; .npy takes the place of any other ending.
        frames: to come; there must be room for them.
        shape: of one frame.
        argument: of the caller, that errors name for `path`.

    Raises:
        ValueError: the file can not be written, has no room, or is being written by another run.
    """

    def __init__(self, path: str | Path, frames: int, shape: tuple[int, ...], argument: str = "path"):
        self.path, self.shape, self.frames, self.kept = Path(path).with_suffix(".npy"), tuple(shape), 0, 0
        self._argument = argument
        self._target = require_writable(self.path, argument)
        self.partial = partial_path(self._target)
        require_writable(self.partial, argument)
        self._frame_bytes = 4 * int(np.prod(shape))
        require_space(self.path, frames * self._frame_bytes, argument)
        self._file, self._open = open_locked(self.partial, argument, self.path), True
        try:
            self._file.truncate(0)
            self._write_header()
        except BaseException as error:
            self.partial.unlink(missing_ok=True)
            self._file.close()
            if isinstance(error, OSError):
                raise unwritable(self.path, error, argument) from None
            raise

    def write(self, frames: np.ndarray) -> None:
        """Append frames [n, ...]; errors are those of VideoWriter.write."""
        if frames.shape[1:] != self.shape:
            raise ValueError(f"frames must be [n, {', '.join(map(str, self.shape))}], got {list(frames.shape)}")
        try:
            with delayed_interrupts():
                self._file.seek(self._start + self.frames * self._frame_bytes)
                write_all(self._file, np.ascontiguousarray(frames, np.float32).tobytes())
                self.frames += len(frames)
                self._write_header()
        except OSError as error:
            raise unwritable(self.path, error, self._argument) from None

    def close(self, whole: bool = True) -> None:
        """Finish the file under its own name or, if it is not `whole`, its temporary one; without a frame, leave
        nothing. It holds the frames that were written."""
        if not self._open:
            return
        self._open = False
        try:
            with delayed_interrupts():
                if not self.frames:
                    self.partial.unlink(missing_ok=True)
                    return
                self.kept = self.frames  # until it has its own name
                self._file.truncate(self._start + self.frames * self._frame_bytes)
                os.fsync(self._file.fileno())
                if whole:
                    self.partial.replace(self._target)
                    self.kept = 0
        except OSError as error:
            raise unwritable(self.path, error, self._argument) from None
        finally:
            self._file.close()

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(whole=kind is None or issubclass(kind, KeyboardInterrupt))

    def _write_header(self) -> None:
        """Of as many frames as there are; it has the same length whatever their number."""
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {(self.frames, *self.shape)}, }}"
        self._start = 10 + HEADER_BYTES
        text = header.ljust(HEADER_BYTES - 1).encode() + b"\n"
        self._file.seek(0)
        write_all(self._file, np.lib.format.magic(1, 0) + HEADER_BYTES.to_bytes(2, "little") + text)
