"""One forward over the open blocks: what all layers share, and what each of them does with its K and V."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from ..layout import PageList, Plan, even_plan
from ..ops import (
    kv_append,
    kv_commit,
    page_scores,
    page_summaries,
    paged_attention,
    qkv_prologue,
    select_pages,
)
from .extent import Extent
from .past import Block
from .slots import Slot
from .storage import Storage
from .table_view import TableView
from .turns import in_turn


@dataclasses.dataclass(frozen=True)
class TopK:
    """Attend to the pages of the past that look best, for each run of queries and KV head, and to all of the block.

    Attributes:
        pages: of the past, for each run and head.
        frames: choose them in the so many best frames of the past; None, in all.
        queries: of a run.
        bounds: judge a page by the least and largest of its keys in place of their mean; see ops.page_scores.
    """

    pages: int
    frames: int | None = None
    queries: int = 64
    bounds: bool = False


class _Selection:
    """TopK at work in one pass. Committed pages do not change, so a layer's are summarised when it first comes by."""

    def __init__(self, store: Storage, top: TopK, block: Block, past: PageList, seen: PageList):
        self.store, self.top, self.past, self.seen = store, top, past, seen
        tokens = len(block.frames) * store.frame_tokens
        own, device = len(seen.ids) - len(past.ids), seen.ids.device
        self.keep = torch.arange(len(seen.ids), device=device) >= len(past.ids)
        self.q_indptr = torch.arange(0, tokens + top.queries, top.queries, dtype=torch.int32, device=device)
        self.q_indptr.clamp_(max=tokens)
        self.k = own + min(top.pages, len(past.ids))
        self.frames = None if top.frames is None else len(block.frames) + top.frames
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


Target = Sequence[tuple[Extent, Slot]]


def _by_format(store: Storage, commit: Block, target: Target) -> list[tuple[str, list[int], list[int]]]:
    """(format, scratch pages, pages of its pool) of what is committed, by the first page of each frame."""
    parts = []
    for format in dict.fromkeys(extent.format for extent, _ in target):
        pairs = [(page, slot) for page, (extent, slot) in zip(commit.scratch, target) if extent.format == format]
        parts.append((format, [page for page, _ in pairs], [slot.pool_page for _, slot in pairs]))
    return parts


class Pass:
    """One forward over open blocks: its `attend` is all that a layer needs to know of the store.

    It is good for as long as its table holds what it held: after an edit (a seal, a block dropped, a frame forgotten or
    given other contents) another one is to be planned, and this one refuses to run.
    """

    def __init__(
        self,
        table: TableView,
        blocks: Sequence[Block],
        past: Sequence[Sequence[int]],
        rope: Tensor | None,
        commit: Block | None,
        target: Target,
        predict: bool,
        top_k: TopK | None = None,
    ):
        self.table, self.rope, self.predict = table, rope, predict
        self.turn, self._edits = table.turn, table.state.edits
        store = table.store
        own = [[store.scratch_page_id + page for page in block.scratch] for block in blocks]
        # Where a frame is read: what the pass writes to scratch, or its committed pages.
        where = {frame: page for block, pages in zip(blocks, own) for frame, page in zip(block.frames, pages)}
        slots = {**table.state.kept, **table.state.slots}
        if commit is not None:
            slots |= {frame: slot for frame, (_, slot) in zip(commit.frames, target)}
        where |= {frame: slots[frame].page_id for frame in chain(*past) if frame in slots}
        seen = [[*(where[frame] for frame in frames), *pages] for frames, pages in zip(past, own)]
        written = [page for block in blocks for page in block.scratch]
        commits = [] if commit is None else _by_format(store, commit, target)
        groups = [list(chain(*seen)), written, *(pages for _, *pair in commits for pages in pair)]
        indptrs = [
            list(accumulate((len(block.frames) * store.frame_tokens for block in blocks), initial=0)),
            list(accumulate((len(pages) * store.pages_per_frame for pages in seen), initial=0)),
        ]
        # One copy to the device for all of them.
        *ids, q_indptr, page_indptr = store.lists.upload(groups, indptrs)
        seen_list, self.written, *lists = (
            PageList(pages, store.lists.lens(len(group))) for pages, group in zip(ids, groups)
        )
        self.plan = Plan(q_indptr, page_indptr, *seen_list)
        # (format, scratch pages, pages of its pool) of what is committed
        self.commits = [(c[0], *pair) for c, pair in zip(commits, zip(lists[0::2], lists[1::2]))]
        self._fresh: dict[int, Tensor] = {}  # mean keys of the layers committed so far, in the pass that freezes them
        self._selection: _Selection | None = None
        if top_k is not None:
            old = len(seen_list.ids) - len(blocks[0].scratch) * store.pages_per_frame
            self._selection = _Selection(store, top_k, blocks[0], PageList(*(x[:old] for x in seen_list)), seen_list)
        self._buffers: tuple[Tensor, Tensor] | None = None  # q and lse, of every layer in turn

    @in_turn
    def attend(
        self,
        layer: int,
        qkv: Tensor,
        norm_q: Tensor | None,
        norm_k: Tensor | None,
        eps: float = 1e-6,
        *,
        norm_q_bias: Tensor | None = None,
        norm_k_bias: Tensor | None = None,
        interleaved: bool = True,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """Normalise, rotate, write, commit if this is the clean pass, and attend.

        Args:
            qkv: [T, (Hq + 2 H) * D] packed q | k | v of all blocks' tokens, before norm and rotation.
            norm_q, norm_k, eps, norm_q_bias, norm_k_bias, interleaved: as for `qkv_prologue`.
            out: [T, Hq, D] to write to.

        Returns:
            [T, Hq * D], or None from the last layer of a pass that predicts nothing.

        Raises:
            RuntimeError: the table was edited since the pass was planned.
        """
        store = self.table.store
        self._check_edits()
        q, lse = self._room(qkv)
        mean, backend = self.table.state.k_means[layer], store.backend
        qkv_prologue(
            qkv,
            norm_q,
            norm_k,
            self.rope,
            store.scratch,
            self.written,
            norm_q_bias=norm_q_bias,
            norm_k_bias=norm_k_bias,
            k_mean=mean,
            eps=eps,
            interleaved=interleaved,
            out=q,
            backend=backend,
        )
        self._commit(layer)
        if not self.predict and layer == store.num_layers - 1:
            return None
        plan = self.plan if self._selection is None else self._selection.plan(layer, q)
        return paged_attention(q, store.layers[layer], plan, out=out, lse=lse, backend=backend)[0].flatten(1)

    @in_turn
    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write keys and values that are ready, [T, heads, D] and [T, heads, Dv]; commit if this is the clean pass."""
        self._check_edits()
        store, mean = self.table.store, self.table.state.k_means[layer]
        kv_append(k if mean is None else k - mean, v, store.scratch, self.written, backend=store.backend)
        self._commit(layer)

    def _check_edits(self) -> None:
        if self._edits != self.table.state.edits:
            raise RuntimeError("this pass was planned before its table was edited: plan another one")

    def _commit(self, layer: int) -> None:
        table, store = self.table, self.table.store
        fresh = None  # scratch keys had their mean removed, if there is one
        if self.commits and store.freezes_mean and table.state.k_means[layer] is None:
            keys = [store.gather([store.scratch], source, torch.float32)[0] for _, source, _ in self.commits]
            fresh = torch.cat(keys).mean(0)
        for format, source, target in self.commits:
            pages = store.pools[format].layers[layer]
            kv_commit(store.scratch, source, pages, target, fresh, backend=store.backend)
        if fresh is not None:
            self._fresh[layer] = fresh
            if len(self._fresh) == store.num_layers:  # of all layers or of none
                table.state = table.state._replace(k_means=tuple(self._fresh[i] for i in range(store.num_layers)))

    def _room(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        if self._buffers is None:
            store = self.table.store
            width = store.scratch.head_dim
            heads = qkv.shape[1] // width - 2 * store.heads
            q = torch.empty(len(qkv), heads, width, dtype=qkv.dtype, device=qkv.device)
            self._buffers = q, torch.empty(len(qkv), heads, dtype=torch.float32, device=qkv.device)
        return self._buffers
