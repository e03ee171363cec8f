"""qkv_prologue in Triton: a program per entry of the page list, head and part of the tile. What a head needs is in the
program: both channels of each pair to be rotated and, for a norm of each head, all of them.

A norm over all heads and a scale over a page cross: neither a program for whole rows nor one for whole pages sees
both. For such a norm a first launch reads q and k for two numbers per row, and the second finds most of them still in
the cache.

Held to the reference in Triton's interpreter, compiled for sm_80 to sm_120, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..layout import KV_FORMATS, Codec, KVPages, PageList
from .codecs import part_of, planes_of, round_to, side_tile, tile_index, tile_of, write_part
from .config import config, rows_and_warps, warps_of
from .kv_pages import (
    entries,
    first_token,
    fits,
    frames_of,
    less_mean,
    list_tensors,
    tiles_of,
    token_places,
)
from .launch import Case, check_device, launch
from .sizes import ceil_div, power_of_2

__all__ = ["qkv_prologue"]


class Heads(NamedTuple):
    """What a kernel is compiled for about the heads of q, k or v in a row of qkv."""

    column: int  # where the first one begins
    heads: int
    width: int  # of one
    norm: str  # over what: "head", "all" heads, or "" for none
    layer: bool  # takes off the mean before
    stats: int  # of a norm over all heads: which of the statistics


class Source(NamedTuple):
    qkv: Tensor  # [tokens, columns]
    token_stride: int
    stride: int
    bias: Tensor | None  # [columns]


class Norm(NamedTuple):
    weight: Tensor | None  # [heads * D], [D], or no norm
    bias: Tensor | None  # as large: a layer norm


def qkv_prologue(
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    rope: Tensor | None,
    pages: KVPages,
    where: PageList,
    *,
    norm_q_bias: Tensor | None = None,
    norm_k_bias: Tensor | None = None,
    bias: Tensor | None = None,
    k_mean: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = True,
    out: Tensor,
) -> Tensor:
    check_device("qkv_prologue", qkv)
    if not qkv.is_cuda:
        reference.spans("where", where, pages, tokens=len(qkv), written=True)
    H, D, query_heads = pages.heads, pages.head_dim, out.shape[1]
    q_norm, k_norm = _norm(norm_q, norm_q_bias), _norm(norm_k, norm_k_bias)
    q = _heads(0, query_heads, D, q_norm, 0)
    k = _heads(query_heads, H, D, k_norm, int(q.norm == "all"))
    v = _heads(query_heads + H, H, D, Norm(None, None), 0)
    source = Source(qkv, qkv.stride(0), qkv.stride(1), None if bias is None else bias.contiguous())
    stats = _norm_stats(source, [side for side in (q, k) if side.norm == "all"], eps)
    rotary_dim = 0 if rope is None else 2 * rope.shape[1]
    # Smaller parts than those of kv_append: each channel needs a cosine and a sine too.
    parts = config("qkv_prologue", "any", qkv.device)
    query = tile_of(Codec(out.dtype), pages.page_size, D, numbers=parts["numbers"])
    key, value = tiles_of(pages, numbers=parts["numbers"])
    if key.split == 1 and (k.norm == "head" or not interleaved):  # a part is some channels: here it must have them all
        key = side_tile(pages, 0, numbers=key.rows * power_of_2(D))
    launch(
        prologue_kernel,
        len(where.ids) * (query_heads * query.parts + H * (key.parts + value.parts)),
        qkv.device,
        source, len(qkv), stats, eps, q_norm, k_norm, rope.contiguous() if rope is not None and rotary_dim else None,
        None if k_mean is None else k_mean.contiguous(), (out, *out.stride()),
        *list_tensors(where), *planes_of(pages), pages.pages,
        ENTRIES=entries(where),
        QUERIES=q,
        KEYS=k,
        VALUES=v,
        QUERY=query,
        KEY=key,
        VALUE=value,
        ROTARY_DIM=rotary_dim,
        INTERLEAVED=interleaved,
        num_warps=warps_of(max(x.rows * x.cols for x in (query, key, value)), parts),
    )  # fmt: skip
    return out


def cases(device: torch.device | str = "cpu") -> Iterator[Case]:
    """A block of three frames in Wan, 12 heads normalised together, and in MAGI, a layer norm for each of 24 + 8."""
    where, empty = frames_of(1560, 3, 64, device), partial(torch.empty, device=device)
    for format in KV_FORMATS:
        for name, query_heads, heads, sizes, channels in (
            ("Wan", 12, 12, (1536, 1536), 128),
            ("MAGI", 24, 8, (128, 128), 96),
        ):
            qkv = empty(4680, (query_heads + 2 * heads) * 128, dtype=torch.bfloat16)
            norm_q, norm_k = (empty(size, dtype=torch.bfloat16) for size in sizes)
            options: dict[str, Any] = {"bias": qkv[0], "k_mean": empty(heads, 128)}
            if name == "MAGI":
                options = {"norm_q_bias": norm_q, "norm_k_bias": norm_k, "interleaved": False}
            pool = KVPages.empty(format, len(where.ids), heads, 64, 128, device)
            rope, out = empty(4680, channels // 2, 2), empty(4680, query_heads, 128, dtype=torch.bfloat16)
            call = partial(qkv_prologue, qkv, norm_q, norm_k, rope, pool, where, out=out, **options)
            yield Case("qkv_prologue", format, f"from bf16, {name}", call)


def _norm(weight: Tensor | None, bias: Tensor | None) -> Norm:
    return Norm(*(None if x is None else x.contiguous() for x in (weight, bias)))


def _heads(before: int, count: int, width: int, norm: Norm, stats: int) -> Heads:
    over = "" if norm.weight is None else "head" if len(norm.weight) == width else "all"
    return Heads(before * width, count, width, over, norm.bias is not None, stats)


def _norm_stats(source: Source, sides: Sequence[Heads], eps: float) -> Tensor | None:
    """[len(sides), T, 2] float32: the mean (0 for an RMS norm) and the reciprocal standard deviation over all heads."""
    if not sides:
        return None
    qkv = source.qkv
    stats = torch.empty(len(sides), len(qkv), 2, dtype=torch.float32, device=qkv.device)
    cols = power_of_2(max(side.heads * side.width for side in sides))
    rows, warps = rows_and_warps("qkv_prologue", cols, qkv.device)
    launch(
        norm_stats_kernel,
        ceil_div(len(qkv), rows) * len(sides),
        qkv.device,
        source, len(qkv), eps, stats,
        SIDES=len(sides),
        FIRST=sides[0],
        LAST=sides[-1],
        ROWS=rows,
        COLS=cols,
        num_warps=warps,
    )  # fmt: skip
    return stats


@triton.jit(do_not_specialize=["tokens"])
def norm_stats_kernel(
    source,  # Source
    tokens,
    eps,
    stats,  # [SIDES, tokens, 2], written
    SIDES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    side, row = tl.program_id(0) % SIDES, tl.program_id(0) // SIDES * ROWS
    at = stats + (side.to(tl.int64) * tokens + row) * 2
    if side == 0:
        store_norm_stats(source, tokens, eps, at, row, FIRST, ROWS, COLS)
    else:
        store_norm_stats(source, tokens, eps, at, row, LAST, ROWS, COLS)


@triton.jit
def store_norm_stats(source, tokens, eps, stats, row, heads: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    WIDTH: tl.constexpr = heads.heads * heads.width
    row_mask = row + rows < tokens
    mask = row_mask[:, None] & (cols < WIDTH)[None, :]
    x = load_biased(source, row + rows, heads.column + cols, mask)
    mean, inverse = mean_and_inverse(x, mask, eps, WIDTH, heads.layer)
    tl.store(stats + 2 * rows, mean, mask=row_mask)
    tl.store(stats + 2 * rows + 1, inverse, mask=row_mask)


@triton.jit
def mean_and_inverse(x, mask, eps, WIDTH: tl.constexpr, LAYER: tl.constexpr):
    """Of each row: its mean, 0 for an RMS norm, and the reciprocal of its standard deviation, or root mean square."""
    mean = tl.zeros([x.shape[0]], tl.float32)
    if LAYER:
        mean = tl.sum(x, 1) / WIDTH
        x = tl.where(mask, x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)


@triton.jit(do_not_specialize=["tokens", "pages"])
def prologue_kernel(
    source,  # Source
    tokens,
    stats,  # of norm_stats_kernel, or None
    eps,
    norm_q,  # Norm, and norm_k
    norm_k,
    rope,  # [tokens, ROTARY_DIM / 2, 2] or None
    k_mean,  # [KEYS.heads, D] or None
    out,  # [tokens, QUERIES.heads, D] and its strides; written
    ids,
    lens,
    k_plane,  # Plane, written, as v_plane
    v_plane,
    pages,
    ENTRIES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    QUERY: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    # Of an entry: the parts of its queries, of its keys, of its values.
    FIRST_KEY: tl.constexpr = QUERIES.heads * QUERY.parts
    FIRST_VALUE: tl.constexpr = FIRST_KEY + KEYS.heads * KEY.parts
    PARTS: tl.constexpr = FIRST_VALUE + VALUES.heads * VALUE.parts
    entry, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    page, length = tl.load(ids + entry), tl.load(lens + entry)
    first = first_token(lens, entry, ENTRIES)
    if fits(page, length, pages, KEY) & (first + length <= tokens):
        if part < FIRST_KEY:
            head = part // QUERY.parts
            row, col = part_of(QUERY, part % QUERY.parts)
            queries = rotated_part(
                source, stats, tokens, eps, norm_q, rope, head, first, row, col, length,
                QUERIES, QUERY, ROTARY_DIM, INTERLEAVED,
            )  # fmt: skip
            write_queries(queries, *out, first, head, row, col, length, QUERY)
        elif part < FIRST_VALUE:
            head = (part - FIRST_KEY) // KEY.parts
            row, col = part_of(KEY, (part - FIRST_KEY) % KEY.parts)
            keys = rotated_part(
                source, stats, tokens, eps, norm_k, rope, head, first, row, col, length,
                KEYS, KEY, ROTARY_DIM, INTERLEAVED,
            )  # fmt: skip
            if k_mean is not None:
                keys = less_mean(keys, k_mean + head * KEY.width, row, col, length, KEY)
            write_part(keys, k_plane, tile_index(page, head, KEYS.heads, KEY), row, col, length, KEY)
        else:
            head = (part - FIRST_VALUE) // VALUE.parts
            row, col = part_of(VALUE, (part - FIRST_VALUE) % VALUE.parts)
            values = rotated_part(
                source, None, tokens, eps, norm_k, None, head, first, row, col, length,
                VALUES, VALUE, 0, True,
            )  # fmt: skip
            write_part(values, v_plane, tile_index(page, head, KEYS.heads, VALUE), row, col, length, VALUE)


@triton.jit
def rotated_part(
    source, stats, tokens, eps, norm, rope, head, first, row, col, length,
    heads: tl.constexpr, tile: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A part of one head, normalised and rotated: [rows, cols] float32, 0 where there is no token or channel."""
    rows, cols = row + tl.arange(0, tile.rows), col + tl.arange(0, tile.cols)
    row_mask, token = rows < length, first + rows
    x = normalised(source, stats, tokens, eps, norm, head, token, row_mask, cols, heads, tile.width)
    if rope is not None:
        x = rotated(x, rope + token[:, None] * ROTARY_DIM, row_mask, col, ROTARY_DIM, INTERLEAVED)
    return x


@triton.jit
def rotated(x, angles, row_mask, col, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """x [rows, cols]: channels col .. col + cols of a head, all of them unless pairs are neighbours. angles: addresses
    of each row's cosines and sines, [rows, 1]."""
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    HALF: tl.constexpr = ROTARY_DIM // 2
    if INTERLEAVED:
        # A pair's cosine and sine lie as its channels do: all of them are one load, and taken apart alike.
        at = col + tl.arange(0, COLS)
        both = tl.load(angles + at[None, :], mask=row_mask[:, None] & (at < ROTARY_DIM)[None, :], other=0.0)
        cos, sin = tl.split(tl.reshape(both, [ROWS, COLS // 2, 2]))
        mask = (col // 2 + tl.arange(0, COLS // 2) < HALF)[None, :]
        a, b = tl.split(tl.reshape(x, [ROWS, COLS // 2, 2]))
        turned = tl.join(tl.where(mask, a * cos - b * sin, a), tl.where(mask, a * sin + b * cos, b))
        return tl.reshape(turned, [ROWS, COLS])
    else:
        cols = tl.arange(0, COLS)
        is_first, pair = cols < HALF, cols % HALF
        mask = row_mask[:, None] & (cols < ROTARY_DIM)[None, :]
        cos = tl.load(angles + 2 * pair[None, :], mask=mask, other=1.0)
        sin = tl.load(angles + 2 * pair[None, :] + 1, mask=mask, other=0.0)
        partner = tl.where(is_first, cols + HALF, tl.where(cols < ROTARY_DIM, cols - HALF, cols))
        y = tl.gather(x, tl.broadcast_to(partner[None, :], [ROWS, COLS]), 1)
        return tl.where(mask, x * cos + tl.where(is_first[None, :], -y, y) * sin, x)


@triton.jit
def write_queries(x, out, token_stride, head_stride, stride, first, head, row, col, length, tile: tl.constexpr):
    places, mask = token_places(token_stride, stride, row, col, length, tile)
    out += first * token_stride + head.to(tl.int64) * head_stride
    tl.store(out + places, round_to(x, out.dtype.element_ty), mask=mask)


@triton.jit
def normalised(source, stats, tokens, eps, norm, head, token, row_mask, cols, heads: tl.constexpr, WIDTH: tl.constexpr):
    """These channels of a head after bias and norm: [tokens, cols] float32, 0 where there is none."""
    col_mask = cols < WIDTH
    mask = row_mask[:, None] & col_mask[None, :]
    x = load_biased(source, token, heads.column + head * heads.width + cols, mask)
    if heads.norm != "":
        at = cols
        if heads.norm == "all":
            at = head * heads.width + cols
            stats += (heads.stats * tokens + token) * 2
            mean, inverse = tl.load(stats, mask=row_mask, other=0.0), tl.load(stats + 1, mask=row_mask, other=0.0)
        else:
            mean, inverse = mean_and_inverse(x, mask, eps, heads.width, heads.layer)
            inverse = tl.where(row_mask, inverse, 0.0)  # without an eps that of a row of zeros is infinite
        if heads.layer:
            x -= mean[:, None]
        x *= inverse[:, None]
        x *= tl.load(norm.weight + at, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if heads.layer:
            x += tl.load(norm.bias + at, mask=col_mask, other=0.0).to(tl.float32)[None, :]
            x = tl.where(mask, x, 0.0)
    return x


@triton.jit
def load_biased(source, rows, cols, mask):
    places = rows.to(tl.int64)[:, None] * source.token_stride + cols[None, :] * source.stride
    numbers = tl.load(source.qkv + places, mask=mask, other=0.0).to(tl.float32)
    if source.bias is not None:
        numbers += tl.load(source.bias + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return numbers
