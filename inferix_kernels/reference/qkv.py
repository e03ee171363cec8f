"""From a QKV projection to q and pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import KVPages, PageList
from .kv_pages import kv_append

__all__ = ["qkv_prologue", "rotate"]


def qkv_prologue(
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    rope: Tensor | None,
    pages: KVPages,
    where: PageList,
    *,
    norm_q_bias: Tensor | None = None,
    norm_k_bias: Tensor | None = None,
    bias: Tensor | None = None,
    k_mean: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = True,
    out: Tensor,
) -> Tensor:
    H, D = pages.heads, pages.head_dim
    x = qkv.float() if bias is None else qkv.float() + bias.float()
    q, k, v = x.split([out.shape[1] * D, H * D, H * D], dim=1)
    q = rotate(normalise(q, norm_q, norm_q_bias, eps).unflatten(1, (-1, D)), rope, interleaved)
    k = rotate(normalise(k, norm_k, norm_k_bias, eps).unflatten(1, (-1, D)), rope, interleaved)
    kv_append(k if k_mean is None else k - k_mean, v.unflatten(1, (-1, D)), pages, where)
    return out.copy_(q)


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [T, heads * D]: the RMS norm, or the layer norm if there is a bias.

    The weight's length is the size of the group that is normalised together: all heads, or one.
    """
    if weight is None:
        return x
    groups = x.unflatten(1, (-1, min(len(weight), x.shape[1])))
    if bias is not None:
        groups = groups - groups.mean(-1, keepdim=True)
    groups = groups * (groups.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    return (groups if bias is None else groups + bias.float()).flatten(1)


def rotate(x: Tensor, rope: Tensor | None, interleaved: bool) -> Tensor:
    """x [T, heads, D], rope [T, R/2, 2]: turns the first R channels by pairs (2j, 2j+1), or (j, j + R/2)."""
    if rope is None:
        return x
    half = rope.shape[1]
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]  # [T, 1, R/2]
    pairs = x[..., : 2 * half]
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else (pairs[..., :half], pairs[..., half:])
    turned = (a * cos - b * sin, a * sin + b * cos)
    turned_pairs = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([turned_pairs, x[..., 2 * half :]], -1)
