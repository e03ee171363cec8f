"""What the attention kernels share: which queries and pages a program has, one online softmax, the sum of splits.

A program has a tile of query rows, one KV head and a run of its page list. A row is one query of one of the heads that
read this KV head, so the keys of a tile serve a whole group. How a list is split among programs follows from sizes
that the host knows without asking the device (`splits_for`): a captured graph stays right when a plan's numbers change.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import KVPages, Plan, as_bytes
from .codecs import INTERPRETED, Tile, round_to, tile_of
from .launch import launch

NOTHING = tl.constexpr(float("-inf"))  # the logarithm of no sum
LOG2E = tl.constexpr(1.4426950408889634)  # scores are powers of two inside a kernel: exp2 is what a GPU has
LN2 = tl.constexpr(0.6931471805599453)
STEP = tl.constexpr(1024)  # numbers of a plan that are looked through at once

# What a program costs besides its keys, in tiles of keys: finding its work, loading queries, writing partial sums.
_OVERHEAD = 2
_MOST_SPLITS = 64
_SUMMED = 4096  # numbers of one program that adds up splits


@functools.lru_cache
def splits_for(programs: int, key_tiles: int, processors: int) -> int:
    """Among how many programs to split each list of `key_tiles` tiles of keys, so that `processors` run dry together.

    The time is the number of waves times what a program takes. Wan 1.3B at 32,760 keys: 444 programs fill 132
    processors to 84 %; in 2 splits to 96 %.
    """

    def time(splits: int) -> int:
        return triton.cdiv(programs * splits, processors) * (triton.cdiv(key_tiles, splits) + _OVERHEAD)

    return min(range(1, max(2, min(_MOST_SPLITS, key_tiles // 2) + 1)), key=lambda splits: (time(splits), splits))


@functools.lru_cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tiles_of(pools: Sequence[KVPages]) -> tuple[tuple[Tile, ...], tuple[Tile, ...]]:
    """Keys and values of every pool."""
    keys = tuple(tile_of(p.sides[0].codec, p.page_size, p.head_dim, 0) for p in pools)
    return keys, tuple(tile_of(p.sides[1].codec, p.page_size, p.value_dim, 0) for p in pools)


def pool_arguments(pools: Sequence[KVPages]) -> tuple:
    """For each pool: codes, scales, offsets of keys and of values, its first page and number of pages.

    sm_80 knows no 8-bit floats: kernels get their bits.
    """
    arguments, first_page = [], 0
    for pages in pools:
        tensors = [x for side in pages.sides for x in (as_bytes(side.codes), side.scales, side.offsets)]
        arguments.append((*tensors, first_page, pages.pages))
        first_page += pages.pages
    return tuple(arguments)


def plan_arguments(plan: Plan) -> tuple:
    return tuple(None if x is None else x.contiguous() for x in plan)


def run_split(
    kernel: object, q: Tensor, plan: Plan, out: Tensor, lse: Tensor, accumulate: bool, splits: int, programs: int,
    rows: int, *args: object, **options: object,
) -> None:  # fmt: skip
    """Launch an attention kernel and, if lists are split, the kernel that adds up in the order of the list.

    programs: those of one split; rows: of the tile of queries each of them has.
    """
    results: tuple[Tensor, Tensor] = out[None], lse[None]
    if splits > 1:
        results = (
            torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device),
            torch.empty(splits, *lse.shape, dtype=torch.float32, device=out.device),
        )
    tokens, segments = q.shape[-3], len(plan.q_indptr) - 1
    launch(
        kernel,
        programs * splits,
        q.device,
        *(q, *((0,) * (4 - q.ndim)), *q.stride()),
        *(results[0], *results[0].stride(), results[1], *results[1].stride()),
        *plan_arguments(plan),
        *(tokens, segments, len(plan.page_ids), splits),
        *args,
        SEGMENTS=triton.next_power_of_2(max(segments, 1)),
        BLOCK_M=rows,
        ACCUMULATE=accumulate and splits == 1,
        **options,
        fma=True,
    )
    if splits > 1:
        sum_splits(*results, out, lse, accumulate)


def sum_splits(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, accumulate: bool) -> None:
    splits, tokens, heads, width = outs.shape
    cols = triton.next_power_of_2(width)
    rows = max(1, _SUMMED // cols)
    launch(
        sum_kernel,
        triton.cdiv(tokens * heads, rows),
        out.device,
        *(outs, lses, out, *out.stride(), lse, *lse.stride()),
        *(tokens * heads, splits),
        HEADS=heads,
        WIDTH=width,
        ROWS=rows,
        COLS=cols,
        SPLITS=triton.next_power_of_2(splits),
        ACCUMULATE=accumulate,
        num_warps=4,
        fma=True,
    )


@triton.jit(do_not_specialize=["rows", "splits"])
def sum_kernel(
    outs,  # [splits, tokens, HEADS, WIDTH] float32
    lses,  # [splits, tokens, HEADS]
    out,  # [tokens, HEADS, WIDTH], written, as lse
    out_token_stride,
    out_head_stride,
    out_stride,
    lse,  # [tokens, HEADS]
    lse_token_stride,
    lse_head_stride,
    rows,
    splits,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SPLITS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    row, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    here, i = row < rows, tl.arange(0, SPLITS)
    logs = tl.load(
        lses + i[:, None].to(tl.int64) * rows + row[None, :],
        mask=(i < splits)[:, None] & here[None, :],
        other=NOTHING,
    )
    largest = finite(tl.max(logs, 0))
    total = tl.sum(tl.exp2((logs - largest[None, :]) * LOG2E), 0)
    x = tl.zeros([ROWS, COLS], tl.float32)
    mask = here[:, None] & (cols < WIDTH)[None, :]
    at = row.to(tl.int64)
    for _ in range(splits):
        weight = tl.exp2((tl.load(lses + at, mask=here, other=NOTHING) - largest) * LOG2E)
        x += weight[:, None] * tl.load(outs + at[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0)
        at += rows
    token, head = row // HEADS, row % HEADS
    out_at = token.to(tl.int64) * out_token_stride + head * out_head_stride
    lse_at = token.to(tl.int64) * lse_token_stride + head * lse_head_stride
    finish(x, largest, total, out, out_at, out_stride, lse, lse_at, here, WIDTH, ACCUMULATE)


@triton.jit
def finish(
    x, largest, total, out, out_at, out_stride, lse, lse_at, here, WIDTH: tl.constexpr, ACCUMULATE: tl.constexpr
):
    """Store x / total [rows, COLS] and largest + log(total) [rows], or merge them into what is there.

    A row that saw no key has total 0 and becomes 0 and -inf.
    """
    cols = tl.arange(0, x.shape[1])
    mask = here[:, None] & (cols < WIDTH)[None, :]
    places = out + out_at[:, None] + cols[None, :] * out_stride
    saw = total != 0  # and true for NaN, which must stay
    total = tl.where(saw, total, 1.0)
    x = x / total[:, None]
    logs = tl.where(saw, largest + tl.log2(total) * LN2, NOTHING)
    if ACCUMULATE:
        before = tl.load(lse + lse_at, mask=here, other=NOTHING)
        largest = finite(tl.maximum(before, logs))
        old, new = tl.exp2((before - largest) * LOG2E), tl.exp2((logs - largest) * LOG2E)
        total = old + new
        # What saw no key is not read: it may be NaN.
        kept = tl.load(places, mask=mask & (old != 0)[:, None], other=0.0).to(tl.float32)
        saw = total != 0
        total = tl.where(saw, total, 1.0)
        x = kept * (old / total)[:, None] + x * (new / total)[:, None]
        logs = tl.where(saw, largest + tl.log2(total) * LN2, NOTHING)
    tl.store(places, round_to(x, out.dtype.element_ty), mask=mask)
    tl.store(lse + lse_at, logs, mask=here)


@triton.jit
def finite(largest):
    """Where everything is -inf, any number serves to subtract: -inf - -inf would be NaN."""
    return tl.where(largest == NOTHING, 0.0, largest)


@triton.jit
def rows_of(tile, q_indptr, tokens, segments, GROUP: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(segment, first token, first row in the segment, rows of the segment) of a tile of queries.

    Segment s begins with tile q_indptr[s] * GROUP // BLOCK_M + s, which leaves it enough tiles whatever its length:
    where a tile belongs follows without a running sum, and some tiles have no rows.
    """
    before = 0
    CHUNK: tl.constexpr = SEGMENTS if SEGMENTS < STEP else STEP
    for start in range(0, SEGMENTS, CHUNK):
        s = start + tl.arange(0, CHUNK)
        first_tiles = tl.load(q_indptr + s, mask=s < segments, other=0) * GROUP // BLOCK_M + s
        before += tl.sum(((first_tiles <= tile) & (s < segments)).to(tl.int32), 0)
    segment = before - 1
    first = tl.load(q_indptr + segment)
    end = tl.minimum(tl.load(q_indptr + segment + 1), tokens)
    first_tile = first * GROUP // BLOCK_M + segment
    return segment, first, (tile - first_tile) * BLOCK_M, (end - first) * GROUP


@triton.jit
def pages_of(page_indptr, entries, at, split, splits):
    """Entries [first, last) of the page list `at` that belong to this split."""
    first = tl.maximum(tl.load(page_indptr + at), 0)
    last = tl.minimum(tl.load(page_indptr + at + 1), entries)
    count = tl.cdiv(last - first, splits)
    return tl.minimum(first + split * count, last), tl.minimum(first + (split + 1) * count, last)


@triton.jit
def run_in_pool(first, last, page_ids, page_variants, variant, pool):
    """The shortest run of entries that holds all those of a pool, and of a variant of q.

    Lists name a pool's pages in a row, so that a pass for each pool walks over hardly more than the list.
    """
    begin, end = last, first
    for start in range(first, last, STEP):
        i = start + tl.arange(0, STEP)
        page = tl.load(page_ids + i, mask=i < last, other=-1) - pool[6]
        here = (i < last) & (page >= 0) & (page < pool[7])
        if page_variants is not None:
            here &= tl.load(page_variants + i, mask=i < last, other=-1) == variant
        begin = tl.minimum(begin, tl.min(tl.where(here, i, last), 0))
        end = tl.maximum(end, tl.max(tl.where(here, i + 1, first), 0))
    return begin, end


@triton.jit
def entry_of(i, last, page_ids, page_lens, page_bias, page_variants, variant, pool, PAGE_SIZE: tl.constexpr):
    """(page in its pool, valid tokens, bias in powers of two) of an entry; no tokens if it is none of this pass."""
    there = i < last
    page = tl.load(page_ids + i, mask=there, other=-1) - pool[6]
    length = tl.load(page_lens + i, mask=there, other=0)
    fits = (page >= 0) & (page < pool[7]) & (length <= PAGE_SIZE)
    if page_variants is not None:
        fits &= tl.load(page_variants + i, mask=there, other=-1) == variant
    bias = 0.0
    if page_bias is not None:
        bias = tl.load(page_bias + i, mask=there, other=0.0) * LOG2E
    return tl.where(fits, page, 0), tl.where(fits, length, 0), bias


@triton.jit
def weigh(scores, largest, total):
    """A step of the online softmax over scores [rows, keys]: weights, what shrinks earlier sums, (largest, total)."""
    new = tl.maximum(largest, tl.max(scores, 1))
    safe = finite(new)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(largest - safe)
    return weights, shrink, new, total * shrink + tl.sum(weights, 1)


@triton.jit
def multiply(a, b):
    """a @ b in float32, of float operands. Triton's interpreter multiplies the bits of bfloat16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def multiply_add(a, b, sum):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum)
    else:
        return tl.dot(a, b, sum, input_precision="ieee")
