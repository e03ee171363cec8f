"""What one world holds, and what it can read of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from .._check import check_index, whole
from ..layout import PageList
from .extent import Extent
from .past import Block, Past
from .policy import Policy
from .slots import NotResident, Slot
from .storage import Storage
from .turns import in_turn


def fitted(policy: Policy, store: Storage) -> Policy:
    """The policy, with its format named, for a world of this store.

    Raises:
        ValueError: the store has no pool for one of its formats, or holds no such world.
    """
    if policy.window is not None and policy.window < store.block_frames:
        raise ValueError(
            f"window must be at least one block of {store.block_frames} frames, as it counts the block "
            f"being made, got {policy.window}"
        )
    if policy.format is None:
        policy = dataclasses.replace(policy, format=next(iter(store.pools)))
    for format in (policy.format, policy.sink_format, policy.older and policy.older[1]):
        if format is not None and format not in store.pools:
            pools = ", ".join(store.pools)
            raise ValueError(f"the policy's format {format!r:.60} has no pool in this store ({pools})")
    if policy.archive and not store.host:
        raise ValueError("archive needs host memory in the store: KVStore(host={format: frames})")
    return policy


def replace_states(edits: Sequence[tuple[TableView, Past]]) -> None:
    """Each of these worlds holds another past from here on; all of them or, whatever is raised meanwhile, none."""
    before = [(table, table.state) for table, _ in edits]
    try:
        for table, state in edits:
            table.state = state
    except BaseException:
        for table, state in before:
            table.state = state
        raise


class TableView:
    """A page table without its edits: passes and block boundaries work on it.

    Attributes:
        state: what the world holds, replaced by every edit and changed by none.
        evicting: is the policy's on_evict being called?
    """

    evicting = False

    def __init__(self, store: Storage, policy: Policy):
        policy = fitted(policy, store)
        self.store, self.policy, self.turn = store, policy, store.turn
        self.state = Past.empty(store.num_layers)
        with self.turn:
            store.register(self)

    @property
    def held(self) -> Mapping[int, Extent]:
        """Frame -> extent, in the order of the frames."""
        return MappingProxyType(self.state.held)

    @property
    def cold(self) -> set[int]:
        """Held frames that this world does not want on the device."""
        return self.state.held.keys() - self.state.slots.keys()

    @property
    def pinned(self) -> frozenset[int]:
        """Held frames that stay and are seen whatever the policy says."""
        return self.state.pinned

    @property
    def next_frame(self) -> int:
        return self.state.next_frame

    @property
    def open_blocks(self) -> list[Block]:
        """Oldest first."""
        return list(self.state.open_blocks)

    @property
    def k_means(self) -> list[Tensor | None]:
        """One mean key [heads, D] per layer, frozen after the first block and taken off every key since: softmax does
        not change, and what is left is smaller to quantize. None until then, and in stores that do not quantize."""
        return list(self.state.k_means)

    @in_turn
    def select(self, frames: Iterable[int]) -> PageList:
        """Pages of these held frames, in this order.

        Raises:
            KeyError: a frame is not held. ValueError: a frame is named twice. NotResident: see `prefetch`.

        Example:
            >>> table.select([0, 14]).lens.tolist()  # a frame has 10 tokens, and a page 16 places
            [10, 10]
        """
        slots = self.resident(frames := list(frames))
        if away := [frame for frame, slot in zip(frames, slots) if not slot.own]:
            raise NotResident(f"frames {away} lie on other ranks: see Shard.frames")
        return self.store.lists.of(slot.page_id for slot in slots)

    @in_turn
    def gather(self, layer: int, frames: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """K (rotated, frozen mean removed) and V of held frames: [tokens, heads, D] and [tokens, heads, Dv].

        Example:
            >>> k, v = table.gather(0, [13, 14])
            >>> list(k.shape)
            [20, 2, 16]
        """
        layer = check_index("layer", layer, self.store.num_layers)
        return self.store.gather(self.store.layers[layer], self.select(frames), dtype)

    def check_held(self, frames: Iterable[int]) -> list[int]:
        """These frames as Python's numbers. Raises KeyError unless they are held, ValueError if one is named twice."""
        frames, held = [whole("frames", frame) for frame in frames], self.state.held
        missing = [frame for frame in frames if frame not in held]
        if missing:
            raise KeyError(f"frames must be held (now {list(held)}), got {missing}")
        if len(set(frames)) < len(frames):
            raise ValueError(f"frames must be named once, got {[f for f in set(frames) if frames.count(f) > 1]} again")
        return frames

    def resident(self, frames: Iterable[int]) -> list[Slot]:
        """The slots on the device of these held frames. Raises as `select` does."""
        frames = self.check_held(frames)
        kept, here = self.state.kept, self.state.slots
        here = {**kept, **here} if kept else here
        slots = [here[frame] for frame in frames if frame in here]
        if len(slots) < len(frames) or any([slot.arriving for slot in slots]):
            away = [frame for frame in frames if self.state.slot(frame) is None]
            raise NotResident(f"frames {away} are in host memory: call prefetch({away}) before the block is opened")
        return slots

    def check_open(self, blocks: Sequence[Block]) -> None:
        """Raises ValueError unless these blocks are open."""
        for block in blocks:
            if block not in self.state.open_blocks:
                raise ValueError(f"blocks must be open in this table; frames {block.first}..{block.end - 1} are not")

    def past(self, block: Block) -> list[int]:
        """Held frames that the policy lets a block see.

        Example:
            >>> block = table.open_block(frames=3)
            >>> table.past(block)
            [0, 9, 10, 11, 12, 13, 14]
        """
        past, sees, end = self.state, self.policy.sees, self.window_end(block.end)
        return [f for f in past.held if f < block.first and (f in past.pinned or sees(f, end))]

    def window_end(self, block_end: int) -> int:
        """Where a block that ends before `block_end` would end if its window had no pinned frames to make room for:
        what `Policy.sees` and `Policy.keeps` are asked about.

        Example:
            >>> table.window_end(18)  # pinned frames take no room from the window, unless the policy says so
            18
        """
        return block_end + self.policy.crowded(block_end, self.state.pinned)

    def seen(self, block: Block, blocks: Sequence[Block], see: Sequence[int] | None) -> Sequence[Slot | int]:
        """What a block of a pass reads besides itself, in the order of `see` or as the policy says: slots of frames
        that are held, and numbers of frames that the other `blocks` of the pass make.

        Raises:
            As `select` does.
        """
        others = [frame for other in blocks if other is not block for frame in other.frames]
        frames = self.frames_seen(block, blocks, see)
        if not others:
            return self.resident(frames)
        held = [frame for frame in frames if frame not in others]
        slots = dict(zip(held, self.resident(held)))
        return [slots.get(frame, frame) for frame in frames]

    def frames_seen(self, block: Block, blocks: Sequence[Block], see: Sequence[int] | None) -> list[int]:
        """What a block of a pass reads besides itself: the frames that `seen` finds.

        Example:
            >>> block = table.open_block(frames=3)
            >>> table.frames_seen(block, [block], see=[0, 14])
            [0, 14]
        """
        if see is not None:
            return [whole("see", frame) for frame in see]
        others = [frame for other in blocks if other is not block for frame in other.frames]
        end = self.window_end(block.end)
        return self.past(block) + [f for f in others if f < block.first and self.policy.sees(f, end)]

    @property
    def can_fuse(self) -> bool:
        """May a clean pass share its forward with the next block? Not the first one of a world that quantizes."""
        return not self.store.freezes_mean or self.state.k_means[0] is not None

    def converted(self, past: Past, frames: Sequence[int], format: str) -> Past:
        """`past` with these of its frames in another format, for the caller to put in place."""
        pairs = [(past.held[frame], past.slot(frame)) for frame in frames]
        made = self.store.converted([(extent, slot) for extent, slot in pairs if slot is not None], format)
        return past.replaced(dict(zip(frames, made, strict=True)))
