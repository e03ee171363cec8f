"""8-bit linear layers and what stands before them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Codec, Quantized, as_bytes, rows_of
from .codecs import encode

__all__ = ["add_norm", "linear", "quantize_rows"]


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
    y = before(x, norm, weight, bias, scale, shift, eps, activation)
    codes, scales, _ = encode(y[None], Codec(dtype, "token"))
    as_bytes(out.codes).copy_(as_bytes(codes[0]))
    out.scales.copy_(scales[0])  # type: ignore[index]
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
    y = rows_of(x).float()
    y = y if gate is None else y * per_row(gate, len(y))
    y = y if residual is None else y + rows_of(residual).float()
    y = y if summed is None else rows_of(summed).copy_(y)
    rows_of(out).copy_(before(y, norm, weight, bias, scale, shift, eps, activation))
    return out


def before(
    x: Tensor,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str | None = None,
) -> Tensor:
    """From the norm to the activation: [M, K] float32."""
    y = x.float()
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm is not None:
        y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    y = y if scale is None else y * (1 + per_row(scale, len(y)))
    y = y if shift is None else y + per_row(shift, len(y))
    return activate(y, activation)


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
    # float64 holds every sum of products of 8-bit codes exactly.
    y = (x.codes.double() @ weight.codes.double().mT).float() * (x.scales[:, None] * weight.scales)
    return finish(y, bias, activation, gate, residual, out)


def finish(
    y: Tensor, bias: Tensor | None, activation: str | None, gate: Tensor | None, residual: Tensor | None, out: Tensor
) -> Tensor:
    """What follows the product y [M, N] float32, into out."""
    y = y if bias is None else y + bias.float()
    y = activate(y, activation)
    y = y if gate is None else y * per_row(gate, len(y))
    return out.copy_(y if residual is None else y + residual.float())


def activate(y: Tensor, activation: str | None) -> Tensor:
    gelu = {"gelu": "none", "gelu_tanh": "tanh"}  # by the error function, and its approximation
    return y if activation is None else torch.nn.functional.gelu(y, approximate=gelu[activation])


def per_row(groups: Tensor, rows: int) -> Tensor:
    """[G, N], or [..., 1, N] with as many rows -> [rows, N]: each group's row for rows / G rows in turn."""
    groups = groups.flatten(0, -2)
    return groups.float().repeat_interleave(rows // max(len(groups), 1), 0)
