"""merge_attention in Triton: a program for a run of (token, head) rows.

Held to the reference in Triton's interpreter, compiled for sm_80 to sm_120, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codecs import round_to
from .config import rows_and_warps
from .launch import Case, check_device, launch
from .sizes import ceil_div, power_of_2

__all__ = ["merge_attention"]

NEG_INF = tl.constexpr(float("-inf"))  # the lse of no keys


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    check_device("merge_attention", out)
    tokens, heads, width = out.shape
    cols = power_of_2(width)
    rows, warps = rows_and_warps("merge_attention", cols, out.device)
    launch(
        merge_kernel,
        ceil_div(tokens * heads, rows),
        out.device,
        out_a, *out_a.stride(), lse_a, *lse_a.stride(),
        out_b, *out_b.stride(), lse_b, *lse_b.stride(),
        out, *out.stride(), lse, *lse.stride(),
        tokens * heads,
        HEADS=heads,
        WIDTH=width,
        ROWS=rows,
        COLS=cols,
        num_warps=warps,
    )  # fmt: skip
    return out, lse


def cases(device: torch.device | str = "cpu") -> Iterator[Case]:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x = torch.empty(4680, 12, 128, dtype=dtype, device=device)
        lse = torch.empty(4680, 12, device=device)
        yield Case("merge_attention", name, "", partial(merge_attention, x, lse, x, lse, out=x, lse=lse))


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    out_a,  # [tokens, HEADS, WIDTH]
    a_token_stride,
    a_head_stride,
    a_stride,
    lse_a,  # [tokens, HEADS]
    lse_a_token_stride,
    lse_a_head_stride,
    out_b,
    b_token_stride,
    b_head_stride,
    b_stride,
    lse_b,
    lse_b_token_stride,
    lse_b_head_stride,
    out,  # written, as lse; may be those of a or b
    token_stride,
    head_stride,
    stride,
    lse,
    lse_token_stride,
    lse_head_stride,
    rows,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    row_mask = row < rows
    mask = row_mask[:, None] & (col < WIDTH)
    a = tl.load(lse_a + token * lse_a_token_stride + head * lse_a_head_stride, mask=row_mask, other=NEG_INF)
    b = tl.load(lse_b + token * lse_b_token_stride + head * lse_b_head_stride, mask=row_mask, other=NEG_INF)
    max_lse = tl.maximum(a, b)
    max_lse = tl.where(max_lse == NEG_INF, 0.0, max_lse)  # any finite number: both weights are 0
    weight_a, weight_b = tl.exp(a - max_lse), tl.exp(b - max_lse)
    total = weight_a + weight_b
    # A side that saw no key is not read: whatever its out holds, even NaN, is not used. A NaN of its lse is not 0.
    x = tl.load(
        out_a + (token * a_token_stride + head * a_head_stride)[:, None] + col * a_stride,
        mask=mask & (weight_a != 0)[:, None],
        other=0.0,
    )
    y = tl.load(
        out_b + (token * b_token_stride + head * b_head_stride)[:, None] + col * b_stride,
        mask=mask & (weight_b != 0)[:, None],
        other=0.0,
    )
    # out and lse may be those just read, by other threads of this program as well: all have read before any writes.
    tl.debug_barrier()
    saw = total != 0
    safe = tl.where(saw, total, 1.0)
    merged = x.to(tl.float32) * (weight_a / safe)[:, None] + y.to(tl.float32) * (weight_b / safe)[:, None]
    places = (token * token_stride + head * head_stride)[:, None] + col * stride
    tl.store(out + places, round_to(merged, out.dtype.element_ty), mask=mask)
    merged_lse = tl.where(saw, max_lse + tl.log(safe), NEG_INF)
    tl.store(lse + token * lse_token_stride + head * lse_head_stride, merged_lse, mask=row_mask)
