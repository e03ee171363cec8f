"""Where frames lie: pools of pages for all layers, on the device and in host memory, shared by any number of worlds.

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
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import layout, profile
from .._check import check_counts, check_device, check_page_size, check_precision
from ..layout import FORMATS, KVPages, PageList
from ..ops import kv_commit, kv_gather
from .copies import Copies
from .extent import Extent
from .page_lists import PageLists
from .past import Holder
from .reading import TurnBack
from .shard import Shard
from .slots import OutOfPages, Pool, Slot
from .turns import StreamTurns, in_turn


def _check_formats(pools: Mapping[str, int], host: Mapping[str, int], scratch_format: str) -> None:
    if unknown := [format for format in (*pools, *host, scratch_format) if format not in FORMATS]:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {unknown[0]!r}")
    if not pools:
        raise ValueError("pools must name at least one format, got none")
    if FORMATS[scratch_format].quantized:
        raise ValueError(f"scratch_format must not quantize, got {scratch_format!r}: noise is never quantized")


class Storage:
    """Pools of pages, and who holds them: a KVStore, which says what the arguments mean, without its worlds.

    Attributes:
        pools, host: format -> Pool, on the device and in host memory.
        scratch: KVPages of the blocks that are being made, one layer deep.
        layers: of each layer the pools that a page id counts through, scratch last.
        scratch_page_id: the page id of the first page of scratch.
        heads, all_heads: KV heads that it holds, and that its worlds have.
        turn: context in which no other thread uses the store.
        lists: makes page lists of whole frames.
    """

    pools: dict[str, Pool]

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
        precision: str = "auto",
        turn_back: TurnBack | None = None,
        shard: Shard = Shard(),
    ):
        self.device = device = check_device("device", device)
        check_precision(precision)
        host, scratch_format = host or {}, scratch_format or layout.scratch_format(device)
        widths = head_dim if isinstance(head_dim, Sequence) else (head_dim, head_dim)
        if len(widths) != 2:
            raise ValueError(f"head_dim must be one width, or those of keys and values, got {head_dim!r}")
        counts = {"layers": layers, "heads": heads, "frame_tokens": frame_tokens, "block_frames": block_frames}
        counts |= {"scratch_blocks": scratch_blocks, "head_dim": min(widths)}
        counts |= {f"pools[{format!r}]": frames for format, frames in pools.items()}
        check_counts(counts | {f"host[{format!r}]": frames for format, frames in host.items()})
        check_page_size(page_size)
        _check_formats(pools, host, scratch_format)
        # NumPy's numbers, too, are whole; snapshots hold Python's.
        layers, heads, frame_tokens, page_size = map(int, (layers, heads, frame_tokens, page_size))
        pools, host = ({format: int(frames) for format, frames in sizes.items()} for sizes in (pools, host))
        head_dim = (int(head_dim[0]), int(head_dim[1])) if isinstance(head_dim, Sequence) else int(head_dim)
        if frame_tokens >= 1 << 31:
            raise ValueError(f"frame_tokens must be under 2^31, as tokens are counted in int32, got {frame_tokens}")
        self.shard, self.all_heads, heads = shard, heads, shard.share("heads", heads)
        self.num_layers, self.heads, self.head_dim, self.frame_tokens = layers, heads, head_dim, frame_tokens
        self.block_frames, self.scratch_blocks, self.turn_back = int(block_frames), int(scratch_blocks), turn_back
        self.page_size, self.model, self.backend, self.precision = page_size, model, backend, precision
        on_gpu = device.type == "cuda"
        self.turn: contextlib.AbstractContextManager[Any] = StreamTurns(self.device) if on_gpu else threading.RLock()
        self.lists, self.copies = PageLists(frame_tokens, page_size, self.device), Copies(self.device)
        self.pages_per_frame = self.lists.pages_per_frame
        self.pools, self.scratch_page_id = {}, 0  # page ids count through the pools, then through scratch
        for format, frames in pools.items():
            self.pools[format] = self._pool("pools", format, frames, self.device, self.scratch_page_id, False)
            self.scratch_page_id += self.pools[format].num_pages
        self.host = {each: self._pool("host", each, frames, "cpu", 0, on_gpu) for each, frames in host.items()}
        pages = self.scratch_frames * self.pages_per_frame
        self.scratch = KVPages.empty(scratch_format, pages, heads, page_size, head_dim, self.device)
        self._scratch_pages = torch.arange(pages, dtype=torch.int32, device=self.device)
        self._scratch_lists: dict[tuple[int, ...], PageList] = {}  # those that were asked for, which are few
        self.layers = [[*(pool.layers[i] for pool in self.pools.values()), self.scratch] for i in range(layers)]
        # MLA's rows are keys and values at once: taking a mean off the keys would change the values too.
        self.freezes_mean = any(FORMATS[format].quantized for format in pools) and isinstance(head_dim, int)
        self._keeping: list[weakref.ref[Holder]] = []  # of these `sync_copies` takes what they kept
        self._tables: weakref.WeakSet[Holder] = weakref.WeakSet()

    @property
    def scratch_frames(self) -> int:
        """That a pass can have, of all its worlds."""
        return self.scratch_blocks * self.block_frames

    def _pool(
        self, name: str, format: str, frames: int, device: torch.device | str, first_page_id: int, pin: bool
    ) -> Pool:
        if frames < self.shard.frames:
            raise ValueError(
                f"{name}[{format!r}] must be a frame for each of shard.frames={self.shard.frames} at least, "
                f"got {frames} on rank {self.shard.rank}"
            )
        pages = self.num_layers * frames * self.pages_per_frame
        if max(pages, first_page_id + frames * self.pages_per_frame) >= 1 << 31:
            raise ValueError(
                f"{name}[{format!r}] must be under 2^31 pages in all layers together, as ids are int32, "
                f"got {frames} frames, {pages:,} pages"
            )
        try:
            return Pool(
                format,
                frames,
                layers=self.num_layers,
                pages_per_frame=self.pages_per_frame,
                tile=(self.heads, self.page_size, self.head_dim),
                device=device,
                first_page_id=first_page_id,
                pin=pin,
                group=self.shard.frame_rank,
                groups=self.shard.frames,
            )
        except (RuntimeError, MemoryError):  # what torch raises where memory is short, on any device
            raise ValueError(
                f"{name}[{format!r}] must fit in the memory of {device}, got {frames} frames, {pages:,} pages of "
                f"{self.page_size} tokens"
            ) from None

    @property
    def geometry(self) -> dict[str, object]:
        """What must agree for pages to move between two stores."""
        names = ("model", "num_layers", "heads", "head_dim", "frame_tokens", "page_size")
        return {name: getattr(self, name) for name in names} | {"heads": self.all_heads}

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the pools by format, of scratch, and of host memory."""
        sizes = {format: pool.pages.nbytes for format, pool in self.pools.items()} | {"scratch": self.scratch.nbytes}
        return sizes | ({"host": sum(pool.pages.nbytes for pool in self.host.values())} if self.host else {})

    @property
    def held_bytes(self) -> dict[str, int]:
        """Bytes of the pools on the device that somebody holds, by format."""
        return {name: pool.held * pool.frame_bytes for name, pool in self.pools.items()}

    @in_turn
    def gather(self, pools: Sequence[KVPages], where: PageList, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kv_gather of whole frames. How many tokens that makes is known here: nothing is read from the device."""
        tokens = len(where.ids) // self.pages_per_frame * self.frame_tokens
        widths = (self.scratch.head_dim, self.scratch.value_dim)
        k, v = (torch.empty(tokens, self.heads, width, dtype=dtype, device=self.device) for width in widths)
        return kv_gather(pools, where, out=(k, v), backend=self.backend)

    def scratch_list(self, first: int, end: int) -> PageList:
        """Pool pages of frames first .. end - 1 of scratch."""
        if (first, end) not in self._scratch_lists:
            pages = self._scratch_pages[first * self.pages_per_frame : end * self.pages_per_frame]
            self._scratch_lists[first, end] = PageList(pages, self.lists.lens(end - first))
        return self._scratch_lists[first, end]

    def scratch_rows(self, frames: int, rows: slice) -> PageList:
        """Pool pages of these tokens of each of the first frames of scratch: a run of slots in each, cut anywhere."""
        key = frames, rows.start, rows.stop
        if key not in self._scratch_lists:
            size, runs = self.page_size, []
            for page in range(rows.start // size, -(-rows.stop // size)):
                start, stop = max(rows.start - page * size, 0), min(rows.stop - page * size, size)
                runs.append((page, stop - start, start))
            pages = [(f * self.pages_per_frame + page, *run) for f in range(frames) for page, *run in runs]
            ids, lens, starts = zip(*pages) if pages else ((), (), ())
            self._scratch_lists[key] = PageList.of(ids, lens, self.device, starts)
        return self._scratch_lists[key]

    # Taking slots

    def register(self, table: Holder) -> None:
        """Of whose slots `check_room` must know."""
        self._tables.add(table)

    @contextlib.contextmanager
    def take(
        self, formats: Sequence[str], in_host: bool = False, groups: Sequence[int] | None = None
    ) -> Iterator[list[Slot]]:
        """A context with a free slot per format named, all or none. If its body fails they are free again; only after
        it may they become part of what a world holds.

        Args:
            groups: for each format named, the one that its slot must be of; see Slot.group.

        Raises:
            OutOfPages: a pool has too few free slots, even once the copies under way have landed.
        """
        pools = self.host if in_host else self.pools
        keys = self._keys(formats, groups)
        wanted = dict.fromkeys(keys)
        for format, _ in wanted:
            if format not in pools and in_host:
                raise OutOfPages(f"{format} pool in host memory: there is none, see KVStore(host=...)")
            self._check_format(format, pools)
        taken: list[Slot] = []
        try:
            each = {}
            for format, group in wanted:
                found = self._take(pools[format], keys.count((format, group)), in_host, group)
                taken += found
                each[format, group] = iter(found)
            if len(wanted) > 1:  # in the order that was asked for
                taken[:] = [next(each[key]) for key in keys]
            del each
            yield taken
        except BaseException:
            self.copies.land()  # no copy may still write to what others may have now
            for slot in taken:  # even while a traceback refers to it
                slot.pool.give_back(slot)
            raise

    def _take(self, pool: Pool, count: int, in_host: bool, group: int | None) -> list[Slot]:
        slots = pool.take(count, group)
        if len(slots) < count:
            del slots  # to be counted as free
            self.copies.land()
            slots = pool.take(count, group)
        if len(slots) < count:
            del slots
            raise self._full(pool, count, pool.count(group)[1], in_host, group)
        return slots

    def _keys(self, formats: Sequence[str], groups: Sequence[int] | None) -> list[tuple[str, int | None]]:
        """(format, group) of each; None: all groups hold all frames, or any will do."""
        return [*zip(formats, [None] * len(formats) if groups is None or self.shard.frames == 1 else groups)]

    def _check_format(self, format: str, pools: Mapping[str, Pool]) -> None:
        if format not in pools:
            raise ValueError(f"format must have a pool in this store ({', '.join(pools)}), got {format!r}")

    @staticmethod
    def _full(pool: Pool, frames: int, free: int, in_host: bool = False, group: int | None = None) -> OutOfPages:
        (there, _), whose = pool.count(group), "" if group is None else f" of group {group} of ranks"
        return OutOfPages(
            f"{pool.format} pool {'in host memory' if in_host else 'on the device'}: {frames} frames{whose} "
            f"({frames * pool.frame_bytes:,} bytes) asked for, {there - free} of {there} are held and {free} free"
        )

    def check_room(
        self,
        table: Holder,
        formats: Sequence[str],
        leaving: Collection[Slot] = (),
        groups: Sequence[int] | None = None,
    ) -> None:
        """Could slots of these formats be taken, once `table` has let go of the slots `leaving`?

        Args:
            groups: as for `take`.

        Raises:
            OutOfPages: not so.
        """
        self.copies.land()
        elsewhere: set[Slot] | None = None
        keys = self._keys(formats, groups)
        for format, group in dict.fromkeys(keys):
            pool, count = self.pools[format], keys.count((format, group))
            _, free = pool.count(group)
            if count > free:
                if elsewhere is None:
                    others = (other.state.all_slots() for other in self._tables if other is not table)
                    elsewhere = set(chain(*others))
                own = (slot for slot in leaving if slot.pool is pool and group in (None, slot.group))
                free += sum(slot not in elsewhere for slot in own)
            if count > free:
                raise self._full(pool, count, free, group=group)

    def converted(self, frames: Sequence[tuple[Extent, Slot]], format: str) -> list[tuple[Extent, Slot]]:
        """The same frames in another format: found if a fork made them already, else made."""
        known = [extent.resident_as(format) for extent, _ in frames]  # held from here on
        fresh = [frame for frame, found in zip(frames, known) if found is None]
        profile.count("pages converted", len(fresh) * self.pages_per_frame * self.num_layers)
        with self.take([format] * len(fresh), groups=[old.group for _, old in fresh]) as slots:
            for source in {extent.format for extent, old in fresh if old.own}:
                pairs = [(old, new) for (extent, old), new in zip(fresh, slots) if extent.format == source and old.own]
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
        layers = range(0, self.num_layers * pool.num_pages, pool.num_pages)
        return self.lists.of(start + slot.pool_page for start in layers for slot in slots)

    # Host memory

    def to_host(self, frames: Sequence[tuple[Extent, Slot]]) -> None:
        """Start to copy to host memory what is not there yet.

        Raises:
            OutOfPages: host memory has no room, or no pool of this format; nothing was started.
        """
        new = [(extent, slot) for extent, slot in frames if extent.host is None]
        with self.take([extent.format for extent, _ in new], True, [slot.group for _, slot in new]) as places:
            self.copies.start([(slot, place) for (_, slot), place in zip(new, places)], to_host=True)
        profile.count("pages offloaded", len(new) * self.pages_per_frame * self.num_layers)
        for (extent, _), place in zip(new, places):
            extent.host = place

    def to_device(self, extents: Sequence[Extent]) -> list[Slot]:
        """The slots of these extents on the device, where copies of what was not there are started. They are to be
        read once `sync_copies` was called.

        Raises:
            OutOfPages: the device has no room; nothing was started.
        """
        found = [extent.device() for extent in extents]  # held from here on, be they on their way to host memory
        new = [extent for extent, slot in zip(extents, found) if slot is None]
        hosts = [extent.host for extent in new if extent.host is not None]
        with self.take([extent.format for extent in new], groups=[host.group for host in hosts]) as places:
            pairs = [(place, extent.host) for extent, place in zip(new, places) if extent.host is not None]
            assert len(pairs) == len(new), "a frame that is nowhere on the device is in host memory"
            self.copies.start(pairs, to_host=False)
        profile.count("pages prefetched", len(new) * self.pages_per_frame * self.num_layers)
        for extent, place in zip(new, places):
            extent.device = weakref.ref(place)
        rest = iter(places)
        return [next(rest) if slot is None else slot for slot in found]

    def keeping(self, table: Holder) -> None:
        """This world may read some frames that it has sent away, until a block is opened."""
        self._keeping.append(weakref.ref(table))

    @in_turn
    def sync_copies(self) -> None:
        """A block boundary: what was being copied has arrived, and what worlds without an open block have sent to host
        memory is theirs on the device no longer.

        On a GPU the current stream waits for the copies; the host does not.
        """
        self.copies.land()
        for reference in self._keeping:
            table = reference()
            if table is not None and not table.state.open_blocks:
                table.state = table.state.let_go()
        self._keeping.clear()
