"""R: each group of ranks holds some frames of the past, and the pages that a pass reads go round (arXiv:2310.01889).

They are sent as they are stored, codes and scales, and attended to as they arrive, while the next ones are on their
way: two buffers take turns.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..layout import KVPages, as_bytes
from ..store.attention import Attend, FrameRead, Local, Reads
from .arriving import Arriving, Delivery
from .exchange import NOTHING
from .frame_shards import FrameShards
from .transport import Message, Ticket, Transport


@dataclasses.dataclass(frozen=True)
class Ring:
    """Attend to the frames of the past that lie here, then to those of the group before, and so on around.

    What it sends grows with the past: for where the past is too large to be held whole by each rank, and heads can't be
    cut. It needs a store with some of the frames, `Shard(..., frames=...)`.

    Attributes:
        arrivals: attend to all by one call, which waits for pages that are on their way, in place of one for each hop.
            On a CPU alone; it takes memory for the past of one layer.

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
    arrivals: bool = False

    def bind(self, reads: Reads) -> Attend:
        alone = self.transport.size == 1 == reads.store.shard.ranks
        if alone:
            return Local().bind(reads)
        return (_ArrivingRing if self.arrivals else _Ring)(reads, self.transport)


class _Hops(FrameShards):
    """Pages on their way round."""

    def __init__(self, reads: Reads, transport: Transport):
        super().__init__(reads, transport)
        here, groups = self.shard.frame_rank, self.shard.frames
        self.visits = [_Visit(self, [(here - hop) % groups]) for hop in range(groups)]  # of each hop, own pages first
        room = 1 << (max(visit.nbytes for visit in self.visits)).bit_length()  # which few sizes of the past share
        self._buffers = [self._room(name, room, dtype=torch.uint8) for name in ("ring 0", "ring 1")]

    def held(self, hop: int) -> Tensor:
        """Where the pages of a hop are, until those of the next but one come."""
        return self._buffers[hop % 2][: self.visits[hop].nbytes]

    def send(self, layer: int, hop: int) -> Ticket:
        """The pages that are held, to the next group; those of the following hop from the one before."""
        ranks = self.shard.alike
        after, before = (ranks[(self.shard.group + step) % self.shard.groups] for step in (1, -1))
        self.transport.at(f"{self.name}: hop {hop + 1} of {len(ranks) - 1}", layer, self.first_frame)
        return self.transport.post([Message(after, self.held(hop))], [Message(before, self.held(hop + 1))])


class _Ring(_Hops):
    name = "Ring"

    def __init__(self, reads: Reads, transport: Transport):
        super().__init__(reads, transport)
        self.past = self.here()
        self._plans = [self.page_lists(visit.reads, places=visit.ids) for visit in self.visits]

    def _attend_past(self, layer: int, asked: Ticket) -> None:
        self.visits[0].pack(self.store.layers[layer], self.held(0))
        for hop, (visit, plan) in enumerate(zip(self.visits, self._plans)):
            ticket = self.send(layer, hop) if hop + 1 < len(self.visits) else NOTHING
            if hop == 0:
                asked.wait()
                self.start()
                if self.past is not None:
                    self.attend(layer, self.store.layers[layer], self.past)
            elif plan is not None:
                self.attend(layer, visit.pools(self.held(hop)), plan)
            ticket.wait()


class _ArrivingRing(Arriving, _Hops):
    name = "Ring"

    def __init__(self, reads: Reads, transport: Transport):
        super().__init__(reads, transport)
        groups = [visit.groups[0] for visit in self.visits[1:]]
        everything = _Visit(self, groups)
        self.landed = everything.pools(self._room("landed", everything.nbytes, dtype=torch.uint8))
        first = self._first + self.arrived.pages
        places = [{place: first + everything.ids[place] for place in visit.ids} for visit in self.visits[1:]]
        self.plan = self.plan_of(self.lies_here, places)
        self._lands, landed = [], Counter[str]()  # of each hop, where its pages of each format begin
        for visit in self.visits[1:]:
            self._lands.append(dict(landed))
            landed.update(visit.pages)

    def hops(self, layer: int) -> list[Delivery]:
        self.visits[0].pack(self.store.layers[layer], self.held(0))
        first = self.shard.ranks - 1
        return [Delivery(first + hop, partial(self._land, layer, hop)) for hop in range(len(self.visits) - 1)]

    def _land(self, layer: int, hop: int) -> None:
        """A hop, and its pages to where they stay."""
        self.send(layer, hop).wait()
        targets = {pool.format: pool for pool in self.landed}
        for source in self.visits[hop + 1].pools(self.held(hop + 1)):
            start = self._lands[hop].get(source.format, 0)
            for name, x in source.tensors.items():
                targets[source.format].tensors[name][start : start + source.pages].copy_(x)


class _Visit:
    """Pages of the past that groups hold, as they go round.

    Attributes:
        groups: which.
        ids: of each frame the page id of its first page, counted through `pools`.
        pages: how many of each format.
        nbytes: of all of them.
    """

    def __init__(self, ring: _Hops, groups: Sequence[int]):
        store, self.groups = ring.store, groups
        read = [frame for block in ring.reads.blocks for frame in block.frames if not frame.made]
        frames: dict[tuple[str, int], FrameRead] = {
            frame.place: frame for group in groups for frame in read if frame.group == group
        }
        self.ids: dict[tuple[str, int], int] = {}
        self._pages: dict[str, list[int]] = {}  # of each format's pool, where they lie: in the group that holds them
        for format in (format for format in store.pools if any(place[0] == format for place in frames)):
            places = [place for place in frames if place[0] == format]
            first, size = len(self.ids) * store.pages_per_frame, store.pages_per_frame
            self.ids |= {place: first + i * size for i, place in enumerate(places)}
            starts = [frames[place].page_id - store.pools[format].first_page_id for place in places]
            self._pages[format] = [page for start in starts for page in range(start, start + size)]
        self.pages = {format: len(pages) for format, pages in self._pages.items()}
        self._shapes = {
            format: {name: (count, x) for name, x in store.pools[format].layers[0].tensors.items()}
            for format, count in self.pages.items()
        }
        lists = [np.array(pages, np.int32) for pages in self._pages.values()]
        self._lists = dict(zip(self._pages, store.lists.upload(lists))) if lists else {}
        self._index = {format: i for i, format in enumerate(store.pools)}
        each = (pages * x[0].nbytes for shapes in self._shapes.values() for pages, x in shapes.values())
        self.nbytes = sum(each)

    def reads(self, frame: FrameRead) -> bool:
        return frame.place in self.ids and not frame.made

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
        for target in self.pools(blob):
            source, pages = layer[self._index[target.format]], self._lists[target.format]
            for name, x in target.tensors.items():
                torch.index_select(as_bytes(source.tensors[name]), 0, pages, out=as_bytes(x))
