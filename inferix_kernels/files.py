"""Files that are whole or absent: written under a temporary name in the target's folder, then renamed over it.

A file that grows for as long as a program runs has a fixed temporary name instead, so that what a kill leaves can be
found, and a lock (`open_locked`), so that no second run writes to it. Files of lines grow by whole lines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_WORDS = re.compile(r"\(os error (\d+)\)")  # as libraries in Rust, safetensors' among them, print an errno
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  # a file system that knows none, as some network ones


def unwritable(path: str | os.PathLike[str], error: Exception, argument: str = "path") -> ValueError:
    """The one-line error for a file that could not be written.

    Args:
        error: an OSError, or what a library made of one (safetensors has its own exception, with the errno in words).
        argument: of the caller, that the message names.
    """
    code = _errno(error)
    if code in _FULL:
        return ValueError(f"{argument}: no space left: {os.fspath(path)!r}")
    return ValueError(f"{argument}: cannot write {os.fspath(path)!r}: {os.strerror(code) if code else error}")


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _IN_WORDS.search(str(error))
    return int(found[1]) if found else None


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """A name next to `path` that no other writer has, hidden and ending in .part."""
    path = Path(path)
    return path.with_name(f".{path.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}.part")


def destination(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """Where what is written to `path` belongs: where a link leads, whether or not a file is there yet.

    Raises:
        ValueError: links that lead in a circle, or a name that no file can have; names `argument`.
    """
    path = Path(path)
    try:
        if not path.name:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        real = Path(os.path.realpath(path)) if path.is_symlink() else path
        if real.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except OSError as error:
        raise unwritable(path, error, argument) from None
    return real


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], argument: str = "path") -> Iterator[Path]:
    """A context whose value is an empty file to write to; it becomes `path`, or where a link there leads, when the
    context ends well.

    It is on disk (fsync) before it is renamed, so that a crash at any moment leaves the earlier file or the new one.
    After an error what was at `path` is as it was, and the temporary file is gone. Permissions are 0666 less the
    umask, whatever the library that fills the file sets.

    Raises:
        ValueError: the file can not be written, or the disk is full; names `argument` and `path`.
    """
    target = destination(path, argument)
    part = temporary_path(target)
    try:
        with part.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield part
        part.chmod(mode)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise unwritable(path, error, argument) from None
    except Exception as error:
        if _errno(error) is not None:
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
                write_all(file, text.encode())
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise unwritable(path, error, argument) from None


def require_writable(path: str | os.PathLike[str], argument: str) -> Path:
    """Check that a file can be written at `path`; leaves everything as it is.

    Returns:
        `destination(path)`.

    Raises:
        ValueError: it can not, or there is something else than a regular file (a device, a FIFO); names `argument`.
    """
    path = destination(path, argument)
    try:
        if path.exists():
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(mode):
                raise ValueError(f"{argument} must be a file, got {os.fspath(path)!r}, which is a device or a pipe")
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        probe = temporary_path(path)  # not `path` itself: another run may be about to put its file there
        with probe.open("xb"):
            pass
        probe.unlink()
    except OSError as error:
        raise unwritable(path, error, argument) from None
    return path


def _end_of_lines(file: io.FileIO, block: int = 1 << 16) -> int:
    """Where the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - block)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def require_space(path: str | os.PathLike[str], nbytes: int, argument: str) -> None:
    """Raise ValueError, naming the argument, unless `nbytes` more bytes are free where `path` lies."""
    free = shutil.disk_usage(destination(path, argument).parent).free
    if nbytes > free:
        raise ValueError(f"{argument}: no space left: {os.fspath(path)!r} needs {nbytes:,} bytes, {free:,} are free")


def open_locked(path: str | os.PathLike[str], argument: str, target: str | os.PathLike[str] | None = None) -> io.FileIO:
    """The file at `path`, made if need be, to read and write without a buffer; no other caller has it until it is
    closed. The lock ends with the process, however that ends. File systems without locks are written to without one.

    Args:
        target: what errors name, if `path` is a temporary name of it.

    Raises:
        ValueError: someone else has it, or it can not be opened; names `argument`.
    """
    path, target = Path(path), os.fspath(path if target is None else target)
    try:
        while True:
            file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")
            try:
                _lock(file)
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # who had the lock has renamed or removed it meanwhile
    except BlockingIOError:
        raise ValueError(f"{argument}: {target!r} is being written by another run") from None
    except OSError as error:
        raise unwritable(target, error, argument) from None


@contextlib.contextmanager
def locked_folder(path: Path, argument: str, target: str | os.PathLike[str]) -> Iterator[Path]:
    """A context whose value is the empty folder `path`, which no other caller has until it ends; what a killed process
    left there goes. At the end it is gone, unless it has been renamed.

    Raises:
        ValueError: someone else has it, or it can not be made; names `argument` and `target`.
    """
    target = os.fspath(target)
    handle = -1
    try:
        while True:
            path.mkdir(exist_ok=True)
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            _lock(handle)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
            os.close(handle)  # who had the lock has renamed or removed it meanwhile
            handle = -1
        for left in path.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    except OSError as error:
        if handle >= 0:
            os.close(handle)
        if isinstance(error, BlockingIOError):
            raise ValueError(f"{argument}: {target!r} is being written by someone else") from None
        raise unwritable(target, error, argument) from None
    try:
        yield path
    finally:
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _lock(file: io.FileIO | int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write all of `data`, where a single call may write less."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
