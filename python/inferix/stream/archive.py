"""Saved worlds and recordings: one folder, names that the server makes, nothing else ever opened."""

from __future__ import annotations

import re
import time
from pathlib import Path

from .protocol import Message

_NAME = re.compile(r"[a-z0-9-]+-\d{8}-\d{6}-\d+")


class Archive:
    """The folder that `save` and `record` fill; made when it is first needed."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._count = 0

    def new(self, model: str) -> str:
        """A name that is not in use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{re.sub('[^a-z0-9]+', '-', model.lower())}-{time.strftime('%Y%m%d-%H%M%S')}"
        while True:
            self._count += 1
            name = f"{stem}-{self._count}"
            if not self.world(name).exists() and not self.video(name).exists():
                return name

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
        return {"type": "files", "worlds": self.worlds()[:50], "videos": list(self.videos())[:50]}

    def _names(self, suffix: str) -> list[str]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.suffix == suffix and _NAME.fullmatch(path.stem)]
        found = [path for path in found if (path.is_dir() if not suffix else path.is_file())]
        return [path.stem for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]
