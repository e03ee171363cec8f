"""What a world holds, as one value: an edit makes another one, and is whole or was never made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

from torch import Tensor

from .extent import Extent
from .slots import Slot

NOTHING: Mapping[int, Slot] = MappingProxyType({})


@dataclasses.dataclass(eq=False)
class Block:
    """Frames [first, end) while they are denoised together."""

    first: int
    end: int

    @property
    def frames(self) -> range:
        return range(self.first, self.end)


class Past(NamedTuple):
    """All that a page table says. Never changed, only replaced, so that forks share it.

    Attributes:
        held: frame -> extent, in the order of the frames.
        slots: of the held frames that this world wants on the device.
        kept: slots of frames in host memory, or on their way there, which may still be read until the next boundary.
        fetched: frames that came back from host memory since the last block boundary.
        pinned: held frames that stay and are seen whatever the policy says.
        next_frame: after the last one sealed.
        open_blocks: oldest first.
        target: what a planned clean pass of the oldest open block writes to.
        k_means: one mean key per layer, or None.
        eight_bit: by layer, may queries be rounded to 8 bits? Decided with the mean keys; see passes.rounds_like_keys.
        edits: how often a slot was let go that an earlier plan may name.
    """

    held: Mapping[int, Extent]
    slots: Mapping[int, Slot]
    kept: Mapping[int, Slot]
    fetched: frozenset[int]
    pinned: frozenset[int]
    next_frame: int
    open_blocks: tuple[Block, ...]
    target: tuple[tuple[Extent, Slot], ...]
    k_means: tuple[Tensor | None, ...]
    eight_bit: tuple[bool, ...]
    edits: int

    @classmethod
    def empty(cls, layers: int) -> Past:
        return cls({}, {}, NOTHING, frozenset(), frozenset(), 0, (), (), (None,) * layers, (False,) * layers, 0)

    def replaced(self, frames: Mapping[int, tuple[Extent, Slot]]) -> Past:
        """These held frames are other extents, which this world wants on the device."""
        held, slots, kept = dict(self.held), dict(self.slots), self.kept
        for frame, (extent, slot) in frames.items():
            held[frame], slots[frame] = extent, slot
        if kept:
            kept = {frame: slot for frame, slot in kept.items() if frame not in frames}
        return self._replace(held=held, slots=slots, kept=kept, edits=self.edits + 1)

    def without(self, frames: Iterable[int]) -> Past:
        """These frames are forgotten."""
        gone = set(frames)
        if not gone:
            return self
        held, slots, kept = dict(self.held), dict(self.slots), dict(self.kept)
        for frame in gone:
            del held[frame]
            slots.pop(frame, None)
            kept.pop(frame, None)
        return self._replace(held=held, slots=slots, kept=kept, pinned=self.pinned - gone, edits=self.edits + 1)

    def away(self, frames: Sequence[int], keep: bool) -> Past:
        """This world does not want these frames on the device; if `keep`, they can be read until the next boundary."""
        kept = {**self.kept, **{frame: self.slots[frame] for frame in frames}} if keep else self.kept
        gone = set(frames)
        slots = {frame: slot for frame, slot in self.slots.items() if frame not in gone}
        return self._replace(slots=slots, kept=kept, fetched=self.fetched - gone, edits=self.edits + (not keep))

    def back(self, slots: Mapping[int, Slot]) -> Past:
        """This world wants these frames on the device, where they are or will be."""
        kept = {frame: slot for frame, slot in self.kept.items() if frame not in slots}
        return self._replace(slots={**self.slots, **slots}, kept=kept, fetched=self.fetched.union(slots))

    def sealed(self) -> Past:
        """The oldest open block is part of the past."""
        block, *others = self.open_blocks
        return self.replaced(dict(zip(block.frames, self.target)))._replace(
            next_frame=block.end, open_blocks=tuple(others), target=(), kept=NOTHING
        )

    def unsealed(self, before: Past) -> Past:
        """Undo `sealed`, and nothing else that was done since `before`."""
        block = before.open_blocks[0]
        return self.without(block.frames)._replace(
            next_frame=before.next_frame, open_blocks=before.open_blocks, target=before.target
        )

    def only_blocks(self, blocks: Sequence[Block]) -> Past:
        """Of the open blocks only these stay open."""
        first = bool(blocks) and blocks[0] is self.open_blocks[0]
        return self._replace(
            open_blocks=tuple(blocks),
            target=self.target if first else (),
            kept=self.kept if blocks else NOTHING,
            edits=self.edits + (len(blocks) < len(self.open_blocks)),
        )

    def thawed(self) -> Past:
        """A world without a first block has no mean key, even if a clean pass has frozen one."""
        layers = len(self.k_means)
        return self if self.next_frame else self._replace(k_means=(None,) * layers, eight_bit=(False,) * layers)

    def slot(self, frame: int) -> Slot | None:
        """Where this world may read a frame now."""
        slot = self.slots.get(frame) or self.kept.get(frame)
        return None if slot is None or slot.arriving else slot

    def let_go(self) -> Past:
        """What was readable until a boundary is so no longer."""
        return self._replace(kept=NOTHING, edits=self.edits + 1) if self.kept else self

    def turned(self) -> Past:
        """At this world's own boundary."""
        if not self.fetched:
            return self.let_go()
        return self.let_go()._replace(fetched=frozenset())

    def all_slots(self) -> list[Slot]:
        return [*self.slots.values(), *self.kept.values(), *(slot for _, slot in self.target)]


class Holder(Protocol):
    """Whoever has a past, and slots by it: a page table."""

    state: Past
