"""The linear layers of one block: its tokens through a layer's square projection, into its feed-forward and out of it;
and what it takes to quantize them.

An 8-bit format quantizes the tokens on the clock, a scale per token, and the weights off it, a scale per channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from inferix_kernels.layout import Quantized
from inferix_kernels.ops import linear, quantize_rows

from . import peers
from .harness.case import EXACT, LIMITS, Case, Contender, Prepared, Result
from .harness.ours import BACKENDS, kernel_of
from .shapes import Shape

BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "fp8": 1}  # of a weight
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """x [M, K], w [N, K], bias [N]: float32 holding bfloat16 numbers; y = x w^T + bias."""

    x: Tensor
    w: Tensor
    bias: Tensor


def make_inputs(m: int, k: int, n: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x, w, bias = (
        torch.randn(*size, generator=generator).bfloat16().float().to(device) for size in ((m, k), (n, k), (n,))
    )
    return Inputs(x, w * k**-0.5, bias)


def expected(inputs: Inputs) -> Tensor:
    """What the layer was to compute: the reference of `linear` is of what is left of it in 8 bits."""
    return F.linear(inputs.x, inputs.w, inputs.bias)


def ours(inputs: Inputs, backend: str, format: str) -> Prepared:
    x, weight = inputs.x.bfloat16(), quantize_rows(inputs.w, CODES[format], backend="reference")
    out = torch.empty(len(x), len(inputs.w), dtype=torch.bfloat16, device=x.device)
    codes = Quantized(torch.empty_like(x, dtype=CODES[format]), torch.empty(len(x), device=x.device))

    def run() -> Tensor:
        quantize_rows(x, out=codes, backend=backend)
        return linear(codes, weight, bias=inputs.bias, out=out, backend=backend)

    return Prepared(run)


def quantize(inputs: Inputs, backend: str, format: str) -> Prepared:
    x = inputs.x.bfloat16()
    out = Quantized(torch.empty_like(x, dtype=CODES[format]), torch.empty(len(x), device=x.device))
    return Prepared(lambda: quantize_rows(x, out=out, backend=backend), lambda q: q.codes.float() * q.scales[:, None])


def quantized(inputs: Inputs, format: str) -> Result:
    prepared = quantize(inputs, "reference", format)
    return prepared.read(prepared.run())


def cases(shape: Shape, device: str) -> Iterator[Case]:
    m, hidden, ffn = shape.queries, shape.hidden, shape.ffn
    for op, k, n in (("projection", hidden, hidden), ("up", hidden, ffn), ("down", ffn, hidden)):
        flops = 2.0 * m * k * n
        nbytes = {format: (4 if format == "fp32" else 2) * m * (k + n) + size * k * n for format, size in BYTES.items()}
        mine = [
            Contender(
                f"ours-{backend}",
                format,
                partial(ours, backend=backend, format=format),
                flops,
                nbytes[format],
                LIMITS[format],
                kernel_of(backend, device, "linear"),
            )
            for backend in BACKENDS[device]
            for format in CODES
        ]
        theirs = peers.contenders("linear", device, flops, nbytes.__getitem__, op="linear")
        yield Case("linear", op, shape.name, partial(make_inputs, m, k, n), expected, [*mine, *theirs])
    mine = [
        Contender(
            f"ours-{backend}",
            format,
            partial(quantize, backend=backend, format=format),
            0.0,
            3 * m * hidden + 4 * m,
            EXACT,
            kernel_of(backend, device, "linear"),
            reference=partial(quantized, format=format),
        )
        for backend in BACKENDS[device]
        for format in CODES
    ]
    theirs = peers.contenders("linear", device, 0.0, lambda _: 3 * m * hidden + 4 * m, op="quantize")
    inputs = partial(make_inputs, m, hidden, hidden)
    yield Case("linear", "quantize", shape.name, inputs, lambda inputs: inputs.x, [*mine, *theirs])
