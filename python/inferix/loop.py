"""The semi-autoregressive decode loop: denoise a block, make it the past, go on.

This is the paper's figure as code. Whatever differs between models is data in their `Adapter`; whatever concerns
pages is in `inferix_kernels.page_table`.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from inferix_kernels.page_table import PageTable
from inferix_kernels.passes import Block, Pass

from .models import BlockModel


@dataclasses.dataclass
class Clean:
    """A finished block whose clean pass is still owed."""

    block: Block
    latents: Tensor
    condition: Any


class Decoder:
    """One world's loop. `step` makes the next block; `observe` takes a given one as if it had been made.

    The clean pass of a block, which turns its K and V into the past, is owed until the next block begins: then it
    shares that block's first forward (fused) or runs just before it (separate). The results are the same, bit for
    bit on one backend; the last block of a video never pays for a clean pass that nobody reads.
    """

    def __init__(self, model: BlockModel, table: PageTable, generator: torch.Generator):
        self.model, self.table, self.generator = model, table, generator
        self.owed: Clean | None = None
        self.seconds: list[float] = []  # per block made

    @torch.inference_mode()
    def step(self, condition: Any) -> Tensor:
        """The next block, clean: [block_frames, *latent_shape]."""
        started = time.perf_counter()
        adapter, model, table = self.model.adapter, self.model, self.table
        try:
            if self.owed and not (adapter.fused and table.can_fuse):
                self._clean_pass()
            from_nothing = table.next_frame == 0 and not self.owed
            times = adapter.first_times if from_nothing and adapter.first_times else adapter.times
            block = table.open_block(adapter.block_frames)
            noisy: Pass | None = None
            x = self._noise()
            for i, t in enumerate(times):
                if self.owed:
                    predicted = self._fused_first_step(block, x, t, condition)
                else:
                    noisy = noisy or table.plan([block], self._rope(block))  # one plan for all layers and steps
                    predicted = model.predict([x], [t], [condition], noisy.attend)
                clean = predicted if adapter.prediction == "x0" else x - t * predicted
                x = self._noised(clean, times[i + 1]) if i + 1 < len(times) else clean
        except BaseException:
            table.abandon(keep=self.owed.block if self.owed else None)
            raise
        self.owed = Clean(block, x, condition)
        self.seconds.append(time.perf_counter() - started)
        return x

    @torch.inference_mode()
    def observe(self, latents: Tensor, condition: Any) -> None:
        """Take a given clean block [frames, *latent_shape] as the next block of the world."""
        if self.owed:
            self._clean_pass()
        self.owed = Clean(self.table.open_block(len(latents)), latents, condition)
        self._clean_pass()

    def fork(self) -> Decoder:
        """Another world's loop with the same past; the clean pass owed is owed by both."""
        other = Decoder(self.model, self.table.fork(), torch.Generator().set_state(self.generator.get_state()))
        if self.owed:
            block = other.table.open_block(len(self.owed.block.frames))
            other.owed = dataclasses.replace(self.owed, block=block)
        return other

    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames, whole blocks. See PageTable.rewind for how far back one can go."""
        if self.owed and frames:
            size = len(self.owed.block.frames)
            if frames < size:
                raise ValueError(f"frames must be whole blocks, the last one of {size}, got {frames}")
            self.table.abandon()
            owed, self.owed = self.owed, None
            try:
                self.table.rewind(frames - size)
            except BaseException:
                self.owed = dataclasses.replace(owed, block=self.table.open_block(size))
                raise
        else:
            self.table.rewind(frames)

    def _fused_first_step(self, block: Block, x: Tensor, t: float, condition: Any) -> Tensor:
        """One forward over the owed block, clean, and the new one, noisy, which reads what the former commits."""
        owed, table = self.owed, self.table
        assert owed is not None
        both = table.plan([owed.block, block], self._rope(owed.block, block), commit=owed.block)
        times, conditions = [self.model.adapter.context_time, t], [owed.condition, condition]
        predicted = self.model.predict([self._context(owed), x], times, conditions, both.attend)
        table.seal(owed.block)
        self.owed = None
        return predicted

    def _clean_pass(self) -> None:
        """The separate clean pass: only K and V of the owed block are wanted, and the model stops after the last."""
        owed = self.owed
        assert owed is not None
        clean = self.table.plan([owed.block], self._rope(owed.block), commit=owed.block, predict=False)
        self.model.predict([self._context(owed)], [self.model.adapter.context_time], [owed.condition], clean.attend)
        self.table.seal(owed.block)
        self.owed = None

    def _context(self, owed: Clean) -> Tensor:
        return self._noised(owed.latents, self.model.adapter.context_time)

    def _noised(self, clean: Tensor, t: float) -> Tensor:
        return (1 - t) * clean + t * self._noise() if t > 0 else clean

    def _noise(self) -> Tensor:
        shape = (self.model.adapter.block_frames, *self.model.latent_shape)
        return torch.randn(shape, generator=self.generator)

    def _rope(self, *blocks: Block) -> Tensor:
        return self.model.rope([frame for block in blocks for frame in block.frames])
