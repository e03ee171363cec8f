"""Rows in 8 bits with one scale for all of them, in plain torch: `quantize_rows` finds a scale for each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Quantized
from ..reference.codecs import AMAX_FLOOR, LARGEST


def quantize_tensor(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Quantized:
    """x [M, K] float32, bfloat16 or float16 -> codes [M, K], and the one scale as that of each row, [M] float32.

    Codes are rounded as `quantize_rows` does it. A NaN or an infinity is never hidden: what shares a scale with it is
    read as NaN. That is all of x where the scale is found in x, and its own row where the scale is given.

    Args:
        dtype: of the codes, int8 or float8_e4m3fn.
        scale: [1] float32, of a calibration; larger numbers than it saw become the largest code. None: that of x.
    """
    y = x.float().contiguous()
    top = y.new_full((), LARGEST[dtype])
    largest = y.abs().amax(1) if y.numel() else y.new_zeros(len(y))
    if scale is None:
        amax = largest.amax() if len(y) else y.new_zeros(())
        scale = amax.clamp(min=AMAX_FLOOR) / top
        scales = scale.where(amax.isfinite(), torch.nan).expand(len(y)).contiguous()
    else:
        scales = scale.expand(len(y)).where(largest.isfinite(), torch.nan)
    codes = (y / scale).clamp(-top, top).where(scales.isfinite()[:, None], 0.0)
    return Quantized((codes if dtype.is_floating_point else codes.round()).to(dtype), scales)
