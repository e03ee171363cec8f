"""One sequence of keys and values: a page table, the block being denoised, and the block whose clean pass is owed.

A world is one branch. A guided world is two, told different things about the same blocks, each with a past of its own.
Scratch belongs to the store and is one layer deep, so that a second branch costs what it commits and nothing else; with
no past to see, nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from inferix_kernels import PageTable
from inferix_kernels.store import Block, Pass

from .models import BlockModel


@dataclasses.dataclass
class Clean:
    """A finished block, and what was said of it."""

    block: Block
    latents: Tensor
    condition: Any


class Branch:
    """Denoises blocks over one page table.

    The clean pass of a block, which turns its K and V into the past, is owed until the next block begins: then it
    shares that block's first forward (fused) or runs just before it (separate). The results are the same, bit for bit
    as far as a library's matrix product does not depend on how many rows it is given.

    Args:
        condition: what this branch is told; None: what the world is told, block by block.
    """

    def __init__(self, model: BlockModel, table: PageTable, condition: Any = None):
        self.model, self.table, self.condition = model, table, condition
        self.owed: Clean | None = None
        self._block: Block | None = None
        self._noisy: Pass | None = None

    @property
    def next_frame(self) -> int:
        """Index of the frame after the last one made."""
        return self.owed.block.end if self.owed else self.table.next_frame

    def open(self, frames: int) -> None:
        """Begin the next block."""
        if self.owed and not (self.model.adapter.fused and self.table.can_fuse):
            self.settle()
        self._block, self._noisy = self.table.open_block(frames), None

    def predict(self, x: Tensor, t: float, condition: Any) -> Tensor:
        """What the network says of the open block at x; its first forward may settle what is owed."""
        assert self._block is not None
        condition = self._told(condition)
        if self.owed:
            return self._fused(self._block, x, t, condition)
        if self._noisy is None:  # one plan for all layers and steps
            self._noisy = self.table.plan([self._block], self._rope(self._block))
        return self.model.predict([x], [t], [condition], self._noisy.attend)

    def close(self, latents: Tensor, condition: Any) -> Clean:
        """The open block is done; its clean pass is owed."""
        assert self._block is not None
        self.owed = Clean(self._block, latents, self._told(condition))
        self._block = self._noisy = None
        return self.owed

    def take(self, latents: Tensor, condition: Any) -> Clean:
        """A given clean block as the next one."""
        self.settle()
        self._block = self.table.open_block(len(latents))
        return self.close(latents, condition)

    def settle(self) -> None:
        """The separate clean pass, if one is owed: only K and V are wanted, and the model stops after the last."""
        if owed := self.owed:
            clean = self.table.plan([owed.block], self._rope(owed.block), commit=owed.block, predict=False)
            self.model.predict([owed.latents], [self.model.adapter.context_time], [owed.condition], clean.attend)
            self._seal()

    def abandon(self) -> None:
        """Forget the open block; what is owed stays owed."""
        self._block = self._noisy = None
        self.table.abandon(keep=self.owed.block if self.owed else None)

    def fork(self) -> Branch:
        """Another branch with the same past; a clean pass owed is owed by both."""
        other = copy.copy(self)
        other.table = self.table.fork()
        if self.owed:
            other.owed = dataclasses.replace(self.owed, block=other.table.open_block(len(self.owed.block.frames)))
        return other

    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames, whole blocks."""
        owed, table = self.owed, self.table
        if owed is None:
            table.rewind(frames)
        elif frames:
            size = len(owed.block.frames)
            if frames < size:
                raise ValueError(f"frames must be whole blocks, the last one of {size}, got {frames}")
            table.abandon()
            try:
                table.rewind(frames - size)
            except BaseException:
                self.owed = dataclasses.replace(owed, block=table.open_block(size))
                raise
            self.owed = None

    def replay(self, blocks: Sequence[Clean], condition: Any) -> list[Clean]:
        """Take these blocks, the last ones, again under another condition, with the sink and pinned frames alone before
        them; the last one's clean pass stays owed.

        Raises:
            OutOfPages: a fork holds what would have to go; nothing has changed.
        """
        table, begin = self.table, blocks[0].block.first
        stay = {frame for frame in table.held if frame < begin and (frame < table.policy.sink or frame in table.pinned)}
        table.check_room([clean.block for clean in blocks], [frame for frame in table.held if frame not in stay])
        self.owed = None
        table.abandon()
        table.truncate(begin)
        table.forget([frame for frame in table.held if frame not in stay])
        return [self.take(clean.latents, condition) for clean in blocks]

    def restart(self) -> None:
        """Begin again at frame 0, without a past."""
        self.table.release()
        self.table, self.owed = PageTable(self.table.store, self.table.policy), None

    def _fused(self, block: Block, x: Tensor, t: float, condition: Any) -> Tensor:
        """One forward over the owed block, clean, and the new one, noisy, which reads what the former commits."""
        owed = self.owed
        assert owed is not None
        both = self.table.plan([owed.block, block], self._rope(owed.block, block), commit=owed.block)
        times, conditions = [self.model.adapter.context_time, t], [owed.condition, condition]
        predicted = self.model.predict([owed.latents, x], times, conditions, both.attend)
        self._seal()
        return predicted

    def _seal(self) -> None:
        assert self.owed is not None
        self.table.seal(self.owed.block)
        self.owed = None

    def _told(self, condition: Any) -> Any:
        return condition if self.condition is None else self.condition

    def _rope(self, *blocks: Block) -> Tensor:
        return self.model.rope([frame for block in blocks for frame in block.frames])
