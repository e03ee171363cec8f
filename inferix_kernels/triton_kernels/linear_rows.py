"""quantize_rows and add_norm in Triton: whole rows in registers, so that gate, residual, norm, modulation, activation
and codes are one read and one write.

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
from ..layout import Quantized, as_bytes, rows_of
from .codecs import round_to, round_to_int, scale_of, to_e4m3
from .config import rows_and_warps
from .launch import Case, check_device, launch
from .sizes import ceil_div, power_of_2

__all__ = ["add_norm", "quantize_rows"]

_WIDEST = 32768  # numbers of a row: 64 in each of 16 warps' threads


class Rows(NamedTuple):
    """[rows, WIDTH], or None."""

    data: Tensor | None
    row_stride: int = 0
    stride: int = 0


class Groups(NamedTuple):
    """[groups, WIDTH], each for `rows` rows, or None."""

    data: Tensor | None
    rows: int = 1


class Steps(NamedTuple):
    """What stands between the sum and the result."""

    weight: Tensor | None  # [WIDTH]
    bias: Tensor | None
    scale: Groups
    shift: Groups


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
    steps = _steps(x, weight, bias, scale, shift)
    _launch("quantize_rows", x, None, None, norm, steps, eps, activation, None, as_bytes(out.codes), out.scales,
            out.codes.dtype)  # fmt: skip
    return out


def add_norm(
    x: Tensor,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    activation: str | None = None,
    summed: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    rows = rows_of(x)
    steps = _steps(rows, weight, bias, scale, shift)
    _launch("add_norm", rows, gate, residual, norm, steps, eps, activation, summed, out, None, out.dtype)
    return out


def _launch(
    op: str,
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    norm: str | None,
    steps: Steps,
    eps: float,
    activation: str | None,
    summed: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    stored: torch.dtype,
) -> None:
    check_device(op, x)
    M, K = x.shape
    if K > _WIDEST:
        raise Unsupported(f"{op}: x must be at most {_WIDEST} wide, got {K}")
    cols = power_of_2(max(K, 1))
    rows, warps = rows_and_warps(op, cols, x.device)
    launch(
        rows_kernel,
        ceil_div(M, rows),
        x.device,
        _rows(x), M, groups_of(gate, M), _rows(residual), _rows(summed), steps, eps, _rows(out), scales,
        WIDTH=K,
        NORM=norm,
        ACTIVATION=activation,
        E4M3=stored == torch.float8_e4m3fn,
        TOP=reference.LARGEST.get(stored, 1.0),
        FLOOR=reference.AMAX_FLOOR,
        ROWS=rows,
        COLS=cols,
        num_warps=warps,
    )  # fmt: skip


def cases(device: torch.device | str = "cpu") -> Iterator[Case]:
    """What stands before the projections of Wan 1.3B and its second matrix, in 8 bits and in bfloat16."""
    empty = partial(torch.empty, device=device)
    x, wide = (empty(4680, width, dtype=torch.bfloat16) for width in (1536, 8960))
    modulation, vector = empty(3, 1536), empty(1536, dtype=torch.bfloat16)
    adaln: dict[str, Any] = {"norm": "layer", "scale": modulation, "shift": modulation}
    for dtype in (torch.int8, torch.float8_e4m3fn):
        kind = kind_of(dtype)
        codes, wide_codes = (Quantized(empty(y.shape, dtype=dtype), empty(len(y))) for y in (x, wide))
        yield Case("quantize_rows", kind, "adaLN", partial(quantize_rows, x, out=codes, **adaln))
        yield Case("quantize_rows", kind, "RMSNorm", partial(quantize_rows, x, norm="rms", weight=vector, out=codes))
        wide_gelu = partial(quantize_rows, wide, activation="gelu_tanh", out=wide_codes)
        yield Case("quantize_rows", kind, "GELU", wide_gelu)
    gated: dict[str, Any] = {"gate": modulation, "residual": x}
    affine: dict[str, Any] = {"norm": "layer", "weight": vector, "bias": vector}
    for what, options in {
        "adaLN": adaln,
        "RMSNorm": {"norm": "rms", "weight": vector},
        "gate and residual": gated,
        "gate, residual, layer norm": {**gated, **affine, "summed": x},
        "gate, residual, adaLN": {**gated, **adaln, "summed": x},
    }.items():
        yield Case("add_norm", "bf16", what, partial(add_norm, x, out=empty(x.shape, dtype=x.dtype), **options))


def kind_of(codes: torch.dtype) -> str:
    return "int8" if codes == torch.int8 else "e4m3"


def _rows(x: Tensor | None) -> Rows:
    if x is None:
        return Rows(None)
    return Rows(x, x.shape[-1], 1) if x.is_contiguous() else Rows(x, *rows_of(x).stride())


def groups_of(groups: Tensor | None, rows: int) -> Groups:
    if groups is None:
        return Groups(None)
    count = groups.shape[:-1].numel()
    return Groups(groups.contiguous(), max(rows // max(count, 1), 1))


def _steps(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Steps:
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    return Steps(weight, bias, groups_of(scale, len(x)), groups_of(shift, len(x)))


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    x,  # Rows
    rows,
    gate,  # Groups
    residual,  # Rows, and summed and out, which are written
    summed,
    steps,  # Steps
    eps,
    out,  # floats, int8, or the bits of e4m3
    scales,  # [rows] float32, written; None of floats
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
    y = tl.load(x.data + places_of(x, row, col), mask=mask, other=0.0).to(tl.float32)
    if gate.data is not None:
        y *= load_groups(gate.data, gate.rows, row, col, mask, WIDTH)
    if residual.data is not None:
        y += tl.load(residual.data + places_of(residual, row, col), mask=mask, other=0.0).to(tl.float32)
    if summed.data is not None:  # what follows is of the sum as it was rounded
        kept = round_to(y, summed.data.dtype.element_ty)
        tl.store(summed.data + places_of(summed, row, col), kept, mask=mask)
        y = kept.to(tl.float32)
    y = normed(y, steps, eps, row, col, mask, WIDTH, NORM)
    y = activate(y, ACTIVATION)
    places = places_of(out, row, col)
    if scales is None:
        tl.store(out.data + places, round_to(y, out.data.dtype.element_ty), mask=mask)
    else:
        y = tl.where(mask, y, 0.0)
        step = scale_of(y, 1, FLOOR, TOP)
        y = tl.div_rn(y, tl.broadcast_to(step[:, None], [ROWS, COLS]))
        y = tl.minimum(tl.maximum(y, -TOP), TOP)
        tl.store(out.data + places, to_e4m3(y) if E4M3 else round_to_int(y).to(tl.int8), mask=mask)
        tl.store(scales + row, step, mask=row_mask)


@triton.jit
def normed(y, steps, eps, row, col, mask, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """Rows after norm and modulation; what is past their end, where `mask` is not, is 0 before and anything after."""
    if NORM == "layer":
        y = tl.where(mask, y - (tl.sum(y, 1) / WIDTH)[:, None], 0.0)
    if NORM is not None:
        y *= tl.rsqrt(tl.sum(y * y, 1) / WIDTH + eps)[:, None]
    if steps.weight is not None:
        y *= tl.load(steps.weight + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :]
    if steps.bias is not None:
        y += tl.load(steps.bias + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :]
    if steps.scale.data is not None:
        y *= 1 + load_groups(steps.scale.data, steps.scale.rows, row, col, mask, WIDTH)
    if steps.shift.data is not None:
        y += load_groups(steps.shift.data, steps.shift.rows, row, col, mask, WIDTH)
    return y


@triton.jit
def places_of(x, row, col):
    return row.to(tl.int64)[:, None] * x.row_stride + col[None, :] * x.stride


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
