"""quantize_rows and linear in Triton.

quantize_rows holds whole rows in registers, so that a norm, a modulation, an activation and the codes are one read and
one write. linear is a tile of the product for each program, over 8-bit tensor cores: the tiles that share rows of the
weight run next to each other and find them in the cache; the epilogue is done on the accumulators.

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
from .._dispatch import Unsupported
from ..layout import Quantized, as_bytes
from .codecs import round_to, round_to_int, scale_of, to_e4m3
from .config import config, rows_and_warps
from .launch import Case, architecture, architecture_name, check_device, has_e4m3, launch

__all__ = ["linear", "quantize_rows"]

_WIDEST = 32768  # numbers of a row: 64 in each of 16 warps' threads


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


def quantize_rows(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    *,
    norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    activation: str | None = None,
    out: Quantized,
) -> Quantized:
    check_device("quantize_rows", x)
    M, K = x.shape
    if K > _WIDEST:
        raise Unsupported(f"quantize_rows: x must be at most {_WIDEST} wide, got {K}")
    cols = triton.next_power_of_2(max(K, 1))
    rows, warps = rows_and_warps("quantize_rows", cols, x.device)
    launch(
        quantize_kernel,
        triton.cdiv(M, rows),
        x.device,
        x, *x.stride(), M, *_contiguous(weight, bias),
        *_groups(scale, M),
        *_groups(shift, M),
        eps,
        as_bytes(out.codes), out.scales,
        WIDTH=K,
        NORM=norm,
        ACTIVATION=activation,
        E4M3=out.codes.dtype == torch.float8_e4m3fn,
        TOP=reference.LARGEST[out.codes.dtype],
        FLOOR=reference.AMAX_FLOOR,
        ROWS=rows,
        COLS=cols,
        num_warps=warps,
    )  # fmt: skip
    return out


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
        triton.cdiv(M, tile["m"]) * triton.cdiv(N, tile["n"]),
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
    gate, gate_rows = _groups(gate, len(x.codes))
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
    """The layers of Wan 1.3B: what stands before its projections and its second matrix, and the products."""
    empty = partial(torch.empty, device=device)
    x, wide = (empty(4680, width, dtype=torch.bfloat16) for width in (1536, 8960))
    modulation, bias = empty(3, 1536), empty(1536, dtype=torch.bfloat16)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        kind = kind_of(dtype)
        codes, wide_codes = (Quantized(empty(y.shape, dtype=dtype), empty(len(y))) for y in (x, wide))
        adaln: dict[str, Any] = {"norm": "layer", "scale": modulation, "shift": modulation}
        yield Case("quantize_rows", kind, "adaLN", partial(quantize_rows, x, out=codes, **adaln))
        yield Case("quantize_rows", kind, "RMSNorm", partial(quantize_rows, x, norm="rms", weight=bias, out=codes))
        wide_gelu = partial(quantize_rows, wide, activation="gelu_tanh", out=wide_codes)
        yield Case("quantize_rows", kind, "GELU", wide_gelu)
        for rows in (64, 1024, 4680):
            part, weight, y = Quantized(*(t[:rows] for t in codes)), Quantized(*(t[:1536] for t in codes)), x[:rows]
            gated = partial(linear, part, weight, bias=bias, gate=modulation[:1], residual=y, out=y)
            gelu = partial(linear, part, weight, bias=bias, activation="gelu_tanh", out=y)
            for what, call in (("gate and residual", gated), ("GELU", gelu)):
                yield Case("linear", kind, f"{size_of(rows)}, {what}", call, f"{kind}, {size_of(rows)}")


def kind_of(codes: torch.dtype) -> str:
    return "int8" if codes == torch.int8 else "e4m3"


def size_of(rows: int) -> str:
    return "up to 64 rows" if rows <= 64 else "up to 1024 rows" if rows <= 1024 else "many rows"


def _contiguous(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in vectors)


def _groups(groups: Tensor | None, rows: int) -> tuple[Tensor | None, int]:
    """The groups, and for how many rows each stands."""
    return (None, 1) if groups is None else (groups.contiguous(), max(rows // len(groups), 1))


@triton.jit(do_not_specialize=["rows", "scale_rows", "shift_rows"])
def quantize_kernel(
    x,  # [rows, WIDTH]
    row_stride,
    stride,
    rows,
    weight,  # [WIDTH] or None
    bias,
    scale,  # [groups, WIDTH] or None, each for scale_rows rows
    scale_rows,
    shift,
    shift_rows,
    eps,
    codes,  # [rows, WIDTH] int8, or the bits of e4m3; written
    scales,  # [rows] float32, written
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    E4M3: tl.constexpr,
    TOP: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    row_mask, col_mask = row < rows, col < WIDTH
    mask = row_mask[:, None] & col_mask[None, :]
    places = row.to(tl.int64)[:, None] * row_stride + col[None, :] * stride
    y = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    if NORM == "layer":
        y = tl.where(mask, y - (tl.sum(y, 1) / WIDTH)[:, None], 0.0)
    if NORM is not None:
        y *= tl.rsqrt(tl.sum(y * y, 1) / WIDTH + eps)[:, None]
    if weight is not None:
        y *= tl.load(weight + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        y *= 1 + load_groups(scale, scale_rows, row, col, mask, WIDTH)
    if shift is not None:
        y += load_groups(shift, shift_rows, row, col, mask, WIDTH)
    y = tl.where(mask, activate(y, ACTIVATION), 0.0)
    step = scale_of(y, 1, FLOOR, TOP)
    y = tl.div_rn(y, tl.broadcast_to(step[:, None], [ROWS, COLS]))
    y = tl.minimum(tl.maximum(y, -TOP), TOP)
    places = row.to(tl.int64)[:, None] * WIDTH + col[None, :]
    if E4M3:
        tl.store(codes + places, to_e4m3(y), mask=mask)
    else:
        tl.store(codes + places, round_to_int(y).to(tl.int8), mask=mask)
    tl.store(scales + row, step, mask=row_mask)


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


@triton.jit
def load_groups(groups, group_rows, row, col, mask, width):
    places = (row // group_rows).to(tl.int64)[:, None] * width + col[None, :]
    return tl.load(groups + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(u) is 2 / (1 + exp(-2u)); at 80 the rest is below any rounding, and past 88 float32 ends.
        return y / (1 + tl.exp(tl.minimum(-1.5957691216057308 * (y + 0.044715 * y * y * y), 80.0)))
    else:
        return y
