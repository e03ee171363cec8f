"""Saved worlds and recordings: one folder, names that the server makes, nothing else ever opened; and a bound."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from . import MAX_FILES, MAX_GB
from .protocol import Message

LISTED = 50  # of each kind, the newest
_NAME = re.compile(r"[a-z0-9-]+-\d{8}-\d{6}-\d+")


class Archive:
    """The folder that `save` and `record` fill; made when it is first needed.

    Args:
        folder: may hold other files, which are neither listed nor counted.
        max_files, max_gb: worlds and recordings that may lie there, in number and in 10^9 bytes, before one more is
            begun. What was not finished counts.
    """

    def __init__(self, folder: str | Path, max_files: int = MAX_FILES, max_gb: float = MAX_GB):
        self.folder, self.max_files, self.max_bytes = Path(folder), max_files, round(max_gb * 1e9)
        self._count = 0

    def new(self, model: str) -> str:
        """A name that is not in use.

        Raises:
            ValueError: there is no room for one more, or the folder can't be made.
        """
        entries = self._entries()
        used = sum(map(_size, entries))
        if len(entries) >= self.max_files or used >= self.max_bytes:
            raise ValueError(
                f"{self.folder.name} holds {len(entries)} of at most {self.max_files} worlds and recordings, "
                f"{used / 1e9:.1f} of at most {self.max_bytes / 1e9:g} GB: remove some, or play --max-files, --max-gb"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.folder.name} cannot be made: {error.strerror}") from None
        stem = f"{re.sub('[^a-z0-9]+', '-', model.lower())}-{time.strftime('%Y%m%d-%H%M%S')}"
        while True:
            self._count += 1
            name = f"{stem}-{self._count}"
            if not self.world(name).exists() and not self.video(name).exists():
                return name

    def room(self) -> int:
        """Bytes that may still be written."""
        return self.max_bytes - sum(map(_size, self._entries()))

    def world(self, name: str) -> Path:
        return self.folder / name

    def video(self, name: str) -> Path:
        return self.folder / f"{name}.mp4"

    def worlds(self) -> list[str]:
        """Names of saved worlds, newest first."""
        return self._names("")

    def videos(self) -> dict[str, Path]:
        """Finished recordings by file name, newest first."""
        return {f"{name}.mp4": self.video(name) for name in self._names(".mp4")}

    def listing(self) -> Message:
        return {"type": "files", "worlds": self.worlds()[:LISTED], "videos": list(self.videos())[:LISTED]}

    def _names(self, suffix: str) -> list[str]:
        found = []
        for entry in self._entries():
            stem, ending = os.path.splitext(entry.name)
            if ending == suffix and _NAME.fullmatch(stem) and (entry.is_file() if suffix else entry.is_dir()):
                found.append((_changed(entry), stem))
        return [stem for _, stem in sorted(found, reverse=True)]

    def _entries(self) -> list[os.DirEntry[str]]:
        """What carries a name of ours, whole or (hidden, and with something behind it) not."""
        try:
            with os.scandir(self.folder) as entries:
                return [entry for entry in entries if _NAME.match(entry.name.removeprefix("."))]
        except OSError:
            return []


# A user may remove files at any time, between two looks of ours as well.


def _changed(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0


def _size(entry: os.DirEntry[str]) -> int:
    """Bytes of a file, or of the files in a folder."""
    try:
        if entry.is_dir(follow_symlinks=False):
            with os.scandir(entry) as inner:
                return sum(each.stat(follow_symlinks=False).st_size for each in inner)
        return entry.stat(follow_symlinks=False).st_size
    except OSError:
        return 0
