"""Softcap, ALiBi, and windows within a page list: what each query row sees beyond what the list says, and how far."""

from __future__ import annotations

import triton
import triton.language as tl

from .online import LOG2E, NEG_INF
from .work import STEP

MOST = tl.constexpr(2**31 - 1)


@triton.jit
def place_of(i, last, plan):
    """(slot, position) of an entry's first valid token."""
    start, position = 0, 0
    if plan.page_starts is not None:
        start = tl.load(plan.page_starts + i, mask=i < last, other=0)
    if plan.windows is not None:
        position = tl.load(plan.page_positions + i, mask=i < last, other=0)
    return start, position


@triton.jit
def window_of(plan, segment, token):
    """The position of each row, and the first and the last that it sees."""
    query = (token - tl.load(plan.q_indptr + segment)).to(tl.int32)
    window = plan.windows + 2 * segment
    return query, query - tl.load(window), query + tl.load(window + 1)


@triton.jit
def run_in_window(first, last, plan, low, high, row_mask):
    """The shortest run of entries that holds all of which a row sees tokens; each sees positions low to high."""
    lowest, highest = tl.min(tl.where(row_mask, low, MOST), 0), tl.max(tl.where(row_mask, high, -MOST), 0)
    begin, end = last, first
    for start in range(first, last, STEP):
        i = start + tl.arange(0, STEP)
        position = tl.load(plan.page_positions + i, mask=i < last, other=0)
        length = tl.load(plan.page_lens + i, mask=i < last, other=0)
        seen = (i < last) & (position <= highest) & (position + length > lowest)
        begin = tl.minimum(begin, tl.min(tl.where(seen, i, last), 0))
        end = tl.maximum(end, tl.max(tl.where(seen, i + 1, first), 0))
    return begin, end


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap) of float32, within 4e-7 of cap and, near 0, of itself."""
    y = tl.minimum(tl.maximum(x / cap, -10.0), 10.0)
    square = y * y
    near = y * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    far = 1.0 - 2.0 / (tl.exp2(y * (2.0 * LOG2E)) + 1.0)
    return tl.where(square < 0.01, near, far) * cap


@triton.jit
def limit_scores(
    qk,  # [rows, keys], scaled if CAPPED or with a slope: what softcap, ALiBi and windows make of it
    rows,  # [keys], the slot of each in its page, of which those before `end` are valid: of its page, or [keys]
    end,
    partial,  # whether one of them is not: worth a BRANCH, if all that it takes is in there
    position,  # of each key, [keys]
    at_row,  # [rows], where the plan has windows: the position of each, the first and the last that it sees
    low,
    high,
    cap,
    slope,  # [rows] of ALiBi, or None
    plan,
    CAPPED: tl.constexpr,
    BRANCH: tl.constexpr,
):
    if CAPPED:
        qk = soft_cap(qk, cap)
    if not BRANCH:
        qk = tl.where((rows < end)[None, :], qk, NEG_INF)
    elif partial:
        # A load that LLVM can not make in advance: else it would make selects of the branch, executed for every tile.
        tl.load(plan.page_indptr, volatile=True)
        qk = tl.where((rows < end)[None, :], qk, NEG_INF)
    if plan.windows is not None:
        at = position[None, :]
        if slope is not None:
            qk -= slope[:, None] * tl.abs(at - at_row[:, None]).to(tl.float32)
        qk = tl.where((at >= low[:, None]) & (at <= high[:, None]), qk, NEG_INF)
    return qk
