"""One sequence of keys and values: a page table, the block being denoised, and the block whose clean pass is pending.

A world is one branch. A guided world is two: the same blocks under the prompt and under the negative prompt, each with
a past of its own. Scratch belongs to the store and is one layer deep, so that a second branch costs what it commits and
nothing else; with no past to see, nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from inferix_kernels import PageTable, Pass, PassBuffers, profile
from inferix_kernels.store import Block

from .contract import BlockInput, Model
from .graphs import Graphs, Recorder
from .timesteps import Timesteps


@dataclasses.dataclass
class CleanBlock:
    """A finished block, and what it was made under."""

    block: Block
    latents: Tensor
    conditioning: Any


class Branch:
    """Denoises blocks over one page table.

    The clean pass of a block, which turns its K and V into the past, is pending until the next block begins: then it
    shares that block's first forward (fused) or runs just before it (separate). The results are the same, bit for bit
    as far as a library's matrix product does not depend on how many rows it is given.

    Args:
        conditioning: of every block of this branch; None: what the world gives, block by block.
        recorder: captures and replays its forwards; None: each is launched from Python.

    Attributes:
        shots: the frames that shots after the first one begin with; see contract.Shots.
    """

    def __init__(self, model: Model, table: PageTable, conditioning: Any = None, recorder: Recorder | None = None):
        self.model, self.table, self.conditioning = model, table, conditioning
        self.pending: CleanBlock | None = None
        self.shots: tuple[int, ...] = ()
        self._block: Block | None = None
        self._noisy: Pass | None = None
        self._times, self._recorder = Timesteps(model), recorder
        self._own_memory()

    def _own_memory(self) -> None:
        """Passes of two branches run in turn: each has its own memory, and graphs that hold its addresses."""
        self._buffers = PassBuffers(padded=self._recorder is not None)
        self._graphs = None if self._recorder is None else Graphs(self.model, self._recorder)

    @property
    def next_frame(self) -> int:
        """Index of the frame after the last one made."""
        return self.pending.block.end if self.pending else self.table.next_frame

    def open(self, frames: int, shot: bool = False) -> None:
        """Begin the next block, and another shot with it if it is to be one."""
        if self._graphs is not None:
            self._graphs.begin_block()
        # What a shot's first block pins is seen, and makes others unseen, from the next block's first forward on.
        alone = self.pending is not None and self.pending.block.first in self.shots[-1:]
        if alone or not (self.model.adapter.fused and self.table.can_fuse):
            self.commit_pending()
        self._block, self._noisy = self.table.open_block(frames), None
        if shot and self._block.first:
            self.shots += (self._block.first,)

    def predict(self, x: Tensor, t: float, conditioning: Any, given: int = 0) -> Tensor:
        """The network's prediction for the open block at x, whose first `given` frames are clean; its first forward may
        commit what is pending."""
        assert self._block is not None
        noisy = BlockInput(x, self._told(t, len(x), given), self._own(conditioning))
        if self.pending:  # one forward over the clean block and the noisy one, which reads what the former commits
            clean = self.pending.block
            both = self._plan(clean, self._block, commit=clean)
            predicted = self._forward([self._clean_input(self.pending), noisy], both)
            self._seal()
            return predicted[-1]
        if self._noisy is None:  # one plan for all layers and steps
            self._noisy = self._plan(self._block)
        return self._forward([noisy], self._noisy)[-1]

    def close(self, latents: Tensor, conditioning: Any) -> CleanBlock:
        """The open block is done; its clean pass is pending."""
        assert self._block is not None
        self.pending = CleanBlock(self._block, latents, self._own(conditioning))
        self._block = self._noisy = None
        return self.pending

    def take(self, latents: Tensor, conditioning: Any, shot: bool = False) -> CleanBlock:
        """A given clean block as the next one."""
        self.commit_pending()
        self.open(len(latents), shot)
        return self.close(latents, conditioning)

    def commit_pending(self) -> None:
        """The separate clean pass, if one is pending: only K and V are wanted; the model stops after the last."""
        if pending := self.pending:
            block = pending.block
            with profile.timed("clean pass"):
                self._forward([self._clean_input(pending)], self._plan(block, commit=block, predict=False))
                self._seal()

    def abandon(self) -> None:
        """Forget the open block; what is pending stays pending."""
        self._forget_shots(self.next_frame)
        self._block = self._noisy = None
        self.table.abandon(keep=self.pending.block if self.pending else None)

    def beside(self, table: PageTable) -> Branch:
        """A branch over this empty table, in this one's memory: for blocks between two blocks of this one."""
        other = copy.copy(self)
        other.table, other.pending, other.shots = table, None, ()
        return other

    def fork(self) -> Branch:
        """Another branch with the same past; a clean pass that is pending is pending in both."""
        other = copy.copy(self)
        other.table = self.table.fork()
        other._own_memory()
        if self.pending:
            frames = len(self.pending.block.frames)
            other.pending = dataclasses.replace(self.pending, block=other.table.open_block(frames))
        return other

    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames, whole blocks."""
        pending, table = self.pending, self.table
        if pending is None:
            table.rewind(frames)
        elif frames:
            size = len(pending.block.frames)
            if frames < size:
                raise ValueError(f"frames must be whole blocks, the last one of {size}, got {frames}")
            table.abandon()
            try:
                table.rewind(frames - size)
            except BaseException:
                self.pending = dataclasses.replace(pending, block=table.open_block(size))
                raise
            self.pending = None
        self._forget_shots(self.next_frame)

    def retake(self, begin: int, blocks: Sequence[Tensor], conditioning: Any) -> None:
        """Take the frames from `begin` on again, as blocks of these latents, under another conditioning, with the sink
        and pinned frames alone before them.

        Raises:
            OutOfPages: a fork holds what would have to go, or scratch does not hold one of the blocks; nothing has
                changed.
        """
        table = self.table
        stay = {frame for frame in table.held if frame < begin and (frame < table.policy.sink or frame in table.pinned)}
        spans = [Block(first, end) for first, end in pairwise(accumulate(map(len, blocks), initial=begin))]
        table.check_room(spans, [frame for frame in table.held if frame not in stay])
        self.pending = None
        table.abandon()
        table.truncate(begin)
        table.forget([frame for frame in table.held if frame not in stay])
        for latents in blocks:
            self.take(latents, conditioning)
        self.commit_pending()

    def restart(self) -> None:
        """Begin again at frame 0, without a past."""
        self.pending, self.shots = None, ()
        self.table.abandon()
        self.table.truncate(0)

    def go_on_from(self, table: PageTable, shots: Sequence[int] = ()) -> None:
        """Have this past in the place of what was there."""
        self.table.release()
        self.pending, self.table, self.shots = None, table, tuple(shots)

    def without_graphs(self) -> None:
        """Launch every forward from Python from here on."""
        self._graphs = self._recorder = None

    def _plan(self, *blocks: Block, **options: Any) -> Pass:
        if self._graphs is not None:  # planning writes to memory that a forward on another stream may still read
            self._graphs.follow_stream()
        rope = self.model.rope([self._time(frame) for block in blocks for frame in block.frames])
        if self.model.attention is not None:  # this process is one of several
            options["attention"] = self.model.attention
        return self.table.plan(blocks, rope, buffers=self._buffers, **options)

    def _forward(self, inputs: Sequence[BlockInput], planned: Pass) -> Sequence[Tensor]:
        if self._graphs is None:
            return self.model.predict(inputs, planned.attend)
        return self._graphs.predict(inputs, planned)

    def _seal(self) -> None:
        assert self.pending is not None
        block = self.pending.block
        self.table.seal(block)
        self.pending = None
        if block.first in self.shots[-1:]:
            sink = self.table.policy.sink
            self.table.unpin(frame for shot in self.shots for frame in range(shot, shot + sink))
            self.table.pin(block.frames[:sink])

    def _told(self, t: float, frames: int, given: int) -> Tensor:
        """The timestep of a block or, where frames at its front are given, of each frame."""
        if not given:
            return self._times(t)
        clean = self._times(self.model.adapter.context_time)
        return torch.cat([clean.expand(given), self._times(t).expand(frames - given)])

    def _time(self, frame: int) -> int:
        """Where a frame stands in rotary time."""
        shots = self.model.adapter.shots
        return frame + shots.offset * bisect_right(self.shots, frame) if shots else frame

    def _forget_shots(self, end: int) -> None:
        self.shots = self.shots[: bisect_left(self.shots, end)]

    def _clean_input(self, clean: CleanBlock) -> BlockInput:
        t = self._times(self.model.adapter.context_time)
        return BlockInput(clean.latents, t, clean.conditioning, predict=False)

    def _own(self, conditioning: Any) -> Any:
        return conditioning if self.conditioning is None else self.conditioning
