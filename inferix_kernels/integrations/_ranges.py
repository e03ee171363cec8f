"""Pairs of ranges, of queries and of keys, as segments of queries with lists of runs of keys.

Two ways to get there. If no two q ranges overlap, each is a segment, and so is each gap between them: made on the
device, with nothing read. If they do, queries are cut wherever a range begins or ends, which takes the numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._check import check_shape, device_of
from .._dispatch import Unsupported
from ..plans import UNLIMITED

FULL, CAUSAL, INVERSE, BOTH = range(4)  # bit 0 bounds the keys of a query on the right, bit 1 on the left

# Where ranges of several types meet in one segment its window is (0, RIGHT), and a range's positions say which end
# of it bounds its keys: those near 0 are bounded on the left, those near RIGHT on the right, those between never.
RIGHT, MIDDLE = 2**29, 2**28


class RangePlan(NamedTuple):
    """What queries see, with nothing left to be read; for any number of calls, layers and steps.

    Example:
        >>> ranges = torch.tensor([[0, 3], [3, 6]])
        >>> plan_ranges(ranges, ranges, None, queries=6, keys=6).q_indptr.tolist()
        [0, 3, 6]
    """

    q_indptr: Tensor  # [S + 1] int32: segments of queries
    row_indptr: Tensor  # [S + 1] int32: the runs of keys of each
    begins: Tensor  # [M] int32, each run's first key
    lens: Tensor  # [M] int32
    positions: Tensor  # [M] int32, of each run's first key, as in a Plan
    windows: Tensor | None  # [S, 2] int32; None: every query sees all of its segment's keys
    longest: int  # no run has more keys
    queries: int
    keys: int


def disjoint_plan(
    q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor | None = None, *, queries: int, keys: int
) -> RangePlan:
    """Of q ranges that do not overlap; nothing is read from the device."""
    _check_shapes(q_ranges, k_ranges, attn_type_map)
    if q_ranges.device.type == "cpu" and not torch.compiler.is_compiling():
        ordered = sorted(range_ for *range_, _, _, _ in _read(q_ranges, k_ranges, attn_type_map, queries, keys))
        for a, b in pairwise(ordered):
            if a[1] > b[0]:
                raise ValueError(f"q_ranges must not overlap with disable_fwd_atomic_reduction=True, got {a} and {b}")
    count = len(q_ranges)
    order = q_ranges[:, 0].argsort(stable=True)  # an empty range may lie at the start of another
    order = order[q_ranges[order, 1].argsort(stable=True)]
    (q_begin, q_end), (k_begin, k_end) = (x[order].int().unbind(1) for x in (q_ranges, k_ranges))

    def between(x: Tensor, gap: int) -> Tensor:
        """[n, ...] -> [2n + 1, ...]: a number for each gap, before, between and after."""
        found = torch.full((2 * count + 1, *x.shape[1:]), gap, dtype=torch.int32, device=x.device)
        found[1::2] = x
        return found

    edges = torch.stack((q_begin, q_end), 1).flatten().clamp(0, queries)
    edges = edges.cummax(0).values  # whatever the ranges are: a plan of queries that are not there would be written to
    q_indptr = torch.cat((edges.new_zeros(1), edges, edges.new_full((1,), queries)))
    lens = between(k_end - k_begin, 0)
    windows = None
    if attn_type_map is not None:
        types, excess = attn_type_map[order], (k_end - k_begin) - (q_end - q_begin)
        left, right = torch.where(types >= INVERSE, 0, UNLIMITED), torch.where(types % 2 == CAUSAL, excess, UNLIMITED)
        windows = between(torch.stack((left, right), 1), UNLIMITED)
    rows = torch.arange(2 * count + 2, dtype=torch.int32, device=edges.device)
    return RangePlan(q_indptr, rows, between(k_begin, 0), lens, torch.zeros_like(lens), windows, keys, queries, keys)


def plan_ranges(
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None = None,
    *,
    queries: int,
    keys: int,
    device: torch.device | str | None = None,
) -> RangePlan:
    """Read the ranges, which may overlap, and lay them out for flex_flash_attn_func(q, k, v, plan=...).

    Args:
        q_ranges, k_ranges, attn_type_map: as flex_flash_attn_func takes them.
        queries, keys: how many there are, T and S.
        device: of the plan; q_ranges' own by default.

    Example:
        >>> q_ranges, k_ranges = torch.tensor([[0, 4], [2, 6]]), torch.tensor([[0, 3], [3, 6]])
        >>> plan = plan_ranges(q_ranges, k_ranges, torch.tensor([0, 1]), queries=6, keys=6)
        >>> plan.q_indptr.tolist(), plan.lens.tolist()  # queries 2 and 3 see both ranges
        ([0, 2, 4, 6], [3, 3, 3, 3])
    """
    _check_shapes(q_ranges, k_ranges, attn_type_map)
    if torch.compiler.is_compiling():
        raise Unsupported(
            "q_ranges and k_ranges are read here: in a graph give a plan, or disable_fwd_atomic_reduction"
        )
    ranges = _read(q_ranges, k_ranges, attn_type_map, queries, keys)
    cuts = {0, queries}
    for begin, end, k_begin, k_end, kind in ranges:
        excess = (k_end - k_begin) - (end - begin)
        # Of more rows than this no key would be bounded on one side alone.
        cuts |= set(range(begin, end, excess + 1)) | {end} if kind == BOTH and excess >= 0 else {begin, end}
    edges = sorted(cuts)
    runs: list[list[tuple[int, int, int]]] = [[] for _ in edges[1:]]
    for begin, end, k_begin, k_end, kind in ranges:
        for s in range(bisect_left(edges, begin), bisect_left(edges, end)):
            runs[s] += _runs(k_begin, k_end, kind, edges[s] - begin, (k_end - k_begin) - (end - begin))
    rows = [row for some in runs for row in some]
    counts = torch.tensor([0, *map(len, runs)]).cumsum(0)
    columns = torch.tensor(rows, dtype=torch.int32).view(-1, 3).unbind(1)
    device = q_ranges.device if device is None else device
    q_indptr, row_indptr, begins, lens, positions = (
        x.to(device, torch.int32).contiguous() for x in (torch.tensor(edges), counts, *columns)
    )
    windows = None
    if any(range_[-1] != FULL for range_ in ranges):
        windows = torch.tensor([0, RIGHT] * len(runs), dtype=torch.int32, device=device).view(-1, 2)
    longest = max((row[1] for row in rows), default=0)
    return RangePlan(q_indptr, row_indptr, begins, lens, positions, windows, longest, queries, keys)


def _runs(k_begin: int, k_end: int, kind: int, row: int, excess: int) -> list[tuple[int, int, int]]:
    """(first key, keys, position) of what a range lets a segment see that begins at its query `row`.

    Query i of the range sees its keys i (if they are bounded on the left) to i + excess (on the right).
    """
    count = k_end - k_begin
    if kind == FULL:
        found = [(k_begin, count, MIDDLE)]
    elif kind == BOTH and excess < 0:
        found = []
    else:
        # Keys before `split` are bounded on the left alone, those from it on, on the right alone.
        split = {CAUSAL: 0, INVERSE: count}.get(kind, min(max(row + excess + 1, 0), count))
        found = [(k_begin, split, -row), (k_begin + split, count - split, RIGHT + split - row - excess)]
    return [run for run in found if run[1]]


def _check_shapes(q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor | None) -> None:
    sizes: dict[str, int] = {}
    for name, x, layout in (
        ("q_ranges", q_ranges, "n 2"),
        ("k_ranges", k_ranges, "n 2"),
        ("attn_type_map", attn_type_map, "n"),
    ):
        if x is not None:
            if device_of(name, x) != q_ranges.device:
                raise ValueError(f"{name} must be on {q_ranges.device} like q_ranges, got {x.device}")
            if x.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name} must be int32 or int64, got {x.dtype}")
            check_shape(name, x, layout, sizes)


def _read(
    q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor | None, queries: int, keys: int
) -> list[tuple[int, int, int, int, int]]:
    """(q begin, q end, k begin, k end, type) of every range, checked."""
    types = [FULL] * len(q_ranges) if attn_type_map is None else attn_type_map.tolist()
    numbers = q_ranges.tolist(), k_ranges.tolist()
    for name, ranges, end in (("q_ranges", numbers[0], queries), ("k_ranges", numbers[1], keys)):
        for i, (a, b) in enumerate(ranges):
            if not 0 <= a <= b <= end:
                raise ValueError(f"{name}[{i}] must rise within 0 to {end}, got [{a}, {b}]")
    for i, kind in enumerate(types):
        if not FULL <= kind <= BOTH:
            raise ValueError(f"attn_type_map[{i}] must be 0, 1, 2 or 3, got {kind}")
    return [(*q_range, *k_range, kind) for q_range, k_range, kind in zip(*numbers, types)]
