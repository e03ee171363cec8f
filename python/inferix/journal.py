"""The latents of a video in the making, written block by block, so that a killed run can be taken up again.

One line of JSON with everything the latents depend on, then one array per block in NumPy's format. What a kill left
half written at the end is cut off. A block costs a megabyte or two, and one forward to take up again (Decoder.step,
`known`); keys and values are not stored, they would be gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def journal_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.journal")


class Journal:
    """The journal of one video.

    Args:
        path: of the journal.
        settings: what the latents depend on; JSON.
        resume: take up the journal that is there; otherwise it is begun anew.

    Raises:
        ValueError: there is no journal to resume, or it is of a run with other settings; says which differ.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool):
        self.path = path
        self.blocks: list[Tensor] = []  # of the run that is taken up
        line = json.dumps(settings, sort_keys=True).encode() + b"\n"
        if resume:
            self._read(settings)
        else:
            path.write_bytes(line)
        self.count = len(self.blocks)  # blocks in the file
        self._file = path.open("ab")

    def append(self, latents: Tensor) -> None:
        """Add a block [frames, ...] float32; it is in the file when this returns."""
        np.lib.format.write_array(self._file, latents.cpu().numpy(), allow_pickle=False)
        self._file.flush()
        self.count += 1

    def close(self, done: bool) -> None:
        """`done`: the video is complete, and the journal goes."""
        self._file.close()
        if done:
            self.path.unlink(missing_ok=True)

    def _read(self, settings: Mapping[str, Any]) -> None:
        if not self.path.exists():
            raise ValueError(f"--resume: there is nothing to resume: no file {self.path}")
        with self.path.open("rb+") as file:
            try:
                before = json.loads(file.readline())
            except ValueError:
                raise ValueError(f"--resume: {self.path} is damaged: its first line is not JSON") from None
            now = json.loads(json.dumps(settings))
            if other := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
                name = other[0]
                raise ValueError(f"--resume: {name} must be {before.get(name)!r} as before, got {now.get(name)!r}")
            whole = file.tell()
            while True:
                try:
                    self.blocks.append(torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False)))
                except (ValueError, EOFError):  # the end, or a block cut short
                    break
                whole = file.tell()
            file.truncate(whole)
