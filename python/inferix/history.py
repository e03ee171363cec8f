"""The pictures of a world, and the way back to earlier ones."""

from __future__ import annotations

import copy

import numpy as np
from torch import Tensor

from .decode.contract import PictureStream


class Pictures:
    """One world's picture stream, and what it was before each block that `rewind` may take back.

    Args:
        stream: of a world that begins.
        undo: latent frames that can be taken back besides the last block. Of a stream that looks back, the state before
            each of these blocks is kept; with 0, such a stream can not be rewound.
    """

    def __init__(self, stream: PictureStream, undo: int):
        self.stream, self.undo = stream, undo
        self._kept: list[tuple[int, PictureStream]] = []  # (frames made, the stream as it was then)

    def __call__(self, latents: Tensor) -> np.ndarray:
        """The next block's latents -> uint8 [pictures, height, width, 3]."""
        return self.stream(latents)

    @property
    def can_rewind(self) -> bool:
        """Without a look back, always; else with an `undo`."""
        return self.undo > 0 or not self.stream.looks_back

    def keep(self, frames: int) -> None:
        """A block is about to be made, `frames` frames are there."""
        if self.undo and self.stream.looks_back:
            self._kept = [(at, stream) for at, stream in self._kept if frames - self.undo <= at < frames]
            self._kept.append((frames, self.stream.fork()))

    def reaches(self, frames: int, now: int) -> bool:
        """Can `rewind` go back to where there were so many frames? There are `now`."""
        return not self.stream.looks_back or frames == now or any(at == frames for at, _ in self._kept)

    def rewind(self, frames: int) -> None:
        """Go back to where there were so many frames."""
        kept = dict(self._kept)
        if frames in kept:
            self.stream = kept[frames].fork()
        self._kept = [(at, stream) for at, stream in self._kept if at < frames]

    def restart(self, latents: Tensor) -> Tensor:
        """A new rollout begins with these, the last latents, in the block that `keep` was last called for; there is no
        way back to before it."""
        latents = self.stream.restart(latents)
        self._kept = [(at, self.stream.fork()) for at, _ in self._kept[-1:]]
        return latents

    def fork(self) -> Pictures:
        """Those of another world with the same past."""
        other = copy.copy(self)
        other.stream = self.stream.fork()
        return other
