"""page_summaries, page_scores and select_pages in Triton: which pages a run of queries attends to, without the host.

Held to the reference in Triton's interpreter, compiled for sm_80 to sm_120, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .._dispatch import Unsupported
from ..layout import KVPages, PageList
from .codecs import part_of, planes_of, read_part, round_to, tile_index
from .config import config
from .kv_pages import fits, frames_of, list_tensors, tiles_of
from .launch import Case, check_device, launch
from .sizes import ceil_div, power_of_2

__all__ = ["page_scores", "page_summaries", "select_pages"]

NEG_INF, POS_INF = tl.constexpr(float("-inf")), tl.constexpr(float("inf"))

_MOST_PAGES = 8192  # of one list: they are sorted in registers


def page_summaries(pools: Sequence[KVPages], where: PageList, bounds: bool = False, *, out: Tensor) -> Tensor:
    check_device("page_summaries", out)
    if not out.is_cuda:
        reference.spans("where", where, *pools)
    first_page_id = 0
    for pages in pools:  # a launch for each, which leaves the entries of other pools alone
        key, _ = tiles_of(pages, split=1)  # whole columns of tokens
        launch(
            summaries_kernel,
            len(where.ids) * pages.heads * key.parts,
            out.device,
            *list_tensors(where),
            planes_of(pages)[0],
            first_page_id, pages.pages, out, *out.stride(),
            HEADS=pages.heads,
            KEY=key,
            BOUNDS=bounds,
            num_warps=key.warps,
        )  # fmt: skip
        first_page_id += pages.pages
    return out


def page_scores(
    q: Tensor, q_indptr: Tensor, summaries: Tensor, where: PageList, *, scale: float, out: Tensor
) -> Tensor:
    check_device("page_scores", q)
    _, H, rows, D = summaries.shape
    if not q.is_cuda:
        reference.check_scores(q, q_indptr, summaries, where)
    tile = config("page_scores", "any", q.device)
    launch(
        scores_kernel,
        (len(q_indptr) - 1) * H * ceil_div(len(where.ids), tile["pages"]),
        q.device,
        q, *q.stride(), len(q), q_indptr.contiguous(), summaries, len(summaries),
        *list_tensors(where), len(where.ids), scale, out, *out.stride(),
        HEADS=H,
        GROUP=q.shape[1] // H,
        ROWS=rows,
        WIDTH=D,
        COLS=power_of_2(D),
        QUERIES=tile["queries"],
        PAGES=tile["pages"],
        num_warps=tile["warps"],
    )  # fmt: skip
    return out


def select_pages(
    scores: Tensor,
    where: PageList,
    k: int,
    *,
    keep: Tensor | None = None,
    frames: int | None = None,
    pages_per_frame: int = 1,
    out: PageList,
) -> PageList:
    check_device("select_pages", scores)
    S, H, n = scores.shape
    per_frame = n if frames is None else pages_per_frame  # one frame of all pages
    shape = [power_of_2(max(x, 1)) for x in (n // max(per_frame, 1), per_frame, k)]
    if shape[0] * shape[1] > _MOST_PAGES:
        raise Unsupported(f"select_pages: scores must be of at most {_MOST_PAGES} pages, got {shape[0]} x {shape[1]}")
    launch(
        select_kernel,
        S * H,
        scores.device,
        scores, *scores.stride(), *list_tensors(where), n,
        None if keep is None else keep.contiguous().view(torch.uint8), out.ids, out.lens,
        HEADS=H,
        TOP_FRAMES=frames,
        PER_FRAME=per_frame,
        K=k,
        FRAMES=shape[0],
        PAGES=shape[1],
        SLOTS=shape[2],
        num_warps=min(16, max(1, shape[0] * shape[1] // 256)),
    )  # fmt: skip
    return out


def cases(device: torch.device | str = "cpu") -> Iterator[Case]:
    """Wan 1.3B: a window of 21 frames, queries by 64."""
    where, frame_list = frames_of(1560, 21, 64, device), frames_of(1560, 3, 64, device)
    q = torch.empty(4680, 12, 128, dtype=torch.bfloat16, device=device)
    starts = torch.arange(0, 4681, 60, dtype=torch.int32, device=device)
    for format in ("bf16", "int8", "i8f8", "fp8", "int4"):
        pool = KVPages.empty(format, len(frame_list.ids), 12, 64, 128, device)
        for bounds, name in ((False, "mean"), (True, "bounds")):
            out = torch.empty(len(frame_list.ids), 12, 1 + bounds, 128, device=device)
            yield Case("page_summaries", format, name, partial(page_summaries, [pool], frame_list, bounds, out=out))
    for rows, name in ((1, "mean"), (2, "bounds")):
        summaries, scores = (
            torch.empty(len(where.ids), 12, rows, 128, device=device),
            torch.empty(78, 12, 525, device=device),
        )
        score = partial(page_scores, q, starts, summaries, where, scale=1.0, out=scores)
        yield Case("page_scores", "bf16", name, score)
    lists = PageList(*(torch.empty(78 * 12 * 64, dtype=torch.int32, device=device) for _ in range(2)))
    for frames in (None, 6):
        select = partial(select_pages, scores, where, 64, frames=frames, pages_per_frame=25, out=lists)
        yield Case("select_pages", "fp32", "pages" if frames is None else "frames, then pages", select)


@triton.jit(do_not_specialize=["first_page_id", "pages"])
def summaries_kernel(
    ids,
    lens,
    k_plane,
    first_page_id,  # of this pool, in the count through all of them
    pages,
    out,  # [all pages, HEADS, 1 or 2, width], written
    page_stride,
    head_stride,
    row_stride,
    stride,
    HEADS: tl.constexpr,
    KEY: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    program = tl.program_id(0)
    entry, head = program // KEY.parts // HEADS, program // KEY.parts % HEADS
    row, col = part_of(KEY, program % KEY.parts)
    global_page, length = tl.load(ids + entry), tl.load(lens + entry)
    page = global_page - first_page_id
    if fits(page, length, pages, KEY):
        at = tile_index(page, head, HEADS, KEY)
        x = read_part(k_plane, at, row, col, length, KEY, KEY.rows, KEY.cols)
        cols = col + tl.arange(0, KEY.cols)
        out += global_page.to(tl.int64) * page_stride + head * head_stride
        if BOUNDS:
            valid = (tl.arange(0, KEY.rows) < tl.maximum(length, 1))[:, None]  # a page without tokens has one of zeros
            low, high = tl.min(tl.where(valid, x, POS_INF), 0), tl.max(tl.where(valid, x, NEG_INF), 0)
            tl.store(out + cols * stride, round_to(low, out.dtype.element_ty), mask=cols < KEY.width)
            tl.store(out + row_stride + cols * stride, round_to(high, out.dtype.element_ty), mask=cols < KEY.width)
        else:
            mean = tl.sum(x, 0) / tl.maximum(length, 1).to(tl.float32)
            tl.store(out + cols * stride, round_to(mean, out.dtype.element_ty), mask=cols < KEY.width)


@triton.jit(do_not_specialize=["tokens", "table", "count"])
def scores_kernel(
    q,  # [tokens, HEADS * GROUP, WIDTH]
    token_stride,
    head_stride,
    stride,
    tokens,
    q_indptr,
    summaries,  # [table, HEADS, ROWS, WIDTH]
    table,
    ids,
    lens,
    count,  # of ids
    scale,
    out,  # [runs, HEADS, count], written
    run_stride,
    out_head_stride,
    out_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    QUERIES: tl.constexpr,
    PAGES: tl.constexpr,
):
    entry = tl.program_id(0) // HEADS % tl.cdiv(count, PAGES) * PAGES + tl.arange(0, PAGES)
    run, head = tl.program_id(0) // HEADS // tl.cdiv(count, PAGES), tl.program_id(0) % HEADS
    first, end = tl.maximum(tl.load(q_indptr + run), 0), tl.minimum(tl.load(q_indptr + run + 1), tokens)
    col = tl.arange(0, COLS)
    total = tl.zeros([QUERIES, COLS], tl.float32)
    for start in range(first, end, QUERIES):
        token = start + tl.arange(0, QUERIES)
        mask = (token < end)[:, None] & (col < WIDTH)[None, :]
        for member in range(GROUP):
            places = token.to(tl.int64)[:, None] * token_stride + (head * GROUP + member) * head_stride
            total += tl.load(q + places + col[None, :] * stride, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / (tl.maximum(end - first, 1) * GROUP).to(tl.float32)
    page = tl.load(ids + entry, mask=entry < count, other=-1)
    valid = (page >= 0) & (page < table)
    places = ((page.to(tl.int64) * HEADS + head) * ROWS * WIDTH)[:, None] + col[None, :]
    mask = valid[:, None] & (col < WIDTH)[None, :]
    products = mean[None, :] * tl.load(summaries + places, mask=mask, other=0.0).to(tl.float32)
    if ROWS == 2:
        high = mean[None, :] * tl.load(summaries + WIDTH + places, mask=mask, other=0.0).to(tl.float32)
        products = tl.maximum(products, high)
    usable = valid & (tl.load(lens + entry, mask=entry < count, other=0) > 0) & (end > first)
    score = tl.where(usable, scale * tl.sum(products, 1), NEG_INF)
    out += run.to(tl.int64) * run_stride + head * out_head_stride
    tl.store(out + entry * out_stride, score, mask=entry < count)


@triton.jit(do_not_specialize=["count"])
def select_kernel(
    scores,  # [runs, HEADS, count]
    run_stride,
    head_stride,
    stride,
    ids,
    lens,
    count,
    keep,  # [count] uint8 or None
    out_ids,  # [runs * HEADS * K], written
    out_lens,
    HEADS: tl.constexpr,
    TOP_FRAMES: tl.constexpr,  # how many, or None for all
    PER_FRAME: tl.constexpr,
    K: tl.constexpr,
    FRAMES: tl.constexpr,
    PAGES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    run, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    page = tl.arange(0, PAGES)[None, :]
    entry = tl.arange(0, FRAMES)[:, None] * PER_FRAME + page
    valid = (page < PER_FRAME) & (entry < count)
    scores += run.to(tl.int64) * run_stride + head * head_stride
    score = tl.load(scores + entry * stride, mask=valid, other=NEG_INF)
    if keep is not None:
        score = tl.where(tl.load(keep + entry, mask=valid, other=0) != 0, POS_INF, score)
    score = tl.where(tl.load(lens + entry, mask=valid, other=0) > 0, score, NEG_INF)
    if TOP_FRAMES is not None:
        chosen = top_k_mask(tl.max(score, 1), TOP_FRAMES, FRAMES)
        score = tl.where(chosen[:, None], score, NEG_INF)
    SIZE: tl.constexpr = FRAMES * PAGES  # row by row: the order of the list
    entries = tl.reshape(entry, [SIZE])
    chosen_pages = top_k_mask(tl.reshape(score, [SIZE]), K, SIZE)
    slot = tl.program_id(0) * K + tl.cumsum(chosen_pages.to(tl.int32), 0) - 1
    tl.store(out_ids + slot, tl.load(ids + entries, mask=chosen_pages, other=0), mask=chosen_pages)
    tl.store(out_lens + slot, tl.load(lens + entries, mask=chosen_pages, other=0), mask=chosen_pages)
    rest = tl.arange(0, SLOTS)
    empty = (rest >= tl.sum(chosen_pages.to(tl.int32), 0)) & (rest < K)
    rest += tl.program_id(0) * K
    tl.store(out_ids + rest, tl.zeros([SLOTS], tl.int32), mask=empty)
    tl.store(out_lens + rest, tl.zeros([SLOTS], tl.int32), mask=empty)


@triton.jit
def top_k_mask(x, K: tl.constexpr, SIZE: tl.constexpr):
    """The mask of the K largest of x [SIZE]: of equals the earlier ones, never -inf."""
    ordered = tl.sort(x, descending=True)
    last = tl.min(tl.where(tl.arange(0, SIZE) < K, ordered, POS_INF), 0)  # the K-th
    above, equal = x > last, x == last
    left = K - tl.sum(above.to(tl.int32), 0)
    return (above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))) & (x > NEG_INF)
