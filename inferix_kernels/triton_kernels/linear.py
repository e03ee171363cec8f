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
from .launch import Case, architecture, check_device, launch

__all__ = ["linear", "quantize_rows"]

_WIDEST = 32768  # numbers of a row: 64 in each of 16 warps' threads


class Epilogue(NamedTuple):
    """What becomes of the sums of products, as linear_kernel gets it."""

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
        *(x, *x.stride(), M, *_contiguous(weight, bias)),
        *_groups(scale, M),
        *_groups(shift, M),
        eps,
        *(as_bytes(out.codes), out.scales),
        WIDTH=K,
        NORM=norm,
        ACTIVATION=activation,
        E4M3=out.codes.dtype == torch.float8_e4m3fn,
        TOP=reference.LARGEST[out.codes.dtype],
        FLOOR=reference.AMAX_FLOOR,
        ROWS=rows,
        COLS=cols,
        num_warps=warps,
    )
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
    if codes == torch.float8_e4m3fn and target is not None and target < 89:
        raise Unsupported(f"linear: e4m3 codes need sm_89 or later, this is sm_{target}; int8 codes run here")
    (M, K), N = x.codes.shape, len(weight.codes)
    tile = config("linear", f"{kind_of(codes)}, {size_of(M)}", device)
    launch(
        linear_kernel,
        triton.cdiv(M, tile["m"]) * triton.cdiv(N, tile["n"]),
        device,
        *(x.codes, weight.codes, M, N),
        Epilogue(
            *(x.scales, weight.scales, *_contiguous(bias), *_groups(gate, M)),  # type: ignore[arg-type]
            *((None, 0, 0) if residual is None else (residual, *residual.stride())),
            *(out, *out.stride()),
        ),
        K=K,
        ACTIVATION=activation,
        TILE_M=tile["m"],
        TILE_N=tile["n"],
        TILE_K=tile["k"],
        TALL=tile["tall"],
        # Sums of e4m3 products keep some 13 bits of mantissa on sm_89 and sm_90 (arXiv:2411.10958): float32 takes them
        # over, tile by tile, before they lose more. Those in sm_100's tensor memory are taken for float32.
        APART=target is None or not 100 <= target < 120,
        num_warps=tile["warps"],
        num_stages=tile["stages"],
    )
    return out


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
    there, known = row < rows, col < WIDTH
    mask = there[:, None] & known[None, :]
    places = row.to(tl.int64)[:, None] * row_stride + col[None, :] * stride
    y = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    if NORM == "layer":
        y = tl.where(mask, y - (tl.sum(y, 1) / WIDTH)[:, None], 0.0)
    if NORM is not None:
        y *= tl.rsqrt(tl.sum(y * y, 1) / WIDTH + eps)[:, None]
    if weight is not None:
        y *= tl.load(weight + col, mask=known, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + col, mask=known, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        y *= 1 + load_groups(scale, scale_rows, row, col, mask, WIDTH)
    if shift is not None:
        y += load_groups(shift, shift_rows, row, col, mask, WIDTH)
    y = tl.where(mask, activated(y, ACTIVATION), 0.0)
    step = scale_of(y, 1, FLOOR, TOP)
    y = tl.div_rn(y, tl.broadcast_to(step[:, None], [ROWS, COLS]))
    y = tl.minimum(tl.maximum(y, -TOP), TOP)
    places = row.to(tl.int64)[:, None] * WIDTH + col[None, :]
    if E4M3:
        tl.store(codes + places, to_e4m3(y), mask=mask)
    else:
        tl.store(codes + places, round_to_int(y).to(tl.int8), mask=mask)
    tl.store(scales + row, step, mask=there)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,  # [rows, K] int8 or e4m3
    weight,  # [columns, K]
    rows,
    columns,
    epilogue,  # Epilogue
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TALL: tl.constexpr,  # tiles in a column of them that run next to each other
    APART: tl.constexpr,  # sum the products of each TILE_K apart
):
    tile_m, tile_n = this_tile(tl.cdiv(rows, TILE_M), tl.cdiv(columns, TILE_N), TALL)
    row, col, k = tile_m * TILE_M + tl.arange(0, TILE_M), tile_n * TILE_N + tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    # Past the end: row 0 again, whose products are not stored. Only the tail of K is masked.
    a = x + tl.where(row < rows, row, 0).to(tl.int64)[:, None] * K + k[None, :]
    b = weight + tl.where(col < columns, col, 0).to(tl.int64)[None, :] * K + k[:, None]
    if x.dtype.element_ty == tl.int8:
        total = tl.zeros([TILE_M, TILE_N], tl.int32)
    else:
        total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for start in range(0, K, TILE_K):
        if K % TILE_K == 0:
            left, right = tl.load(a), tl.load(b)
        else:
            left = tl.load(a, mask=(k < K - start)[None, :], other=0.0)
            right = tl.load(b, mask=(k < K - start)[:, None], other=0.0)
        if x.dtype.element_ty == tl.int8:
            total = tl.dot(left, right, total, out_dtype=tl.int32)
        elif APART:
            total += tl.dot(left, right, max_num_imprecise_acc=TILE_K)
        else:
            total = tl.dot(left, right, total)
        a += TILE_K
        b += TILE_K
    # One half after the other: what the epilogue reads for both would push the sums out of the registers.
    HALF: tl.constexpr = TILE_N // 2
    first, second = tl.split(tl.permute(tl.reshape(total, [TILE_M, 2, HALF]), [0, 2, 1]))
    finish(first, rows, columns, epilogue, tile_m, tile_n * TILE_N, TILE_M, HALF, ACTIVATION)
    finish(second, rows, columns, epilogue, tile_m, tile_n * TILE_N + HALF, TILE_M, HALF, ACTIVATION)


@triton.jit
def finish(
    total, rows, columns, epilogue, tile, first_col, TILE_M: tl.constexpr, COLS: tl.constexpr, ACTIVATION: tl.constexpr
):
    """From sums of products of codes, [TILE_M, COLS], to what is stored."""
    row, col = tile * TILE_M + tl.arange(0, TILE_M), first_col + tl.arange(0, COLS)
    there, known = row < rows, col < columns
    mask = there[:, None] & known[None, :]
    x_scales = tl.load(epilogue.x_scales + row, mask=there, other=0.0)
    weight_scales = tl.load(epilogue.weight_scales + col, mask=known, other=0.0)
    y = total.to(tl.float32) * (x_scales[:, None] * weight_scales[None, :])
    if epilogue.bias is not None:
        y += tl.load(epilogue.bias + col, mask=known, other=0.0).to(tl.float32)[None, :]
    y = activated(y, ACTIVATION)
    if epilogue.gate is not None:
        y *= load_groups(epilogue.gate, epilogue.gate_rows, row, col, mask, columns)
    first, inside = tile.to(tl.int64) * TILE_M, tl.arange(0, TILE_M)[:, None]  # inside a tile 32 bits do
    if epilogue.residual is not None:
        places = inside * epilogue.residual_row_stride + col[None, :] * epilogue.residual_stride
        residual = epilogue.residual + first * epilogue.residual_row_stride
        y += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    places = inside * epilogue.out_row_stride + col[None, :] * epilogue.out_stride
    out = epilogue.out + first * epilogue.out_row_stride
    tl.store(out + places, round_to(y, out.dtype.element_ty), mask=mask)


@triton.jit
def this_tile(tall, wide, TALL: tl.constexpr):
    """Tiles go down TALL of a column, then to the next column; after the last one, to the next TALL rows of tiles."""
    program = tl.program_id(0)
    band = program // (TALL * wide)
    height = tl.minimum(tall - band * TALL, TALL)
    inside = program % (TALL * wide)
    return band * TALL + inside % height, inside // height


@triton.jit
def load_groups(groups, group_rows, row, col, mask, width):
    places = (row // group_rows).to(tl.int64)[:, None] * width + col[None, :]
    return tl.load(groups + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(u) is 2 / (1 + exp(-2u)); at 80 the rest is below any rounding, and past 88 float32 ends.
        return y / (1 + tl.exp(tl.minimum(-1.5957691216057308 * (y + 0.044715 * y * y * y), 80.0)))
    else:
        return y
