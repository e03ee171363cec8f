"""How the queries of a pass attend, once their keys and values are written: a strategy that the caller chooses.

`Attention` is the choice, the same for any number of passes; `bind` makes it one pass's. Another strategy (in a ring of
devices, over gathered pages) is another class with `bind`: passes know no more of it than this file declares.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._check import check_counts
from .._dispatch import prepared_plan
from ..layout import KVPages, PageList
from ..ops import page_scores, page_summaries, paged_attention, select_pages
from ..plans import Plan, even_plan
from .buffers import Rows
from .storage import Storage


class FrameRead(NamedTuple):
    """A frame that a block reads, on the host."""

    place: tuple[str, int]  # the same on every rank: format and slot, or ("scratch", frame of scratch)
    page_id: int  # of its first page
    made: bool  # by this pass, which writes it or commits it
    group: int = 0  # see Slot.group


class BlockReads(NamedTuple):
    """What one block of a pass reads, on the host."""

    world: int  # which of the pass's worlds it belongs to
    queries: int
    past: int  # pages of other frames, first in its page list
    own: int  # pages of itself, in scratch
    frames: tuple[FrameRead, ...] = ()  # in the order of its page list


class Reads(NamedTuple):
    """What the queries of a pass read, the same in all layers.

    Attributes:
        store: its `layers[layer]` are the pools that page ids count through.
        plan: a segment of queries and a page list for each block.
        blocks: the same on the host.
        precision: of attention's products, for each world and layer; see ops.paged_attention.
        rows: room for what has a row for each query.
        captured: a graph may run this pass's kernels for the plan of a later one: nothing may be made of the plan
            outside of them.
        predict: False if the last layer attends to nothing.
        commits: what is committed: (frame of scratch, format, slot) of each.
        first_frame: of the pass: by it an error names the block.
    """

    store: Storage
    plan: Plan
    blocks: tuple[BlockReads, ...]
    precision: Sequence[Sequence[str]]
    rows: Rows
    captured: bool = False
    predict: bool = True
    commits: tuple[tuple[int, str, int], ...] = ()
    first_frame: int = 0

    def part(self, first: int, end: int) -> tuple[slice, Plan]:
        """Of blocks first .. end - 1: their rows of q, and the plan of these rows."""
        start = sum(block.queries for block in self.blocks[:first])
        rows = slice(start, start + sum(block.queries for block in self.blocks[first:end]))
        begin = sum(block.past + block.own for block in self.blocks[:first])
        pages = slice(begin, begin + sum(block.past + block.own for block in self.blocks[first:end]))
        q_indptr, page_indptr, ids, lens, bias, variants, *_ = self.plan
        arrivals = None if self.plan.arrivals is None else self.plan.arrivals[pages]
        ends = slice(first, end + 1)
        more = [None if x is None else x[pages] for x in (bias, variants)]
        part = Plan(q_indptr[ends] - start, page_indptr[ends] - begin, ids[pages], lens[pages], *more)
        return rows, part._replace(arrivals=arrivals, counters=self.plan.counters)


class Attend(Protocol):
    """Attention in one pass. Called once per layer, when the layer's keys and values are written and committed."""

    def __call__(self, layer: int, q: Tensor, out: Tensor | None) -> Tensor:
        """q [T, Hq, D], or [V, T, Hq, D] where the plan has page_variants; out to write to, [T, Hq, Dv] -> the same:
        `out`, if it is given."""


class Sharded(abc.ABC):
    """Attend, of one of several ranks, in a pass that they make together: see inferix_kernels.distributed.

    It has some rows of each frame, and maybe some heads. A layer's keys and values of these rows are written where
    `staging` says; `begin` brings those of other rows; then the pass commits, and then attends.
    """

    @abc.abstractmethod
    def staging(self, rows: slice) -> tuple[KVPages, PageList]:
        """Where keys and values of all heads are to be written, of some of its rows, counted from the pass's first."""

    @abc.abstractmethod
    def begin(self, layer: int, q: Tensor | None) -> None:
        """The layer's own rows are written. When it returns, scratch holds all keys and values that this rank is to
        commit or to read.

        Args:
            q: of its own rows, all heads, [rows, Hq, D], if they are known already: attention to what was there before
                the pass may begin.
        """

    @abc.abstractmethod
    def everywhere(self, mean: Tensor) -> Tensor:
        """[H, D] of the heads of this rank -> the same of all heads, from the ranks that hold them."""

    @abc.abstractmethod
    def __call__(self, layer: int, q: Tensor, out: Tensor | None) -> Tensor:
        """As for Attend, of its own rows and all heads."""


class Attention(Protocol):
    """A way to attend.

    Example:
        >>> class Noting:  # attends as Local does, and notes the layers
        ...     def bind(self, reads):
        ...         attend, self.layers = Local().bind(reads), []
        ...         return lambda layer, q, out: self.layers.append(layer) or attend(layer, q, out)
        >>> store = KVStore(layers=2, heads=2, head_dim=16, frame_tokens=10, block_frames=3, pools={"int8": 12})
        >>> table, noting = store.open(Policy(window=9)), Noting()
        >>> noisy = table.plan([table.open_block(frames=3)], attention=noting)
        >>> y = noisy.attend(0, torch.randn(30, 3 * 2 * 16), None, None)
        >>> noting.layers
        [0]
    """

    def bind(self, reads: Reads) -> Attend:
        """This way, for one pass. Raises ValueError for a pass that it can not serve."""


@dataclasses.dataclass(frozen=True)
class Local:
    """Attend to all that the page lists name, on the store's device.

    Example:
        >>> store = KVStore(layers=2, heads=2, head_dim=16, frame_tokens=10, block_frames=3, pools={"int8": 12})
        >>> table = store.open(Policy(window=9))
        >>> noisy = table.plan([table.open_block(frames=3)], attention=Local())  # which is plan's default
        >>> list(noisy.attend(0, torch.randn(30, 3 * 2 * 16), None, None).shape)
        [30, 32]
    """

    def bind(self, reads: Reads) -> Attend:
        return _Local(reads)


class _Local:
    def __init__(self, reads: Reads):
        self.reads = reads
        self._lse: Tensor | None = None  # of every layer in turn
        wanted = {tuple(reads.precision[block.world]) for block in reads.blocks}
        self._precision = (
            next(iter(wanted)) if len(wanted) == 1 else None
        )  # of each layer, where it is the same for all

    def __call__(self, layer: int, q: Tensor, out: Tensor | None) -> Tensor:
        store, reads = self.reads.store, self.reads
        if self._lse is None:
            self._lse = reads.rows.of("lse", q.shape[-3:-1], torch.float32, q.device)
            if not reads.captured:
                plan = prepared_plan(q, store.layers[layer], reads.plan, store.backend)
                self.reads = reads = reads._replace(plan=plan)
        pools = store.layers[layer]
        if self._precision is not None:
            precision = self._precision[layer]
            return paged_attention(
                q, pools, reads.plan, out=out, lse=self._lse, precision=precision, backend=store.backend
            )[0]
        # Worlds that differ in it get what each would get alone.
        out, first = torch.empty_like(q[0] if q.ndim == 4 else q) if out is None else out, 0
        attend = partial(paged_attention, pools=pools, backend=store.backend)
        for precision, run in groupby(reads.precision[block.world][layer] for block in reads.blocks):
            rows, plan = reads.part(first, end := first + len(list(run)))
            attend(q[..., rows, :, :], plan=plan, out=out[rows], lse=self._lse[rows], precision=precision)
            first = end
        return out


@dataclasses.dataclass(frozen=True)
class TopK:
    """Attend to the pages of the past that look best, for each run of queries and KV head, and to all of the block.

    A pass may have one block of each world: what a block reads of another one in scratch changes from pass to pass.

    Attributes:
        pages: of the past, for each run and head.
        frames: choose them in the so many best frames of the past; None, in all.
        queries: of a run.
        bounds: judge a page by the least and largest of its keys in place of their mean; see ops.page_scores.

    Example:
        >>> store = KVStore(layers=2, heads=2, head_dim=16, frame_tokens=10, block_frames=3, page_size=16,
        ...     pools={"int8": 12})
        >>> table = store.open(Policy(window=9))
        >>> block = table.open_block(frames=3)
        >>> best = table.plan([block], attention=TopK(pages=4, queries=10))
        >>> list(best.attend(0, torch.randn(30, 3 * 2 * 16), None, None).shape)
        [30, 32]
    """

    pages: int
    frames: int | None = None
    queries: int = 64
    bounds: bool = False

    def __post_init__(self) -> None:
        check_counts({"pages": self.pages, "frames": 0 if self.frames is None else self.frames}, least=0)
        check_counts({"queries": self.queries})

    def bind(self, reads: Reads) -> Attend:
        if reads.plan.page_bias is not None or reads.plan.page_variants is not None:
            raise ValueError("attention: TopK needs a policy without past_bias and with time='absolute'")
        worlds = [block.world for block in reads.blocks]
        if len(set(worlds)) < len(worlds):
            most = max(worlds.count(world) for world in worlds)
            raise ValueError(f"attention: TopK needs a pass over one block of each world, got {most} blocks of one")
        return _TopK(self, reads)


class _TopK:
    """Committed pages do not change, so a layer's are summarised when it first comes by."""

    def __init__(self, top: TopK, reads: Reads):
        self.store, self.chosen = reads.store, []
        row = page = 0
        for block in reads.blocks:
            pages = slice(page, page := page + block.past + block.own)
            seen = PageList(reads.plan.page_ids[pages], reads.plan.page_lens[pages])
            self.chosen.append(
                (
                    slice(row, row := row + block.queries),
                    _Chosen(reads.store, top, block, seen, reads.precision[block.world]),
                )
            )

    def __call__(self, layer: int, q: Tensor, out: Tensor | None) -> Tensor:
        store, out = self.store, torch.empty_like(q) if out is None else out
        for rows, chosen in self.chosen:
            plan, precision, pools = chosen.plan(layer, q[rows]), chosen.precision[layer], store.layers[layer]
            paged_attention(q[rows], pools, plan, out=out[rows], precision=precision, backend=store.backend)
        return out


class _Chosen:
    """The pages that one block's queries attend to."""

    def __init__(self, store: Storage, top: TopK, block: BlockReads, seen: PageList, precision: Sequence[str]):
        self.precision = precision  # of each layer
        self.store, self.top, self.seen, device = store, top, seen, seen.ids.device
        self.past = PageList(seen.ids[: block.past], seen.lens[: block.past])
        self.keep = torch.arange(block.past + block.own, device=device) >= block.past
        self.q_indptr = torch.arange(0, block.queries + top.queries, top.queries, dtype=torch.int32, device=device)
        self.q_indptr.clamp_(max=block.queries)
        self.k = block.own + min(top.pages, block.past)
        self.frames = None if top.frames is None else block.own // store.pages_per_frame + top.frames
        self.summaries: dict[int, Tensor] = {}

    def plan(self, layer: int, q: Tensor) -> Plan:
        store, backend = self.store, self.store.backend
        if layer not in self.summaries:
            pools = store.layers[layer]
            self.summaries[layer] = page_summaries(pools, self.past, self.top.bounds, backend=backend)
        scores = page_scores(q, self.q_indptr, self.summaries[layer], self.seen, backend=backend)
        pages = select_pages(
            *(scores, self.seen, self.k),
            keep=self.keep,
            frames=self.frames,
            pages_per_frame=store.pages_per_frame,
            backend=backend,
        )
        return even_plan(self.q_indptr, pages, scores.shape[0] * scores.shape[1])
