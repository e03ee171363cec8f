"""The KV store: pools of pages for all layers, shared by any number of worlds.

    store = KVStore(layers=30, heads=12, head_dim=128, frame_tokens=1560, block_frames=3, pools={"int8": 21})
    table = store.open(Policy(window=18, sink=3))          # one world: see page_table.py

The unit that is allocated, shared, moved and freed is the *extent*: the pages of one frame, in one format, in every
layer. A committed extent never changes, so worlds share it by counting references, and whoever wants it otherwise
(another format, other contents) makes another. Extents live on the store's device, in host memory, or in both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import layout
from ._check import check_counts, check_page_size
from .layout import FORMATS, KVPages, PageList, as_bytes
from .ops import kv_commit, kv_gather

if TYPE_CHECKING:
    from .page_table import PageTable
    from .policy import Policy


class OutOfPages(RuntimeError):
    """A pool has no room for what was asked; nothing was changed."""


class NotResident(RuntimeError):
    """A frame that was to be read lies in host memory alone; nothing was changed."""


@dataclasses.dataclass(eq=False)
class Extent:
    """One frame's keys and values, in every layer.

    Attributes:
        slot: its place in the format's pool on the device; host_slot: in host memory. One may be None.
        arriving: the copy to the device is still under way.
        references: worlds that hold it; hot: those of them that want it on the device.
        derived: the same frame in other formats, made from this one, so that forks that age alike share that too.
    """

    format: str
    slot: int | None = None
    host_slot: int | None = None
    arriving: bool = False
    references: int = 1
    hot: int = 1
    origin: Extent | None = None
    derived: dict[str, Extent] = dataclasses.field(default_factory=dict)

    @property
    def resident(self) -> bool:
        return self.slot is not None and not self.arriving


class Pool:
    """The slots of one format on one device, each pages_per_frame pages in every layer."""

    def __init__(self, store: KVStore, format: str, frames: int, device: torch.device | str, base: int, pin: bool):
        self.format, self.frames, self.base = format, frames, base
        self.pages_per_frame, self.num_pages = store.pages_per_frame, frames * store.pages_per_frame
        shape = (store.heads, store.page_size, store.head_dim, device, pin)
        self.pages = KVPages.empty(format, store.num_layers * self.num_pages, *shape)
        self.layers = [self.layer(i) for i in range(store.num_layers)]
        self.free = list(range(frames))[::-1]

    def layer(self, layer: int) -> KVPages:
        return self.pages.part(layer * self.num_pages, (layer + 1) * self.num_pages)

    def slot(self, layer: int, slot: int) -> KVPages:
        """The pages of one slot in one layer."""
        return self.layers[layer].part(slot * self.pages_per_frame, (slot + 1) * self.pages_per_frame)

    @property
    def frame_bytes(self) -> int:
        return self.pages.nbytes // self.frames


class KVStore:
    """Pools of pages, and who holds them.

    A page id means the same page in every layer. Ids count through the pools in their order, then through scratch.
    A frame's tokens begin on a page boundary; its last page may be partly valid. Scratch is one layer deep: a layer's
    noisy keys are read only by its own attention, and the clean pass commits each layer as it goes by.

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
        host, scratch_format = host or {}, scratch_format or layout.scratch_format(device)
        counts = {"layers": layers, "heads": heads, "frame_tokens": frame_tokens, "block_frames": block_frames}
        counts |= {"scratch_blocks": scratch_blocks}
        counts |= {"head_dim": head_dim if isinstance(head_dim, int) else min(head_dim)}
        counts |= {f"pools[{format!r}]": frames for format, frames in pools.items()}
        counts |= {f"host[{format!r}]": frames for format, frames in host.items()}
        check_counts(counts)
        if unknown := [format for format in (*pools, *host, scratch_format) if format not in FORMATS]:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {unknown[0]!r}")
        if not pools:
            raise ValueError("pools must name at least one format, got none")
        check_page_size(page_size)
        if FORMATS[scratch_format].quantized:
            raise ValueError(f"scratch_format must not quantize, got {scratch_format!r}: noise is never quantized")
        self.num_layers, self.heads, self.head_dim, self.frame_tokens = layers, heads, head_dim, frame_tokens
        self.block_frames, self.scratch_blocks = block_frames, scratch_blocks
        self.page_size, self.model = page_size, model
        self.device, self.backend = torch.device(device), backend
        self.pages_per_frame = -(-frame_tokens // page_size)
        last = frame_tokens - (self.pages_per_frame - 1) * page_size
        lens = [page_size] * (self.pages_per_frame - 1) + [last]
        self._lens = torch.tensor([lens], dtype=torch.int32, device=device)  # of each frame, as many as were asked for
        self._steps = np.arange(self.pages_per_frame, dtype=np.int32)
        self.pools: dict[str, Pool] = {}
        base = 0
        for format, frames in pools.items():
            self.pools[format] = Pool(self, format, frames, self.device, base, False)
            base += self.pools[format].num_pages
        self.scratch_base = base
        pin = self.device.type == "cuda"
        self.host = {format: Pool(self, format, frames, "cpu", 0, pin) for format, frames in host.items()}
        shape = (heads, page_size, head_dim, self.device)
        self.scratch = KVPages.empty(scratch_format, scratch_blocks * block_frames * self.pages_per_frame, *shape)
        # Page ids count through these, in this order.
        self.layers = [[*(pool.layers[i] for pool in self.pools.values()), self.scratch] for i in range(layers)]
        # MLA's rows are keys and values at once: taking a mean off the keys would change the values too.
        quantizes = any(FORMATS[format].quantized for format in pools)
        self.freezes_mean = quantizes and isinstance(head_dim, int)
        self._unsettled: dict[Extent, None] = {}  # an ordered set: extents with a copy under way
        self._copies = torch.cuda.Stream(self.device) if pin else None

    def open(self, policy: Policy) -> PageTable:
        """A new, empty world over this store."""
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

    def first_page(self, extent: Extent) -> int:
        assert extent.slot is not None, "callers have checked that it is resident"
        return self.pools[extent.format].base + extent.slot * self.pages_per_frame

    def gather(self, pools: Sequence[KVPages], where: PageList, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kv_gather of whole frames. How many tokens that makes is known here: nothing is read from the device."""
        tokens = len(where.ids) // self.pages_per_frame * self.frame_tokens
        widths = (self.scratch.head_dim, self.scratch.value_dim)
        k, v = (torch.empty(tokens, self.heads, width, dtype=dtype, device=self.device) for width in widths)
        return kv_gather(pools, where, out=(k, v), backend=self.backend)

    # Holding and letting go

    def allocate(self, formats: Sequence[str], in_host: bool = False) -> list[Extent]:
        """A new extent per format named, all or none; on the device, or cold in host memory.

        Raises:
            OutOfPages: a pool has too few free slots, even once the copies under way have landed.
        """
        if in_host:
            slots = self._take(self.host, formats, "in host memory")
            return [Extent(format, host_slot=slot, hot=0) for format, slot in zip(formats, slots)]
        for format in formats:
            if format not in self.pools:
                raise ValueError(f"format must have a pool in this store ({', '.join(self.pools)}), got {format!r}")
        return [Extent(format, slot) for format, slot in zip(formats, self._take(self.pools, formats, "on the device"))]

    def _take(self, pools: Mapping[str, Pool], formats: Sequence[str], where: str) -> list[int]:
        """A free slot per format named, all or none."""
        self._check_room(pools, formats, where)
        return [pools[format].free.pop() for format in formats]

    def _check_room(
        self, pools: Mapping[str, Pool], formats: Sequence[str], where: str, leaving: Sequence[Extent] = ()
    ) -> None:
        """Are there slots for all of these, or would be, were these extents let go by one world?"""
        need = {format: formats.count(format) for format in dict.fromkeys(formats)}
        if any(frames > len(pools[format].free) for format, frames in need.items()):
            self.settle()
        for format, frames in need.items():
            pool = pools[format]
            ours = [e for e in leaving if e.format == format and e.references == 1 and e.slot is not None]
            free = len(pool.free) + len(ours)
            if frames > free:
                raise OutOfPages(
                    f"{format} pool {where}: {frames} frames ({frames * pool.frame_bytes:,} bytes) asked for, "
                    f"{pool.frames - free} of {pool.frames} are held and {free} free"
                )

    def check_room(self, formats: Sequence[str], leaving: Sequence[Extent]) -> None:
        """Could these be allocated, once one world has let go of the extents `leaving`?

        Raises:
            OutOfPages: not so.
        """
        self._check_room(self.pools, formats, "on the device", leaving)

    def share(self, extent: Extent, hot: bool = True) -> Extent:
        extent.references += 1
        extent.hot += hot
        return extent

    def release(self, extent: Extent, hot: bool = True) -> None:
        extent.references -= 1
        extent.hot -= hot
        if extent.references and extent.hot == 0:
            self._unsettled[extent] = None  # the worlds that are left have a host copy
        elif extent.references == 0 and extent not in self._unsettled:
            self._free(extent)

    def _free(self, extent: Extent) -> None:
        if extent.slot is not None:
            self.pools[extent.format].free.append(extent.slot)
        if extent.host_slot is not None:
            self.host[extent.format].free.append(extent.host_slot)
        extent.slot = extent.host_slot = None
        if extent.origin is not None:
            del extent.origin.derived[extent.format]
        for other in extent.derived.values():
            other.origin = None

    def converted(self, extents: Sequence[Extent], format: str) -> list[Extent]:
        """The same frames in another format, one reference more each: found if a fork made them already, else made."""
        fresh = [e for e in extents if format not in e.derived or not e.derived[format].resident]
        made = self.allocate([format] * len(fresh))
        try:
            for source in {extent.format for extent in fresh}:
                pairs = [(old, new) for old, new in zip(fresh, made) if old.format == source]
                lists = [self._all_layers(group) for group in zip(*pairs)]
                kv_commit(self.pools[source].pages, lists[0], self.pools[format].pages, lists[1], backend=self.backend)
        except BaseException:
            for new in made:
                self.release(new)
            raise
        for extent, new in zip(fresh, made):  # only now: pages that were not written are no one's to share
            if away := extent.derived.get(format):  # in host memory alone, where whoever sent it there still has it
                away.origin = None
            extent.derived[format], new.origin, new.references, new.hot = new, extent, 0, 0
        return [self.share(extent.derived[format]) for extent in extents]

    def _all_layers(self, extents: Sequence[Extent]) -> PageList:
        """Pages of extents of one format in every layer, for the pool of all layers."""
        pool = self.pools[extents[0].format]
        offsets = range(0, self.num_layers * pool.num_pages, pool.num_pages)
        slots = [extent.slot * self.pages_per_frame for extent in extents if extent.slot is not None]
        return self.page_list(offset + slot for offset in offsets for slot in slots)

    # Host memory

    def offload(self, extents: Sequence[Extent]) -> None:
        """Start to copy to host memory what is not there yet; `settle` gives the slots on the device back.

        Raises:
            OutOfPages: host memory has no room, or no pool of this format; nothing was started.
        """
        new = [extent for extent in extents if extent.host_slot is None]
        for extent in new:
            if extent.format not in self.host:
                raise OutOfPages(f"{extent.format} pool in host memory: there is none, see KVStore(host=...)")
        for extent, slot in zip(new, self._take(self.host, [extent.format for extent in new], "in host memory")):
            extent.host_slot = slot
        self._copy(new, to_host=True)
        self._unsettled.update(dict.fromkeys(extents))

    def prefetch(self, extents: Sequence[Extent]) -> None:
        """Start to copy to the device what is not there; the next `settle` makes it readable.

        Raises:
            OutOfPages: the device has no room; nothing was started.
        """
        new = [extent for extent in extents if extent.slot is None]
        for extent, slot in zip(new, self._take(self.pools, [extent.format for extent in new], "on the device")):
            extent.slot, extent.arriving = slot, True
        self._copy(new, to_host=False)
        self._unsettled.update(dict.fromkeys(new))

    def settle(self) -> None:
        """A block boundary: what was being copied has arrived, and slots that no world wants on the device are free.

        On a GPU the current stream waits for the copies; the host does not.
        """
        if self._copies is not None and self._unsettled:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        moved, self._unsettled = self._unsettled, {}
        for extent in moved:
            extent.arriving = False
            if extent.references == 0:
                self._free(extent)
            elif extent.hot == 0 and extent.slot is not None and extent.host_slot is not None:
                self.pools[extent.format].free.append(extent.slot)
                extent.slot = None

    def _copy(self, extents: Sequence[Extent], to_host: bool) -> None:
        """Whole extents between device and host, on the copy stream where there is one."""
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies) if self._copies is not None else contextlib.nullcontext():
            for extent in extents:
                assert extent.slot is not None and extent.host_slot is not None
                for layer in range(self.num_layers):
                    device = self.pools[extent.format].slot(layer, extent.slot)
                    host = self.host[extent.format].slot(layer, extent.host_slot)
                    source, target = (device, host) if to_host else (host, device)
                    for x, y in zip(source, target):
                        if x is not None and y is not None:
                            as_bytes(y).copy_(as_bytes(x), non_blocking=True)
