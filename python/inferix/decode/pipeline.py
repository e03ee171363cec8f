"""The decode loop with several blocks in flight, each a stage ahead of the next.

    stage 0    1    2    3    4    5
      b0 ▁    ▃    ▅    ▇    █ commit             ▁ noisy … ▇ nearly clean, █ clean
           b1 ▁    ▃    ▅    ▇    █ commit
                b2 ▁    ▃    ▅    ▇   …

A forward is a list of *segments*: a block, its conditioning, how far back it sees. All that is special about a model
says itself in segments, and so lies in its `Schedule`:

- a clean pass is a segment of weight 0 whose keys and values stay;
- guidance is one block in several forwards, under several conditionings, with weights that sum to 1;
- a nearly clean block whose prediction without a past is wanted too is in one forward twice;
- blocks that see later ones say how many of them: rolling.py.

With one block in flight this is the loop of sequential.py, bit for bit; that one also rewinds and starts over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inferix_kernels import PageTable, Pass, PassBuffers, profile
from inferix_kernels.store import Block

from .contract import BlockInput, Forward, Model, Segment
from .decoder import Decoder
from .timesteps import Timesteps
from .traffic import Traffic


@dataclasses.dataclass
class InFlight:
    """A block in flight, or the clean one whose K and V are still to be committed.

    Attributes:
        x: [frames, *latent_shape], as it is now.
        variants: its conditionings by name; see Model.variants.
        given: its first frames, if they were given and not made.
        steps: denoising steps it has made.
    """

    block: Block
    x: Tensor
    variants: Mapping[str, Any]
    given: Tensor
    steps: int = 0


class _Before(NamedTuple):
    """What a step replaces: for `repeat`."""

    flight: list[InFlight]
    begun: int
    given: Tensor | None


class PipelineDecoder(Decoder):
    """One world's loop, several blocks in flight: a step begins a block and moves all by one stage.

    Args:
        model: with a schedule.
        table: empty, of a store with `scratch_blocks` for all stages, the clean block and a copy.
        generator: of all noise.
        total: blocks the world is to have; after them none is begun. None: no end.

    Attributes:
        flight: the blocks in flight, oldest first.
        pending: the block that is clean and not committed yet.
        begun: blocks begun or observed.
        given: frames of the next block that were observed.
    """

    def __init__(self, model: Model, table: PageTable, generator: torch.Generator, total: int | None = None):
        super().__init__(model, generator)
        assert model.schedule is not None
        self.schedule, self.total, self._table = model.schedule, total, table
        self.flight: list[InFlight] = []
        self.pending: InFlight | None = None
        self.begun = 0
        self.given: Tensor | None = None
        self.traffic = Traffic()
        self._times, self._buffers = Timesteps(model), PassBuffers()
        self._before: _Before | None = None

    @property
    def tables(self) -> list[PageTable]:
        return [self._table]

    @property
    def ahead(self) -> int:
        return sum(len(flying.block.frames) for flying in self.flight)

    @property
    def begins(self) -> bool:
        """The next step begins a block."""
        return self.total is None or self.begun < self.total

    @property
    def at_work(self) -> int:
        return self.ahead + self.begins * self.model.adapter.block_frames

    def kv_read(self) -> dict[str, int]:
        return self.traffic.bytes_per_step(self.table)

    def _step(self, conditioning: Any) -> Tensor:
        with self._stage(conditioning) as flight:
            for i in range(self.schedule.stage_steps):
                with profile.span("step", step=i):
                    velocities = self._velocities(flight)
                for flying in flight:
                    self._advance(flying, velocities[flying.block.first])
            return torch.cat([flying.x for flying in flight])

    def _replay(self, conditioning: Any, latents: Tensor) -> Tensor:
        with self._stage(conditioning) as flight:
            for _ in range(self.schedule.stage_steps):
                if self.pending:
                    self._velocities(flight)  # what commits the pending block
                for flying in flight:
                    self._advance(flying, flying.x)  # for the noise that the schedule draws
            for flying, x in zip(flight, latents.split([len(flying.block.frames) for flying in flight])):
                flying.x = x
            return latents

    @contextmanager
    def _stage(self, conditioning: Any) -> Iterator[list[InFlight]]:
        """The blocks in flight, a new one among them, while they are moved by one stage. If anything fails, they are
        where they were.

        Raises:
            RuntimeError: all `total` blocks are done.
        """
        begins = self.begins
        if not begins and not self.flight:
            raise RuntimeError(f"step: the world was to have {self.total} blocks, and has them")
        self._before = _Before(self.flight, self.begun, self.given)
        try:
            if self.pending and not self.table.can_fuse:
                self._clean_pass()  # for the mean keys, which it freezes; what it commits is committed again
            flight = [dataclasses.replace(flying) for flying in self.flight]
            if begins:
                flight.append(self._begin(conditioning))
            yield flight
        except BaseException:
            self.table.abandon(keep=[flying.block for flying in self._at_work()])
            raise
        if begins:
            self.begun, self.given = self.begun + 1, None
        self.flight, self.finished = flight, 0
        if flight[0].steps == self.schedule.stages * self.schedule.stage_steps:
            self.pending, *self.flight = flight
            self.finished = len(self.pending.block.frames)
        self.frames += self.finished

    def _take_back_step(self) -> None:
        assert self._before is not None
        self.flight, self.begun, self.given = self._before
        self.pending = None
        self.table.abandon(keep=[flying.block for flying in self.flight])

    def split_observed(self, frames: int) -> list[int]:
        """Whole blocks, which become the past at once, and what is left over: the first frames of the next block, which
        is made around them, if the schedule has such blocks."""
        if self.flight or self.given is not None:
            raise RuntimeError("observe: frames can be given before the first block is begun, not after")
        size = self.model.adapter.block_frames
        if frames % size and not self.schedule.partly_given:
            raise ValueError(f"frames must make whole blocks of {size} latents, got {frames}")
        sizes = [size] * (frames // size) + ([frames % size] if frames % size else [])
        if self.total is not None and self.begun + len(sizes) > self.total:
            raise ValueError(f"frames: {frames} latent frames are more than the {self.total} blocks of the world")
        return sizes

    def _observe_block(self, latents: Tensor, conditioning: Any) -> None:
        size = self.model.adapter.block_frames
        if len(latents) < size:
            self.given = latents
            return
        variants = self.model.variants(conditioning, self._remaining())
        self.pending = InFlight(self.table.open_block(size), latents, variants, latents[:0])
        self.commit_pending()
        self.begun += 1
        self.frames += size

    @torch.inference_mode()
    def commit_pending(self) -> None:
        if self.pending:
            self._clean_pass()
            self.table.seal(self.pending.block)
            self.pending = None

    def warm_up(self, conditioning: Any) -> None:
        """Nothing: a forward of each kind is met only when a pipeline fills, a stage at a time."""

    def _without_graphs(self) -> None:
        """There are none: forwards differ from stage to stage."""

    def _at_work(self) -> list[InFlight]:
        return [*([self.pending] if self.pending else []), *self.flight]

    def _fork_past(self) -> None:
        self._table, self._buffers = self._table.fork(), PassBuffers()
        table = self._table
        moved = [
            dataclasses.replace(flying, block=table.open_block(len(flying.block.frames))) for flying in self._at_work()
        ]
        self.pending = moved.pop(0) if self.pending else None
        self.flight, self.traffic = moved, dataclasses.replace(self.traffic)

    def _begin(self, conditioning: Any) -> InFlight:
        size = self.model.adapter.block_frames
        variants, noise = self.model.variants(conditioning, self._remaining()), self._noise(size)
        given = noise[:0] if self.given is None else self.given.to(noise)
        return InFlight(self.table.open_block(size), torch.cat([given, noise[len(given) :]]), variants, given)

    def _advance(self, flying: InFlight, predicted: Tensor) -> None:
        moved = self.schedule.advance(flying.steps, flying.x, predicted, self._noise)
        flying.x = torch.cat([flying.given, moved[len(flying.given) :]])
        flying.steps += 1

    def _remaining(self) -> int | None:
        return None if self.total is None else self.total - self.begun - 1

    def _velocities(self, flight: Sequence[InFlight]) -> dict[int, Tensor]:
        """First frame of each block in flight -> the weighted sum of what its segments predicted."""
        size = self.model.adapter.block_frames
        clean = None if self.pending is None else self.pending.block.first // size
        sums: dict[int, Tensor] = {}
        steps = [(flying.block.first // size, flying.steps) for flying in flight]
        forwards = self.schedule.forwards(steps, clean)
        self.traffic.steps += 1
        self.traffic.history += sum(not forward.apart for forward in forwards) * self.table.next_frame
        for full in forwards:
            forward = full.needed()
            if forward is None:
                continue
            predicted, blocks = self._forward(forward, flight)
            if forward.commit:
                self.table.seal(blocks[0], self._horizon(forward, blocks))
                self.pending = None
            for segment, velocity in zip(forward.segments, predicted):
                if segment.weight:
                    first = segment.block * size
                    sums[first] = sums.get(first, 0) + segment.weight * velocity
        return sums

    def _clean_pass(self) -> None:
        assert self.pending is not None
        block = self.pending.block.first // self.model.adapter.block_frames
        with profile.timed("clean pass"):
            self._forward(self.schedule.clean_pass(block), [])

    def _forward(self, forward: Forward, flight: Sequence[InFlight]) -> tuple[Sequence[Tensor], list[Block]]:
        """One forward of the network: a prediction per segment, and the segments' blocks."""
        size, table = self.model.adapter.block_frames, self.table
        by_index = {part.block.first // size: part for part in [*([self.pending] if self.pending else []), *flight]}
        parts = [by_index[segment.block] for segment in forward.segments]
        blocks = [
            table.open_block(size) if segment.copy else part.block for segment, part in zip(forward.segments, parts)
        ]
        try:
            attend = self._plan(forward, blocks).attend
            inputs = [
                BlockInput(part.x, self._times(segment.t), part.variants[segment.conditioning], segment.weight != 0)
                for segment, part in zip(forward.segments, parts)
            ]
            predicted = self.model.predict(inputs, attend, forward.stride)
        finally:
            for segment, block in zip(forward.segments, blocks):
                if segment.copy:
                    table.drop(block)
        return predicted, blocks

    def _horizon(self, forward: Forward, blocks: Sequence[Block]) -> int | None:
        """Where the window must be counted from to reach the first frame that a block in flight sees, now or, if it is
        the next to be committed, in its clean pass.

        The cleaner a block, the less it sees, and the next one to begin sees less than this forward's newest.
        """
        window = self.table.policy.window
        noisy = [(block, s.lookback) for block, s in zip(blocks[1:], forward.segments[1:]) if not s.copy]
        if window is None or not noisy:
            return None
        following = noisy[0][0]
        clean = self.schedule.clean_pass(following.first // len(following.frames)).segments[0]
        noisy.append((following, clean.lookback))
        return window + min(block.end - min(lookback * len(block.frames), window) for block, lookback in noisy)

    def _plan(self, forward: Forward, blocks: Sequence[Block]) -> Pass:
        table = self.table
        here = [frame for block, segment in zip(blocks, forward.segments) if not segment.copy for frame in block.frames]
        alone = [forward.apart or segment.copy for segment in forward.segments]
        see = [
            [] if apart else self._sees(block, segment, here)
            for block, segment, apart in zip(blocks, forward.segments, alone)
        ]
        coming = blocks[0].frames if forward.commit else ()
        self.traffic.read += len(set().union(*see) & {*table.held, *coming})
        positions = [range(len(block.frames)) if forward.apart else block.frames for block in blocks]
        rope = self.model.rope([frame for frames in positions for frame in frames])
        commit = blocks[0] if forward.commit else None
        predict = any(segment.weight for segment in forward.segments)
        options = {} if self.model.attention is None else {"attention": self.model.attention}
        return table.plan(blocks, rope, commit, predict, see=see, buffers=self._buffers, **options)

    def _sees(self, block: Block, segment: Segment, here: Sequence[int]) -> list[int]:
        """Frames other than its own that a block attends to, held ones and those of the same forward."""
        policy, held, size = self.table.policy, self.table.held, len(block.frames)
        near, far = block.end - segment.lookback * size, block.end + segment.lookahead * size
        always = {frame for frame in held if segment.sink and frame < policy.sink} | self.table.pinned
        before = [f for f in held if f in always or (f >= near and policy.sees(f, block.end))]
        beside = [f for f in here if near <= f < far and f not in block.frames and policy.sees(f, block.end)]
        return sorted({*before, *beside})
