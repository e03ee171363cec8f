"""Linear layers by others."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness.case import DTYPES, Prepared
from . import peer

if TYPE_CHECKING:
    from ..linear import Inputs

BOTH = ("cpu", "cuda")


@peer("linear", "torch", ("fp32", "bf16"), BOTH, op="linear")
def matmul(inputs: Inputs, format: str) -> Prepared:
    x, w, bias = (x.to(DTYPES[format]) for x in (inputs.x, inputs.w, inputs.bias))
    return Prepared(lambda: F.linear(x, w, bias))


def quantized(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """Codes of a row's numbers, and the row's scale [rows, 1] float32."""
    scale = (x.abs().amax(1, True).float() / largest).clamp(min=1e-12)
    codes = x / scale
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


@peer("linear", "torch-int-mm", ("int8",), BOTH, op="linear")
def int_mm(inputs: Inputs, format: str) -> Prepared:
    """torch._int_mm: int32 sums of the product; quantizing, scales and bias are torch ops around it."""
    x, bias = inputs.x.bfloat16(), inputs.bias
    codes, scale = quantized(inputs.w, torch.int8, 127)
    w, w_scale = codes.t(), scale.t()

    def run() -> Tensor:
        x_codes, x_scale = quantized(x, torch.int8, 127)
        return torch.addcmul(bias, torch._int_mm(x_codes, w) * x_scale, w_scale).bfloat16()

    return Prepared(run)


@peer("linear", "torch-scaled-mm", ("fp8",), op="linear")
def scaled_mm(inputs: Inputs, format: str) -> Prepared:
    """torch._scaled_mm with a scale per token and per channel; quantizing the tokens is torch ops before it."""
    x, bias = inputs.x.bfloat16(), inputs.bias.bfloat16()
    codes, w_scale = quantized(inputs.w, torch.float8_e4m3fn, 448)
    w, w_scale = codes.t(), w_scale.t().contiguous()

    def run() -> Tensor:
        x_codes, x_scale = quantized(x, torch.float8_e4m3fn, 448)
        return torch._scaled_mm(x_codes, w, x_scale, w_scale, bias=bias, out_dtype=torch.bfloat16)

    return Prepared(run)


@peer("linear", "torchao", ("int8", "fp8"), module="torchao", op="linear")
def torchao(inputs: Inputs, format: str) -> Prepared:
    """Its dynamic quantization of an nn.Linear, compiled, which is how it is meant to run."""
    library = importlib.import_module("torchao.quantization")
    layer = torch.nn.Linear(inputs.w.shape[1], inputs.w.shape[0], device=inputs.w.device, dtype=torch.bfloat16)
    layer.weight.data.copy_(inputs.w)
    layer.bias.data.copy_(inputs.bias)
    if format == "int8":
        library.quantize_(layer, library.Int8DynamicActivationInt8WeightConfig())
    else:
        library.quantize_(layer, library.Float8DynamicActivationFloat8WeightConfig(granularity=library.PerRow()))
    call, x = torch.compile(layer), inputs.x.bfloat16()
    return Prepared(lambda: call(x))


@peer("linear", "torch", ("int8", "fp8"), BOTH, op="quantize")
def quantize(inputs: Inputs, format: str) -> Prepared:
    dtype, largest = (torch.int8, 127) if format == "int8" else (torch.float8_e4m3fn, 448)
    x = inputs.x.bfloat16()
    return Prepared(lambda: quantized(x, dtype, largest), lambda pair: pair[0].float() * pair[1])


@peer("linear", "inductor", ("int8", "fp8"), op="quantize")
def quantize_compiled(inputs: Inputs, format: str) -> Prepared:
    dtype, largest = (torch.int8, 127) if format == "int8" else (torch.float8_e4m3fn, 448)
    x, call = inputs.x.bfloat16(), torch.compile(quantized)
    return Prepared(lambda: call(x, dtype, largest), lambda pair: pair[0].float() * pair[1])
