"""R: each group of ranks holds some frames of the past, and the pages that a pass reads go round (arXiv:2310.01889).

They are sent as they are stored, codes and scales, and attended to as they arrive, while the next ones are on their
way: two buffers take turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..layout import KVPages, as_bytes
from ..plans import Plan
from ..store.attention import Attend, FrameRead, Local, Reads
from .frame_shards import FrameShards
from .transport import Message, Ticket, Transport


@dataclasses.dataclass(frozen=True)
class Ring:
    """Attend to the frames of the past that lie here, then to those of the group before, and so on around.

    What it sends grows with the past: for where the past is too large to be held whole by each rank, and heads can't be
    cut. It needs a store with some of the frames, `Shard(..., frames=...)`.

    Example:
        >>> from inferix_kernels.distributed import Ring, in_process_group, run_ranks
        >>> def make(transport):
        ...     store = KVStore(layers=1, heads=2, head_dim=16, frame_tokens=10, block_frames=1, pools={"int8": 2},
        ...         shard=Shard(transport.rank, ranks=2, frames=2))
        ...     table = store.open(Policy())
        ...     noisy = table.plan([table.open_block(frames=1)], attention=Ring(transport))
        ...     return noisy.attend(0, torch.ones(5, 3 * 2 * 16), None, None)
        >>> [list(out.shape) for out in run_ranks(in_process_group(2), make)]
        [[5, 32], [5, 32]]
    """

    transport: Transport

    def bind(self, reads: Reads) -> Attend:
        alone = self.transport.size == 1 == reads.store.shard.ranks
        return Local().bind(reads) if alone else _Ring(reads, self.transport)


class _Ring(FrameShards):
    name = "Ring"

    def __init__(self, reads: Reads, transport: Transport):
        super().__init__(reads, transport)
        self.past = self.here()
        self._visits = [_Visit(self, group) for group in range(self.shard.frames)]
        room = 1 << (max(visit.nbytes for visit in self._visits)).bit_length()  # which few sizes of the past share
        self._buffers = [self._room(name, room, dtype=torch.uint8) for name in ("ring 0", "ring 1")]

    def _attend_past(self, layer: int, asked: Ticket) -> None:
        ranks, here = self.shard.alike, self.shard.frame_rank
        after, before = (ranks[(self.shard.group + step) % self.shard.groups] for step in (1, -1))
        visits = [self._visits[(here - hop) % len(ranks)] for hop in range(len(ranks))]
        held, free = self._buffers
        visits[0].pack(self.store.layers[layer], held)
        for hop, visit in enumerate(visits):
            self.transport.at(f"{self.name}: hop {hop + 1} of {len(ranks) - 1}", layer, self.first_frame)
            ticket = None
            if hop + 1 < len(visits):
                following = visits[hop + 1].nbytes
                sends, receives = [Message(after, held[: visit.nbytes])], [Message(before, free[:following])]
                ticket = self.transport.post(sends, receives)
            if hop == 0:
                asked.wait()
                self.start()
                if self.past is not None:
                    self.attend(layer, self.store.layers[layer], self.past)
            elif visit.plan is not None:
                self.attend(layer, visit.pools(held), visit.plan)
            if ticket is not None:
                ticket.wait()
            held, free = free, held


class _Visit:
    """Pages of the past that one group holds, as they go round.

    Attributes:
        nbytes: of all of them.
        plan: of this rank's queries over them, with page ids counted through `pools`. None: there is nothing to do.
    """

    def __init__(self, ring: _Ring, group: int):
        store = ring.store
        read = [
            frame for block in ring.reads.blocks for frame in block.frames if not frame.made and frame.group == group
        ]
        frames: dict[tuple[str, int], FrameRead] = {frame.place: frame for frame in read}
        self._formats = [format for format in store.pools if any(place[0] == format for place in frames)]
        self._pages: dict[str, list[int]] = {}  # of each format's pool, where they lie: in the group that holds them
        ids, first = {}, 0
        for format in self._formats:
            starts = [
                frame.page_id - store.pools[format].first_page_id for p, frame in frames.items() if p[0] == format
            ]
            for place in (place for place in frames if place[0] == format):
                ids[place] = first
                first += store.pages_per_frame
            self._pages[format] = [page for start in starts for page in range(start, start + store.pages_per_frame)]
        self._shapes = {
            format: {name: (len(self._pages[format]), x) for name, x in store.pools[format].layers[0].tensors.items()}
            for format in self._formats
        }
        lists = [np.array(pages, np.int32) for pages in self._pages.values()]
        self._lists = dict(zip(self._pages, store.lists.upload(lists))) if lists else {}
        self._index = {format: i for i, format in enumerate(store.pools)}
        each = (pages * x[0].nbytes for shapes in self._shapes.values() for pages, x in shapes.values())
        self.nbytes = sum(each)
        self.plan: Plan | None = ring.page_lists(lambda frame: frame.place in ids and not frame.made, places=ids)

    def pools(self, blob: Tensor) -> list[KVPages]:
        """The pages in a blob, one pool per format."""
        pools, start = [], 0
        for format, shapes in self._shapes.items():
            tensors = {}
            for name, (pages, x) in shapes.items():
                stop = start + pages * x[0].nbytes
                tensors[name] = blob[start:stop].view(x.dtype).view(pages, *x.shape[1:])
                start = stop
            pools.append(KVPages(format, **tensors))
        return pools

    def pack(self, layer: Sequence[KVPages], blob: Tensor) -> None:
        """Those that lie here, copied to a blob."""
        for format, target in zip(self._formats, self.pools(blob)):
            source = layer[self._index[format]]
            for name, x in target.tensors.items():
                torch.index_select(as_bytes(source.tensors[name]), 0, self._lists[format], out=as_bytes(x))
