"""The KV store: pools of pages for all layers, shared by any number of worlds.

    store = KVStore(layers=30, heads=12, head_dim=128, frame_tokens=1560, block_frames=3, pools={"int8": 21})
    table = store.open(Policy(window=18, sink=3))          # one world: see page_table.py

The unit that is allocated, shared, moved and freed is the *extent*: the pages of one frame, in one format, in every
layer. A committed extent never changes, so worlds share it, and whoever wants it otherwise (another format, other
contents) makes another. Extents live on the store's device, in host memory, or in both.

Nothing moves under a caller: a slot is some world's, or a copy's, as long as that refers to it (slots.py). Every
operation is all or nothing, whatever is raised in it, and worlds that are dropped give their slots back by that alone.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import layout
from ._check import check_counts, check_device, check_page_size
from .layout import FORMATS, KVPages, PageList, as_bytes
from .ops import kv_commit, kv_gather
from .slots import Extent, OutOfPages, Pool, Slot, StreamTurns, in_turn

if TYPE_CHECKING:
    from .page_table import PageTable
    from .policy import Policy


def _check_formats(pools: Mapping[str, int], host: Mapping[str, int], scratch_format: str) -> None:
    if unknown := [format for format in (*pools, *host, scratch_format) if format not in FORMATS]:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {unknown[0]!r}")
    if not pools:
        raise ValueError("pools must name at least one format, got none")
    if FORMATS[scratch_format].quantized:
        raise ValueError(f"scratch_format must not quantize, got {scratch_format!r}: noise is never quantized")


class KVStore:
    """Pools of pages, and who holds them.

    A page id means the same page in every layer. Ids count through the pools in their order, then through scratch.
    A frame's tokens begin on a page boundary; its last page may be partly valid. Scratch is one layer deep: a layer's
    noisy keys are read only by its own attention, and the clean pass commits each layer as it goes by.

    Threads: the worlds of a store share its pools and scratch. They may be stepped by several threads, a world by one
    at a time: every operation, and every layer of a pass, has the store to itself (`turn`), so each world computes what
    it would alone. On a GPU the streams of the threads are put in order too; see slots.StreamTurns.

    Args:
        layers, heads, head_dim: of the keys and values (heads is the number of KV heads). head_dim may be the widths
            of keys and values, (D, Dv), for rows of latents (MLA, with heads=1).
        frame_tokens: tokens per latent frame; any count.
        block_frames: frames per block, at most.
        scratch_blocks: blocks that can be open at once. Two are enough to denoise one block at a time: it, and the one
            before it, whose clean pass shares its first forward.
        pools: format -> frames it can hold, over all worlds. See layout.FORMATS, and Policy.capacity.
        host: the same for host memory (pinned beside a GPU), where frames wait that no block attends to.
        scratch_format: "fp32", "fp16" or "bf16", how the current block stores K and V; None: as
            layout.scratch_format has it for a bfloat16 network on this device.
        page_size: token slots per page, a multiple of 8.
        model: any name; a snapshot is refused by a store of another one.

    Raises:
        ValueError: an argument is not what it must be; nothing was allocated.

    Example:
        >>> store = KVStore(layers=2, heads=2, head_dim=16, frame_tokens=10, block_frames=3, pools={"int8": 12})
        >>> table = store.open(Policy(window=9))
        >>> store.nbytes["int8"] // 12  # bytes of a frame: two layers of one page of 64 tokens
        9472
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_dim: int | tuple[int, int],
        frame_tokens: int,
        block_frames: int,
        pools: Mapping[str, int],
        host: Mapping[str, int] | None = None,
        scratch_blocks: int = 2,
        scratch_format: str | None = None,
        page_size: int = 64,
        model: str = "",
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ):
        self.device = device = check_device("device", device)
        host, scratch_format = host or {}, scratch_format or layout.scratch_format(device)
        if isinstance(head_dim, Sequence) and len(head_dim) != 2:
            raise ValueError(f"head_dim must be one width, or those of keys and values, got {head_dim!r}")
        counts = {"layers": layers, "heads": heads, "frame_tokens": frame_tokens, "block_frames": block_frames}
        least_width = min(head_dim) if isinstance(head_dim, Sequence) else head_dim
        counts |= {"scratch_blocks": scratch_blocks, "head_dim": least_width}
        counts |= {f"pools[{format!r}]": frames for format, frames in pools.items()}
        counts |= {f"host[{format!r}]": frames for format, frames in host.items()}
        check_counts(counts)
        check_page_size(page_size)
        _check_formats(pools, host, scratch_format)
        # NumPy's numbers, too, are whole; snapshots hold Python's.
        layers, heads, frame_tokens, page_size = map(int, (layers, heads, frame_tokens, page_size))
        pools, host = ({format: int(frames) for format, frames in sizes.items()} for sizes in (pools, host))
        head_dim = (int(head_dim[0]), int(head_dim[1])) if isinstance(head_dim, Sequence) else int(head_dim)
        if frame_tokens >= 1 << 31:
            raise ValueError(f"frame_tokens must be under 2^31, as tokens are counted in int32, got {frame_tokens}")
        self.num_layers, self.heads, self.head_dim, self.frame_tokens = layers, heads, head_dim, frame_tokens
        self.block_frames, self.scratch_blocks = int(block_frames), int(scratch_blocks)
        self.page_size, self.model, self.backend = page_size, model, backend
        on_gpu = device.type == "cuda"
        self.turn: contextlib.AbstractContextManager[Any] = StreamTurns(self.device) if on_gpu else threading.RLock()
        self.pages_per_frame = -(-frame_tokens // page_size)
        lens = [page_size] * (self.pages_per_frame - 1)
        lens += [frame_tokens - sum(lens)]
        self._lens = torch.tensor([lens], dtype=torch.int32, device=device)  # of each frame, as many as were asked for
        self._steps = np.arange(self.pages_per_frame, dtype=np.int32)
        self.pools: dict[str, Pool] = {}
        self.scratch_base = 0  # page ids count through the pools, then through scratch
        for format, frames in pools.items():
            self.pools[format] = self._pool("pools", format, frames, self.device, self.scratch_base, False)
            self.scratch_base += self.pools[format].num_pages
        self.host = {format: self._pool("host", format, frames, "cpu", 0, on_gpu) for format, frames in host.items()}
        pages = scratch_blocks * block_frames * self.pages_per_frame
        self.scratch = KVPages.empty(scratch_format, pages, heads, page_size, head_dim, self.device)
        self.layers = [[*(pool.layers[i] for pool in self.pools.values()), self.scratch] for i in range(layers)]
        # MLA's rows are keys and values at once: taking a mean off the keys would change the values too.
        self.freezes_mean = any(FORMATS[format].quantized for format in pools) and isinstance(head_dim, int)
        self._moving: list[Slot] = []  # slots of both sides with a copy under way: no one else's until it has landed
        self._keeping: list[weakref.ref[PageTable]] = []  # of these `settle` takes what they kept
        self._tables: weakref.WeakSet[PageTable] = weakref.WeakSet()
        self._copies = torch.cuda.Stream(self.device) if on_gpu else None

    def _pool(self, name: str, format: str, frames: int, device: torch.device | str, base: int, pin: bool) -> Pool:
        pages = self.num_layers * frames * self.pages_per_frame
        if max(pages, base + frames * self.pages_per_frame) >= 1 << 31:
            raise ValueError(
                f"{name}[{format!r}] must be under 2^31 pages in all layers together, as ids are int32, "
                f"got {frames} frames, {pages:,} pages"
            )
        try:
            return Pool(self, format, frames, device, base, pin)
        except (RuntimeError, MemoryError):  # what torch raises where memory is short, on any device
            raise ValueError(
                f"{name}[{format!r}] must fit in the memory of {device}, got {frames} frames, {pages:,} pages of "
                f"{self.page_size} tokens"
            ) from None

    @in_turn
    def open(self, policy: Policy) -> PageTable:
        """A new, empty world over this store.

        Example:
            >>> other = store.open(Policy(window=6))  # in the store's first format, int8
            >>> other.next_frame
            0
        """
        from .page_table import PageTable

        return PageTable(self, policy)

    @property
    def geometry(self) -> dict[str, object]:
        """What must agree for pages to move between two stores."""
        names = ("model", "num_layers", "heads", "head_dim", "frame_tokens", "page_size")
        return {name: getattr(self, name) for name in names}

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the pools by format, of scratch, and of host memory."""
        sizes = {format: pool.pages.nbytes for format, pool in self.pools.items()} | {"scratch": self.scratch.nbytes}
        return sizes | ({"host": sum(pool.pages.nbytes for pool in self.host.values())} if self.host else {})

    # Page lists

    def page_list(self, first_pages: Iterable[int]) -> PageList:
        """The tokens of whole frames, given by the first page of each."""
        frames = list(first_pages)
        (ids,) = self.upload([frames])
        return PageList(ids, self.page_lens(len(frames)))

    def upload(self, frames: Sequence[Sequence[int]], others: Sequence[Sequence[int]] = ()) -> tuple[Tensor, ...]:
        """int32 tensors on the device, in one copy: page ids of frames given by their first pages, and plain lists."""
        firsts = np.fromiter(chain(*frames), np.int32)
        ids = (firsts[:, None] + self._steps).ravel()
        packed = np.concatenate([ids, np.fromiter(chain(*others), np.int32)])
        sizes = [len(group) * self.pages_per_frame for group in frames] + [len(group) for group in others]
        return torch.from_numpy(packed).to(self.device).split(sizes)

    def page_lens(self, frames: int) -> Tensor:
        """Valid tokens of each page of so many frames, [frames * pages_per_frame] int32 on the device."""
        if frames > self._lens.shape[0]:
            self._lens = self._lens[:1].repeat(2 * frames, 1)
        return self._lens[:frames].flatten()

    @in_turn
    def gather(self, pools: Sequence[KVPages], where: PageList, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kv_gather of whole frames. How many tokens that makes is known here: nothing is read from the device."""
        tokens = len(where.ids) // self.pages_per_frame * self.frame_tokens
        widths = (self.scratch.head_dim, self.scratch.value_dim)
        k, v = (torch.empty(tokens, self.heads, width, dtype=dtype, device=self.device) for width in widths)
        return kv_gather(pools, where, out=(k, v), backend=self.backend)

    # Taking slots

    def register(self, table: PageTable) -> None:
        """Of whose slots `check_room` must know."""
        self._tables.add(table)

    @contextlib.contextmanager
    def take(self, formats: Sequence[str], in_host: bool = False) -> Iterator[list[Slot]]:
        """A context with a free slot per format named, all or none. If its body fails they are free again; only after
        it may they become part of what a world holds.

        Raises:
            OutOfPages: a pool has too few free slots, even once the copies under way have landed.
        """
        pools = self.host if in_host else self.pools
        wanted = dict.fromkeys(formats)
        for format in wanted:
            if format not in pools and in_host:
                raise OutOfPages(f"{format} pool in host memory: there is none, see KVStore(host=...)")
            self._check_format(format, pools)
        taken: list[Slot] = []
        try:
            for format in wanted:
                taken += self._take(pools[format], formats.count(format), in_host)
            if len(wanted) > 1:  # in the order that was asked for
                groups = {format: iter([slot for slot in taken if slot.pool.format == format]) for format in wanted}
                taken[:] = [next(groups[format]) for format in formats]
            yield taken
        except BaseException:
            self._land()  # no copy may still write to what others may have now
            for slot in taken:  # even while a traceback refers to it
                slot.pool.give_back(slot)
            raise

    def _take(self, pool: Pool, count: int, in_host: bool) -> list[Slot]:
        slots = pool.take(count)
        if len(slots) < count:
            del slots  # to be counted as free
            self._land()
            slots = pool.take(count)
        if len(slots) < count:
            del slots
            raise self._full(pool, count, len(pool.free), in_host)
        return slots

    def _check_format(self, format: str, pools: Mapping[str, Pool]) -> None:
        if format not in pools:
            raise ValueError(f"format must have a pool in this store ({', '.join(pools)}), got {format!r}")

    @staticmethod
    def _full(pool: Pool, frames: int, free: int, in_host: bool = False) -> OutOfPages:
        return OutOfPages(
            f"{pool.format} pool {'in host memory' if in_host else 'on the device'}: {frames} frames "
            f"({frames * pool.frame_bytes:,} bytes) asked for, {pool.frames - free} of {pool.frames} are held and "
            f"{free} free"
        )

    def check_room(self, table: PageTable, formats: Sequence[str], leaving: Collection[Slot] = ()) -> None:
        """Could slots of these formats be taken, once `table` has let go of the slots `leaving`?

        Raises:
            OutOfPages: not so.
        """
        self._land()
        elsewhere: set[Slot] | None = None
        for format in dict.fromkeys(formats):
            pool, count = self.pools[format], formats.count(format)
            free = len(pool.free)
            if count > free:
                if elsewhere is None:
                    others = (other.state.all_slots() for other in self._tables if other is not table)
                    elsewhere = set(chain(*others))
                free += sum(slot.pool is pool and slot not in elsewhere for slot in leaving)
            if count > free:
                raise self._full(pool, count, free)

    def converted(self, frames: Sequence[tuple[Extent, Slot]], format: str) -> list[tuple[Extent, Slot]]:
        """The same frames in another format: found if a fork made them already, else made."""
        known = [extent.resident_as(format) for extent, _ in frames]  # held from here on
        fresh = [frame for frame, found in zip(frames, known) if found is None]
        with self.take([format] * len(fresh)) as slots:
            for source in {extent.format for extent, _ in fresh}:
                pairs = [(old, new) for (extent, old), new in zip(fresh, slots) if extent.format == source]
                lists = [self._all_layers(group) for group in zip(*pairs)]
                kv_commit(self.pools[source].pages, lists[0], self.pools[format].pages, lists[1], backend=self.backend)
        made = iter(slots)
        return [
            self._derive(extent, format, next(made)) if found is None else found
            for (extent, _), found in zip(frames, known)
        ]

    @staticmethod
    def _derive(extent: Extent, format: str, slot: Slot) -> tuple[Extent, Slot]:
        new = Extent(format, slot)
        extent.derived[format] = weakref.ref(new)  # of one that is in host memory alone, whoever has it keeps it
        return new, slot

    def _all_layers(self, slots: Sequence[Slot]) -> PageList:
        """Pages of slots of one pool in every layer, for the pool of all layers."""
        pool = slots[0].pool
        offsets = range(0, self.num_layers * pool.num_pages, pool.num_pages)
        firsts = [slot.index * self.pages_per_frame for slot in slots]
        return self.page_list(offset + first for offset in offsets for first in firsts)

    # Host memory

    def to_host(self, frames: Sequence[tuple[Extent, Slot]]) -> None:
        """Start to copy to host memory what is not there yet.

        Raises:
            OutOfPages: host memory has no room, or no pool of this format; nothing was started.
        """
        new = [(extent, slot) for extent, slot in frames if extent.host is None]
        with self.take([extent.format for extent, _ in new], in_host=True) as places:
            self._copy([(slot, place) for (_, slot), place in zip(new, places)], to_host=True)
        for (extent, _), place in zip(new, places):
            extent.host = place

    def to_device(self, extents: Sequence[Extent]) -> list[Slot]:
        """The slots of these extents on the device, where copies of what was not there are started. They are to be
        read once `settle` was called.

        Raises:
            OutOfPages: the device has no room; nothing was started.
        """
        found = [extent.device() for extent in extents]  # held from here on, be they on their way to host memory
        new = [extent for extent, slot in zip(extents, found) if slot is None]
        with self.take([extent.format for extent in new]) as places:
            pairs = [(place, extent.host) for extent, place in zip(new, places) if extent.host is not None]
            assert len(pairs) == len(new), "a frame that is nowhere on the device is in host memory"
            self._copy(pairs, to_host=False)
        for extent, place in zip(new, places):
            extent.device = weakref.ref(place)
        rest = iter(places)
        return [next(rest) if slot is None else slot for slot in found]

    def keeping(self, table: PageTable) -> None:
        """This world may read some frames that it has sent away, until a block is opened."""
        self._keeping.append(weakref.ref(table))

    @in_turn
    def settle(self) -> None:
        """A block boundary: what was being copied has arrived, and what worlds without an open block have sent to host
        memory is theirs on the device no longer.

        On a GPU the current stream waits for the copies; the host does not.
        """
        self._land()
        for reference in self._keeping:
            table = reference()
            if table is not None and not table.state.open_blocks:
                table.state = table.state.let_go()
        self._keeping.clear()

    def _land(self) -> None:
        """The copies under way are waited for. This moves nothing: a slot in a copy is free after it if no one else
        has it, and what has arrived can be read."""
        if not self._moving:
            return
        self._wait()
        for slot in self._moving:
            slot.arriving = False
        self._moving.clear()

    def _copy(self, pairs: Sequence[tuple[Slot, Slot]], to_host: bool) -> None:
        """Start to copy whole frames between slots on the device and in host memory."""
        for device, host in pairs:
            device.arriving = device.arriving or not to_host
            self._moving += [device, host]
        self._transfer(pairs, to_host)

    def _transfer(self, pairs: Sequence[tuple[Slot, Slot]], to_host: bool) -> None:
        """The copies, on the copy stream where there is one."""
        if self._copies is not None and pairs:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies) if self._copies is not None else contextlib.nullcontext():
            for device, host in pairs:
                for layer in range(self.num_layers):
                    ends = device.pool.slot(layer, device.index), host.pool.slot(layer, host.index)
                    for source, target in zip(*(ends if to_host else ends[::-1])):
                        if source is not None and target is not None:
                            as_bytes(target).copy_(as_bytes(source), non_blocking=True)

    def _wait(self) -> None:
        """What is launched from here on comes after the copies that were started."""
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
