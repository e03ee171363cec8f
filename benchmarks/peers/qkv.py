"""The prologue by others: as a model's code writes it down, op by op, and the same through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness.case import DTYPES, Prepared
from . import peer
from .kv_pages import slots_of

if TYPE_CHECKING:
    from ..qkv import Inputs


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2j, 2j + 1) of x [T, H, D], in float32 as Wan's code rotates."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def eager(inputs: Inputs, format: str, compile: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Prepared:
    """RMS norm over all heads, rotation, and a copy into slots of [pages * page, H, D]."""
    shape, dtype = inputs.shape, DTYPES[format]
    qkv, norm_q, norm_k = (x.to(dtype) for x in (inputs.qkv, inputs.norm_q, inputs.norm_k))
    cos, sin = (x[:, None] for x in inputs.rope.unbind(-1))
    slots = slots_of(inputs.where, shape.page_size)
    size = (len(inputs.where.ids) * shape.page_size, shape.kv_heads, shape.head_dim)
    caches = [torch.empty(size, dtype=dtype, device=qkv.device) for _ in range(2)]
    widths = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]

    def prologue(qkv: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = qkv.split(widths, 1)
        q, k = F.rms_norm(q, q.shape[1:], norm_q, 1e-6), F.rms_norm(k, k.shape[1:], norm_k, 1e-6)
        q, k, v = (x.unflatten(1, (-1, shape.head_dim)) for x in (q, k, v))
        k_cache.index_copy_(0, slots, turned(k, cos, sin))
        v_cache.index_copy_(0, slots, v)
        return turned(q, cos, sin)

    call = compile(prologue)
    return Prepared(lambda: call(qkv, *caches), lambda q: (q.float(), *(cache[slots].float() for cache in caches)))


@peer("qkv", "torch", ("fp32", "bf16"), ("cpu", "cuda"))
def torch_eager(inputs: Inputs, format: str) -> Prepared:
    return eager(inputs, format, lambda call: call)


@peer("qkv", "inductor", ("fp32", "bf16"), ("cuda",))
def torch_compiled(inputs: Inputs, format: str) -> Prepared:
    return eager(inputs, format, torch.compile)
