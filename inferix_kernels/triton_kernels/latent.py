"""latent_attention in Triton: as paged_attention, with keys in two parts, of which the first serve as values too.

Held to the reference in Triton's interpreter, compiled for sm_80 to sm_120, never run on a GPU. A tile of latent rows
is read and converted once for both products. A scale by token multiplies the row's scores, and then its probability,
so that codes are exact.

The sum over a latent of 512 does not fit into the registers with all else, so two programs share its width: each
computes all scores and sums its half of the values ("part" of a configuration is how much of it one program takes).
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
from ..layout import KVPages
from ..plans import Plan, make_plan
from . import online
from .codecs import round_to
from .config import Config, config
from .key_tiles import any_ends_within, entries_from, load_by_token, load_floats, spread
from .launch import Call, Case, architecture, check_device, has_e4m3
from .online import (
    LN2,
    LOG2E,
    NEG_INF,
    dot,
    finite,
    load_rows,
    online_softmax_step,
    pages_of_tile,
    store_output,
    tile_at,
)
from .sizes import ceil_div, power_of_2
from .work import max_bias, rows_from, run_in_pool, work_of

__all__ = ["latent_attention"]

_WIDEST = 512


def latent_attention(
    q: Tensor, pools: Sequence[KVPages], plan: Plan, *, scale: float, out: Tensor, lse: Tensor, accumulate: bool = False
) -> tuple[Tensor, Tensor]:
    check_device("latent_attention", q)
    if not q.is_cuda:
        reference.check_plan(q, pools, plan)
    return run_latent_attention(Call(q, pools, plan, scale, out, lse, accumulate))


def run_latent_attention(call: Call, chosen: Config | None = None, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """latent_attention; tiles and splits as given, or as the configuration and the GPU ask."""
    q, pools = call.q, call.pools
    if pools[0].head_dim > _WIDEST:
        raise Unsupported(f"latent_attention: latents must be at most {_WIDEST} wide, got D={pools[0].head_dim}")
    width = power_of_2(pools[0].head_dim)
    chosen = chosen or config("latent_attention", shape_class(q), q.device)
    parts = ceil_div(width, chosen["part"])
    online.launch_attention(
        latent_kernel,
        call,
        chosen=chosen,
        splits=splits,
        least=16,
        parts=parts,
        PART=max(16, width // parts),
        BLOCK_ROTARY=max(16, power_of_2(pools[0].value_dim)),
        E4M3=has_e4m3(architecture(q.device)),
    )
    return call.out, call.lse


def shape_class(q: Tensor) -> str:
    return "float32" if q.dtype == torch.float32 else "halves"


def cases(device: torch.device | str = "cpu") -> Iterator[Case]:
    """16 heads on a latent of 512 with a rotary part of 64."""
    kinds = [(format, torch.bfloat16) for format in ("latent8", "bf16", "fp32")]
    for format, dtype in (*kinds, ("latent8", torch.float32)):
        pool = KVPages.empty(format, 75, 1, 64, (512, 64), device)
        q = torch.empty(1560, 16, 576, dtype=dtype, device=device)
        plan = make_plan([(len(q), range(75), [64] * 75)], device)
        out, lse = q.new_empty(1560, 16, 512), q.new_empty(1560, 16, dtype=torch.float32)
        what = f"{str(dtype).removeprefix('torch.')} q, latent 512"
        run = partial(run_latent_attention, Call(q, [pool], plan, 0.1, out, lse))
        yield Case("latent_attention", format, what, run, shape_class(q))


@triton.jit(do_not_specialize=["tokens", "segments", "entries", "splits", "tiles"])
def latent_kernel(
    q,  # Strided [V, tokens, HEADS * GROUP, D + Dv]
    out,  # Strided [splits, tokens, HEADS * GROUP, D], written, as lse
    lse,  # Strided [splits, tokens, HEADS * GROUP]
    plan,
    pools,  # a Pool each
    scale,
    tokens,
    segments,
    entries,  # of all page lists
    splits,
    tiles,  # of queries, for each head and split
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    VARIANTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    E4M3: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    PARTS: tl.constexpr = BLOCK_D // PART
    head, split, segment, first_row, first, last = work_of(
        tl.program_id(0) // PARTS, plan, segments, entries, splits, tiles, HEADS, GROUP, SEGMENTS, PER_HEAD, BLOCK_M
    )
    token, query_head, row_mask = rows_from(first_row, segment, head, plan, tokens, GROUP, BLOCK_M)
    if tl.max(row_mask.to(tl.int32), 0) == 0:
        return
    WIDTH: tl.constexpr = tile_at(KEYS, 0).width
    ALL: tl.constexpr = WIDTH + tile_at(VALUES, 0).width
    mine = (tl.program_id(0) % PARTS) * PART  # the first channel of this program's part of the latent
    other = BLOCK_D - PART - mine  # and of the other's
    base = max_bias(first, last, plan)
    running_max = tl.full([BLOCK_M], NEG_INF, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PART], tl.float32)
    for n in tl.static_range(len(KEYS)):
        for variant in tl.static_range(VARIANTS):
            begin, end = first, last
            if len(KEYS) * VARIANTS > 1:
                begin, end = run_in_pool(first, last, plan, variant, pools[n])
            q_mine = load_rows(q, variant, token, query_head, row_mask, mine, WIDTH, PART)
            q_other = load_rows(q, variant, token, query_head, row_mask, other, WIDTH, PART)
            q_rotary = load_rows(q, variant, token, query_head, row_mask, WIDTH, ALL, BLOCK_ROTARY)
            running_max, running_sum, acc = attend_latent_pages(
                q_mine, q_other, q_rotary, mine, other, scale * LOG2E, running_max, running_sum, acc,
                begin, end, plan, variant, pools[n], base, head,
                HEADS, tile_at(KEYS, n), tile_at(VALUES, n), BLOCK_N, PARTS, E4M3,
            )  # fmt: skip
    token, query_head, row_mask = rows_from(first_row, segment, head, plan, tokens, GROUP, BLOCK_M)
    store_output(
        acc, finite(running_max) * LN2 + base, running_sum, out, lse, split, token, query_head, row_mask, mine,
        WIDTH, ACCUMULATE,
    )  # fmt: skip


@triton.jit
def attend_latent_pages(
    q_mine,
    q_other,
    q_rotary,
    mine,
    other,
    qk_scale,  # of q . k, including log2(e): probabilities are powers of two
    running_max,
    running_sum,
    acc,
    first,
    last,
    plan,
    variant,
    pool,
    base,  # the largest bias: biases are relative to it
    head,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    E4M3: tl.constexpr,
):
    """Continues the online softmax over the entries [first, last) that are pages of this pool, of this variant.

    Long because it is one loop: its parts would need most of these arguments again.
    """
    DTYPE: tl.constexpr = q_mine.dtype
    BLOCK_D: tl.constexpr = q_mine.shape[1]
    BLOCK_ROTARY: tl.constexpr = q_rotary.shape[1]
    PAGES: tl.constexpr = pages_of_tile(LATENT.page_size, BLOCK_N)
    TILES: tl.constexpr = (LATENT.page_size + BLOCK_N - 1) // BLOCK_N  # tiles of keys of a page
    SPAN: tl.constexpr = BLOCK_N // PAGES
    SCALED: tl.constexpr = LATENT.kind == "int8" or LATENT.kind == "e4m3"  # by token
    qk_scales = tl.full([q_mine.shape[0]], qk_scale, tl.float32)
    step_scales = qk_scales
    if plan.page_bias is not None:
        step_scales = tl.full([q_mine.shape[0]], 1.0, tl.float32)
    keys = tl.arange(0, BLOCK_N)
    which = keys // SPAN  # page, of those of the tile
    pages, starts, ends, biases, _ = entries_from(first, last, plan, variant, pool, base, LATENT.page_size, PAGES)
    for i in range(first * TILES, last * TILES, PAGES):
        row = (i % TILES) * BLOCK_N
        rows = row + (keys & (SPAN - 1))
        # Latents are values too, and are 0 past the valid tokens.
        latent = load_floats(
            pool.k, pages, head, which, rows, mine, ends, HEADS, LATENT, DTYPE, BLOCK_D, E4M3, LATENT.kind == "u4", True
        )  # fmt: skip
        rotary = load_floats(
            pool.v, pages, head, which, rows, 0, ends, HEADS, ROTARY, DTYPE, BLOCK_ROTARY, E4M3, True, True
        )  # fmt: skip
        qk = dot(q_mine, tl.trans(latent))
        if PARTS > 1:
            rest = load_floats(
                pool.k, pages, head, which, rows, other, ends, HEADS, LATENT, DTYPE, BLOCK_D, E4M3,
                LATENT.kind == "u4", True,
            )  # fmt: skip
            qk = dot(q_other, tl.trans(rest), qk)
        if SCALED:
            scales = load_by_token(pool.k.scales, pages, head, which, rows, ends, HEADS, LATENT)
            qk *= scales[None, :]
        qk = dot(q_rotary, tl.trans(rotary), qk)
        if any_ends_within(row, starts, ends, SPAN):
            qk = tl.where((rows < spread(ends, which))[None, :], qk, NEG_INF)
        if plan.page_bias is not None:
            qk = qk * qk_scales[:, None] + spread(biases, which)
        p, alpha, running_max, running_sum = online_softmax_step(qk, step_scales, running_max, running_sum)
        if SCALED:
            p *= scales[None, :]
        acc = dot(round_to(p, DTYPE), latent, acc * alpha[:, None])
        pages, starts, ends, biases, _ = entries_from(
            (i + PAGES) // TILES, last, plan, variant, pool, base, LATENT.page_size, PAGES
        )
    return running_max, running_sum, acc
