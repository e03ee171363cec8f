"""Linear layers by others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness.case import DTYPES, Prepared
from . import peer

if TYPE_CHECKING:
    from ..linear import Inputs

BOTH = ("cpu", "cuda")


@peer("linear", "torch", ("fp32", "bf16"), BOTH)
def matmul(inputs: Inputs, format: str) -> Prepared:
    x, w, bias = (x.to(DTYPES[format]) for x in (inputs.x, inputs.w, inputs.bias))
    return Prepared(lambda: F.linear(x, w, bias))


def quantized(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """Codes of a row's numbers, and the row's scale [rows, 1] float32."""
    scale = (x.abs().amax(1, True).float() / largest).clamp(min=1e-12)
    codes = x / scale
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


@peer("linear", "torch-int-mm", ("int8",), BOTH)
def int_mm(inputs: Inputs, format: str) -> Prepared:
    """torch._int_mm: int32 sums of the product; quantizing, scales and bias are torch ops around it."""
    x, bias = inputs.x.bfloat16(), inputs.bias
    codes, scale = quantized(inputs.w, torch.int8, 127)
    w, w_scale = codes.t(), scale.t()

    def run() -> Tensor:
        x_codes, x_scale = quantized(x, torch.int8, 127)
        return torch.addcmul(bias, torch._int_mm(x_codes, w) * x_scale, w_scale).bfloat16()

    return Prepared(run)
