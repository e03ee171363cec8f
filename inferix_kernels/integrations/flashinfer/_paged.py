"""Attention over paged caches, as prefill and decode share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import KVPages
from ...plans import UNLIMITED, Plan
from .._arguments import check_range, refuse_but
from ._wrapper import Planned, Scores, Wrapper, check_same_batch, check_window_left, host_indptr
from .page import pool_of


class Lists(NamedTuple):
    """The pages of every sequence, on the device."""

    plan: Plan  # all keys
    positions: Tensor  # [N] int32, of each page's first token; 0 is that of its sequence's first query

    def within(self, causal: bool, window_left: int) -> Plan:
        if window_left == -1 and not causal:
            return self.plan
        left, right = (UNLIMITED if window_left == -1 else window_left), (0 if causal else UNLIMITED)
        shape, device = (len(self.plan.q_indptr) - 1,), self.positions.device
        windows = [torch.full(shape, side, dtype=torch.int32, device=device) for side in (left, right)]
        return self.plan._replace(windows=torch.stack(windows, 1), page_positions=self.positions)


def lists_of(
    qo_indptr: Tensor, indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int,
    names: tuple[str, str, str], device: torch.device,
) -> Lists:  # fmt: skip
    """qo_indptr on the host; names: of the next three."""
    starts = host_indptr(names[0], indptr)
    check_same_batch(names[0], starts, qo_indptr)
    count, last = int(starts[-1]), last_page_len.to("cpu", torch.int64)
    if indices.ndim != 1 or len(indices) < count:
        raise ValueError(f"{names[1]} must be [{count}], as {names[0]} ends, got {list(indices.shape)}")
    pages = starts.diff()
    some = pages > 0
    if last.shape != pages.shape or bool((some & ((last < 1) | (last > page_size))).any()):
        raise ValueError(f"{names[2]} must be [{len(pages)}] numbers from 1 to {page_size}, got {last.tolist()}")
    lens = torch.full((count,), page_size, dtype=torch.int64)
    lens[starts[1:][some] - 1] = last[some]
    first = qo_indptr.diff() - ((pages - 1) * page_size + last)  # of token 0; the last query is at the last token
    place = torch.arange(count) - starts[:-1].repeat_interleave(pages)
    positions = first.repeat_interleave(pages) + place * page_size

    def there(x: Tensor) -> Tensor:
        return x.to(device, torch.int32)

    return Lists(Plan(there(qo_indptr), there(starts), there(indices[:count]), there(lens)), there(positions))


class PagedWrapper(Wrapper):
    _indices = "paged_kv_indices"  # what plan calls the pages
    _lists: Lists
    _limited: Plan  # as the scores say

    def _settle(self, planned: Planned, scores: Scores, lists: Lists) -> None:
        limited = lists.within(scores.causal, scores.window_left)
        self._planned, self._scores, self._lists, self._limited = planned, scores, lists, limited

    def _run_pages(
        self, q: Tensor, cache: Tensor | Sequence[Tensor] | KVPages, scales: dict[str, float | None],
        window_left: int | None, out: Tensor | None, lse: Tensor | None, return_lse: bool,
        lse_base: str = "log2", lse_layout: str = "NH",
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        refuse_but(1.0, **scales)
        self._settled()
        plan = self._limited
        if window_left is not None and window_left != self._scores.window_left:
            check_window_left(window_left)
            plan = self._lists.within(self._scores.causal, window_left)
        pool = pool_of(cache, self._kv_layout)
        check_range(self._indices, plan.page_ids, 0, pool.pages - 1, "paged_kv_cache")
        return self._attend(q, pool, plan, out, lse, return_lse, lse_base, lse_layout)
