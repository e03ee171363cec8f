"""Attention over several sets of keys, joined: states (v, s), with s to base 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._check import check_shape
from ...ops import merge_attention

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys: (v, s) of both together.

    Args:
        v_a, v_b: [T, H, D] float32, bfloat16 or float16, same dtype, which v has too.
        s_a, s_b: [T, H] any float dtype: log2 of the sum of exp(score). -inf saw no key and contributes nothing.
    """
    sizes: dict[str, int] = {}
    for name, x, layout in (("v_a", v_a, "T H D"), ("s_a", s_a, "T H"), ("v_b", v_b, "T H D"), ("s_b", s_b, "T H")):
        check_shape(name, x, layout, sizes)
    v, natural = merge_attention(v_a, s_a.float() * LN_2, v_b, s_b.float() * LN_2)
    return v, natural.mul_(LOG2_E)


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """As merge_state, into v and s.

    Args:
        s: float32, since it is written to.
        mask: [T] bool: rows that are joined; the others keep every bit. None: all.
    """
    if s.dtype != torch.float32:
        raise ValueError(f"s must be float32, got {s.dtype}: it is written to")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != v.shape[:1]):
        raise ValueError(f"mask must be [{v.shape[0]}] bool, got {list(mask.shape)} {mask.dtype}")
    merged, natural = merge_state(v, s, v_other, s_other)
    v.copy_(merged if mask is None else torch.where(mask[:, None, None], merged, v))
    s.copy_(natural if mask is None else torch.where(mask[:, None], natural, s))


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over N disjoint sets of keys; without a set v is 0 and s -inf.

    Args:
        v: [T, N, H, D] float32, bfloat16 or float16.
        s: [T, N, H] any float dtype, to base 2.

    Returns:
        v [T, H, D] in v's dtype, rounded once, and s [T, H] float32.
    """
    if v.ndim != 4 or s.shape != v.shape[:3]:
        raise ValueError(f"v and s must be [T, N, H, D] and [T, N, H], got {list(v.shape)} and {list(s.shape)}")
    natural = s.float() * LN_2
    merged = v.new_zeros(v.shape[0], *v.shape[2:], dtype=torch.float32)
    total = torch.full(merged.shape[:2], -torch.inf, device=v.device)
    for i in range(v.shape[1]):
        merge_attention(merged, total, v[:, i].float(), natural[:, i].contiguous(), out=merged, lse=total)
    return merged.to(v.dtype), total.mul_(LOG2_E)
