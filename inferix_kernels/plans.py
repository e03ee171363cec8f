"""Which pages each query attends to: the plan that an attention call follows, and how to make one on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import PageList, check_list, int32

UNLIMITED = 2**30  # in a plan's windows: further than any key


class Plan(NamedTuple):
    """Which pages each query attends to. One plan serves all layers and all passes over a block.

    Segment s is the queries q_indptr[s] : q_indptr[s+1]. It has one page list for all KV heads, or one for each: list
    l is the pages page_indptr[l] : page_indptr[l+1], with l = s or l = s * H + head. A query attends to every valid
    token of its list's pages and to nothing else. The page list is the mask.

    Where that is too coarse, among tokens that see only what came before them, a segment has a window too: query i of
    it sees the tokens at positions i - left to i + right, of those that its list holds.

    Pages may be on their way: the entry of such a page names a counter, and the value from which the page is there
    (arrivals.py). Attention then waits for the pages of each list in their order, which is the order of work: what came
    first changes no bit of the result.

    Example:
        >>> plan = make_plan([(4, [3, 1], [16, 9]), (6, [3], [16])])
        >>> plan.q_indptr.tolist(), plan.page_indptr.tolist(), plan.page_ids.tolist()
        ([0, 4, 10], [0, 2, 3], [3, 1, 3])
    """

    q_indptr: Tensor  # [S+1] int32, from 0 to T
    page_indptr: Tensor  # [L+1] int32, from 0 to N; L is S, or S * H
    page_ids: Tensor  # [N] int32, counted through the pools in the order a call gives them
    page_lens: Tensor  # [N] int32, valid tokens of each page
    page_bias: Tensor | None = None  # [N] float32, added to the scaled scores of a page's keys; -inf leaves it out
    page_variants: Tensor | None = None  # [N] int32 in [0, V): which of q's variants meets the page
    page_starts: Tensor | None = None  # [N] int32, the slot of each page's first valid token; None: 0
    windows: Tensor | None = None  # [S, 2] int32, (left, right) in tokens, at most UNLIMITED
    page_positions: Tensor | None = None  # [N] int32, of each page's first valid token, query 0 at 0; with windows
    arrivals: Tensor | None = None  # [N, 2] int32, (counter, value): there once the counter is so high; -1: it is there
    counters: Tensor | None = None  # [C] int32, which other threads raise meanwhile: Counters.values; with arrivals
    prepared: Tensor | None = None  # uint8, of compiled.prepare_attention; what it is for is in its docstring


class Segment(NamedTuple):
    """A run of queries and the pages they attend to, on the host.

    Attributes:
        queries: how many.
        ids, lens: its pages, in order, and how many valid tokens each has.
        bias: added to the scaled scores of each page's keys.
        variants: which of q's variants meets each page.
        starts: the slot of each page's first valid token; None: 0.
        window: (left, right) in tokens, -1 for any number: (-1, 0) is causal.
        arrivals: of each page (counter, value): it is there once that counter is so high; (-1, 0): it is there.

    Example:
        >>> segment = Segment(queries=4, ids=[3, 1], lens=[16, 9], bias=[0.0, -1.0])
        >>> make_plan([segment]).page_bias.tolist()
        [0.0, -1.0]
    """

    queries: int
    ids: Sequence[int]
    lens: Sequence[int]
    bias: Sequence[float] | None = None
    variants: Sequence[int] | None = None
    starts: Sequence[int] | None = None
    window: tuple[int, int] | None = None
    arrivals: Sequence[tuple[int, int]] | None = None


def make_plan(
    segments: Sequence[Segment | tuple], device: torch.device | str = "cpu", *, lists_per_segment: int = 1
) -> Plan:
    """Build a plan from segments, or plain tuples of a Segment's fields, (queries, ids, lens[, bias[, ...]]), in query
    order.

    An empty page list is allowed: its queries get out = 0 and lse = -inf. With lists_per_segment = H every H entries
    in a row are one segment: the same number of queries and window, and the page list of KV head 0, 1, ...

    Windows (Segment.window) are aligned bottom-right, as FlashAttention means them: a segment's last query stands at
    the last token of its list, whatever their numbers.

    A plan with arrivals is still to be given counters: plan._replace(counters=counters.values), of each layer, say.

    Raises:
        ValueError: a negative count, id or length; fields of a segment that differ in length; bias, variants, starts or
            arrivals in some segments only; entries that make no whole segments. Ids and lengths are checked with the
            pools when the plan is used, since one plan may serve pools of several layers.

    Example:
        >>> plan = make_plan([(4, [3, 1], [16, 9]), (6, [3], [16])])  # two segments: (queries, page ids, lens)
        >>> plan.page_lens.tolist()
        [16, 9, 16]
        >>> causal = make_plan([Segment(queries=20, ids=[3, 1], lens=[16, 9], window=(-1, 0))])
    """
    if isinstance(segments, (Segment, Mapping)) or not all(isinstance(segment, tuple) for segment in segments):
        raise ValueError(f"segments must be a list of Segments, or of tuples of their fields, got {segments!r:.80}")
    lists = [Segment(*segment) for segment in segments]
    _check_segments(lists, lists_per_segment)

    def flat(field: str, dtype: torch.dtype = torch.int32) -> Tensor | None:
        if not lists or getattr(lists[0], field) is None:
            return None
        numbers = [x for segment in lists for x in getattr(segment, field)]
        return torch.tensor(numbers, dtype=dtype, device=device)

    arrivals = flat("arrivals")
    windows = positions = None
    if any(segment.window is not None for segment in lists):
        sides = [side for segment in lists[::lists_per_segment] for side in segment.window or (-1, -1)]
        windows = int32([UNLIMITED if side == -1 else side for side in sides], device).view(-1, 2)
        positions = int32([position for segment in lists for position in _positions(segment)], device)
    return Plan(
        int32(list(accumulate((segment.queries for segment in lists[::lists_per_segment]), initial=0)), device),
        int32(list(accumulate((len(segment.ids) for segment in lists), initial=0)), device),
        int32([x for segment in lists for x in segment.ids], device),
        int32([x for segment in lists for x in segment.lens], device),
        flat("bias", torch.float32),
        flat("variants"),
        flat("starts"),
        windows,
        positions,
        None if arrivals is None else arrivals.view(-1, 2),
    )


def _is_window(window: object) -> bool:
    if window is None:
        return True
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        return False
    return all(type(side) is int and -1 <= side <= UNLIMITED for side in window)


def _positions(segment: Segment) -> list[int]:
    """Of each page's first valid token, counted from the segment's first query: its last query is at the last token."""
    return list(accumulate(segment.lens[:-1], initial=segment.queries - sum(segment.lens))) if segment.lens else []


def even_plan(q_indptr: Tensor, pages: PageList, lists: int) -> Plan:
    """A plan of so many page lists of one length, as select_pages makes them; nothing is read from the device.

    Example:
        >>> runs = torch.tensor([0, 64, 100], dtype=torch.int32)
        >>> even_plan(runs, PageList.of([3, 1, 3, 2], [16, 9, 16, 16]), lists=2).page_indptr.tolist()
        [0, 2, 4]
    """
    if lists < 1 or len(pages.ids) % lists:
        raise ValueError(f"lists must be a divisor of the {len(pages.ids)} pages, got {lists}")
    steps = torch.arange(lists + 1, dtype=torch.int32, device=pages.ids.device)
    return Plan(q_indptr, steps * (len(pages.ids) // lists), pages.ids, pages.lens, page_starts=pages.starts)


def _check_segments(lists: list[Segment], lists_per_segment: int) -> None:
    if len(lists) % lists_per_segment:
        raise ValueError(f"segments must be a multiple of {lists_per_segment} page lists, got {len(lists)}")
    for s, segment in enumerate(lists):
        if segment.queries < 0:
            raise ValueError(f"segments[{s}]: the number of queries must not be negative, got {segment.queries}")
        for field in ("queries", "window"):
            want, got = (getattr(x, field) for x in (lists[s - s % lists_per_segment], segment))
            if got != want:
                raise ValueError(f"segments[{s}]: {field} must be {want} in all lists of one segment, got {got}")
        if not _is_window(segment.window):
            raise ValueError(f"segments[{s}]: window must be (left, right) in tokens, or -1, got {segment.window!r}")
        check_list(f"segments[{s}]: page ids", segment.ids, segment.lens)
        for field in ("bias", "variants", "starts", "arrivals"):
            numbers = getattr(segment, field)
            if (numbers is None) != (getattr(lists[0], field) is None):
                raise ValueError(f"segments[{s}]: {field} must be given for all segments or for none")
            if numbers is not None and len(numbers) != len(segment.ids):
                raise ValueError(f"segments[{s}]: {field} must be {len(segment.ids)} numbers, got {len(numbers)}")
        if any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in segment.arrivals or ()):
            raise ValueError(f"segments[{s}]: arrivals must be pairs (counter, value), got {segment.arrivals!r:.80}")
