"""The linear layers of one block: its tokens through a layer's square projection and into its feed-forward.

An 8-bit format quantizes the tokens on the clock, a scale per token, and the weights off it, a scale per channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import peers
from .harness.case import Case, Contender
from .shapes import Shape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}  # of a weight


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
    return F.linear(inputs.x, inputs.w, inputs.bias)


def cases(shape: Shape, device: str) -> Iterator[Case]:
    for op, n in (("projection", shape.hidden), ("up", shape.ffn)):
        m, k = shape.queries, shape.hidden

        def nbytes(format: str, m: int = m, k: int = k, n: int = n) -> int:
            activation = 4 if format == "fp32" else 2
            return activation * m * (k + n) + BYTES[format] * k * n

        mine: list[Contender] = []
        theirs = peers.contenders("linear", device, 2.0 * m * k * n, nbytes)
        yield Case("linear", op, shape.name, partial(make_inputs, m, k, n), expected, mine + theirs)
