"""Attention over paged caches, as prefill and decode share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...layout import UNLIMITED, KVPages, Plan
from .._arguments import refuse_but
from ._wrapper import Wrapper, check_same_batch, host_indptr
from .page import pool_of


class PagedWrapper(Wrapper):
    _lists: Plan  # of all keys
    _positions: Tensor  # [N] int32, of each page's first token; 0 is the sequence's first query's own
    _limited: Plan  # as causal and window_left say

    def _plan_pages(
        self, qo_indptr: Tensor, indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int,
        names: tuple[str, str, str],
    ) -> int:  # fmt: skip
        """qo_indptr on the host. Returns its last number."""
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

        def there(x: Tensor) -> Tensor:
            return x.to(self.device, torch.int32)

        self._lists = Plan(there(qo_indptr), there(starts), there(indices[:count]), there(lens))
        self._positions = there(first.repeat_interleave(pages) + place * page_size)
        self._limited = self._within(self._window_left)
        return int(qo_indptr[-1])

    def _within(self, window_left: int) -> Plan:
        if window_left == -1 and not self._causal:
            return self._lists
        left, right = (UNLIMITED if window_left == -1 else window_left), (0 if self._causal else UNLIMITED)
        segments = len(self._lists.q_indptr) - 1
        windows = [torch.full((segments,), side, dtype=torch.int32, device=self.device) for side in (left, right)]
        return self._lists._replace(windows=torch.stack(windows, 1), page_positions=self._positions)

    def _run_pages(
        self, q: Tensor, cache: Tensor | Sequence[Tensor] | KVPages, scales: dict[str, float | None],
        window_left: int | None, out: Tensor | None, lse: Tensor | None, return_lse: bool,
        lse_base: str = "log2", lse_layout: str = "NH",
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        refuse_but(1.0, **scales)
        self._settled()
        plan = self._limited if window_left in (None, self._window_left) else self._within(int(window_left or 0))
        return self._attend(q, pool_of(cache, self._kv_layout), plan, out, lse, return_lse, lse_base, lse_layout)
