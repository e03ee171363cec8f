"""qkv_prologue in Triton: the sums that the norms need, then a program per entry of the page list, head and part.

A norm over all heads and a scale over a page cross: neither a program for whole rows nor one for whole pages sees
both. So a first launch reads q and k for two numbers per row, and the second, which finds most of them still in the
cache, does the rest where it is stored. Without norms there is no first launch.

Held to the reference in Triton's interpreter, compiled for sm_80 to sm_120, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..layout import KV_FORMATS, Codec, KVPages, PageList
from .codecs import part_of, round_to, tile_of, write_part
from .config import config, rows_and_warps, warps_of
from .kv_pages import entries, first_token, fits, frames_of, list_tensors, pool_tensors, tiles_of, token_places
from .launch import Case, check_device, launch


class Heads(NamedTuple):
    """What a kernel is compiled for about the heads of q, k or v in a row of qkv."""

    column: int  # where the first one begins
    heads: int
    width: int  # of one
    norms: int  # groups of channels that are normalised together: none, 1 or one for each head
    group: int  # channels of one
    layer: bool  # takes off the mean before


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
    q = _heads(0, query_heads, D, norm_q, norm_q_bias)
    k = _heads(query_heads, H, D, norm_k, norm_k_bias)
    v = _heads(query_heads + H, H, D, None, None)
    bias, norm_q, norm_k, norm_q_bias, norm_k_bias, k_mean, rope = (
        x if x is None else x.contiguous() for x in (bias, norm_q, norm_k, norm_q_bias, norm_k_bias, k_mean, rope)
    )
    sums = _row_sums(qkv, bias, q, k, eps)
    turned = 0 if rope is None else 2 * rope.shape[1]
    # Smaller parts than those of append: a number comes with its partner, a cosine and a sine.
    parts = config("qkv_prologue", "any", qkv.device)
    query = tile_of(Codec(out.dtype), pages.page_size, D, numbers=parts["numbers"])
    key, value = tiles_of(pages, numbers=parts["numbers"])
    launch(
        prologue_kernel,
        len(where.ids) * (query_heads * query.parts + H * (key.parts + value.parts)),
        qkv.device,
        *(qkv, *qkv.stride(), bias, len(qkv), sums),
        *(norm_q, norm_q_bias, norm_k, norm_k_bias, rope if turned else None, k_mean),
        *(out, *out.stride()),
        *list_tensors(where),
        *pool_tensors(pages),
        pages.pages,
        ENTRIES=entries(where),
        QUERIES=q,
        KEYS=k,
        VALUES=v,
        QUERY=query,
        KEY=key,
        VALUE=value,
        TURNED=turned,
        INTERLEAVED=interleaved,
        num_warps=warps_of(max(x.rows * x.cols for x in (query, key, value)), parts),
    )
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


def _heads(before: int, count: int, width: int, norm: Tensor | None, norm_bias: Tensor | None) -> Heads:
    group = 0 if norm is None else len(norm)
    return Heads(before * width, count, width, count * width // group if group else 0, group, norm_bias is not None)


def _row_sums(qkv: Tensor, bias: Tensor | None, q: Heads, k: Heads, eps: float) -> Tensor | None:
    """[groups of q, then of k, T, 2] float32: what to take off, and what to multiply with."""
    if not q.norms + k.norms:
        return None
    sums = torch.empty(q.norms + k.norms, len(qkv), 2, dtype=torch.float32, device=qkv.device)
    cols = triton.next_power_of_2(max(q.group, k.group))
    rows, warps = rows_and_warps("qkv_prologue", cols, qkv.device)
    launch(
        row_sums_kernel,
        triton.cdiv(len(qkv), rows) * (q.norms + k.norms),
        qkv.device,
        *(qkv, *qkv.stride(), bias, len(qkv), eps, sums),
        QUERIES=q,
        KEYS=k,
        ROWS=rows,
        COLS=cols,
        num_warps=warps,
    )
    return sums


@triton.jit(do_not_specialize=["tokens"])
def row_sums_kernel(
    qkv,  # [tokens, columns]
    token_stride,
    stride,
    bias,  # [columns] or None
    tokens,
    eps,
    sums,  # [groups, tokens, 2], written
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    GROUPS: tl.constexpr = QUERIES.norms + KEYS.norms
    group, row = tl.program_id(0) % GROUPS, tl.program_id(0) // GROUPS * ROWS
    at = sums + (group.to(tl.int64) * tokens + row) * 2
    if group < QUERIES.norms:
        sum_rows(qkv, token_stride, stride, bias, tokens, eps, at, group, row, QUERIES, ROWS, COLS)
    else:
        sum_rows(qkv, token_stride, stride, bias, tokens, eps, at, group - QUERIES.norms, row, KEYS, ROWS, COLS)


@triton.jit
def sum_rows(
    qkv,
    token_stride,
    stride,
    bias,
    tokens,
    eps,
    sums,
    group,
    row,
    heads: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    there, counted = row + rows < tokens, cols < heads.group
    first = heads.column + group * heads.group
    mask = there[:, None] & counted[None, :]
    x = load_biased(qkv + row.to(tl.int64) * token_stride, token_stride, stride, bias, rows, first + cols, mask)
    mean = tl.zeros([ROWS], tl.float32)
    if heads.layer:
        mean = tl.sum(x, 1) / heads.group
        x = tl.where(mask, x - mean[:, None], 0.0)
    tl.store(sums + 2 * rows, mean, mask=there)
    tl.store(sums + 2 * rows + 1, tl.rsqrt(tl.sum(x * x, 1) / heads.group + eps), mask=there)


@triton.jit(do_not_specialize=["tokens", "pages"])
def prologue_kernel(
    qkv,  # [tokens, columns]
    token_stride,
    stride,
    bias,  # [columns] or None
    tokens,
    sums,  # of row_sums_kernel, or None
    norm_q,  # [QUERIES.heads * D], [D] or None, and so on
    norm_q_bias,
    norm_k,
    norm_k_bias,
    rope,  # [tokens, TURNED / 2, 2] or None
    k_mean,  # [KEYS.heads, D] or None
    out,  # [tokens, QUERIES.heads, D], written
    out_token_stride,
    out_head_stride,
    out_stride,
    ids,
    lens,
    k_codes,
    k_scales,
    k_offsets,
    v_codes,
    v_scales,
    v_offsets,
    pages,
    ENTRIES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    QUERY: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    TURNED: tl.constexpr,
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
        to = page.to(tl.int64) * KEYS.heads
        qkv += first * token_stride
        if rope is not None:
            rope += first * TURNED
        if part < FIRST_KEY:
            head = part // QUERY.parts
            row, col = part_of(QUERY, part % QUERY.parts)
            queries = turned_part(
                *(qkv, token_stride, stride, bias, sums, tokens, first, 0, norm_q, norm_q_bias, rope),
                *(head, row, col, length, QUERIES, QUERY, TURNED, INTERLEAVED),
            )
            places, mask = token_places(out_token_stride, out_stride, row, col, length, QUERY)
            out += first * out_token_stride + head.to(tl.int64) * out_head_stride
            tl.store(out + places, round_to(queries, out.dtype.element_ty), mask=mask)
        elif part < FIRST_VALUE:
            head = (part - FIRST_KEY) // KEY.parts
            row, col = part_of(KEY, (part - FIRST_KEY) % KEY.parts)
            keys = turned_part(
                *(qkv, token_stride, stride, bias, sums, tokens, first, QUERIES.norms, norm_k, norm_k_bias, rope),
                *(head, row, col, length, KEYS, KEY, TURNED, INTERLEAVED),
            )
            if k_mean is not None:
                cols = col + tl.arange(0, KEY.cols)
                keys -= tl.load(k_mean + head * KEY.width + cols, mask=cols < KEY.width, other=0.0)[None, :]
                keys = tl.where((row + tl.arange(0, KEY.rows) < length)[:, None], keys, 0.0)
            write_part(keys, k_codes, k_scales, k_offsets, to + head, row, col, length, KEY)
        else:
            head = (part - FIRST_VALUE) // VALUE.parts
            row, col = part_of(VALUE, (part - FIRST_VALUE) % VALUE.parts)
            values = turned_part(
                *(qkv, token_stride, stride, bias, None, tokens, first, 0, None, None, None),
                *(head, row, col, length, VALUES, VALUE, 0, True),
            )
            write_part(values, v_codes, v_scales, v_offsets, to + head, row, col, length, VALUE)


@triton.jit
def turned_part(
    qkv,  # from the entry's first token on, as rope
    token_stride,
    stride,
    bias,
    sums,
    tokens,
    first,
    first_group,
    weight,
    weight_bias,
    rope,
    head,
    row,
    col,
    length,
    heads: tl.constexpr,
    tile: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """A part of one head, normalised and rotated: [rows, cols] float32, 0 where there is no token or channel."""
    rows, cols = row + tl.arange(0, tile.rows), col + tl.arange(0, tile.cols)
    if heads.norms > 0:
        group = first_group + head if heads.norms > 1 else first_group
        sums += (group * tokens + first) * 2
    x = normalised(
        qkv, token_stride, stride, bias, sums, weight, weight_bias, head, rows, cols, length, heads, tile.width
    )
    if rope is not None:
        # Each channel by itself, from its own number and its partner's: a part need not hold both.
        HALF: tl.constexpr = TURNED // 2
        pair = cols // 2 if INTERLEAVED else cols % HALF
        first_of_pair = cols % 2 == 0 if INTERLEAVED else cols < HALF
        partner = tl.where(first_of_pair, cols + (1 if INTERLEAVED else HALF), cols - (1 if INTERLEAVED else HALF))
        mask = (rows < length)[:, None] & (cols < TURNED)[None, :]
        angle = rope + rows[:, None] * TURNED + pair[None, :] * 2
        cos, sin = tl.load(angle, mask=mask, other=1.0), tl.load(angle + 1, mask=mask, other=0.0)
        y = normalised(
            qkv, token_stride, stride, bias, sums, weight, weight_bias, head, rows, partner, length, heads, TURNED
        )
        x = tl.where(mask, x * cos + tl.where(first_of_pair[None, :], -y, y) * sin, x)
    return x


@triton.jit
def normalised(
    qkv,
    token_stride,
    stride,
    bias,
    sums,
    weight,
    weight_bias,
    head,
    rows,
    cols,
    length,
    heads: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """These channels of a head after bias and norm: [rows, cols] float32, 0 past `length` and WIDTH."""
    there, known = rows < length, (cols >= 0) & (cols < WIDTH)
    mask = there[:, None] & known[None, :]
    x = load_biased(qkv, token_stride, stride, bias, rows, heads.column + head * heads.width + cols, mask)
    if heads.norms > 0:
        if heads.layer:
            x -= tl.load(sums + 2 * rows, mask=there, other=0.0)[:, None]
        x *= tl.load(sums + 2 * rows + 1, mask=there, other=0.0)[:, None]
        at = cols if heads.group == heads.width else head * heads.width + cols
        x *= tl.load(weight + at, mask=known, other=0.0).to(tl.float32)[None, :]
        if heads.layer:
            x += tl.load(weight_bias + at, mask=known, other=0.0).to(tl.float32)[None, :]
            x = tl.where(mask, x, 0.0)
    return x


@triton.jit
def load_biased(x, token_stride, stride, bias, rows, cols, mask):
    places = rows.to(tl.int64)[:, None] * token_stride + cols[None, :] * stride
    numbers = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        numbers += tl.load(bias + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return numbers
