"""Attention over lists of pages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..arrivals import NotArrived
from ..layout import KVPages, PageList
from ..plans import Plan
from .kv_pages import locate, read_page, spans, starts_of

POLL = 1e-4  # seconds between two looks at a counter

__all__ = ["check_plan", "latent_attention", "merge_attention", "paged_attention"]


def paged_attention(
    q: Tensor,
    pools: Sequence[KVPages],
    plan: Plan,
    *,
    scale: float,
    out: Tensor,
    lse: Tensor,
    accumulate: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    precision: str = "auto",
    deadline: float = 60.0,
) -> tuple[Tensor, Tensor]:
    """Exact whatever `precision` allows: it is what the others are compared with."""

    def keys_and_values(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    limits = softcap, alibi_slopes, deadline
    return attention_over_pages(q, pools, plan, scale, out, lse, accumulate, keys_and_values, *limits)


def latent_attention(
    q: Tensor, pools: Sequence[KVPages], plan: Plan, *, scale: float, out: Tensor, lse: Tensor, accumulate: bool = False
) -> tuple[Tensor, Tensor]:
    def keys_and_values(latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((latent, rotary), -1), latent

    return attention_over_pages(q, pools, plan, scale, out, lse, accumulate, keys_and_values)


def attention_over_pages(
    q: Tensor,
    pools: Sequence[KVPages],
    plan: Plan,
    scale: float,
    out: Tensor,
    lse: Tensor,
    accumulate: bool,
    keys_and_values: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deadline: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """keys_and_values: of the two sides of a page, [length, heads, D] and [length, heads, Dv]."""
    starts, lists, entries, slots, bias, variants = check_plan(q, pools, plan)
    arrivals, until = check_arrivals(plan), time.monotonic() + deadline
    queries = q[None] if q.ndim == 3 else q  # [V, T, Hq, D]
    H = pools[0].heads
    group = queries.shape[2] // H  # query head j reads KV head j // group
    shared = H if len(lists) == len(starts) else 1  # KV heads that share a page list
    for i in range(len(lists) - 1):
        s, first = divmod(i * shared, H)
        if starts[s] == starts[s + 1]:
            continue
        mine, pages = range(lists[i], lists[i + 1]), []
        for j in mine:
            while not has_arrived(plan, arrivals[j]):
                if time.monotonic() > until and (late := missing(plan, arrivals, starts, lists)):
                    raise NotArrived(late, deadline)
                time.sleep(POLL)
            pages.append(keys_and_values(*read_page(*locate(pools, entries[j][0]), length_of(entries[j]), slots[j])))
        # Added to a bias of 1e9 a score is lost in float32's rounding: biases count from the largest of the list.
        base = largest_bias(bias[j] for j in mine if length_of(entries[j]))
        # Head by head, so that a head's bits do not depend on how many heads share its list.
        for head in range(first, first + shared):
            at = slice(starts[s], starts[s + 1]), slice(head * group, (head + 1) * group)
            x = queries[:, at[0], at[1]].float()  # [V, t, group, D]
            scores, values = [x.new_empty(x[0, ..., 0].numel(), 0)], [x.new_empty(0, out.shape[2])]
            for j, (k, v) in zip(mine, pages, strict=True):
                page_scores = capped(x[variants[j]].flatten(0, 1) @ k[:, head].T * scale, softcap) + (bias[j] - base)
                scores.append(limited(page_scores, plan, s, j, group, alibi_slopes, at[1]))
                values.append(v[:, head])
            list_out, list_lse = softmax_sum(torch.cat(scores, -1), torch.cat(values))
            list_out, list_lse = list_out.unflatten(0, x.shape[1:3]), (list_lse + base).unflatten(0, x.shape[1:3])
            if accumulate:
                list_out, list_lse = merge(out[at].float(), lse[at], list_out, list_lse)
            out[at], lse[at] = list_out, list_lse
    return out, lse


def capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * (scores / softcap).tanh() if softcap else scores


def limited(
    scores: Tensor, plan: Plan, segment: int, entry: int, group: int, alibi_slopes: Tensor | None, heads: slice
) -> Tensor:
    """What ALiBi and a segment's window make of the scores [queries * group, length] of its rows and a page."""
    if plan.windows is None or plan.page_positions is None:
        return scores
    row, slot = (torch.arange(size, device=scores.device) for size in scores.shape)
    distance = plan.page_positions[entry] + slot - (row // group)[:, None]
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.ndim == 1 else alibi_slopes[segment]
        scores = scores - slopes[heads][row % group][:, None] * distance.abs()
    left, right = plan.windows[segment].tolist()
    return scores.masked_fill((distance < -left) | (distance > right), -torch.inf)


def check_plan(
    q: Tensor, pools: Sequence[KVPages], plan: Plan
) -> tuple[list[int], list[int], list[tuple[int, int, int]], list[int], list[float], list[int]]:
    """The numbers of a plan, checked: q_indptr, page_indptr, then (page, first token, one past the last), first slot,
    bias and variant of every entry."""
    tokens, variants = q.shape[-3], len(q) if q.ndim == 4 else 1
    starts = indptr("plan.q_indptr", plan.q_indptr, tokens)
    lists = indptr("plan.page_indptr", plan.page_indptr, len(plan.page_ids))
    listed = PageList(plan.page_ids, plan.page_lens, plan.page_starts)
    entries, slots = spans("plan.page", listed, *pools), starts_of("plan.page", listed, pools[0].page_size)
    bias = [0.0] * len(entries) if plan.page_bias is None else plan.page_bias.tolist()
    chosen = [0] * len(entries) if plan.page_variants is None else choices(plan.page_variants, variants)
    return starts, lists, entries, slots, bias, chosen


def check_arrivals(plan: Plan) -> list[tuple[int, int]]:
    """(counter, value) of every entry of a plan, checked; (-1, 0) where it waits for none."""
    if plan.arrivals is None or plan.counters is None:
        return [(-1, 0)] * len(plan.page_ids)
    count, arrivals = len(plan.counters), [(counter, value) for counter, value in plan.arrivals.tolist()]
    for i, (counter, _) in enumerate(arrivals):
        if not -1 <= counter < count:
            raise ValueError(f"plan.arrivals[{i}] must name one of {count} counters, or -1, got {counter}")
    return arrivals


def has_arrived(plan: Plan, arrival: tuple[int, int]) -> bool:
    counter, value = arrival
    return counter < 0 or plan.counters is None or int(plan.counters[counter]) >= value


def missing(plan: Plan, arrivals: list[tuple[int, int]], starts: list[int], lists: list[int]) -> list[int]:
    """Ids of pages that are not there, of lists that have queries."""
    shared = (len(lists) - 1) // (len(starts) - 1)  # lists of a segment
    read = [starts[i // shared] < starts[i // shared + 1] for i in range(len(lists) - 1)]
    entries = [j for i, wanted in enumerate(read) if wanted for j in range(lists[i], lists[i + 1])]
    return sorted({int(plan.page_ids[j]) for j in entries if not has_arrived(plan, arrivals[j])})


def softmax_sum(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """scores [rows, L], values [L, D] -> out [rows, D], lse [rows].

    Without a key, or with none above -inf, out is 0 and lse -inf.
    """
    largest = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    largest = largest.where(largest != -torch.inf, 0.0)  # any finite number: all weights are 0
    weights = (scores - largest[:, None]).exp()
    total = weights.sum(-1)
    return weights @ values / total.where(total != 0, 1.0)[:, None], largest + total.log()


def largest_bias(biases: Iterable[float]) -> float:
    """Of a list's pages that have tokens; 0 if they are all left out."""
    largest = max(biases, default=-math.inf)
    return 0.0 if largest == -math.inf else largest


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
    # A side that saw no key contributes nothing, whatever its out holds: 0 * NaN is NaN, so it is chosen away. A weight
    # that is NaN is not 0, and shows.
    share_a = torch.where((weight_a != 0)[..., None], out_a * (weight_a / total)[..., None], 0.0)
    share_b = torch.where((weight_b != 0)[..., None], out_b * (weight_b / total)[..., None], 0.0)
    return share_a + share_b, lse


def length_of(entry: tuple[int, int, int]) -> int:
    return entry[2] - entry[1]


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
        raise ValueError(f"{name} must rise from 0 to {end}, got {values}")
    return values
