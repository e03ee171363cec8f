"""paged_attention in Triton: a program per tile of query rows, KV head and part of the page list.

Held to the reference in Triton's interpreter, compiled for sm_80 to sm_120, never run on a GPU. There a plan's numbers
are not checked on the host, which would wait for the device: an entry that does not fit is skipped.

Two ways to multiply. In floats, of q's type: a tile of keys and values is dequantized once and serves all rows of the
program; a scale that a key has for itself multiplies its scores instead, so that its codes are exact. In 8 bits, where
a configuration says "eight_bit": q is quantized row by row to the type of the keys' codes and multiplied with them;
weights are rounded to e4m3 and multiplied with e4m3 values, and the sum over each tile of at most 128 keys goes to
float32, which Hopper's e4m3 units do not keep, in the step that applies the channels' scales. Sides that are neither,
bf16 keys or int8 values say, stay with floats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .._dispatch import Unsupported
from ..layout import KVPages, Plan
from .codecs import INTERPRETED, Tile, from_e4m3, read_codes, read_part, round_to, round_to_int, scale_places, to_e4m3
from .config import Config, config
from .launch import architecture, check_device
from .online import (
    LN2,
    LOG2E,
    NOTHING,
    entry_of,
    finish,
    finite,
    multiply,
    multiply_add,
    pages_of,
    pool_arguments,
    processors,
    rows_of,
    run_in_pool,
    run_split,
    splits_for,
    tiles_of,
    weigh,
)

_MOST_POOLS = 8  # each is a loop of its own in the kernel
# e4m3 weights are stored times this: at most 256 of 448, and down to 2^-17 of the largest.
WEIGHT_SCALE = tl.constexpr(256.0)


def paged_attention(
    q: Tensor, pools: Sequence[KVPages], plan: Plan, *, scale: float, out: Tensor, lse: Tensor, accumulate: bool = False
) -> tuple[Tensor, Tensor]:
    check_device("paged_attention", q)
    if not q.is_cuda:
        reference.check_plan(q, pools, plan)
    chosen = config("paged_attention", shape_class(q, pools), q.device)
    return attend(q, pools, plan, scale, out, lse, accumulate, chosen)


def shape_class(q: Tensor, pools: Sequence[KVPages]) -> str:
    """The rows of configs/*.json: what q is multiplied as, how keys lie, how wide they are, how many rows meet."""
    if q.dtype == torch.float32:
        return "float32"
    pages = "quantized" if any(p.sides[0].codec.scaled_by for p in pools) else "floats"
    return f"{pages}, D {64 if pools[0].head_dim <= 64 else 128 if pools[0].head_dim <= 128 else 256}"


def attend(
    q: Tensor, pools: Sequence[KVPages], plan: Plan, scale: float, out: Tensor, lse: Tensor, accumulate: bool,
    chosen: Config, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """paged_attention with given tiles, and lists split as given or so that they fill the GPU."""
    if len(pools) > _MOST_POOLS:
        raise Unsupported(f"paged_attention: pools must be at most {_MOST_POOLS}, got {len(pools)}")
    eight_bit = bool(chosen.get("eight_bit", 0))
    keys, values = tiles_of(pools)
    target = architecture(q.device) or 90
    if eight_bit and target < 89 and any(tile.kind == "e4m3" for tile in keys + values):
        raise Unsupported(f"paged_attention: sm_{target} multiplies no e4m3; it has 8-bit attention to int8 pages only")
    heads, tokens, segments = pools[0].heads, q.shape[-3], len(plan.q_indptr) - 1
    lists = len(plan.page_indptr) - 1
    group = q.shape[-2] // heads
    least = 32 if eight_bit else 16  # of any side of a product
    block_m = tile_rows(chosen["m"], tokens * group, segments)
    block_n = max(least, min(chosen["n"], triton.next_power_of_2(pools[0].page_size)))
    tiles = tokens * group // block_m + segments
    if splits is None:
        key_tiles = triton.cdiv(len(plan.page_ids), max(lists, 1)) * triton.cdiv(pools[0].page_size, block_n)
        splits = splits_for(tiles * heads, key_tiles, processors(q.device))
    run_split(
        attention_kernel,
        *(q, plan, out, lse, accumulate, splits, tiles * heads, block_m),
        *(tiles, pool_arguments(pools), scale),
        HEADS=heads,
        GROUP=group,
        KEYS=keys,
        VALUES=values,
        VARIANTS=1 if q.ndim == 3 else len(q),
        PER_HEAD=lists != segments,
        BLOCK_N=block_n,
        COLS=max(least, keys[0].cols),
        EIGHT_BIT=eight_bit,
        E4M3=target >= 89,
        num_warps=max(1, chosen["warps"] * block_m // chosen["m"]),
        num_stages=chosen["stages"],
    )
    return out, lse


def tile_rows(most: int, rows: int, segments: int) -> int:
    """Rows of a tile: not many more than a segment has."""
    return min(most, max(16, triton.next_power_of_2(triton.cdiv(rows, max(segments, 1)))))


@triton.constexpr_function
def tile_at(tiles, i) -> Tile:
    return tiles[i]


@triton.jit(do_not_specialize=["tokens", "segments", "entries", "splits", "tiles"])
def attention_kernel(
    q,  # [V, tokens, HEADS * GROUP, D]
    q_variant_stride,
    q_token_stride,
    q_head_stride,
    q_stride,
    out,  # [splits, tokens, HEADS * GROUP, D], written, as lse
    out_split_stride,
    out_token_stride,
    out_head_stride,
    out_stride,
    lse,  # [splits, tokens, HEADS * GROUP]
    lse_split_stride,
    lse_token_stride,
    lse_head_stride,
    q_indptr,
    page_indptr,
    page_ids,
    page_lens,
    page_bias,
    page_variants,
    tokens,
    segments,
    entries,
    splits,
    tiles,
    pools,  # online.pool_arguments
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    VARIANTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLS: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    E4M3: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    # Tiles of one head run side by side: they read the same pages.
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    split, head = part % splits, part // splits
    segment, first_token, first_row, rows = rows_of(tile, q_indptr, tokens, segments, GROUP, SEGMENTS, BLOCK_M)
    if first_row >= rows:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    here = row < rows
    token, query_head = (first_token + row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    at = segment
    if PER_HEAD:
        at = segment * HEADS + head
    first, last = pages_of(page_indptr, entries, at, split, splits)

    WIDTH: tl.constexpr = tile_at(KEYS, 0).width
    cols = tl.arange(0, COLS)
    places = (token * q_token_stride + query_head * q_head_stride)[:, None] + cols[None, :] * q_stride
    largest = tl.full([BLOCK_M], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum = tl.zeros([BLOCK_M, COLS], tl.float32)
    for p in tl.static_range(len(KEYS)):
        for variant in tl.static_range(VARIANTS):
            begin, end = first, last
            if len(KEYS) * VARIANTS > 1:
                begin, end = run_in_pool(first, last, page_ids, page_variants, variant, pools[p])
            queries = tl.load(
                q + variant * q_variant_stride + places, mask=here[:, None] & (cols < WIDTH)[None, :], other=0.0
            )
            largest, total, sum = attend_run(
                *(queries, scale * LOG2E, largest, total, sum, begin, end),
                *(page_ids, page_lens, page_bias, page_variants, variant, pools[p], head),
                *(HEADS, tile_at(KEYS, p), tile_at(VALUES, p), BLOCK_N, EIGHT_BIT, E4M3),
            )
    out_at = split.to(tl.int64) * out_split_stride + token * out_token_stride + query_head * out_head_stride
    lse_at = split.to(tl.int64) * lse_split_stride + token * lse_token_stride + query_head * lse_head_stride
    finish(sum, finite(largest) * LN2, total, out, out_at, out_stride, lse, lse_at, here, WIDTH, ACCUMULATE)


@triton.jit
def attend_run(
    queries,
    factor,  # of scores, to powers of two
    largest,
    total,
    sum,
    first,
    last,
    page_ids,
    page_lens,
    page_bias,
    page_variants,
    variant,
    pool,
    head,
    HEADS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    E4M3: tl.constexpr,
):
    """One online softmax goes on over the entries [first, last) that are pages of this pool, of this variant."""
    COLS: tl.constexpr = queries.shape[1]
    DTYPE: tl.constexpr = queries.dtype
    PARTS: tl.constexpr = (KEY.page_size + BLOCK_N - 1) // BLOCK_N  # tiles of keys of a page
    CODES: tl.constexpr = EIGHT_BIT and (KEY.kind == "int8" or KEY.kind == "e4m3")  # q is multiplied as codes
    row_scale = tl.full([queries.shape[0]], factor, tl.float32)
    if CODES:
        queries, scales = quantize(queries.to(tl.float32), KEY)
        row_scale *= scales
    # The next entry is read while this one is multiplied: nothing waits for a page id.
    page, length, bias = entry_of(
        first, last, page_ids, page_lens, page_bias, page_variants, variant, pool, KEY.page_size
    )
    for i in range(first * PARTS, last * PARTS):
        at, row = page.to(tl.int64) * HEADS + head, (i % PARTS) * BLOCK_N
        rows = row + tl.arange(0, BLOCK_N)
        if CODES:
            codes = read_codes(pool[0], at, row, 0, length, KEY, BLOCK_N, COLS)
            scores = multiply_codes(queries, tl.trans(codes), KEY)
        else:
            keys = read_keys(pool, at, row, length, KEY, DTYPE, BLOCK_N, COLS, E4M3)
            scores = multiply(queries, tl.trans(keys))
        scores *= row_scale[:, None]
        if KEY.kind == "int8" or KEY.kind == "e4m3":
            along, mask = scale_places(at, rows, tl.arange(0, COLS), length, KEY)
            scores *= tl.load(pool[1] + along, mask=mask, other=0.0)[None, :]
        if page_bias is not None:
            scores += bias
        if row + BLOCK_N > length:
            scores = tl.where((rows < length)[None, :], scores, NOTHING)
        weights, shrink, largest, total = weigh(scores, largest, total)
        if EIGHT_BIT and VALUE.kind == "e4m3":
            stored = read_codes(pool[3], at, row, 0, length, VALUE, BLOCK_N, COLS)
            stored = tl.where((rows < length)[:, None], stored, 0).to(tl.uint8)
            along, mask = scale_places(at, rows, tl.arange(0, COLS), length, VALUE)
            channel_scale = tl.load(pool[4] + along, mask=mask, other=0.0) / WEIGHT_SCALE
            # A sum of its own for every tile: float32 where the tensor cores keep less.
            tile_sum = multiply_codes(as_e4m3(weights * WEIGHT_SCALE), stored, VALUE)
            sum = sum * shrink[:, None] + tile_sum * channel_scale[None, :]
        else:
            values = read_values(pool, at, row, length, VALUE, DTYPE, BLOCK_N, COLS, E4M3)
            sum = multiply_add(round_to(weights, values.dtype), values, sum * shrink[:, None])
        page, length, bias = entry_of(
            (i + 1) // PARTS, last, page_ids, page_lens, page_bias, page_variants, variant, pool, KEY.page_size
        )
    return largest, total, sum


@triton.jit
def quantize(x, tile: tl.constexpr):
    """Rows of float32 as codes of a tile's kind, and their scales."""
    scale = tl.maximum(tl.max(tl.abs(x), 1), tile.floor) / tile.top
    x = tl.minimum(tl.maximum(x / scale[:, None], -tile.top), tile.top)
    if tile.kind == "int8":
        return round_to_int(x).to(tl.int8), scale
    else:
        return as_e4m3(x), scale


@triton.jit
def as_e4m3(x):
    if INTERPRETED:  # which rounds it wrong
        return to_e4m3(x)
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def multiply_codes(a, b, tile: tl.constexpr):
    """a @ b of codes of a tile's kind, as float32; int8 exactly."""
    if tile.kind == "int8":
        return tl.dot(a, b).to(tl.float32)
    else:
        return tl.dot(a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True))


@triton.jit
def read_keys(
    pool, at, row, length, tile: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    E4M3: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] of this type; where each token has a scale, without it: its codes are exact in every type."""
    if tile.kind == "u4":
        return round_to(read_part(pool[0], pool[1], pool[2], at, row, 0, length, tile, ROWS, COLS), DTYPE)
    else:
        return as_floats(read_codes(pool[0], at, row, 0, length, tile, ROWS, COLS), tile, DTYPE, E4M3)


@triton.jit
def read_values(
    pool, at, row, length, tile: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    E4M3: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] of this type, dequantized; 0 past the length."""
    if tile.kind == "float":
        return as_floats(read_codes(pool[3], at, row, 0, length, tile, ROWS, COLS), tile, DTYPE, E4M3)
    else:
        return round_to(read_part(pool[3], pool[4], pool[5], at, row, 0, length, tile, ROWS, COLS), DTYPE)


@triton.jit
def as_floats(codes, tile: tl.constexpr, DTYPE: tl.constexpr, E4M3: tl.constexpr):
    if codes.dtype == DTYPE:
        return codes
    elif tile.kind != "e4m3":
        return round_to(codes.to(tl.float32), DTYPE)
    elif E4M3 and not INTERPRETED:
        return codes.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        return round_to(from_e4m3(codes), DTYPE)
