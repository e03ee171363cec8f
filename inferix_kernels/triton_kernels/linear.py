"""linear in Triton: a tile of the product for each program, over 8-bit tensor cores. The tiles that share rows of the
weight run next to each other and find them in the cache; the epilogue is done on the accumulators.

Held to the reference in Triton's interpreter, compiled for sm_80 to sm_120, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch import Unsupported
from ..layout import Quantized
from .codecs import round_to
from .config import config
from .launch import Case, architecture, architecture_name, check_device, has_e4m3, launch
from .linear_rows import activate, groups_of, kind_of, load_groups
from .sizes import ceil_div

__all__ = ["linear"]


class Epilogue(NamedTuple):
    """The operands of linear_kernel's epilogue."""

    x_scales: Tensor  # [rows] float32
    weight_scales: Tensor  # [columns] float32
    bias: Tensor | None  # [columns]
    gate: Tensor | None  # [groups, columns], each for gate_rows rows
    gate_rows: int
    residual: Tensor | None  # [rows, columns]
    residual_row_stride: int
    residual_stride: int
    out: Tensor  # [rows, columns], written; may be residual
    out_row_stride: int
    out_stride: int


def linear(
    x: Quantized,
    weight: Quantized,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor,
) -> Tensor:
    device, codes = x.codes.device, x.codes.dtype
    check_device("linear", x.codes)
    target = architecture(device)
    if codes == torch.float8_e4m3fn and target is not None and not has_e4m3(target):
        name = architecture_name(target)
        raise Unsupported(f"linear: e4m3 codes need sm_89 or later, this is {name}; int8 codes run here")
    (M, K), N = x.codes.shape, len(weight.codes)
    tile = config("linear", f"{kind_of(codes)}, {size_of(M)}", device)
    launch(
        linear_kernel,
        ceil_div(M, tile["m"]) * ceil_div(N, tile["n"]),
        device,
        x.codes, weight.codes, M, N,
        _epilogue(x, weight, bias, gate, residual, out),
        K=K,
        ACTIVATION=activation,
        BLOCK_M=tile["m"],
        BLOCK_N=tile["n"],
        BLOCK_K=tile["k"],
        GROUP_SIZE_M=tile["tall"],
        # Tensor cores accumulate e4m3 products with about 13 bits of mantissa on sm_89 and sm_90 (arXiv:2411.10958), so
        # each BLOCK_K is promoted to a float32 accumulator. Those in sm_100's tensor memory are taken for float32.
        PROMOTE=target is None or (isinstance(target, int) and not 100 <= target < 120),
        num_warps=tile["warps"],
        num_stages=tile["stages"],
    )  # fmt: skip
    return out


def _epilogue(
    x: Quantized, weight: Quantized, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None, out: Tensor
) -> Epilogue:
    gate, gate_rows = groups_of(gate, len(x.codes))
    return Epilogue(
        x_scales=x.scales,
        weight_scales=weight.scales,
        bias=None if bias is None else bias.contiguous(),
        gate=gate,
        gate_rows=gate_rows,
        residual=residual,
        residual_row_stride=0 if residual is None else residual.stride(0),
        residual_stride=0 if residual is None else residual.stride(1),
        out=out,
        out_row_stride=out.stride(0),
        out_stride=out.stride(1),
    )


def cases(device: torch.device | str = "cpu") -> Iterator[Case]:
    """The layers of Wan 1.3B, 1536 wide."""
    empty = partial(torch.empty, device=device)
    x, modulation = empty(4680, 1536, dtype=torch.bfloat16), empty(1, 1536)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        kind, codes = kind_of(dtype), Quantized(empty(x.shape, dtype=dtype), empty(len(x)))
        for rows in (64, 1024, 4680):
            part, weight, y = Quantized(*(t[:rows] for t in codes)), Quantized(*(t[:1536] for t in codes)), x[:rows]
            gated = partial(linear, part, weight, bias=x[0], gate=modulation, residual=y, out=y)
            gelu = partial(linear, part, weight, bias=x[0], activation="gelu_tanh", out=y)
            for what, call in (("gate and residual", gated), ("GELU", gelu)):
                yield Case("linear", kind, f"{size_of(rows)}, {what}", call, f"{kind}, {size_of(rows)}")


def size_of(rows: int) -> str:
    return "up to 64 rows" if rows <= 64 else "up to 1024 rows" if rows <= 1024 else "many rows"


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,  # [rows, K] int8 or e4m3
    weight,  # [columns, K]
    rows,
    columns,
    epilogue,  # Epilogue
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,  # tiles in a column of them that run next to each other
    PROMOTE: tl.constexpr,  # accumulate each BLOCK_K in the tensor cores, all of them in float32 (promotion)
):
    tile_m, tile_n = grouped_tile(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP_SIZE_M)
    row, col, k = (
        tile_m * BLOCK_M + tl.arange(0, BLOCK_M),
        tile_n * BLOCK_N + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_K),
    )
    # Past the end: row 0 again, whose products are not stored. Only the tail of K is masked.
    a_ptrs = x + tl.where(row < rows, row, 0).to(tl.int64)[:, None] * K + k[None, :]
    b_ptrs = weight + tl.where(col < columns, col, 0).to(tl.int64)[None, :] * K + k[:, None]
    if x.dtype.element_ty == tl.int8:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k < K - start)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(k < K - start)[:, None], other=0.0)
        if x.dtype.element_ty == tl.int8:
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        elif PROMOTE:
            acc += tl.dot(a, b, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    # One half after the other: with the epilogue's operands for both, the accumulators would spill.
    HALF: tl.constexpr = BLOCK_N // 2
    first, second = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, HALF]), [0, 2, 1]))
    store_output(first, rows, columns, epilogue, tile_m, tile_n * BLOCK_N, BLOCK_M, HALF, ACTIVATION)
    store_output(second, rows, columns, epilogue, tile_m, tile_n * BLOCK_N + HALF, BLOCK_M, HALF, ACTIVATION)


@triton.jit
def store_output(
    acc, rows, columns, epilogue, tile, first_col, BLOCK_M: tl.constexpr, COLS: tl.constexpr, ACTIVATION: tl.constexpr
):
    """From sums of products of codes, [TILE_M, COLS], to what is stored."""
    row, col = tile * BLOCK_M + tl.arange(0, BLOCK_M), first_col + tl.arange(0, COLS)
    row_mask, col_mask = row < rows, col < columns
    mask = row_mask[:, None] & col_mask[None, :]
    x_scales = tl.load(epilogue.x_scales + row, mask=row_mask, other=0.0)
    weight_scales = tl.load(epilogue.weight_scales + col, mask=col_mask, other=0.0)
    y = acc.to(tl.float32) * (x_scales[:, None] * weight_scales[None, :])
    if epilogue.bias is not None:
        y += tl.load(epilogue.bias + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    if epilogue.gate is not None:
        y *= load_groups(epilogue.gate, epilogue.gate_rows, row, col, mask, columns)
    first, inside = tile.to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)[:, None]  # inside a tile 32 bits do
    if epilogue.residual is not None:
        places = inside * epilogue.residual_row_stride + col[None, :] * epilogue.residual_stride
        residual = epilogue.residual + first * epilogue.residual_row_stride
        y += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    places = inside * epilogue.out_row_stride + col[None, :] * epilogue.out_stride
    out = epilogue.out + first * epilogue.out_row_stride
    tl.store(out + places, round_to(y, out.dtype.element_ty), mask=mask)


@triton.jit
def grouped_tile(tall, wide, GROUP_SIZE_M: tl.constexpr):
    """Tiles go down TALL of a column, then to the next column; after the last one, to the next TALL rows of tiles."""
    program = tl.program_id(0)
    band = program // (GROUP_SIZE_M * wide)
    height = tl.minimum(tall - band * GROUP_SIZE_M, GROUP_SIZE_M)
    inside = program % (GROUP_SIZE_M * wide)
    return band * GROUP_SIZE_M + inside % height, inside // height
