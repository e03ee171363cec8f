"""Attention by others. Each gets K and V as it likes them best, laid out off the clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..harness.case import DTYPES, Prepared
from . import peer

if TYPE_CHECKING:
    from ..attention import Inputs

HALF = ("bf16", "fp16")


def heads_first(x: Tensor, format: str) -> Tensor:
    """[T, H, D] -> [1, H, T, D], contiguous, in a precision."""
    return x.to(DTYPES[format]).transpose(0, 1)[None].contiguous()


def tokens_first(x: Tensor, format: str) -> Tensor:
    """[T, H, D] -> [1, T, H, D]."""
    return x.to(DTYPES[format])[None].contiguous()


def rows(inputs: Inputs, out: Tensor) -> Tensor:
    """[T, Hq, D] -> what the reference is compared with."""
    from ..attention import sampled

    return sampled(out, inputs)


def _sdpa(inputs: Inputs, format: str, kind: str | None) -> Prepared:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qkv = [heads_first(x, format) for x in (inputs.q, inputs.k, inputs.v)]
    grouped = inputs.q.shape[1] != inputs.k.shape[1]
    kinds = list(SDPBackend.__members__.values()) if kind is None else [SDPBackend.__members__[kind]]

    def run() -> Tensor:
        if kind is None:
            return F.scaled_dot_product_attention(*qkv, enable_gqa=grouped)
        with sdpa_kernel(kinds):
            return F.scaled_dot_product_attention(*qkv, enable_gqa=grouped)

    return Prepared(run, lambda out: rows(inputs, out[0].transpose(0, 1)))


@peer("attention", "sdpa", ("fp32", "bf16"), ("cpu",), op="paged_attention")
def sdpa(inputs: Inputs, format: str) -> Prepared:
    return _sdpa(inputs, format, None)
