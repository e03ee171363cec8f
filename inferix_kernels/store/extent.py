"""One frame's keys and values: the unit that is allocated, shared, moved and freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from .slots import Slot, nobody


class Extent:
    """One frame's keys and values, in every layer. They never change, so worlds share them.

    Attributes:
        format: of its pages.
        device: weak reference to its slot on the device: worlds that want it there hold the slot.
        host: its slot in host memory, held as long as the extent lives; None: no copy is there.
        derived: format -> weak reference to the same frame in that format, made from this one, so that forks that age
            alike share that too.
    """

    __slots__ = ("__weakref__", "derived", "device", "format", "host")

    def __init__(self, format: str, device: Slot | None = None, host: Slot | None = None):
        self.format, self.host = format, host
        self.device: Callable[[], Slot | None] = nobody if device is None else weakref.ref(device)
        self.derived: dict[str, weakref.ref[Extent]] = {}

    @property
    def slot(self) -> int | None:
        slot = self.device()
        return None if slot is None else slot.index

    @property
    def host_slot(self) -> int | None:
        return None if self.host is None else self.host.index

    @property
    def arriving(self) -> bool:
        slot = self.device()
        return slot is not None and slot.arriving

    @property
    def resident(self) -> bool:
        """Can it be read on the device?"""
        slot = self.device()
        return slot is not None and not slot.arriving

    def resident_as(self, format: str) -> tuple[Extent, Slot] | None:
        """The same frame in another format, if it is known and can be read."""
        other = self.derived.get(format, nobody)()
        slot = None if other is None else other.device()
        return None if other is None or slot is None or slot.arriving else (other, slot)
