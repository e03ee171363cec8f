"""Attention over lists of pages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..layout import KVPages, PageList, Plan
from .kv_pages import locate, read_page, spans


def paged_attention(
    q: Tensor, pools: Sequence[KVPages], plan: Plan, *, scale: float, out: Tensor, lse: Tensor, accumulate: bool = False
) -> tuple[Tensor, Tensor]:
    queries = q[None] if q.ndim == 3 else q  # [V, T, Hq, D]
    H, D = pools[0].heads, q.shape[-1]
    starts = indptr("q_indptr", plan.q_indptr, queries.shape[1])
    lists = indptr("page_indptr", plan.page_indptr, len(plan.page_ids))
    entries = spans("plan.page", PageList(plan.page_ids, plan.page_lens), *pools)
    bias = [0.0] * len(entries) if plan.page_bias is None else plan.page_bias.tolist()
    variants = [0] * len(entries) if plan.page_variants is None else choices(plan.page_variants, len(queries))
    group = queries.shape[2] // H  # query head j reads KV head j // group
    shared = H if len(lists) == len(starts) else 1  # KV heads that share a page list
    for i in range(len(lists) - 1):
        s, head = divmod(i * shared, H)
        at = slice(starts[s], starts[s + 1]), slice(head * group, (head + shared) * group)
        x = queries[:, at[0], at[1]].float().unflatten(2, (shared, group))  # [V, t, heads, group, D]
        scores, values = [x.new_empty(*x.shape[1:4], 0)], [x.new_empty(0, shared, D)]
        for entry in range(lists[i], lists[i + 1]):
            page, start, stop = entries[entry]
            k, v = (side[:, head : head + shared] for side in read_page(*locate(pools, page), stop - start))
            scores.append(torch.einsum("thgd,lhd->thgl", x[variants[entry]], k) * scale + bias[entry])
            values.append(v)
        list_out, list_lse = softmax_sum(torch.cat(scores, -1), torch.cat(values))
        if accumulate:
            list_out, list_lse = merge(out[at].float(), lse[at], list_out, list_lse)
        out[at], lse[at] = list_out, list_lse
    return out, lse


def softmax_sum(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """scores [t, H, group, L], values [L, H, D] -> out [t, H * group, D], lse [t, H * group].

    Without a key, or with none above -inf, out is 0 and lse -inf.
    """
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    weights = (scores - lse.where(lse != -torch.inf, 0.0)[..., None]).exp()
    return torch.einsum("thgl,lhd->thgd", weights, values).flatten(1, 2), lse.flatten(1, 2)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    merged_out, merged_lse = merge(out_a.float(), lse_a, out_b.float(), lse_b)
    out.copy_(merged_out)
    lse.copy_(merged_lse)
    return out, lse


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the union of two disjoint sets of keys, from the results over each: out [..., D], lse [...]."""
    largest = torch.maximum(lse_a, lse_b)
    # -inf on both sides: any finite number in the maximum's place makes both weights 0.
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weight_a, weight_b = (lse_a - largest).exp(), (lse_b - largest).exp()
    total = weight_a + weight_b
    lse = largest + total.log()
    # A side that saw no key contributes nothing, whatever its out holds: 0 * NaN is NaN, so it is chosen away.
    share_a = torch.where((weight_a > 0)[..., None], out_a * (weight_a / total)[..., None], 0.0)
    share_b = torch.where((weight_b > 0)[..., None], out_b * (weight_b / total)[..., None], 0.0)
    return share_a + share_b, lse


def choices(variants: Tensor, count: int) -> list[int]:
    values: list[int] = variants.tolist()
    for i, value in enumerate(values):
        if not 0 <= value < count:
            raise ValueError(f"plan.page_variants[{i}] must be in [0, {count}), got {value}")
    return values


def indptr(name: str, pointers: Tensor, end: int) -> list[int]:
    """A CSR row pointer, checked: it starts at 0, never falls and ends at `end`."""
    values: list[int] = pointers.tolist()
    if values[0] != 0 or values[-1] != end or any(a > b for a, b in pairwise(values)):
        raise ValueError(f"plan.{name} must rise from 0 to {end}, got {values}")
    return values
