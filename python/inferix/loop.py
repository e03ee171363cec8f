"""The semi-autoregressive decode loop: denoise a block, make it the past, go on.

This is the paper's figure as code. Whatever differs between models is data in their `Adapter`; whatever concerns
pages is in `inferix_kernels.page_table`.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inferix_kernels.page_table import PageTable
from inferix_kernels.passes import Block, Pass

from .models import BlockModel


@dataclasses.dataclass
class Clean:
    """A finished block; `Decoder.owed` is the one whose clean pass is still to come."""

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
        self.recent: list[Clean] = []  # the blocks a new prompt or a new rollout may need again
        self.frames = 0  # latent frames made or observed
        self.seconds: list[float] = []  # per block made
        # Overlapping latents as the next rollout begins with them; a VAE encodes the first one again.
        self.restart: Callable[[Tensor], Tensor] = lambda latents: latents

    @torch.inference_mode()
    def step(self, condition: Any, known: Tensor | None = None) -> Tensor:
        """The next block, clean: [frames, *latent_shape].

        `known` is a block that was made before, from the same seed and past: it is taken as the result. What later
        blocks depend on, K, V and the state of the generator, becomes what it was then, at the cost of one forward.
        """
        started = time.perf_counter()
        adapter, model, table = self.model.adapter, self.model, self.table
        if adapter.rollout and self._next_frame >= adapter.rollout:
            self._new_rollout(condition)
            table = self.table
        try:
            if self.owed and not (adapter.fused and table.can_fuse):
                self._clean_pass()
            first = self._next_frame == 0
            schedule = adapter.schedule(first)
            block = table.open_block(adapter.frames(first))
            noisy: Pass | None = None
            x = self._noise(block)
            for i, (level, t) in enumerate(schedule):
                if self.owed:
                    predicted = self._fused_first_step(block, x, t, condition)
                elif known is None:
                    noisy = noisy or table.plan([block], self._rope(block))  # one plan for all layers and steps
                    predicted = model.predict([x], [t], [condition], noisy.attend)
                if known is not None:
                    clean = known
                else:
                    clean = predicted if adapter.prediction == "x0" else x - level * predicted
                x = self._noised(clean, schedule[i + 1][0], block) if i + 1 < len(schedule) else clean
        except BaseException:
            table.abandon(keep=self.owed.block if self.owed else None)
            raise
        self._made(Clean(block, x, condition))
        self.seconds.append(time.perf_counter() - started)
        return x

    @torch.inference_mode()
    def observe(self, latents: Tensor, condition: Any) -> None:
        """Take a given clean block [frames, *latent_shape] as the next block of the world."""
        self.settle()
        self._made(Clean(self.table.open_block(len(latents)), latents, condition))
        self._clean_pass()

    @torch.inference_mode()
    def settle(self) -> None:
        """Do the clean pass owed, if there is one: all that was made is the past then, and nothing else."""
        if self.owed:
            self._clean_pass()

    def fork(self) -> Decoder:
        """Another world's loop with the same past; the clean pass owed is owed by both."""
        other = copy.copy(self)
        other.table, other.generator = self.table.fork(), torch.Generator(self.generator.device)
        other.generator.set_state(self.generator.get_state())
        other.recent, other.seconds = list(self.recent), []
        if self.owed:
            other.owed = dataclasses.replace(self.owed, block=other.table.open_block(len(self.owed.block.frames)))
        return other

    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames, whole blocks. See PageTable.rewind for how far back one can go."""
        owed, table, end = self.owed, self.table, self._next_frame - frames
        if owed and frames:
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
        elif not owed:
            table.rewind(frames)
        self.frames -= frames
        self.recent = [clean for clean in self.recent if clean.block.end <= end]

    @torch.inference_mode()
    def recache(self, condition: Any) -> None:
        """Compute K and V of what the window holds again, as if it had been made under this condition.

        Oldest block first, each seeing what the policy lets it see; the sink keeps what it has. The last block's clean
        pass stays owed.
        """
        table, policy, end = self.table, self.table.policy, self._next_frame
        depth = end if policy.window is None else policy.window + policy.sink  # `recent` may go back further, to rewind
        blocks = [clean for clean in self.recent if clean.block.first >= policy.sink and clean.block.end > end - depth]
        if not blocks:
            return
        table.abandon()
        table.truncate(blocks[0].block.first)
        self.owed, self.recent = None, []
        self.frames -= sum(len(clean.latents) for clean in blocks)
        for clean in blocks:
            if self.owed:
                self._clean_pass()
            self._made(Clean(table.open_block(len(clean.latents)), clean.latents, condition))

    def _new_rollout(self, condition: Any) -> None:
        """Begin again at frame 0, with the last frames as the past."""
        overlap = self.model.adapter.overlap
        given = self.restart(torch.cat([clean.latents for clean in self.recent])[-overlap:])
        self.table.release()
        self.table, self.owed, self.recent = self.table.store.open(self.table.policy), None, []
        self.observe(given, condition)
        self.frames -= overlap

    def _made(self, clean: Clean) -> None:
        policy, adapter = self.table.policy, self.model.adapter
        self.owed, self.frames = clean, self.frames + len(clean.latents)
        depth = max(adapter.overlap, (policy.window or clean.block.end) + policy.sink) + policy.undo
        self.recent = [old for old in self.recent if old.block.end > clean.block.end - depth] + [clean]

    def _fused_first_step(self, block: Block, x: Tensor, t: float, condition: Any) -> Tensor:
        """One forward over the owed block, clean, and the new one, noisy, which reads what the former commits."""
        owed, table = self.owed, self.table
        assert owed is not None
        both = table.plan([owed.block, block], self._rope(owed.block, block), commit=owed.block)
        times, conditions = [self.model.adapter.context_time, t], [owed.condition, condition]
        predicted = self.model.predict([owed.latents, x], times, conditions, both.attend)
        table.seal(owed.block)
        self.owed = None
        return predicted

    def _clean_pass(self) -> None:
        """The separate clean pass: only K and V of the owed block are wanted, and the model stops after the last."""
        owed = self.owed
        assert owed is not None
        clean = self.table.plan([owed.block], self._rope(owed.block), commit=owed.block, predict=False)
        self.model.predict([owed.latents], [self.model.adapter.context_time], [owed.condition], clean.attend)
        self.table.seal(owed.block)
        self.owed = None

    @property
    def _next_frame(self) -> int:
        """Index of the next frame in this rollout."""
        return self.owed.block.end if self.owed else self.table.next_frame

    def _noised(self, clean: Tensor, level: float, block: Block) -> Tensor:
        return (1 - level) * clean + level * self._noise(block)

    def _noise(self, block: Block) -> Tensor:
        """Drawn on the generator's device, so that a seed means the same wherever the model runs."""
        shape = (len(block.frames), *self.model.latent_shape)
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.table.store.device)

    def _rope(self, *blocks: Block) -> Tensor:
        return self.model.rope([frame for block in blocks for frame in block.frames])
