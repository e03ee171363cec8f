"""Files that are whole or absent: written under a temporary name beside the target, then renamed over it. Files of
lines grow by whole lines."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


def unwritable(path: str | os.PathLike[str], error: Exception, argument: str = "path") -> ValueError:
    """The one-line error for a file that could not be written.

    Args:
        error: an OSError, or what a library made of one (safetensors has its own exception, with the errno in words).
        argument: of the caller, that the message names.
    """
    code = getattr(error, "errno", None)
    if code in _FULL or any(f"os error {full}" in str(error) for full in _FULL):
        return ValueError(f"{argument}: no space left: {os.fspath(path)!r}")
    return ValueError(f"{argument}: cannot write {os.fspath(path)!r}: {getattr(error, 'strerror', None) or error}")


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """A name beside `path` that no other writer has, hidden and ending in .part."""
    path = Path(path)
    return path.with_name(f".{path.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], argument: str = "path") -> Iterator[Path]:
    """A context whose value is an empty file to write to; it becomes `path` when the context ends well.

    It is on disk (fsync) before it is renamed, so that a crash at any moment leaves the earlier file or the new one.
    After an error what was at `path` is as it was, and the temporary file is gone. Permissions are 0666 less the
    umask, whatever the library that fills the file sets.

    Raises:
        ValueError: the file can not be written, or the disk is full; names `argument` and `path`.
    """
    part = temporary_path(path)
    try:
        with part.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield part
        part.chmod(mode)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise unwritable(path, error, argument) from None
    except Exception as error:
        if any(f"os error {full}" in str(error) for full in _FULL):
            raise unwritable(path, error, argument) from None
        raise
    finally:
        part.unlink(missing_ok=True)


def append_lines(path: str | os.PathLike[str], text: str, argument: str = "path") -> None:
    """Add whole lines to a file, which is begun if there is none; they are on disk (fsync) when this returns.

    After an error the file is as it was. A last line without its end, which a crash left, is cut off first.

    Raises:
        ValueError: the file can not be written, or the disk is full; names `argument` and `path`.
    """
    try:
        with open(path, "a+b", buffering=0) as file:
            end = _end_of_lines(file)
            file.truncate(end)
            try:
                left = memoryview(text.encode())
                while left:
                    left = left[file.write(left) or 0 :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise unwritable(path, error, argument) from None


def _end_of_lines(file: FileIO, block: int = 1 << 16) -> int:
    """Where the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - block)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0
