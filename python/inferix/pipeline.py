"""The decode loop with several blocks in flight, each a stage ahead of the next.

    stage 0    1    2    3    4    5
      b0 ▁    ▃    ▅    ▇    █ commit             ▁ noisy … ▇ nearly clean, █ clean
           b1 ▁    ▃    ▅    ▇    █ commit
                b2 ▁    ▃    ▅    ▇   …

A forward is a list of *segments*: a block, what the network is told of it, how far back it sees. All that is special
about a model says itself in segments, and so lies in its `Schedule`:

- a clean pass is a segment of weight 0 whose keys and values stay;
- guidance is one block in several forwards, told different things, with weights that sum to 1;
- a nearly clean block that is also asked what it would do without a past is in one forward twice.

With one block in flight this is the loop of `inferix.loop`, bit for bit; that one also rewinds and starts over.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from inferix_kernels import PageTable
from inferix_kernels.store import Block, Pass

from .models import Adapter, PagedAttend
from .traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Segment:
    """One block in one forward.

    Attributes:
        block: its index in the world.
        step: how many denoising steps it has made; all of them: it is clean.
        t: what the network is told of its noise.
        reach: blocks it attends to, its own included: committed ones, and those of this forward.
        told: which part of its condition it is told.
        weight: of its prediction in what moves the block.
        copy: a second segment of a block of this forward, behind the others and out of their sight.
    """

    block: int
    step: int
    t: float
    reach: int
    told: str
    weight: float = 1.0
    copy: bool = False


@dataclasses.dataclass(frozen=True)
class Forward:
    """Segments that share one forward, oldest block first.

    Attributes:
        commit: the first segment's keys and values become the past.
        apart: each segment is alone in the world: at frame 0, and attending to itself.
        stride: what else a network is told that was distilled to steps of several sizes.
    """

    segments: tuple[Segment, ...]
    commit: bool = False
    apart: bool = False
    stride: float | None = None

    def needed(self) -> Forward | None:
        """The same without what no one waits for; None if that is all of it."""
        if self.apart:
            kept = tuple(segment for segment in self.segments if segment.weight)
            return dataclasses.replace(self, segments=kept) if kept else None
        return self if self.commit or any(segment.weight for segment in self.segments) else None


class Schedule(Protocol):
    """How the blocks in flight are denoised.

    Attributes:
        stages: blocks in flight at most; stage_steps: denoising steps until the next block may begin.
    """

    stages: int
    stage_steps: int

    def forwards(self, flight: Sequence[tuple[int, int]], clean: int | None) -> Sequence[Forward]:
        """The forwards of one step, of which one commits `clean` if there is a clean block to commit.

        Args:
            flight: (block, steps it has made) of the blocks in flight, oldest first.
        """

    def clean_pass(self, block: int) -> Forward:
        """The clean pass of a block by itself."""

    def advance(self, step: int, x: Tensor, predicted: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        """A block after its step number `step`. `noise` draws so many frames."""


class PipelinedModel(Protocol):
    """A network that denoises several blocks at once. See `models.BlockModel` for what is not said here."""

    adapter: Adapter
    latent_shape: tuple[int, ...]
    schedule: Schedule

    def rope(self, frames: Sequence[int]) -> Tensor: ...

    def tell(self, condition: Any, remaining: int | None) -> Mapping[str, Any]:
        """What a block's segments can be told, by name. `remaining`: blocks to come after it; None: without end."""

    def predict_segments(
        self, forward: Forward, blocks: Sequence[Tensor], told: Sequence[Any], attend: PagedAttend
    ) -> list[Tensor]:
        """A prediction per segment ([frames, *latent_shape] each); none if `attend` ended the pass."""


@dataclasses.dataclass
class InFlight:
    """A block in flight, or the clean one whose K and V are still to be committed."""

    block: Block
    x: Tensor
    told: Mapping[str, Any]
    given: Tensor  # its first frames, if they were given and not made
    steps: int = 0


class Pipeline:
    """One world's loop. `step` begins a block and moves all that are in flight by one stage.

    Args:
        table: empty, of a store with `scratch_blocks` for all stages, the clean block and a copy.
        generator: of all noise.
        total: blocks the world is to have; after them none is begun. None: no end.
    """

    def __init__(self, model: PipelinedModel, table: PageTable, generator: torch.Generator, total: int | None = None):
        self.model, self.table, self.generator, self.total = model, table, generator, total
        self.flight: list[InFlight] = []
        self.owed: InFlight | None = None
        self.begun = 0  # blocks begun or given
        self.given: Tensor | None = None  # frames of the next block that were given
        self.finished = 0  # frames at the front of what `step` returned that are done
        self.frames = 0  # latent frames made or given
        self.seconds = 0.0  # that the last step took
        self.traffic = Traffic()
        self._before: tuple[list[InFlight], int, Tensor | None, Tensor] | None = None  # of the last step: for `repeat`
        self.restart: Callable[[Tensor], Tensor] = lambda latents: latents
        self.busy = threading.RLock()  # see turns.py

    @property
    def ahead(self) -> int:
        """Latent frames begun and not done."""
        return sum(len(flying.block.frames) for flying in self.flight)

    def kv_read(self) -> dict[str, int]:
        """See World.kv_read."""
        return self.traffic.bytes_per_step(self.table)

    @torch.inference_mode()
    def step(self, condition: Any, known: Tensor | None = None) -> Tensor:
        """Begin the next block, told `condition`, and move every block in flight by one stage.

        Args:
            known: what this call returned in an earlier run from the same seed; it is then taken as the result, at the
                cost of the forward that commits the last clean block.

        Returns:
            [frames, *latent_shape] of all blocks that were in flight, oldest first. The first `finished` frames are
            done, none as long as the pipeline fills.

        Raises:
            RuntimeError: all `total` blocks are done.
        """
        started = time.perf_counter()
        begins = self.total is None or self.begun < self.total
        if not begins and not self.flight:
            raise RuntimeError(f"step: the world was to have {self.total} blocks, and has them")
        kept = [flying.block for flying in self.flight]
        self._before = self.flight, self.begun, self.given, self.generator.get_state()
        try:
            if self.owed and not self.table.can_fuse:
                self._clean_pass()  # for the mean keys, which it freezes; what it commits is committed again
            flight = [dataclasses.replace(flying) for flying in self.flight]
            if begins:
                flight.append(self._begin(condition))
            state = self._stage(flight, known)
        except BaseException:
            self.table.abandon(keep=[*([self.owed.block] if self.owed else []), *kept])
            raise
        if begins:
            self.begun, self.given = self.begun + 1, None
        self.flight, self.finished = flight, 0
        if flight[0].steps == self.model.schedule.stages * self.model.schedule.stage_steps:
            self.owed, *self.flight = flight
            self.finished = len(self.owed.block.frames)
        self.frames += self.finished
        self.seconds = time.perf_counter() - started
        return state

    def repeat(self, condition: Any) -> None:
        """Run the last `step` again, with the same noise: for a closer look at it, if the world is not to go on. What
        it committed stays committed."""
        assert self._before is not None
        self.flight, self.begun, self.given, noise = self._before
        self.owed = None
        self.table.abandon(keep=[flying.block for flying in self.flight])
        self.generator.set_state(noise)
        self.step(condition)

    @torch.inference_mode()
    def observe(self, latents: Tensor, condition: Any) -> None:
        """Take given clean frames [frames, *latent_shape] as the world's beginning.

        Whole blocks become the past at once. What is left over are the first frames of the next block, which is made
        around them.
        """
        if self.flight or self.given is not None:
            raise RuntimeError("observe: frames can be given before the first block is begun, not after")
        size = self.model.adapter.block_frames
        whole = len(latents) - len(latents) % size
        if self.total is not None and self.begun + -(-len(latents) // size) > self.total:
            raise ValueError(f"frames: {len(latents)} latent frames are more than the {self.total} blocks of the world")
        for first in range(0, whole, size):
            block = latents[first : first + size]
            told = self.model.tell(condition, self._remaining())
            self.owed = InFlight(self.table.open_block(size), block, told, block[:0])
            self.settle()
            self.begun += 1
            self.frames += size
        self.given = latents[whole:] if whole < len(latents) else None

    @torch.inference_mode()
    def settle(self) -> None:
        """Run the clean pass that is owed, if one is, so that the last block's K and V can be read."""
        if self.owed:
            self._clean_pass()
            self.table.seal(self.owed.block)
            self.owed = None

    def fork(self) -> Pipeline:
        """Another world's loop with the same past and the same blocks in flight."""
        other = copy.copy(self)
        other.busy = threading.RLock()
        other.table, other.generator = self.table.fork(), torch.Generator(self.generator.device)
        other.generator.set_state(self.generator.get_state())
        moved = [
            dataclasses.replace(flying, block=other.table.open_block(len(flying.block.frames)))
            for flying in [*([self.owed] if self.owed else []), *self.flight]
        ]
        other.owed = moved.pop(0) if self.owed else None
        other.flight, other.traffic = moved, dataclasses.replace(self.traffic)
        return other

    def rewind(self, frames: int) -> None:
        raise RuntimeError(
            "rewind: the blocks in flight rest on the last ones made, which can't be unmade: keep a fork"
        )

    def release(self) -> None:
        """Give all pages back to the store."""
        self.table.release()

    def _begin(self, condition: Any) -> InFlight:
        size = self.model.adapter.block_frames
        told, noise = self.model.tell(condition, self._remaining()), self._noise(size)
        given = noise[:0] if self.given is None else self.given.to(noise)
        return InFlight(self.table.open_block(size), torch.cat([given, noise[len(given) :]]), told, given)

    def _stage(self, flight: Sequence[InFlight], known: Tensor | None) -> Tensor:
        """Move these blocks by one stage; what `step` returns."""
        schedule = self.model.schedule
        for _ in range(schedule.stage_steps):
            if known is None or self.owed:
                velocities = self._velocities(flight)
            for flying in flight:
                # Of what is known, nothing but the noise that was drawn then matters.
                predicted = flying.x if known is not None else velocities[flying.block.first]
                moved = schedule.advance(flying.steps, flying.x, predicted, self._noise)
                flying.x = torch.cat([flying.given, moved[len(flying.given) :]])
                flying.steps += 1
        if known is None:
            return torch.cat([flying.x for flying in flight])
        for flying, x in zip(flight, known.split([len(flying.block.frames) for flying in flight])):
            flying.x = x
        return known

    def _remaining(self) -> int | None:
        return None if self.total is None else self.total - self.begun - 1

    def _velocities(self, flight: Sequence[InFlight]) -> dict[int, Tensor]:
        """First frame of each block in flight -> the weighted sum of what its segments predicted."""
        size = self.model.adapter.block_frames
        clean = None if self.owed is None else self.owed.block.first // size
        sums: dict[int, Tensor] = {}
        steps = [(flying.block.first // size, flying.steps) for flying in flight]
        forwards = self.model.schedule.forwards(steps, clean)
        self.traffic.steps += 1
        self.traffic.history += sum(not forward.apart for forward in forwards) * self.table.next_frame
        for full in forwards:
            forward = full.needed()
            if forward is None:
                continue
            predicted, blocks = self._forward(forward, flight)
            if forward.commit:
                self.table.seal(blocks[0], self._horizon(forward, blocks))
                self.owed = None
            for segment, velocity in zip(forward.segments, predicted):
                if segment.weight:
                    first = segment.block * size
                    sums[first] = sums.get(first, 0) + segment.weight * velocity
        return sums

    def _clean_pass(self) -> None:
        assert self.owed is not None
        block = self.owed.block.first // self.model.adapter.block_frames
        self._forward(self.model.schedule.clean_pass(block), [])

    def _forward(self, forward: Forward, flight: Sequence[InFlight]) -> tuple[list[Tensor], list[Block]]:
        """One forward of the network: a prediction per segment, and the segments' blocks."""
        size, table, owed = self.model.adapter.block_frames, self.table, self.owed
        flying = {f.block.first // size: f for f in [*([owed] if owed else []), *flight]}
        parts = [flying[segment.block] for segment in forward.segments]
        blocks = [
            table.open_block(size) if segment.copy else part.block for segment, part in zip(forward.segments, parts)
        ]
        try:
            passed = self._plan(forward, blocks)
            told = [part.told[segment.told] for segment, part in zip(forward.segments, parts)]
            predicted = self.model.predict_segments(forward, [part.x for part in parts], told, passed.attend)
        finally:
            for segment, block in zip(forward.segments, blocks):
                if segment.copy:
                    table.drop(block)
        return predicted, blocks

    def _horizon(self, forward: Forward, blocks: Sequence[Block]) -> int | None:
        """Where the window must be counted from to reach the first frame that a block in flight sees.

        The cleaner a block, the less it sees, and the next one to begin sees less than this forward's newest.
        """
        window = self.table.policy.window
        noisy = [(block, s.reach) for block, s in zip(blocks[1:], forward.segments[1:]) if not s.copy]
        if window is None or not noisy:
            return None
        return window + min(block.end - min(reach * len(block.frames), window) for block, reach in noisy)

    def _plan(self, forward: Forward, blocks: Sequence[Block]) -> Pass:
        table = self.table
        here = [frame for block, segment in zip(blocks, forward.segments) if not segment.copy for frame in block.frames]
        alone = [forward.apart or segment.copy for segment in forward.segments]
        see = [
            [] if apart else self._sees(block, segment.reach, here)
            for block, segment, apart in zip(blocks, forward.segments, alone)
        ]
        coming = blocks[0].frames if forward.commit else ()
        self.traffic.read += len(set().union(*see) & {*table.held, *coming})
        positions = [range(len(block.frames)) if forward.apart else block.frames for block in blocks]
        rope = self.model.rope([frame for frames in positions for frame in frames])
        commit = blocks[0] if forward.commit else None
        return table.plan(blocks, rope, commit, predict=any(s.weight for s in forward.segments), see=see)

    def _sees(self, block: Block, reach: int, here: Sequence[int]) -> list[int]:
        """Frames before a block that it attends to, held ones and those of the same forward."""
        table = self.table
        near = block.end - reach * len(block.frames)
        always = {frame for frame in table.held if frame < table.policy.sink} | table.pinned
        frames = sorted({*table.held, *here})
        return [
            f for f in frames if f < block.first and (f in always or (f >= near and table.policy.sees(f, block.end)))
        ]

    def _noise(self, frames: int) -> Tensor:
        """Drawn on the generator's device, so that a seed means the same wherever the model runs."""
        shape = (frames, *self.model.latent_shape)
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.table.store.device)
