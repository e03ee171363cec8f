"""paged_attention in Triton: a program per tile of query rows, KV head and part of the page list.

Held to the reference in Triton's interpreter, compiled for sm_80 to sm_120, never run on a GPU. There a plan's numbers
are not checked on the host, which would wait for the device: an entry that does not fit is skipped.

Two ways to multiply. In floats, of q's type: a tile of keys and values is dequantized once for all rows of the program;
a scale by token multiplies the key's scores instead, so that its codes are exact. In 8 bits, for precision "8bit": q is
quantized row by row to the type of the keys' codes and multiplied with them; weights are rounded to e4m3 and multiplied
with e4m3 values, and the sum over each tile of at most 128 keys goes to float32, which Hopper's e4m3 units do not keep,
in the step that applies the channels' scales. Sides that are neither, bf16 keys or int8 values say, stay with floats.

Pages that are on their way (Plan.arrivals) are not waited for: programs that wait on a GPU could keep those that bring
the pages from running. Each group of pages that comes is a call of its own there, with accumulate=True.
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
from ..layout import KV_FORMATS, Codec, KVPages
from ..plans import Plan, Segment, make_plan
from . import online
from .codecs import INTERPRETED, round_to, round_to_int, scale_of, to_e4m3
from .config import Config, config
from .key_tiles import (
    any_ends_within,
    entries_from,
    load_by_channel,
    load_by_token,
    load_codes,
    load_floats,
    spread,
)
from .launch import Call, Case, architecture, architecture_name, check_device, has_e4m3
from .limits import limit_scores, run_in_window, window_of
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
from .sizes import power_of_2
from .work import max_bias, rows_from, run_in_pool, work_of

__all__ = ["paged_attention"]

_WIDEST = 256
# e4m3 weights are stored times this: at most 256 of 448, and down to 2^-17 of the largest.
WEIGHT_SCALE = tl.constexpr(256.0)


def paged_attention(
    q: Tensor,
    pools: Sequence[KVPages],
    plan: Plan,
    *,
    scale: float,
    out: Tensor,
    lse: Tensor,
    accumulate: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    precision: str = "auto",
    deadline: float = 60.0,
) -> tuple[Tensor, Tensor]:
    if plan.arrivals is not None:
        raise Unsupported(
            "paged_attention: Triton waits for no pages: plan.arrivals must be None; attend to each group of them as "
            "it comes, with accumulate=True"
        )
    check_device("paged_attention", q)
    if not q.is_cuda:
        reference.check_plan(q, pools, plan)
    codes = any(codec.scaled_by == "token" for codec in keys_of(pools))
    eight_bit = precision == "8bit" and codes and q.dtype != torch.float32
    return run_paged_attention(Call(q, pools, plan, scale, out, lse, accumulate, softcap, alibi_slopes), eight_bit)


def run_paged_attention(
    call: Call, eight_bit: bool = False, chosen: Config | None = None, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """paged_attention, in floats or in 8 bits; tiles and splits as given, or as the configuration and the GPU ask."""
    q, pools = call.q, call.pools
    if pools[0].head_dim > _WIDEST:
        raise Unsupported(f"paged_attention: heads must be at most {_WIDEST} wide, got D={pools[0].head_dim}")
    target = architecture(q.device)
    if eight_bit and target and not has_e4m3(target) and any(multiplies_e4m3(pages) for pages in pools):
        name = architecture_name(target)
        raise Unsupported(f"paged_attention: {name} multiplies no e4m3; it has 8-bit attention to int8 pages only")
    chosen = chosen or config("paged_attention", shape_class(q, pools, eight_bit), q.device)
    if eight_bit and any(multiplies_e4m3(pages) for pages in pools):
        # Sums over a tile are scaled by the page's channels: it has no keys of another.
        chosen = {**chosen, "n": min(chosen["n"], power_of_2(pools[0].page_size))}
    if call.softcap or call.plan.windows is not None:
        # What limits scores needs registers, and with 255 of them nvdisasm cannot look for hazards.
        chosen = {**chosen, "n": min(chosen["n"], 64)}
    online.launch_attention(
        attention_kernel,
        call,
        chosen=chosen,
        splits=splits,
        least=32 if eight_bit else 16,
        cap=call.softcap * LOG2E.value,
        slopes=None
        if call.alibi_slopes is None
        else call.alibi_slopes.expand(len(call.plan.q_indptr) - 1, -1).contiguous(),
        CAPPED=call.softcap != 0,
        EIGHT_BIT=eight_bit,
        E4M3=has_e4m3(target),
        MMA_SYNC=target not in (90, 100),
    )
    return call.out, call.lse


def shape_class(q: Tensor, pools: Sequence[KVPages], eight_bit: bool) -> str:
    """Which row of configs/*.json: what is multiplied, how keys lie, how wide they are."""
    if q.dtype == torch.float32:
        return "float32"
    kind = "quantized" if any(codec.scaled_by for codec in keys_of(pools)) else "floats"
    if eight_bit:
        kind = "8 bits" if any(multiplies_e4m3(pages) for pages in pools) else "8-bit keys"
    return f"{kind}, D {max(64, power_of_2(pools[0].head_dim))}"


def keys_of(pools: Sequence[KVPages]) -> list[Codec]:
    return [pages.sides[0].codec for pages in pools]


def multiplies_e4m3(pages: KVPages) -> bool:
    return any(side.codec.dtype == torch.float8_e4m3fn for side in pages.sides)


def cases(device: torch.device | str = "cpu") -> Iterator[Case]:
    """Attention of Wan 1.3B, three frames of 480p on a window of nine; other widths; q in float32."""
    formats: list[tuple[str, ...]] = [(format,) for format in KV_FORMATS]
    for mix in [*formats, ("int8", "bf16"), ("bf16", "int8", "int4")]:  # the second is what a world keeps by default
        yield _case(mix, 128, device=device)
    for width in (64, 256):
        for format in ("bf16", "i8f8"):
            yield _case((format,), width, device=device)
    for format in ("int8", "i8f8", "fp8"):
        yield _case((format,), 128, eight_bit=True, device=device)
    for width in (64, 256):
        for format in ("int8", "i8f8"):
            yield _case((format,), width, eight_bit=True, device=device)
    for format in ("fp32", "i8f8"):
        yield _case((format,), 128, torch.float32, device=device)
    yield _case(("bf16",), 128, splits=2, device=device)
    yield _case(("bf16",), 128, softcap=30.0, device=device)


def _case(
    formats: Sequence[str], width: int, dtype: torch.dtype = torch.bfloat16, eight_bit: bool = False,
    splits: int | None = None, softcap: float = 0.0, device: torch.device | str = "cpu",
) -> Case:  # fmt: skip
    """softcap: also causal, and over another's cache [P, page_size, H, D]: what drop-ins ask for."""
    pools = [KVPages.empty(format, 225 // len(formats), 12, 64, width, device) for format in formats]
    q = torch.empty(4680, 12, width, dtype=dtype, device=device)
    pages = sum(pool.pages for pool in pools)
    lens = [64 if page % 25 < 24 else 24 for page in range(pages)]
    plan = make_plan([Segment(len(q), range(pages), lens, window=(-1, 0) if softcap else None)], device)
    if softcap:
        pools = [pool.map(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)) for pool in pools]
    kind = ", 8 bits" * eight_bit + ", split" * (splits is not None) + ", causal" * (softcap > 0)
    what = f"{str(dtype).removeprefix('torch.')} q, D {width}{kind}"
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    call = Call(q, pools, plan, width**-0.5, out, lse, softcap=softcap)
    run = partial(run_paged_attention, call, eight_bit, splits=splits)
    return Case("paged_attention", "+".join(formats), what, run, shape_class(q, pools, eight_bit))


@triton.jit(do_not_specialize=["tokens", "segments", "entries", "splits", "tiles"])
def attention_kernel(
    q,  # Strided [V, tokens, HEADS * GROUP, D]
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
    cap,  # softcap, times log2(e)
    slopes,  # [segments, HEADS * GROUP] of ALiBi, or None
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, VARIANTS: tl.constexpr,
    SEGMENTS: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAPPED: tl.constexpr, EIGHT_BIT: tl.constexpr, E4M3: tl.constexpr,
    MMA_SYNC: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    head, split, segment, first_row, first, last = work_of(
        tl.program_id(0), plan, segments, entries, splits, tiles, HEADS, GROUP, SEGMENTS, PER_HEAD, BLOCK_M
    )
    token, query_head, row_mask = rows_from(first_row, segment, head, plan, tokens, GROUP, BLOCK_M)
    if tl.max(row_mask.to(tl.int32), 0) == 0:
        return
    WIDTH: tl.constexpr = tile_at(KEYS, 0).width
    base = max_bias(first, last, plan)
    at, low, high, slope = 0, 0, 0, None
    if plan.windows is not None:
        at, low, high = window_of(plan, segment, token)
        first, last = run_in_window(first, last, plan, low, high, row_mask)
        if slopes is not None:
            slope = tl.load(slopes + segment * (HEADS * GROUP) + query_head) * LOG2E
    running_max = tl.full([BLOCK_M], NEG_INF, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in tl.static_range(len(KEYS)):
        for variant in tl.static_range(VARIANTS):
            begin, end = first, last
            if len(KEYS) * VARIANTS > 1:
                begin, end = run_in_pool(first, last, plan, variant, pools[n])
            queries = load_rows(q, variant, token, query_head, row_mask, 0, WIDTH, BLOCK_D)
            running_max, running_sum, acc = attend_pages(
                queries, scale * LOG2E, running_max, running_sum, acc, begin, end, plan, variant, pools[n], base, head,
                at, low, high, cap, slope, HEADS, tile_at(KEYS, n), tile_at(VALUES, n), BLOCK_N,
                CAPPED, EIGHT_BIT, E4M3, MMA_SYNC,
            )  # fmt: skip
    token, query_head, row_mask = rows_from(first_row, segment, head, plan, tokens, GROUP, BLOCK_M)
    store_output(
        acc, finite(running_max) * LN2 + base, running_sum, out, lse, split, token, query_head, row_mask, 0,
        WIDTH, ACCUMULATE,
    )  # fmt: skip


@triton.jit
def attend_pages(
    queries, qk_scale, running_max, running_sum, acc, first, last, plan, variant, pool, base, head,
    at_row, low, high, cap, slope,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, EIGHT_BIT: tl.constexpr, E4M3: tl.constexpr, MMA_SYNC: tl.constexpr,
):  # fmt: skip
    """Continues the online softmax over the entries [first, last) that are pages of this pool, of this variant.

    qk_scale: of q . k, including log2(e): probabilities are powers of two. base: the largest bias, to which the others
    are relative. at_row, low, high, slope: [rows], the position of each, the first and the last that it sees, and
    its slope of ALiBi, where the plan has windows.

    Long because it is one loop: its parts would need most of these arguments again.
    """
    BLOCK_D: tl.constexpr = queries.shape[1]
    DTYPE: tl.constexpr = queries.dtype
    SUMMED: tl.constexpr = EIGHT_BIT and VALUE.kind == "e4m3"  # tile by tile, then scaled by channel: one page each
    PAGES: tl.constexpr = 1 if SUMMED else pages_of_tile(KEY.page_size, BLOCK_N)
    PARTS: tl.constexpr = (KEY.page_size + BLOCK_N - 1) // BLOCK_N  # tiles of keys of a page
    SPAN: tl.constexpr = BLOCK_N // PAGES  # keys of a tile in one page
    CODES: tl.constexpr = EIGHT_BIT and (KEY.kind == "int8" or KEY.kind == "e4m3")  # q is multiplied as codes
    SCALED: tl.constexpr = CAPPED or slope is not None or plan.page_bias is not None  # scores, before the softmax
    # Keys past the valid ones are read and masked as scores, if they are of the page.
    TO_THE_END: tl.constexpr = plan.page_starts is not None or KEY.page_size % SPAN != 0
    qk_scales = tl.full([queries.shape[0]], qk_scale, tl.float32)
    if CODES:
        queries, scales = quantize(queries.to(tl.float32), KEY)
        qk_scales *= scales
    step_scales = tl.full([queries.shape[0]], 1.0, tl.float32) if SCALED else qk_scales
    keys = tl.arange(0, BLOCK_N)
    which = keys // SPAN  # page, of those of the tile
    # Software pipelining: entries are read one step ahead, so that pages can be loaded at the start of their own step.
    pages, starts, ends, biases, positions = entries_from(first, last, plan, variant, pool, base, KEY.page_size, PAGES)
    for i in range(first * PARTS, last * PARTS, PAGES):
        row = (i % PARTS) * BLOCK_N
        rows = row + spread(starts, which) + (keys & (SPAN - 1))
        if CODES:
            codes = load_codes(pool.k.codes, pages, head, which, rows, 0, ends, HEADS, KEY, BLOCK_D, TO_THE_END)
            qk = dot_codes(queries, tl.trans(codes), KEY)
        else:
            k = load_floats(
                pool.k, pages, head, which, rows, 0, ends, HEADS, KEY, DTYPE, BLOCK_D, E4M3, KEY.kind == "u4",
                TO_THE_END,
            )  # fmt: skip
            qk = dot(queries, tl.trans(k))
        if KEY.kind == "int8" or KEY.kind == "e4m3":
            qk *= load_by_token(pool.k.scales, pages, head, which, rows, ends, HEADS, KEY)[None, :]
        if SCALED:
            qk *= qk_scales[:, None]
        qk = limit_scores(
            qk, rows, spread(ends, which), any_ends_within(row, starts, ends, SPAN),
            spread(positions, which) + row + (keys & (SPAN - 1)), at_row, low, high, cap, slope, plan,
            CAPPED, not MMA_SYNC,
        )  # fmt: skip
        if plan.page_bias is not None:
            qk += spread(biases, which)
        p, alpha, running_max, running_sum = online_softmax_step(qk, step_scales, running_max, running_sum)
        if SUMMED:
            codes = load_codes(pool.v.codes, pages, head, which, rows, 0, ends, HEADS, VALUE, BLOCK_D, False)
            # A sum of its own for every tile: float32 where the tensor cores keep less.
            tile_acc = dot_codes(as_e4m3(p * WEIGHT_SCALE), codes, VALUE)
            # Read before the products it would be there in time, but sm_100 has no register left for it.
            channel_scale = (
                load_by_channel(pool.v.scales, pages, head, which, 0, ends, HEADS, VALUE, BLOCK_D) / WEIGHT_SCALE
            )
            acc = acc * alpha[:, None] + tile_acc * channel_scale
        else:
            v = load_floats(
                pool.v, pages, head, which, rows, 0, ends, HEADS, VALUE, DTYPE, BLOCK_D, E4M3, True,
                VALUE.kind == "float",
            )  # fmt: skip
            if MMA_SYNC and VALUE.kind != "float":
                # Each warp would dequantize all values for itself. What is selected is shared among them.
                v = tl.where((rows < spread(ends, which))[:, None], v, 0.0)
            acc = dot(round_to(p, DTYPE), v, acc * alpha[:, None])
        pages, starts, ends, biases, positions = entries_from(
            (i + PAGES) // PARTS, last, plan, variant, pool, base, KEY.page_size, PAGES
        )
    return running_max, running_sum, acc


@triton.jit
def quantize(x, tile: tl.constexpr):
    """Rows of float32 as codes of a tile's kind, and their scales."""
    scale = scale_of(x, 1, tile.floor, tile.top)
    x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    x = tl.minimum(tl.maximum(x, -tile.top), tile.top)
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
def dot_codes(a, b, tile: tl.constexpr):
    """a @ b of codes of a tile's kind, as float32; int8 exactly, e4m3 with at most 128 products in fewer bits."""
    if tile.kind == "int8":
        return tl.dot(a, b).to(tl.float32)
    else:
        MOST: tl.constexpr = 128 if a.shape[1] > 128 else a.shape[1]
        a, b = a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
        return tl.dot(a, b, max_num_imprecise_acc=MOST)
