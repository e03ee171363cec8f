"""The latents of a video in the making, written block by block, so that a killed run can be taken up again.

One line of JSON with everything the latents depend on, then the blocks: for each a line of JSON with its shape and the
CRC-32 of shape and numbers, which goes on from that of what is before, then the numbers, float32. What a kill left half
written at the end is cut off, and so is everything from the first block on that is damaged or not in its place: it is
made again. A block costs a megabyte or two, and one forward to take
up again (World.replay); keys and values are not stored, they would be gigabytes.

The file is locked while a run writes to it. One whose first line is not whole says nothing, and is begun anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from inferix_kernels.files import destination, open_locked, unwritable, write_all

FORMAT = 2
MOST_HEADER = 1 << 20  # bytes of the first line that are read; a block's line is shorter still


def journal_path(path: Path, argument: str = "path") -> Path:
    """Next to the video, also if `path` is a link to it: whoever writes that one finds the same journal."""
    out = destination(path, argument)
    return out.with_name(f".{out.name}.journal")


def is_unfinished(path: Path) -> bool:
    """Is there a journal that a run could be taken up from?"""
    try:
        with path.open("rb") as file:
            line = file.readline(MOST_HEADER)
            return line.endswith(b"\n") or len(line) == MOST_HEADER
    except FileNotFoundError:
        return False


def refuse_unfinished(path: Path, argument: str = "path") -> None:
    """Raise ValueError, naming the argument, if a new run would write over the journal of an unfinished one."""
    if is_unfinished(path):
        raise ValueError(f"{argument}: an unfinished video has its journal there: `resume` goes on; or delete {path}")


class Journal:
    """The journal of one video.

    Args:
        path: of the journal.
        frame: shape of one frame of latents; every block is [frames, *frame].
        settings: what the latents depend on; JSON.
        resume: take up the journal that is there; otherwise it is begun anew.
        argument: of the caller, that errors name for `path`.

    Raises:
        ValueError: there is no journal to resume, or it is of a run with other settings; says which differ. Or another
            run is writing it, or it can not be written.
    """

    def __init__(
        self, path: Path, frame: Sequence[int], settings: Mapping[str, Any], resume: bool, argument: str = "path"
    ):
        self.path, self.frame, self._argument = path, list(frame), argument
        self.blocks: list[Tensor] = []  # of the run that is taken up
        if resume and not path.exists():
            raise ValueError(f"resume: there is nothing to resume: no file {path}")
        settings = {"journal": FORMAT, **json.loads(json.dumps(settings))}
        self._file = open_locked(path, argument)
        try:
            if not resume:
                refuse_unfinished(path, argument)
            self._end = self._read(settings) if resume and is_unfinished(path) else 0
            self.count = len(self.blocks)  # blocks in the file
            if not self._end:
                line = json.dumps(settings, sort_keys=True).encode() + b"\n"
                self._write(line)
                self._checksum = zlib.crc32(line)
        except BaseException:
            self._file.close()
            raise

    def append(self, latents: Tensor) -> None:
        """Add a block [frames, ...] float32; it is in the file when this returns.

        Raises:
            ValueError: it can not be written; the journal holds the blocks before it.
        """
        shape, numbers = list(latents.shape), latents.to("cpu", torch.float32).numpy().tobytes()
        checksum = _checksum(self._checksum, shape, numbers)
        self._write(json.dumps({"shape": shape, "crc32": checksum}).encode() + b"\n" + numbers)
        self._checksum = checksum
        self.count += 1

    def close(self, done: bool) -> None:
        """`done`: the video is complete, and the journal goes."""
        if done and not self._file.closed:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _write(self, data: bytes) -> None:
        """After what is whole; nothing of it stays if it can not be written."""
        try:
            self._file.seek(self._end)
            self._file.truncate()
            write_all(self._file, data)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise unwritable(self.path, error, self._argument) from None
        self._end += len(data)

    def _read(self, now: Mapping[str, Any]) -> int:
        """Take up the blocks; returns where they end."""
        with self.path.open("rb") as file:
            try:
                line = file.readline(MOST_HEADER)
                before = json.loads(line)
                if not isinstance(before, dict):
                    raise ValueError
            except (ValueError, RecursionError):
                raise ValueError(f"resume: {self.path} is damaged: its first line is not JSON") from None
            if other := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
                name = other[0]
                wanted = f"{before[name]!r} as before" if name in before else "left to the version that began the video"
                typed = f"`{name}`" if name.isidentifier() else name  # an option, or what one stands for
                raise ValueError(f"resume: {typed} must be {wanted}, got {now.get(name)!r}")
            whole, self._checksum, size = file.tell(), zlib.crc32(line), self.path.stat().st_size
            while (read := _read_block(file, size, self.frame, self._checksum)) is not None:
                block, self._checksum = read
                self.blocks.append(block)
                whole = file.tell()
        return whole


def _read_block(file: BinaryIO, end: int, frame: list[int], before: int) -> tuple[Tensor, int] | None:
    """The next block and its checksum; None at the end, and where one is cut short, damaged or not in its place."""
    try:
        said = json.loads(file.readline(MOST_HEADER))
        shape, checksum = said["shape"], said["crc32"]
        if not all(type(n) is int and n > 0 for n in shape) or shape[1:] != frame or not shape:
            return None
        size = 4 * math.prod(shape)
        numbers = file.read(size) if size <= end - file.tell() else b""
        if checksum != _checksum(before, shape, numbers):
            return None
        return torch.from_numpy(np.frombuffer(numbers, "<f4").reshape(shape).copy()), checksum
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _checksum(before: int, shape: list[int], numbers: bytes) -> int:
    return zlib.crc32(numbers, zlib.crc32(json.dumps(shape).encode(), before))
