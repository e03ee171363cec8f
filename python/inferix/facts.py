"""What a world says of itself: nothing here changes it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from inferix_kernels import KVStore, PageTable

from .decode.contract import Model
from .decode.decoder import Decoder
from .history import Pictures
from .ranks import Ranks


class Facts:
    """The part of a World that is read.

    Attributes:
        model: what it runs.
        decoder: its decode loop.
        store: where its keys and values lie, and those of its forks.
        pictures: its picture stream.
        prompt: the last one it was given.
        latents: [frames, *latent_shape], what the last step left: of the block that it made or, of a model with several
            in flight, of all that were. `World.replay` takes it.
        ranks: the processes that run it together; None: this one alone.
    """

    model: Model
    decoder: Decoder
    store: KVStore
    pictures: Pictures
    latents: Tensor
    prompt: str | None = None
    ranks: Ranks | None = None

    @property
    def table(self) -> PageTable:
        """The world's page table."""
        return self.decoder.table

    @property
    def frames(self) -> int:
        """Latent frames made or observed so far."""
        return self.decoder.frames

    @property
    def ahead(self) -> int:
        """Latent frames that are begun and not done."""
        return self.decoder.ahead

    @property
    def released(self) -> bool:
        """It can't go on: its pages are given back, or will be with its next call, which says why."""
        return self.decoder.released or self.pictures.spoiled

    @property
    def can_rewind(self) -> bool:
        """May `rewind` take anything back? Where pictures depend on those before them, only with an `undo`."""
        return self.decoder.can_rewind and self.pictures.can_rewind

    @property
    def rewinds(self) -> list[int]:
        """How many latent frames `rewind` can take back now: none, the last block, the last two, and so on."""
        now = self.frames
        return [size for size in self.decoder.rewinds if self.pictures.reaches(now - size, now)]

    @property
    def denoising(self) -> float:
        """Seconds that the last step took, pictures apart; 0 before the first."""
        return self.decoder.seconds

    @property
    def undo(self) -> int:
        """Latent frames that `rewind` can take back now, at most."""
        return self.rewinds[-1]

    def last_picture(self) -> np.ndarray | None:
        """uint8 [height, width, 3]: what the world looks like now; None if that can't be made again."""
        latents = None if self.pictures.stream.looks_back else self.decoder.last_latents()
        return None if latents is None else self.pictures(latents)[-1]

    def kv_read(self) -> dict[str, int]:
        """Bytes of the past that a layer reads in one step of a model with several blocks in flight, on average so far.

        Returns:
            "read": from pages. "copied": where the past is one bf16 tensor of all frames since the beginning, which
            MAGI-1's own code copies in every forward.
        """
        return self.decoder.kv_read()

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of the KV store by format, scratch apart."""
        return self.store.nbytes
