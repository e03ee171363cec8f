"""What the formats of pages, and 8-bit rows, mean: from float32 to codes and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Codec

__all__ = ["AMAX_FLOOR", "HALF_MAX", "LARGEST", "STEP_FLOOR", "decode", "encode"]

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.uint8: 15.0}  # int8 is symmetric: -128 is never stored
AMAX_FLOOR = 1e-12  # an all-zero row gets a scale above 0: it stores zeros, not NaN
STEP_FLOOR = 2.0**-14  # the same for 4-bit codes: the smallest normal float16
HALF_MAX = 65504.0


def encode(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [H, L, width] float32 -> codes of the same shape, not yet packed or transposed, scales and offsets [H, n].

    8-bit codes are x / scale with scale = max(largest |x|, 1e-12) / 127 (int8) or 448 (e4m3). 4-bit codes are
    (x - offset) / scale with offset = the smallest x and scale = max((largest x - offset) / 15, 2^-14), both
    float16. Divisions are float32, roundings half to even. Where a NaN or an infinity is among the numbers that share
    a scale, that is NaN, the codes and the offset are 0: so all of them are read as NaN.
    """
    if codec.scaled_by is None:
        return x.to(codec.dtype), None, None
    dim, top = (-1 if codec.scaled_by == "token" else -2), x.new_full((), LARGEST[codec.dtype])
    if codec.packed:
        shape = x.sum(dim, keepdim=True).shape  # amin of no tokens is undefined
        low, high = (x.amin(dim, True), x.amax(dim, True)) if x.shape[dim] else (x.new_zeros(shape),) * 2
        finite = low.isfinite() & high.isfinite()
        offset = (low.clamp(-HALF_MAX, HALF_MAX).half() + 0.0).where(finite, 0.0)  # -0 becomes 0
        scale = (
            ((high.clamp(max=HALF_MAX) - offset.float()) / top).clamp(min=STEP_FLOOR).half().where(finite, torch.nan)
        )
        codes = ((x - offset.float()) / scale.float()).round().clamp(0, LARGEST[codec.dtype])
        return codes.where(finite, 0.0).to(codec.dtype), scale.squeeze(dim), offset.squeeze(dim)
    amax = x.abs().amax(dim, True) if x.shape[dim] else x.new_zeros(x.sum(dim, keepdim=True).shape)
    finite = amax.isfinite()
    scale = (amax.clamp(min=AMAX_FLOOR) / top).where(finite, torch.nan)  # top is a tensor: CUDA has its reciprocal else
    codes = (x / scale).clamp(-top, top).where(finite, 0.0)
    return (codes if codec.dtype.is_floating_point else codes.round()).to(codec.dtype), scale.squeeze(dim), None


def decode(codes: Tensor, scales: Tensor | None, offsets: Tensor | None, codec: Codec) -> Tensor:
    """The inverse of encode: [H, L, width] float32."""
    x = codes.float()
    if scales is None:
        return x
    dim = -1 if codec.scaled_by == "token" else -2
    x = x * scales.float().unsqueeze(dim)
    return x if offsets is None else x + offsets.float().unsqueeze(dim)
