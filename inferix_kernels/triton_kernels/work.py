"""Which queries and which entries of a page list a program of attention has.

A program has a tile of query rows, one KV head and a run of its page list. A row is one query of one of the heads that
read this KV head, so the keys of a tile serve a whole group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .online import LOG2E, NEG_INF, finite

LEAST_BIAS = tl.constexpr(-(2.0**30))
STEP = tl.constexpr(1024)  # numbers of a plan that are looked through at once


@triton.jit
def work_of(
    program, plan, segments, entries, splits, tiles,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SEGMENTS: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What this program has to do: (head, split, segment, first row in the segment, first entry of the page list, one
    past the last). Tiles of one head run side by side: they read the same pages.
    """
    tile, split, head = program % tiles, program // tiles % splits, program // tiles // splits
    segment, first_row = place_in_segments(tile, plan, segments, GROUP, SEGMENTS, BLOCK_M)
    at = segment
    if PER_HEAD:
        at = segment * HEADS + head
    first, last = pages_of(plan, entries, at, split, splits)
    return head, split.to(tl.int64), segment, first_row, first, last


@triton.jit
def place_in_segments(tile, plan, segments, GROUP: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(segment, first row in it) of a tile of queries.

    Segment s begins with tile q_indptr[s] * GROUP // BLOCK_M + s, which leaves it enough tiles whatever its length:
    where a tile belongs follows without a running sum, and some tiles have no rows.
    """
    before = 0
    CHUNK: tl.constexpr = SEGMENTS if SEGMENTS < STEP else STEP
    for start in range(0, SEGMENTS, CHUNK):
        s = start + tl.arange(0, CHUNK)
        first_tiles = tl.load(plan.q_indptr + s, mask=s < segments, other=0) * GROUP // BLOCK_M + s
        before += tl.sum(((first_tiles <= tile) & (s < segments)).to(tl.int32), 0)
    segment = before - 1
    first_tile = tl.load(plan.q_indptr + segment) * GROUP // BLOCK_M + segment
    return segment, (tile - first_tile) * BLOCK_M


@triton.jit
def rows_from(first_row, segment, head, plan, tokens, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(token and query head of each row, which rows there are). To be called again at the end: the load is volatile, so
    that the compiler can not keep all this in registers through the loop over pages.
    """
    first = tl.load(plan.q_indptr + segment, volatile=True)
    end = tl.minimum(tl.load(plan.q_indptr + segment + 1), tokens)
    row = first_row + tl.arange(0, BLOCK_M)
    return (first + row // GROUP).to(tl.int64), head * GROUP + row % GROUP, row < (end - first) * GROUP


@triton.jit
def pages_of(plan, entries, at, split, splits):
    """Entries [first, last) of the page list `at` that belong to this split."""
    first = tl.maximum(tl.load(plan.page_indptr + at), 0)
    last = tl.minimum(tl.load(plan.page_indptr + at + 1), entries)
    count = tl.cdiv(last - first, splits)
    return tl.minimum(first + split * count, last), tl.minimum(first + (split + 1) * count, last)


@triton.jit
def run_in_pool(first, last, plan, variant, pool):
    """The shortest run of entries that holds all those of a pool, and of a variant of q.

    Lists name a pool's pages one after the other, so that a pass for each pool reads little more than the list once.
    """
    begin, end = last, first
    for start in range(first, last, STEP):
        i = start + tl.arange(0, STEP)
        page = tl.load(plan.page_ids + i, mask=i < last, other=-1) - pool.first_page_id
        in_pool = (i < last) & (page >= 0) & (page < pool.pages)
        if plan.page_variants is not None:
            in_pool &= tl.load(plan.page_variants + i, mask=i < last, other=-1) == variant
        begin = tl.minimum(begin, tl.min(tl.where(in_pool, i, last), 0))
        end = tl.maximum(end, tl.max(tl.where(in_pool, i + 1, first), 0))
    return begin, end


@triton.jit
def max_bias(first, last, plan):
    """The largest bias of the entries [first, last) that have tokens, or 0. Biases are taken relative to it: in float32
    a score added to a bias of 1e9 is lost to rounding, and one of -3e38 overflows when it is multiplied with log2(e).
    """
    largest = 0.0
    if plan.page_bias is not None:
        largest = NEG_INF
        for start in range(first, last, STEP):
            i = start + tl.arange(0, STEP)
            there = (i < last) & (tl.load(plan.page_lens + i, mask=i < last, other=0) > 0)
            largest = tl.maximum(largest, tl.max(tl.load(plan.page_bias + i, mask=there, other=NEG_INF), 0))
        largest = finite(largest)
    return largest


@triton.jit
def entry_of(i, last, plan, variant, pool, base, PAGE_SIZE: tl.constexpr):
    """(page in its pool, valid tokens, (bias - base) * log2(e)) of entry i; no tokens if of another pool or variant."""
    there = i < last
    page = tl.load(plan.page_ids + i, mask=there, other=-1) - pool.first_page_id
    length = tl.load(plan.page_lens + i, mask=there, other=0)
    fits = (page >= 0) & (page < pool.pages) & (length <= PAGE_SIZE)
    if plan.page_starts is not None:
        start = tl.load(plan.page_starts + i, mask=there, other=0)
        fits &= (start >= 0) & (start + length <= PAGE_SIZE)
    if plan.page_variants is not None:
        fits &= tl.load(plan.page_variants + i, mask=there, other=-1) == variant
    bias = 0.0
    if plan.page_bias is not None:
        bias = tl.where(there, tl.load(plan.page_bias + i, mask=there, other=0.0) - base, 0.0) * LOG2E
        # A page so far below has no weight. Its bias would absorb its scores, and exp2 of what is left has no bound.
        bias = tl.where(bias < LEAST_BIAS, NEG_INF, bias)
    return tl.where(fits, page, 0), tl.where(fits, length, 0), bias
