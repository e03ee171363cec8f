"""Choosing the pages that a run of queries attends to, by a summary of each page's keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..layout import KVPages, PageList
from .attention import indptr
from .kv_pages import check_ids, locate, read_page, spans

__all__ = ["check_scores", "page_scores", "page_summaries", "select_pages"]


def page_summaries(pools: Sequence[KVPages], where: PageList, bounds: bool = False, *, out: Tensor) -> Tensor:
    for page, start, stop in spans("where", where, *pools):
        k, _ = read_page(*locate(pools, page), stop - start)  # [L, H, D]
        if start == stop:
            out[page] = 0
        else:
            out[page] = torch.stack((k.amin(0), k.amax(0)) if bounds else (k.mean(0),), 1)
    return out


def page_scores(
    q: Tensor, q_indptr: Tensor, summaries: Tensor, where: PageList, *, scale: float, out: Tensor
) -> Tensor:
    starts = check_scores(q, q_indptr, summaries, where)
    H = summaries.shape[1]
    keys = summaries[where.ids].float()  # [n, H, 1 or 2, D]
    for s, (start, stop) in enumerate(pairwise(starts)):
        mean = q[start:stop].float().unflatten(1, (H, -1)).sum((0, 2)) / max((stop - start) * (q.shape[1] // H), 1)
        # A mean has one product with it; of bounds the larger product of each channel counts.
        scores = scale * (mean[:, None] * keys).amax(2).sum(-1)  # [n, H]
        out[s] = scores.T.where((where.lens > 0) & (stop > start), -torch.inf)
    return out


def check_scores(q: Tensor, q_indptr: Tensor, summaries: Tensor, where: PageList) -> list[int]:
    check_ids("where.ids", where.ids.tolist(), len(summaries))
    return indptr("q_indptr", q_indptr, len(q))


def select_pages(
    scores: Tensor,
    where: PageList,
    k: int,
    *,
    keep: Tensor | None = None,
    frames: int | None = None,
    pages_per_frame: int = 1,
    out: PageList,
) -> PageList:
    scores = scores if keep is None else scores.masked_fill(keep, torch.inf)
    scores = scores.masked_fill(where.lens == 0, -torch.inf)
    if frames is not None:
        best = scores.unflatten(-1, (-1, pages_per_frame)).amax(-1)  # of a frame's pages
        chosen = largest(best, frames).repeat_interleave(pages_per_frame, -1)
        scores = scores.masked_fill(~chosen, -torch.inf)
    for field, numbers in ((out.ids, where.ids), (out.lens, where.lens)):
        field.zero_()
        for slots, chosen in zip(field.view(-1, k), largest(scores, k).flatten(0, 1), strict=True):
            picked = numbers[chosen]
            slots[: len(picked)] = picked
    return out


def largest(x: Tensor, k: int) -> Tensor:
    """Which are the k largest along the last axis, the earlier of equals; -inf never is."""
    first = x.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, first, True) & (x > -torch.inf)
