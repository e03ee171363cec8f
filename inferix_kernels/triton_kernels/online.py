"""What the attention kernels share: how they are launched, the online softmax, the merge of splits.

What a program has of the queries and of the pages: work.py. How a list is split among programs follows from sizes
that the host knows without asking the device (`splits_for`): a captured graph stays right when a plan's numbers change.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Unsupported
from ..layout import KVPages
from ..plans import Plan
from .codecs import INTERPRETED, Plane, Tile, planes_of, round_to, side_tile
from .config import Config
from .launch import Call, launch
from .sizes import ceil_div, power_of_2

NEG_INF = tl.constexpr(float("-inf"))  # score of a masked key, lse of no keys
LOG2E = tl.constexpr(1.4426950408889634)  # kernels use exp2, the instruction that a GPU has, for exp
LN2 = tl.constexpr(0.6931471805599453)

MOST_POOLS = 8  # each is a loop of its own in a kernel
LEAST_SCALE = 1e-30  # for 0: a masked score is -inf, and must stay so when it is scaled
# Fixed cost of a program, in tiles of keys: finding its work, loading queries, writing partial results.
_OVERHEAD = 2
_PARTIAL = 4  # additional cost where lists are split: partial results go to memory and are read again
_MOST_SPLITS = 64
_COMBINED = 4096  # numbers of one program that combines splits


@functools.lru_cache
def splits_for(programs: int, key_tiles: int, processors: int) -> int:
    """Among how many programs to split each list of `key_tiles` tiles of keys, so that all processors finish together.

    The time is the number of waves times what a program takes. Wan 1.3B at 32,760 keys: 444 programs fill 132
    processors to 84 %; in 2 splits to 96 %.
    """

    def time(splits: int) -> int:
        overhead = _OVERHEAD + _PARTIAL * (splits > 1)
        return ceil_div(programs * splits, processors) * (ceil_div(key_tiles, splits) + overhead)

    return min(range(1, max(2, min(_MOST_SPLITS, key_tiles // 2) + 1)), key=lambda splits: (time(splits), splits))


@functools.lru_cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Strided(NamedTuple):
    """A tensor [outer, tokens, heads, width] or, for lse, [outer, tokens, heads]: its address and strides."""

    pointer: Tensor
    outer_stride: int  # of variants of q, or of splits
    token_stride: int
    head_stride: int
    channel_stride: int = 0


class Pool(NamedTuple):
    """A pool as kernels get it."""

    k: Plane
    v: Plane
    first_page_id: int  # in the count through all pools
    pages: int


def strided(x: Tensor) -> Strided:
    return Strided(x, *x.stride())


def pools_of(pools: Sequence[KVPages]) -> tuple[Pool, ...]:
    found, first_page_id = [], 0
    for pages in pools:
        found.append(Pool(*planes_of(pages), first_page_id, pages.pages))
        first_page_id += pages.pages
    return tuple(found)


def tiles_of_pools(pools: Sequence[KVPages]) -> tuple[tuple[Tile, ...], tuple[Tile, ...]]:
    """Keys and values of every pool."""
    return tuple(side_tile(p, 0, 0) for p in pools), tuple(side_tile(p, 1, 0) for p in pools)


def launch_attention(
    kernel: object, call: Call, chosen: Config, splits: int | None, least: int, parts: int = 1, **options: object
) -> None:
    """Launch an attention kernel and, if lists are split, the kernel that combines their results in the list's order.

    chosen: "m" query rows of a tile at most, "n" keys at most, "warps", "stages". splits: None, as many as fill the
    GPU. least: the smallest side that tl.dot takes. parts: programs that share the width of the output.
    """
    q, pools, plan, scale, out, lse, accumulate, *_ = call
    if len(pools) > MOST_POOLS:
        raise Unsupported(f"pools must be at most {MOST_POOLS}, got {len(pools)}")
    if scale < 0:
        q, scale = -q, -scale
    chosen = fit_tile_to_pages(chosen, q, pools)
    heads, page_size, tokens = pools[0].heads, pools[0].page_size, q.shape[-3]
    keys, values = tiles_of_pools(pools)
    segments, lists, group = len(plan.q_indptr) - 1, len(plan.page_indptr) - 1, q.shape[-2] // heads
    block_m = tile_rows(chosen["m"], tokens * group, segments)
    block_n = max(least, chosen["n"])
    tiles = tokens * group // block_m + segments
    if splits is None:
        listed, pages = ceil_div(len(plan.page_ids), max(lists, 1)), pages_spanned(page_size, block_n)
        key_tiles = ceil_div(listed, pages) * ceil_div(page_size, block_n)
        splits = splits_for(tiles * heads * parts, key_tiles, processors(q.device))
    outs, lses = out[None], lse[None]
    # Parts that accumulate would read an lse that another part has just written.
    combined = splits > 1 or (accumulate and parts > 1)
    if combined:
        outs, lses = (torch.empty(splits, *x.shape, dtype=torch.float32, device=q.device) for x in (out, lse))
    launch(
        kernel,
        tiles * heads * splits * parts,
        q.device,
        strided(q if q.ndim == 4 else q[None]), strided(outs), strided(lses),
        Plan(*(None if x is None else x.contiguous() for x in plan[:-1])), pools_of(pools), max(scale, LEAST_SCALE),  # type: ignore[arg-type]
        tokens, segments, len(plan.page_ids), splits, tiles,
        HEADS=heads,
        GROUP=group,
        KEYS=keys,
        VALUES=values,
        VARIANTS=1 if q.ndim == 3 else len(q),
        SEGMENTS=power_of_2(max(segments, 1)),
        PER_HEAD=lists != segments,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(least, keys[0].cols),
        ACCUMULATE=accumulate and not combined,
        **options,
        num_warps=max(min(4, chosen["warps"]), chosen["warps"] * block_m // chosen["m"]),
        num_stages=chosen["stages"],
        fma=True,
    )  # fmt: skip
    if combined:
        combine_splits(outs, lses, call)


def fit_tile_to_pages(chosen: Config, q: Tensor, pools: Sequence[KVPages]) -> Config:
    """Tile sizes are for numbers of q's size. Pages of larger ones get tiles of fewer keys, in as many bytes; where a
    product takes no fewer, tiles of fewer queries make up for it.
    """
    widest = max(side.codes.element_size() for pages in pools for side in pages.sides)
    n = chosen["n"] * q.element_size() // max(widest, q.element_size())
    return {**chosen, "m": max(16, chosen["m"] * min(n, 16) // 16), "n": max(n, 16)}


def tile_rows(most: int, rows: int, segments: int) -> int:
    """Rows of a tile: not many more than a segment has."""
    return min(most, max(16, power_of_2(ceil_div(rows, max(segments, 1)))))


def combine_splits(outs: Tensor, lses: Tensor, call: Call) -> None:
    splits, tokens, heads, width = outs.shape
    cols = power_of_2(width)
    block = max(1, _COMBINED // cols)
    launch(
        combine_kernel,
        ceil_div(tokens * heads, block),
        outs.device,
        outs, lses, strided(call.out[None]), strided(call.lse[None]), tokens * heads, splits,
        HEADS=heads,
        WIDTH=width,
        ROWS=block,
        COLS=cols,
        SPLITS=power_of_2(splits),
        ACCUMULATE=call.accumulate,
        num_warps=4,
        fma=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_kernel(
    outs,  # [splits, tokens, HEADS, WIDTH] float32
    lses,  # [splits, tokens, HEADS]
    out,  # Rows [1, tokens, HEADS, WIDTH], written, as lse
    lse,  # Rows [1, tokens, HEADS]
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
    row_mask, i = row < rows, tl.arange(0, SPLITS)
    logs = tl.load(
        lses + i[:, None].to(tl.int64) * rows + row[None, :],
        mask=(i < splits)[:, None] & row_mask[None, :],
        other=NEG_INF,
    )
    max_lse = finite(tl.max(logs, 0))
    total = tl.sum(tl.exp2((logs - max_lse[None, :]) * LOG2E), 0)
    x = tl.zeros([ROWS, COLS], tl.float32)
    mask = row_mask[:, None] & (cols < WIDTH)[None, :]
    at = row.to(tl.int64)
    for _ in range(splits):
        weight = tl.exp2((tl.load(lses + at, mask=row_mask, other=NEG_INF) - max_lse) * LOG2E)
        x += weight[:, None] * tl.load(outs + at[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0)
        at += rows
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    store_output(x, max_lse, total, out, lse, 0, token, head, row_mask, 0, WIDTH, ACCUMULATE)


@triton.jit
def store_output(
    acc, row_max, row_sum, out, lse, split, token, head, row_mask, start,
    WIDTH: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Store acc / row_sum [rows, COLS] from channel `start` on and, if that is 0, row_max + log(row_sum) [rows] as lse;
    or merge them into the result that is there.

    A row that saw no key has row_sum 0 and becomes 0 and -inf.
    """
    cols = start + tl.arange(0, acc.shape[1])
    mask = row_mask[:, None] & (cols < WIDTH)[None, :]
    rows = split * out.outer_stride + token * out.token_stride + head * out.head_stride
    places = out.pointer + rows[:, None] + cols[None, :] * out.channel_stride
    lse_places = lse.pointer + split * lse.outer_stride + token * lse.token_stride + head * lse.head_stride
    saw = row_sum != 0  # and true for NaN, which must stay
    row_sum = tl.where(saw, row_sum, 1.0)
    acc = acc / row_sum[:, None]
    row_lse = tl.where(saw, row_max + tl.log2(row_sum) * LN2, NEG_INF)
    if ACCUMULATE:
        before = tl.load(lse_places, mask=row_mask, other=NEG_INF)
        row_max = finite(tl.maximum(before, row_lse))
        old, new = tl.exp2((before - row_max) * LOG2E), tl.exp2((row_lse - row_max) * LOG2E)
        row_sum = old + new
        # What saw no key is not read: it may be NaN.
        kept = tl.load(places, mask=mask & (old != 0)[:, None], other=0.0).to(tl.float32)
        tl.debug_barrier()  # other threads of this program read the lse of these rows too, before any writes it
        saw = row_sum != 0
        row_sum = tl.where(saw, row_sum, 1.0)
        acc = kept * (old / row_sum)[:, None] + acc * (new / row_sum)[:, None]
        row_lse = tl.where(saw, row_max + tl.log2(row_sum) * LN2, NEG_INF)
    tl.store(places, round_to(acc, out.pointer.dtype.element_ty), mask=mask)
    if start == 0:
        tl.store(lse_places, row_lse, mask=row_mask)


def pages_spanned(page_size: int, keys: int) -> int:
    """How many pages a tile of so many keys spans; each has a power of two of them, so that some may be none."""
    return max(1, keys // (1 << (page_size - 1).bit_length()))


pages_of_tile = triton.constexpr_function(pages_spanned)  # for kernels


@triton.constexpr_function
def tile_at(tiles, i) -> Tile:
    return tiles[i]


@triton.jit
def finite(row_max):
    """0 for a maximum of -inf, so that it can be subtracted: -inf - -inf would be NaN."""
    return tl.where(row_max == NEG_INF, 0.0, row_max)


@triton.jit
def load_rows(q, variant, token, head, row_mask, start, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """[rows, COLS]: channels of q's rows from `start` on, 0 from channel WIDTH on."""
    cols = start + tl.arange(0, COLS)
    places = (token * q.token_stride + head * q.head_stride)[:, None] + cols[None, :] * q.channel_stride
    mask = row_mask[:, None] & (cols < WIDTH)[None, :]
    return tl.load(q.pointer + variant * tl.cast(q.outer_stride, tl.int64) + places, mask=mask, other=0.0)


@triton.jit
def online_softmax_step(qk, qk_scale, running_max, running_sum):
    """A step of the online softmax, in base 2, over the scores qk [rows, keys] * qk_scale [rows].

    Returns p = exp2(score - new maximum), alpha = exp2(old maximum - new maximum), which rescales earlier sums, and the
    new (running_max, running_sum). As qk_scale is positive, the maximum is found before it is applied, and each p costs
    one fma and one exp2.
    """
    new_max = tl.maximum(running_max, tl.max(qk, 1) * qk_scale)
    safe_max = finite(new_max)
    p = tl.exp2(qk * qk_scale[:, None] - safe_max[:, None])
    alpha = tl.exp2(running_max - safe_max)
    return p, alpha, new_max, running_sum * alpha + tl.sum(p, 1)


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc in float32, of float operands. Triton's interpreter would multiply bfloat16's bits."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")
