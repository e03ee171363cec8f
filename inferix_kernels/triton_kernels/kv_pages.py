"""kv_append, kv_commit and kv_gather in Triton: a program per entry of the page list, head and part of a tile.

Held to the reference in Triton's interpreter, compiled for sm_80 to sm_120, never run on a GPU. There the numbers of
a page list are not checked on the host, which would wait for the device: an entry that does not fit is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..layout import FORMATS, KV_FORMATS, KVPages, PageList
from .codecs import (
    Tile,
    code_places,
    copy_part,
    part_of,
    planes_of,
    read_part,
    round_to,
    side_tile,
    tile_index,
    write_part,
)
from .launch import Case, check_device, launch
from .sizes import power_of_2

__all__ = ["kv_append", "kv_commit", "kv_gather"]

# A page list's lens are added up in steps of this many.
LIST_STEP = tl.constexpr(1024)


def kv_append(k: Tensor, v: Tensor, pages: KVPages, where: PageList) -> None:
    check_device("kv_append", k)
    if not k.is_cuda:
        reference.spans("where", where, pages, tokens=k.shape[0], written=True)
        reference.starts_of("where", where, pages.page_size)
    # Within a page, tokens alone are written: by tokens, whatever the slot of the first.
    key, value = tiles_of(pages, split=None if where.starts is None else 0)
    launch(
        append_kernel,
        len(where.ids) * pages.heads * (key.parts + value.parts),
        k.device,
        k, *k.stride(), v, *v.stride(), k.shape[0],
        *list_tensors(where), None if where.starts is None else where.starts.contiguous(),
        *planes_of(pages),
        pages.pages,
        ENTRIES=entries(where),
        HEADS=pages.heads,
        KEY=key,
        VALUE=value,
        num_warps=max(key.warps, value.warps),
    )  # fmt: skip


def kv_commit(
    source: KVPages, source_list: PageList, target: KVPages, target_list: PageList, k_mean: Tensor | None = None
) -> None:
    check_device("kv_commit", source.k)
    if not source.k.is_cuda:
        _check_commit(source, source_list, target, target_list)
    from_key, from_value = tiles_of(source)
    key, value = tiles_of(target)
    launch(
        commit_kernel,
        len(source_list.ids) * target.heads * (key.parts + value.parts),
        source.k.device,
        *list_tensors(source_list),
        *planes_of(source),
        source.pages,
        *list_tensors(target_list),
        *planes_of(target),
        target.pages,
        None if k_mean is None else k_mean.contiguous(),
        HEADS=target.heads,
        FROM_KEY=from_key,
        FROM_VALUE=from_value,
        KEY=key,
        VALUE=value,
        COPY=source.format == target.format and k_mean is None and (from_key, from_value) == (key, value),
        num_warps=max(key.warps, value.warps),
    )


def kv_gather(
    pools: Sequence[KVPages], where: PageList, dtype: torch.dtype = torch.float32, *, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    k, v = out
    check_device("kv_gather", k)
    if not k.is_cuda:
        reference.spans("where", where, *pools, tokens=k.shape[0])
    first_page_id = 0
    for pages in pools:  # a launch for each, which leaves the entries of other pools alone
        key, value = tiles_of(pages, split=0)  # by tokens, as they are written, however the scales run
        launch(
            gather_kernel,
            len(where.ids) * pages.heads * (key.parts + value.parts),
            k.device,
            k, *k.stride(), v, *v.stride(), k.shape[0],
            *list_tensors(where),
            *planes_of(pages),
            first_page_id,
            pages.pages,
            ENTRIES=entries(where),
            HEADS=pages.heads,
            KEY=key,
            VALUE=value,
            num_warps=max(key.warps, value.warps),
        )  # fmt: skip
        first_page_id += pages.pages
    return out


def cases(device: torch.device | str = "cpu") -> Iterator[Case]:
    """A block of Wan 1.3B, three frames of 1560 tokens; for latent8, rows of MLA."""
    where = frames_of(1560, 3, 64, device)
    shapes: dict[str, tuple[int, int, Any]] = {format: (12, 64, 128) for format in KV_FORMATS} | {
        "latent8": (1, 64, (512, 64))
    }
    pools = {format: KVPages.empty(format, len(where.ids), *shapes[format], device) for format in FORMATS}
    for format, pool in pools.items():
        k, v = (
            torch.empty(4680, pool.heads, 3 * width, dtype=torch.bfloat16, device=device)[..., :width]
            for width in (pool.head_dim, pool.value_dim)
        )
        yield Case("kv_append", format, "from bf16", partial(kv_append, k, v, pool, where))
        yield Case("kv_gather", format, "to bf16", partial(kv_gather, [pool], where, out=(k, v)))
    pairs = [("bf16", format) for format in KV_FORMATS]
    pairs += [(format, "int4") for format in ("int8", "i8f8", "fp8")] + [("i8f8", "i8f8"), ("int4", "int4")]
    mean = torch.empty(12, 128, device=device)
    for source, target in pairs:
        call = partial(kv_commit, pools[source], where, pools[target], where, mean if source == "bf16" else None)
        yield Case("kv_commit", target, f"from {source}", call)


def frames_of(tokens: int, frames: int, page_size: int, device: torch.device | str) -> PageList:
    """The pages of `frames` frames of `tokens` tokens each; a frame begins on a page of its own."""
    lens = ([page_size] * (tokens // page_size) + ([tokens % page_size] if tokens % page_size else [])) * frames
    return PageList.of(range(len(lens)), lens, device)


def _check_commit(source: KVPages, source_list: PageList, target: KVPages, target_list: PageList) -> None:
    reference.spans("source_list", source_list, source)
    reference.spans("target_list", target_list, target, written=True)
    wants, gets = source_list.lens.tolist(), target_list.lens.tolist()
    if wants != gets:
        raise ValueError(f"target_list.lens must equal source_list.lens, got {gets} and {wants}")


def tiles_of(pages: KVPages, split: int | None = None, numbers: int | None = None) -> tuple[Tile, Tile]:
    return side_tile(pages, 0, split, numbers), side_tile(pages, 1, split, numbers)


def list_tensors(where: PageList) -> tuple[Tensor, Tensor]:
    return where.ids.contiguous(), where.lens.contiguous()


def entries(where: PageList) -> int:
    """The length of a list, rounded up so that a list that grows is seldom a reason to compile again."""
    return max(64, power_of_2(len(where.ids)))


@triton.jit(do_not_specialize=["tokens", "pages"])
def append_kernel(
    k,  # [tokens, HEADS, D]
    k_token_stride,
    k_head_stride,
    k_stride,
    v,  # [tokens, HEADS, Dv]
    v_token_stride,
    v_head_stride,
    v_stride,
    tokens,
    ids,
    lens,
    starts,  # the slot of each page's first token, or None
    k_plane,  # Plane, written, as v_plane
    v_plane,
    pages,
    ENTRIES: tl.constexpr,
    HEADS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
):
    entry, head, part = this_program(HEADS, KEY, VALUE)
    page, length = tl.load(ids + entry), tl.load(lens + entry)
    first = first_token(lens, entry, ENTRIES)
    start = 0
    if starts is not None:
        start = tl.load(starts + entry)
    if fits(page, start + length, pages, KEY) & (start >= 0) & (length >= 0) & (first + length <= tokens):
        if part < KEY.parts:
            k += first * k_token_stride + head.to(tl.int64) * k_head_stride
            to = tile_index(page, head, HEADS, KEY)
            append_part(k, k_token_stride, k_stride, k_plane, to, part, start, length, KEY, starts is not None)
        else:
            v += first * v_token_stride + head.to(tl.int64) * v_head_stride
            to, part = tile_index(page, head, HEADS, VALUE), part - KEY.parts
            append_part(v, v_token_stride, v_stride, v_plane, to, part, start, length, VALUE, starts is not None)


@triton.jit
def append_part(x, token_stride, stride, plane, to, part, start, length, tile: tl.constexpr, WITHIN: tl.constexpr):
    """WITHIN: from slot `start` on, and no other slot."""
    row, col = part_of(tile, part)
    places, mask = token_places(token_stride, stride, row, col, length, tile)
    tokens = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    if WITHIN:
        slots, there = code_places(plane.codes, to, start + row + tl.arange(0, tile.rows), col, tile, tile.cols)
        tl.store(slots, round_to(tokens, plane.codes.dtype.element_ty), mask=mask & there)
    else:
        write_part(tokens, plane, to, row, col, length, tile)


@triton.jit(do_not_specialize=["from_pages", "pages"])
def commit_kernel(
    from_ids,
    from_lens,
    from_k_plane,  # Plane, and the other planes
    from_v_plane,
    from_pages,
    ids,
    lens,
    k_plane,  # written, as v_plane
    v_plane,
    pages,
    k_mean,  # [HEADS, D] or None
    HEADS: tl.constexpr,
    FROM_KEY: tl.constexpr,
    FROM_VALUE: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    COPY: tl.constexpr,  # one format, nothing to subtract: bit for bit
):
    entry, head, part = this_program(HEADS, KEY, VALUE)
    from_page, page, length = tl.load(from_ids + entry), tl.load(ids + entry), tl.load(lens + entry)
    agree = tl.load(from_lens + entry) == length
    if agree & fits(from_page, length, from_pages, KEY) & fits(page, length, pages, KEY):
        if part < KEY.parts:
            at, to = tile_index(from_page, head, HEADS, FROM_KEY), tile_index(page, head, HEADS, KEY)
            commit_part(from_k_plane, at, k_plane, to, k_mean, head, part, length, FROM_KEY, KEY, COPY)
        else:
            at, to = tile_index(from_page, head, HEADS, FROM_VALUE), tile_index(page, head, HEADS, VALUE)
            commit_part(from_v_plane, at, v_plane, to, None, head, part - KEY.parts, length, FROM_VALUE, VALUE, COPY)


@triton.jit
def commit_part(
    from_plane, at, plane, to, mean, head, part, length,
    source: tl.constexpr, tile: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    row, col = part_of(tile, part)
    if COPY:
        copy_part(from_plane, at, plane, to, row, col, length, tile)
    else:
        x = read_part(from_plane, at, row, col, length, source, tile.rows, tile.cols)
        if mean is not None:
            x = less_mean(x, mean + head * tile.width, row, col, length, tile)
        write_part(x, plane, to, row, col, length, tile)


@triton.jit
def less_mean(x, mean, row, col, length, tile: tl.constexpr):
    rows, cols = row + tl.arange(0, tile.rows), col + tl.arange(0, tile.cols)
    x -= tl.load(mean + cols, mask=cols < tile.width, other=0.0)[None, :]
    return tl.where((rows < length)[:, None], x, 0.0)


@triton.jit(do_not_specialize=["tokens", "first_page_id", "pages"])
def gather_kernel(
    k,  # [tokens, HEADS, D], written
    k_token_stride,
    k_head_stride,
    k_stride,
    v,  # [tokens, HEADS, Dv], written
    v_token_stride,
    v_head_stride,
    v_stride,
    tokens,
    ids,
    lens,
    k_plane,  # Plane, and v_plane
    v_plane,
    first_page_id,  # of this pool, in the count through all of them
    pages,
    ENTRIES: tl.constexpr,
    HEADS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
):
    entry, head, part = this_program(HEADS, KEY, VALUE)
    page, length = tl.load(ids + entry) - first_page_id, tl.load(lens + entry)
    if fits(page, length, pages, KEY):
        first = first_token(lens, entry, ENTRIES)
        if first + length <= tokens:
            if part < KEY.parts:
                at = tile_index(page, head, HEADS, KEY)
                k += first * k_token_stride + head.to(tl.int64) * k_head_stride
                gather_part(k, k_token_stride, k_stride, k_plane, at, part, length, KEY)
            else:
                v += first * v_token_stride + head.to(tl.int64) * v_head_stride
                at, part = tile_index(page, head, HEADS, VALUE), part - KEY.parts
                gather_part(v, v_token_stride, v_stride, v_plane, at, part, length, VALUE)


@triton.jit
def gather_part(x, token_stride, stride, plane, at, part, length, tile: tl.constexpr):
    row, col = part_of(tile, part)
    tokens = read_part(plane, at, row, col, length, tile, tile.rows, tile.cols)
    places, mask = token_places(token_stride, stride, row, col, length, tile)
    tl.store(x + places, round_to(tokens, x.dtype.element_ty), mask=mask)


@triton.jit
def this_program(HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr):
    """(entry of the page list, head, part of a tile): the keys' parts come first, then the values'."""
    PARTS: tl.constexpr = KEY.parts + VALUE.parts
    program = tl.program_id(0)
    tile = program // PARTS
    return tile // HEADS, tile % HEADS, program % PARTS


@triton.jit
def fits(page, length, pages, tile: tl.constexpr):
    return (page >= 0) & (page < pages) & (length >= 0) & (length <= tile.page_size)


@triton.jit
def first_token(lens, entry, ENTRIES: tl.constexpr):
    """Tokens in the entries before this one. Each program adds them up: a prefix sum would be a launch of its own."""
    STEP: tl.constexpr = ENTRIES if ENTRIES < LIST_STEP else LIST_STEP
    total = tl.full([], 0, tl.int64)
    for start in range(0, ENTRIES, STEP):
        i = start + tl.arange(0, STEP)
        total += tl.sum(tl.maximum(tl.load(lens + i, mask=i < entry, other=0), 0), 0)
    return total


@triton.jit
def token_places(token_stride, stride, row, col, length, tile: tl.constexpr):
    """Where a part's tokens and channels lie in k or v, from its first token on, and which of them there are."""
    rows, cols = row + tl.arange(0, tile.rows), col + tl.arange(0, tile.cols)
    places = rows.to(tl.int64)[:, None] * token_stride + cols[None, :] * stride
    return places, (rows < length)[:, None] & (cols < tile.width)[None, :]
