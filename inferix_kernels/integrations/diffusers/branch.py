"""The past of one branch of guidance, and the passes of the transformer over the block that is open in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout import scratch_format
from ...store import KVStore, Part, Pass, Policy
from ...store.past import Block


class Shape(NamedTuple):
    """What all calls of a transformer have in common, taken from the first."""

    videos: int
    height: int  # of the latents
    width: int
    device: torch.device
    dtype: torch.dtype


class Branch:
    """A world for each video of the batch, in a store of their own.

    Attributes:
        inputs: the transformer's arguments in this block, but for latents and timestep; None: it was not called.
        steps: shape of the timestep that it was given.
        running: the pass of the call that is under way, or of the last one.
        committed: is the clean pass of the open block done?
        means: of each world, and layer, what is off the keys that `running` reads and writes.
    """

    def __init__(self, config: Any, shape: Shape, policy: Policy, block_frames: int, frames: int | None):
        patch = config.patch_size
        self.shape = shape
        self.store = KVStore(
            layers=config.num_layers,
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            frame_tokens=(shape.height // patch[1]) * (shape.width // patch[2]),
            block_frames=block_frames,
            scratch_blocks=shape.videos,
            scratch_format=scratch_format(shape.device, shape.dtype),
            pools={format: count * shape.videos for format, count in policy.capacity(frames).items()},
            device=shape.device,
        )
        self.tables = [self.store.open(policy) for _ in range(shape.videos)]
        self._forget()

    def _forget(self) -> None:
        self._blocks: list[Block] = []
        self._noisy: Pass | None = None
        self.running: Pass | None = None
        self.inputs: dict[str, Any] | None = None
        self.steps: torch.Size | None = None
        self.committed = False
        self.means: list[list[Tensor | None]] = []

    def open(self, frames: int) -> None:
        """Begin the next block."""
        self._forget()
        self._blocks = [table.open_block(frames) for table in self.tables]

    def begin(self, rope: Tensor, commit: bool) -> None:
        """The transformer is about to run. rope: [tokens of a block, D / 2, 2], the same for every video."""
        self.means = [table.k_means for table in self.tables]
        if not commit and self._noisy is not None and not self._noisy.stale:
            self.running = self._noisy
            return
        parts = [Part(table, [block], block if commit else None) for table, block in zip(self.tables, self._blocks)]
        self.running = self.store.plan(parts, rope.repeat(self.shape.videos, 1, 1))
        if not commit:
            self._noisy = self.running

    def abandon(self) -> None:
        """Forget the open block."""
        for table in self.tables:
            table.abandon()
        self._forget()
