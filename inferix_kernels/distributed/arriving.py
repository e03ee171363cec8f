"""One call of attention in each layer, over pages of which some are still on their way (`Plan.arrivals`).

What is there is attended to first, then each delivery as it comes, in the order of the page list: what came first
changes no bit. A thread beside the rank's own waits for the messages and raises the counters. New rows are read where
they arrive, so only a pass that commits moves them to scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arrivals import Counters
from ..layout import KVPages
from ..plans import Plan
from ..store.attention import BlockReads, FrameRead, Reads
from .exchange import Exchange
from .transport import Ticket, Transport

WAITING = ("auto", "compiled", "reference")  # backends that wait for pages
POOLS = 8  # of one call at most: csrc/kv_pages.h
NONE = -1  # in place of a counter
Hop = Mapping[tuple[str, int], int]  # what comes with it: page ids of frames, by their places


class Delivery(NamedTuple):
    """Attributes:
    counter: of the pages that come; NONE: nobody waits for it.
    bring: returns when they are there.
    """

    counter: int
    bring: Callable[[], None]


def deliver(deliveries: Sequence[Delivery], counters: Counters) -> None:
    """Bring one after the other, and say so. If one fails all counters are raised, so that nobody waits for what will
    not come, and its error is raised here."""
    try:
        with torch.inference_mode():  # which what is written may be from
            for counter, bring in deliveries:
                bring()
                if counter != NONE:
                    counters.raise_to(counter, 1)
    except BaseException:
        for counter in range(len(counters)):
            counters.raise_to(counter, 1)
        raise


class Arriving(Exchange):
    """What schedules have in common that attend so. A subclass makes `plan`, by `plan_of`.

    Attributes:
        arrived: the new rows of all ranks, as pages: what page ids count through after the store's pools.
        landed: pools of pages of the past that come from other ranks, which page ids count through after `arrived`.
        plan: of one call.
    """

    def __init__(self, reads: Reads, transport: Transport):
        super().__init__(reads, transport)
        store, size = self.store, self.store.page_size
        if store.device.type != "cpu" or store.backend not in WAITING:
            raise ValueError(
                f"arrivals must be False but on a CPU with backend {', '.join(WAITING)}, as other kernels wait for no "
                f"pages, got True on {store.device} with backend {store.backend} on rank {self.shard.rank}"
            )
        pages = -(-self.frames * store.frame_tokens // size)
        self.arrived = self.in_pages(self._arrived[: pages * size], self.heads)
        self.landed: list[KVPages] = []
        self.plan: Plan | None = None
        self._first = store.scratch_page_id + store.scratch.pages  # page id of what has arrived
        self.new = self.page_lists(lambda frame: frame.made and frame.place[0] != "scratch")  # once it is committed
        self._counters = Counters(self.shard.ranks - 1 + self.shard.frames - 1)
        self._coming: list[Delivery] = []

    def plan_of(self, here: Callable[[FrameRead], bool], hops: Sequence[Hop] = ()) -> Plan | None:
        """The plan of one call: frames of the past that lie here, rows that the pass makes, and frames that come.

        Args:
            hops: the deliveries that follow those of new rows.
        """
        pools = len(self.store.layers[0]) + 1 + len(self.landed)
        if pools > POOLS:
            raise ValueError(
                f"arrivals must be False where one call would read over {POOLS} pools, got True for {pools}: of the "
                f"store, of what is new, and {len(self.landed)} of pages that come, on rank {self.shard.rank}"
            )
        each = [self._entries(block, here, hops) for block in self.reads.blocks]
        ends, blocks = self.segments()
        entries = np.concatenate([each[block] for block in blocks])
        if not len(entries) or not ends[-1]:
            return None
        pages = np.cumsum([0, *(len(each[block]) for block in blocks)], dtype=np.int32)
        ids, lens, starts = (column.copy() for column in entries[:, :3].T)
        lists = [np.array(ends, np.int32), pages, ids, lens, starts, entries[:, 3:].ravel()]
        q_indptr, page_indptr, *three, arrivals = self.store.lists.upload(lists)
        ids_, lens_, starts_ = three
        plan = Plan(q_indptr, page_indptr, ids_, lens_, page_starts=starts_)
        return plan._replace(arrivals=arrivals.view(-1, 2), counters=self._counters.values)

    def _entries(self, block: BlockReads, here: Callable[[FrameRead], bool], hops: Sequence[Hop]) -> np.ndarray:
        """What a block reads, in the order in which it comes: page id, tokens, first slot, counter and 1 of each."""
        made = [frame.place[1] for frame in block.frames if frame.made and frame.place[0] == "scratch"]
        entries = self._whole([self.page_id(frame) for frame in block.frames if here(frame)], NONE)
        for step in range(self.shard.ranks):  # own rows, then those of the rank before, and so on
            rank = (self.shard.rank - step) % self.shard.ranks
            first, rows = self.rows_of(rank).start, self.shard.rows(self.store.frame_tokens, rank)
            count = rows.stop - rows.start
            for begin, end in runs(made):
                entries += self._part(first + begin * count, first + end * count, step - 1 if step else NONE)
        for hop, places in enumerate(hops):
            ids = [places[frame.place] for frame in block.frames if not frame.made and frame.place in places]
            entries += self._whole(ids, self.shard.ranks - 1 + hop)
        return np.array(entries, np.int32).reshape(-1, 5)

    def _whole(self, frames: Sequence[int], counter: int) -> list[tuple[int, int, int, int, int]]:
        """Of whole frames, given by the first page of each."""
        ids = self.store.lists.pages(frames)
        return [(page, n, 0, counter, 1) for page, n in zip(ids.tolist(), self.store.lists.lengths(len(ids)).tolist())]

    def _part(self, start: int, stop: int, counter: int) -> list[tuple[int, int, int, int, int]]:
        """Of rows start .. stop - 1 of what has arrived."""
        size, entries = self.store.page_size, []
        for page in range(start // size, -(-stop // size) if start < stop else 0):
            first, end = max(start, page * size), min(stop, (page + 1) * size)
            entries.append((self._first + page, end - first, first - page * size, counter, 1))
        return entries

    def _bring(self, layer: int, q: Tensor | None) -> None:
        asked = None if q is None else self._send_queries(q)
        self._counters.reset()
        messages = self.key_messages()
        sent = self.transport.post([send for send, _ in messages], [])
        posted = [self.transport.post([], [receive]) for _, receive in messages]
        self._coming = [Delivery(counter, ticket.wait) for counter, ticket in enumerate(posted)]
        self._coming.append(Delivery(NONE, sent.wait))
        if asked is not None:
            self._attend_past(layer, asked)
        else:
            deliver(self._taken(), self._counters)
        if self.reads.commits:
            self._append()

    def _taken(self) -> list[Delivery]:
        coming, self._coming = self._coming, []
        return coming

    def hops(self, layer: int) -> list[Delivery]:
        """What comes after the new rows."""
        return []

    def _attend_past(self, layer: int, asked: Ticket) -> None:
        asked.wait()
        self.start()
        coming = [*self._taken(), *self.hops(layer)]
        coming.sort(key=lambda delivery: delivery.counter == NONE)
        delivered = self.transport.beside.submit(deliver, coming, self._counters)
        self.attend(layer, [*self.store.layers[layer], self.arrived, *self.landed], self.plan)
        delivered.result()


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, one past the last) of numbers that follow each other.

    Example:
        >>> from inferix_kernels.distributed.arriving import runs
        >>> runs([3, 4, 5, 0, 1])
        [(3, 6), (0, 2)]
    """
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = found[-1][0], number + 1
        else:
            found.append((number, number + 1))
    return found
