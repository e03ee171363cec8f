"""Where frames lie, and who has them: a slot is taken as long as something refers to it.

Nothing counts references, and nothing has to be given back. What is dropped, by whomever and however, an exception or
the garbage collector included, is free; what is held can't be taken away. A store's operations rest on that: they build
a new value next to the old one, and put it in place with one assignment.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain

import torch

from ..layout import KVPages


class OutOfPages(RuntimeError):
    """A pool has no room for what was asked; nothing was changed.

    Example:
        >>> store = KVStore(layers=1, heads=1, head_dim=16, frame_tokens=8, block_frames=1, page_size=8,
        ...     pools={"int8": 1})
        >>> table = store.open(Policy())  # keeps every frame, and the store has room for one
        >>> table.plan([block := table.open_block(1)], commit=block).append(0, *torch.randn(2, 8, 1, 16))
        >>> table.seal(block)
        >>> table.plan([block := table.open_block(1)], commit=block)
        Traceback (most recent call last):
        inferix_kernels...OutOfPages: int8 pool on the device: 1 frames (...) asked for, 1 of 1 are held and 0 free
    """


class NotResident(RuntimeError):
    """A frame that was to be read lies in host memory alone; nothing was changed.

    Example:
        >>> store = KVStore(layers=1, heads=1, head_dim=16, frame_tokens=8, block_frames=1, page_size=8,
        ...     pools={"int8": 3}, host={"int8": 3})
        >>> table = store.open(Policy())
        >>> table.plan([block := table.open_block(1)], commit=block).append(0, *torch.randn(2, 8, 1, 16))
        >>> table.seal(block)
        >>> table.offload([0])
        >>> store.sync_copies()  # the copy has landed
        >>> table.gather(0, [0])
        Traceback (most recent call last):
        inferix_kernels...NotResident: frames [0] are in host memory: ...
    """


class Slot:
    """A place for one frame in a pool. It belongs to whoever refers to it, and is free when no one does.

    Attributes:
        index: of the slot in its pool.
        pool_page: of its first page, counted in its pool.
        page_id: of its first page, counted through all pools of a layer.
        group: of ranks, that holds it where they hold different frames; see Shard.frames.
        own: does it lie in this process? Only then are there pages.
        arriving: the copy that fills it is still under way.
    """

    __slots__ = ("__weakref__", "arriving", "group", "index", "own", "page_id", "pool", "pool_page")

    def __init__(self, pool: Pool, index: int):
        self.pool, self.index, self.arriving = pool, index, False
        place, self.group = divmod(index, pool.groups)
        self.own, self.pool_page = self.group == pool.group, place * pool.pages_per_frame
        self.page_id = pool.first_page_id + self.pool_page


def nobody() -> None:
    """Stands for a reference to a slot that no one has."""


class Pool:
    """The slots of one format on one device, each pages_per_frame pages in every layer.

    Args:
        tile: KV heads, tokens per page, and the width of a head or the two widths (D, Dv).
        first_page_id: id of its first page; those of the others follow.
        pin: in page-locked host memory, from which a GPU copies while it computes.
        group, groups: slots with index % groups == group lie here, and the others in other processes.
    """

    def __init__(
        self,
        format: str,
        frames: int,
        *,
        layers: int,
        pages_per_frame: int,
        tile: tuple[int, int, int | tuple[int, int]],
        device: torch.device | str,
        first_page_id: int = 0,
        pin: bool = False,
        group: int = 0,
        groups: int = 1,
    ):
        self.group, self.groups, self._own = group, groups, range(group, frames, groups)
        self.format, self.frames, self.first_page_id = format, frames, first_page_id
        self.pages_per_frame, self.num_pages = pages_per_frame, len(self._own) * pages_per_frame
        self.pages = KVPages.empty(format, layers * self.num_pages, *tile, device, pin)  # of all layers, one by one
        self.layers = [self.layer(i) for i in range(layers)]
        self._holders: list[Callable[[], Slot | None]] = [nobody] * frames
        self._next = 0  # where to look for a free slot: after the one that was taken last

    def layer(self, layer: int) -> KVPages:
        return self.pages.part(layer * self.num_pages, (layer + 1) * self.num_pages)

    def slot(self, layer: int, slot: int) -> KVPages:
        """The pages of one slot in one layer, one that lies here."""
        place = slot // self.groups
        return self.layers[layer].part(place * self.pages_per_frame, (place + 1) * self.pages_per_frame)

    @property
    def frame_bytes(self) -> int:
        return self.pages.nbytes // len(self._own)

    @property
    def held(self) -> int:
        """How many of the slots that lie here somebody has."""
        return sum(self._holders[index]() is not None for index in self._own)

    @property
    def free(self) -> list[int]:
        """Indices of the slots that no one has."""
        return [index for index, holder in enumerate(self._holders) if holder() is None]

    def count(self, group: int | None) -> tuple[int, int]:
        """How many slots there are, and how many of them no one has; of one group, if it is given."""
        if group is None:
            return self.frames, len(self.free)
        free = sum(index % self.groups == group for index in self.free)
        return len(range(group, self.frames, self.groups)), free

    def take(self, count: int, group: int | None = None) -> list[Slot]:
        """So many free slots, or as many as there are; of one group, if it is given."""
        found: list[Slot] = []
        holders, start = self._holders, self._next
        for index in chain(range(start, self.frames), range(start)) if count else ():
            if holders[index]() is None and (group is None or index % self.groups == group):
                slot = Slot(self, index)
                holders[index] = weakref.ref(slot)
                found.append(slot)
                self._next = index + 1
                if len(found) == count:
                    break
        return found

    def give_back(self, slot: Slot) -> None:
        """Free a slot although something, a traceback for instance, may refer to it still."""
        if self._holders[slot.index]() is slot:
            self._holders[slot.index] = nobody
