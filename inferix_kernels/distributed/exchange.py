"""What all schedules have in common: one rank's part of a pass that several ranks make.

Every frame's tokens are cut among the ranks. In each layer a rank writes the keys and values of its own rows, and
everybody is sent the heads that it holds: they are on their way while the rank attends to the past, which was there
before. Queries are sent within a group alone, as its ranks hold different heads of the same frames; their outputs
return the same way. With one group that is Ulysses (arXiv:2309.14509); in groups of one rank, where no query moves, it
is a gather of the new keys and values. The bytes of either do not depend on how long the past is.

How the past is attended to is the schedule's: `_attend_past`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layout import KVPages, PageList
from ..ops import kv_append, paged_attention
from ..plans import Plan
from ..store.attention import FrameRead, Reads, Sharded
from . import agreement
from .transport import Message, Ticket, Transport, as_blob


class Exchange(Sharded):
    """One pass of a store that is one of several ranks'.

    Rows lie rank by rank, each rank's frame by frame.

    Attributes:
        frames: of the pass.
        rows, group: those of this rank, and of the ranks of its group, whose queries it attends with.
        heads: KV heads that it holds.
    """

    name = ""  # of the schedule

    def __init__(self, reads: Reads, transport: Transport):
        check(reads, transport, self.name)
        self.reads, self.store, self.shard, self.transport = reads, reads.store, reads.store.shard, transport
        self.frames = sum(block.queries for block in reads.blocks) // self.store.frame_tokens
        self.heads, self.rows, self.group = self.store.heads, self.rows_of(self.shard.rank), self.rows_of_group()
        self.widths = self.store.scratch.head_dim, self.store.scratch.value_dim
        width, spare = self.heads * sum(self.widths), self.store.page_size
        # A row holds its keys, then its values, of these heads. A page that is written whole ends in spare rows.
        self._arrived = self._room("arrived", self.frames * self.store.frame_tokens + spare, width)
        if self.shard.heads == 1:
            self._staged = self._arrived[self.rows.start : self.rows.stop + spare]
        else:
            self._staged = self._room("staged", self._own + spare, width * self.shard.heads)
        self.new = self.page_lists(lambda frame: frame.made)
        self._layer = self.store.num_layers  # that began last
        self._facts: agreement.Facts | None = None
        self._asked: Tensor | None = None  # own rows' queries that were sent in this layer
        self._queries: Tensor | None = None  # of the group's rows, and the heads that this rank holds
        self._out: Tensor | None = None  # of these, so far
        self._lse: Tensor | None = None

    @property
    def _own(self) -> int:
        return self.rows.stop - self.rows.start

    def _room(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.reads.rows.of(
            name, shape, self.store.scratch.k.dtype if dtype is None else dtype, self.store.device
        )

    # Sharded

    def staging(self, rows: slice) -> tuple[KVPages, PageList]:
        size, tokens = self.store.page_size, rows.stop - rows.start
        pages = -(-tokens // size)
        held = self._staged[rows.start : rows.start + pages * size]
        ids, lens = np.arange(pages, dtype=np.int32), np.full(pages, size, np.int32)
        lens[-1] = tokens - (pages - 1) * size
        return self.in_pages(held, self.store.all_heads), PageList(*self.store.lists.upload([ids, lens]))

    def begin(self, layer: int, q: Tensor | None) -> None:
        if layer <= self._layer:
            self._agree(q)
        self._layer, self._asked = layer, None
        self.transport.at(f"{self.name}: keys", layer, self.first_frame)
        attends = self.reads.predict or layer < self.store.num_layers - 1
        self._bring(layer, q if attends else None)

    def _bring(self, layer: int, q: Tensor | None) -> None:
        """`begin`; q: None if nothing is to be attended to yet."""
        asked = None if q is None else self._send_queries(q)
        sent = self._send_keys()
        if asked is not None:
            self._attend_past(layer, asked)
        sent.wait()
        self._append()

    def _agree(self, q: Tensor | None) -> None:
        """A forward begins: do all ranks make the same one? On a GPU, where it waits for the device to read what the
        others say, this is asked in the first forward of each pass."""
        if self._facts is None or self.store.device.type == "cpu":
            self._facts = agreement.fields(self.name, self.reads, q) if self._facts is None else self._facts
            agreement.compare(self.transport, self._facts)

    def _append(self) -> None:
        """What has arrived, and own rows, to scratch."""
        store = self.store
        for rank in range(self.shard.ranks):
            where = store.scratch_rows(self.frames, self.shard.rows(store.frame_tokens, rank))
            if len(where.ids):
                k, v = self._sides(self._arrived[self.rows_of(rank)], self.heads)
                kv_append(k, v, store.scratch, where, backend=store.backend)

    def everywhere(self, mean: Tensor) -> Tensor:
        parts = self._of_group(as_blob(mean))
        return torch.cat([part.view(mean.dtype).view(mean.shape) for part in parts]) if len(parts) > 1 else mean

    def __call__(self, layer: int, q: Tensor, out: Tensor | None) -> Tensor:
        self.transport.at(f"{self.name}: out", layer, self.first_frame)
        if self._asked is not q:  # keys were written by themselves, or other queries meet them
            self._attend_past(layer, self._send_queries(q))
        self._attend_new(layer)
        out = q.new_empty(*q.shape[:2], self.widths[1]) if out is None else out
        self._asked = None
        return self._return(q.dtype, out)

    # What moves

    def _send_keys(self) -> Ticket:
        """Own rows to everybody, of each the heads that it holds; and theirs from everybody."""
        messages = self.key_messages()
        return self.transport.post([send for send, _ in messages], [receive for _, receive in messages])

    def key_messages(self) -> list[tuple[Message, Message]]:
        """What goes to the rank so many places after this one, and what comes from the one so many before: from 1 on,
        so that no rank is everybody's first."""
        own, parts = self._arrived[self.rows], [self._arrived[self.rows]]
        if self.shard.heads > 1:
            sides = self._sides(self._staged[: self._own], self.store.all_heads)
            packed = self._room("packed", self.shard.heads, *own.shape)
            for part, *heads in zip(packed, *(x.split(self.heads, 1) for x in sides)):
                torch.cat([x.flatten(1) for x in heads], 1, out=part)
            parts = list(packed)
            own.copy_(parts[self.shard.head_rank])
        others = [(self.shard.rank + step) % self.shard.ranks for step in range(1, self.shard.ranks)]
        sends = [Message(rank, as_blob(parts[rank % self.shard.heads])) for rank in others]
        receives = [Message(rank, as_blob(self._arrived[self.rows_of(rank)])) for rank in reversed(others)]
        return list(zip(sends, receives))

    def _send_queries(self, q: Tensor) -> Ticket:
        """Own rows to the ranks of the group, of each the heads that it holds. What arrives is self._queries."""
        self._asked = q
        if self.shard.heads == 1:
            self._queries = q
            return NOTHING
        heads = self.shard.share("qkv: query heads", q.shape[1])
        parts = self._room("asking", self.shard.heads, self._own, heads, q.shape[2], dtype=q.dtype)
        parts.copy_(q.unflatten(1, (self.shard.heads, heads)).transpose(0, 1))
        self._queries = self._room("queries", self._grouped, heads, q.shape[2], dtype=q.dtype)
        rows = self._rows_in_group()
        self._queries[rows[self.shard.head_rank]] = parts[self.shard.head_rank]
        peers = self._peers()
        return self.transport.post(
            [Message(rank, as_blob(parts[part])) for part, rank in peers],
            [Message(rank, as_blob(self._queries[rows[part]])) for part, rank in peers],
        )

    def _return(self, dtype: torch.dtype, out: Tensor) -> Tensor:
        """What the group's rows attended to, each back to its rank."""
        assert self._out is not None
        if self.shard.heads == 1:
            return out.copy_(self._out)
        made, rows, peers = self._out.to(dtype), self._rows_in_group(), self._peers()
        parts = self._room("answers", self.shard.heads, self._own, *made.shape[1:], dtype=dtype)
        parts[self.shard.head_rank] = made[rows[self.shard.head_rank]]
        self.transport.post(
            [Message(rank, as_blob(made[rows[part]])) for part, rank in peers],
            [Message(rank, as_blob(parts[part])) for part, rank in peers],
        ).wait()
        out.unflatten(1, (self.shard.heads, made.shape[1])).copy_(parts.transpose(0, 1))
        return out

    def _of_group(self, blob: Tensor) -> list[Tensor]:
        """This rank's bytes and those of the others of its group, by their part of the heads; all give as many."""
        found, peers = [blob] * self.shard.heads, self._peers()
        for part, _ in peers:
            found[part] = torch.empty_like(blob)
        self.transport.post(
            [Message(rank, blob) for _, rank in peers], [Message(rank, found[part]) for part, rank in peers]
        ).wait()
        return found

    # Attention

    def _attend_past(self, layer: int, asked: Ticket) -> None:
        """Wait for the group's queries, and attend to what was there before the pass, by `attend`."""
        raise NotImplementedError

    def _attend_new(self, layer: int) -> None:
        self.attend(layer, self.store.layers[layer], self.new)

    def start(self) -> None:
        """Nothing was attended to yet: the next `attend` is the first."""
        self._out = self._lse = None

    def attend(self, layer: int, pools: Sequence[KVPages], plan: Plan | None) -> None:
        """The group's queries attend to more pages; None: there are none."""
        q = self._queries
        assert q is not None
        if plan is None or not len(q):
            if self._out is None:
                self._out, self._lse = self._nothing(q)
            return
        more = self._out is not None
        if not more:
            self._out, self._lse = self._outputs(q)
        options: dict[str, Any] = {"precision": self.precision(layer), "backend": self.store.backend}
        options |= {"accumulate": more, "deadline": self.deadline(plan)}
        paged_attention(q, pools, plan, out=self._out, lse=self._lse, **options)

    def deadline(self, plan: Plan) -> float:
        """Of attention, in seconds: later than that of all messages that bring its pages, one after the other."""
        return self.transport.deadline * (1 + (0 if plan.counters is None else len(plan.counters)))

    def precision(self, layer: int) -> str:
        """The same for all worlds of a pass: no rank may round where another does not."""
        wanted = {self.reads.precision[block.world][layer] for block in self.reads.blocks}
        return wanted.pop() if len(wanted) == 1 else "auto"

    def _outputs(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Sums are kept in float32, whatever the queries are in."""
        out = self._room("sums", *q.shape[:2], self.widths[1], dtype=torch.float32)
        return out, self._room("lse", *q.shape[:2], dtype=torch.float32)

    def _nothing(self, q: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self._outputs(q)
        return out.zero_(), lse.fill_(-torch.inf)

    # Small things

    @property
    def first_frame(self) -> int:
        """What a lost rank's error calls the block."""
        return self.reads.first_frame

    @property
    def _grouped(self) -> int:
        return self.group.stop - self.group.start

    def _peers(self) -> list[tuple[int, int]]:
        """(its part of the heads, rank) of the others of the group."""
        return [(part, rank) for part, rank in enumerate(self.shard.group_ranks) if rank != self.shard.rank]

    def rows_of(self, rank: int) -> slice:
        rows = self.shard.rows(self.store.frame_tokens, rank)
        return slice(self.frames * rows.start, self.frames * rows.stop)

    def rows_of_group(self, group: int | None = None) -> slice:
        first = (self.shard.group if group is None else group) * self.shard.heads
        return slice(self.rows_of(first).start, self.rows_of(first + self.shard.heads - 1).stop)

    def _rows_in_group(self) -> list[slice]:
        """Of each rank of the group, counted from the group's first."""
        first, each = self.group.start, (self.rows_of(rank) for rank in self.shard.group_ranks)
        return [slice(rows.start - first, rows.stop - first) for rows in each]

    def page_id(self, frame: FrameRead) -> int:
        return frame.page_id

    def page_lists(
        self,
        wanted: Callable[[FrameRead], bool],
        group: int | None = None,
        places: Mapping[tuple[str, int], int] | None = None,
    ) -> Plan | None:
        """The plan of the queries of a group, by default this rank's, over the frames wanted of those that each block
        reads. None: there is nothing to do.

        Args:
            places: page ids of frames, where they are others than the store's.
        """
        store = self.store
        reads = [
            [self.page_id(frame) if places is None else places[frame.place] for frame in block.frames if wanted(frame)]
            for block in self.reads.blocks
        ]
        ends, blocks = self.segments(group)
        frames = [page for block in blocks for page in reads[block]]
        if not frames or not ends[-1]:
            return None
        lists, pages = store.lists, np.cumsum([0, *(len(reads[block]) for block in blocks)]) * store.pages_per_frame
        indptrs = (np.array(ends, np.int32), pages.astype(np.int32))
        return Plan(*lists.upload([*indptrs, lists.pages(frames), lists.lengths(pages[-1])]))

    def segments(self, group: int | None = None) -> tuple[list[int], list[int]]:
        """Of the queries of a group, by default this rank's: 0 and where each segment ends, and whose page list it
        reads, by block."""
        first, store = (self.shard.group if group is None else group) * self.shard.heads, self.store
        ends, blocks = [0], list[int]()
        for rank in range(first, first + self.shard.heads):
            rows = self.shard.rows(store.frame_tokens, rank)
            for i, block in enumerate(self.reads.blocks):
                count = block.queries // store.frame_tokens * (rows.stop - rows.start)
                if len(self.reads.blocks) == 1 and blocks:  # of one block: the order of its queries is all the same
                    ends[-1] += count
                    continue
                ends.append(ends[-1] + count)
                blocks.append(i)
        return ends, blocks

    def in_pages(self, rows: Tensor, heads: int) -> KVPages:
        """Rows that hold keys and values of so many heads, whole pages of them."""
        sides = (x.unflatten(0, (-1, self.store.page_size)).transpose(1, 2) for x in self._sides(rows, heads))
        return KVPages(self.store.scratch.format, *sides)

    def _sides(self, rows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, D], [rows, heads, Dv] of rows that hold both."""
        k, v = rows.split_with_sizes([heads * width for width in self.widths], 1)
        return k.unflatten(1, (heads, -1)), v.unflatten(1, (heads, -1))


class _Nothing:
    def wait(self, deadline: float | None = None) -> None:
        pass


NOTHING = _Nothing()


def check(reads: Reads, transport: Transport, name: str) -> None:
    """Raises ValueError unless this schedule can serve this pass."""
    shard = reads.store.shard
    if (transport.rank, transport.size) != (shard.rank, shard.ranks):
        raise ValueError(
            f"transport must be that of the store's rank {shard.rank} of {shard.ranks}, got that of rank "
            f"{transport.rank} of {transport.size}"
        )
    if transport.device != reads.store.device:
        raise ValueError(
            f"transport must be on {reads.store.device} like the store, got {transport.device} on rank {shard.rank}"
        )
