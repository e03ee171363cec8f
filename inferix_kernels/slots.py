"""Where frames lie, and who has them: a slot is taken as long as something refers to it.

Nothing counts references, and nothing has to be given back. What is dropped, by whomever and however, an exception or
the garbage collector included, is free; what is held can't be taken away. A store's operations rest on that: they build
what is to be beside what is, and put it in place with one assignment.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from .layout import KVPages

if TYPE_CHECKING:
    from .paged_kv import KVStore

P = ParamSpec("P")
T = TypeVar("T")


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
        >>> store.settle()  # the copy has landed
        >>> table.gather(0, [0])
        Traceback (most recent call last):
        inferix_kernels...NotResident: frames [0] are in host memory: ...
    """


class Slot:
    """A place for one frame in a pool. It belongs to whoever refers to it, and is free when no one does.

    Attributes:
        index: of the slot in its pool; page: id of its first page among those of its store.
        arriving: the copy that fills it is still under way.
    """

    __slots__ = ("__weakref__", "arriving", "index", "page", "pool")

    def __init__(self, pool: Pool, index: int):
        self.pool, self.index, self.arriving = pool, index, False
        self.page = pool.base + index * pool.pages_per_frame


def nobody() -> None:
    """Stands for a reference to a slot that no one has."""


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


class Pool:
    """The slots of one format on one device, each pages_per_frame pages in every layer."""

    def __init__(self, store: KVStore, format: str, frames: int, device: torch.device | str, base: int, pin: bool):
        self.format, self.frames, self.base = format, frames, base
        self.pages_per_frame, self.num_pages = store.pages_per_frame, frames * store.pages_per_frame
        shape = (store.heads, store.page_size, store.head_dim, device, pin)
        self.pages = KVPages.empty(format, store.num_layers * self.num_pages, *shape)
        self.layers = [self.layer(i) for i in range(store.num_layers)]
        self._holders: list[Callable[[], Slot | None]] = [nobody] * frames
        self._next = 0  # where to look for a free slot: after the one that was taken last

    def layer(self, layer: int) -> KVPages:
        return self.pages.part(layer * self.num_pages, (layer + 1) * self.num_pages)

    def slot(self, layer: int, slot: int) -> KVPages:
        """The pages of one slot in one layer."""
        return self.layers[layer].part(slot * self.pages_per_frame, (slot + 1) * self.pages_per_frame)

    @property
    def frame_bytes(self) -> int:
        return self.pages.nbytes // self.frames

    @property
    def free(self) -> list[int]:
        """Indices of the slots that no one has."""
        return [index for index, holder in enumerate(self._holders) if holder() is None]

    def take(self, count: int) -> list[Slot]:
        """So many free slots, or as many as there are."""
        found: list[Slot] = []
        holders, start = self._holders, self._next
        for index in chain(range(start, self.frames), range(start)) if count else ():
            if holders[index]() is None:
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


class StreamTurns:
    """A lock for a store on a GPU. What a thread launches comes after what the one before it did, whatever its stream.

    The stream is the one that is current when a thread's turn begins after another's: who changes it in between must
    make the new one wait for the old.
    """

    def __init__(self, device: torch.device):
        self._lock, self._device = threading.RLock(), device
        self._thread: int | None = None
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            thread = threading.get_ident()
            if thread != self._thread:
                stream = torch.cuda.current_stream(self._device)
                if self._stream is not None and stream != self._stream:
                    stream.wait_stream(self._stream)
                self._thread, self._stream = thread, stream
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class InTurn(Protocol):
    @property
    def turn(self) -> contextlib.AbstractContextManager[Any]: ...


S = TypeVar("S", bound=InTurn)


def in_turn(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method during which no other thread uses the store."""

    @functools.wraps(method)
    def taking_turns(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.turn:
            return method(self, *args, **kwargs)

    return taking_turns
