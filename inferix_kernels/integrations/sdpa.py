"""torch.nn.functional.scaled_dot_product_attention's signature over our kernels, without masks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import paged_attention
from ._arguments import refuse
from ._sequences import dense


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of [B, H, L, D]. key and value are read where they lie; nothing is read from the device.

    Args:
        query: [B, Hq, L, D] float32, bfloat16 or float16.
        key, value: [B, H, S, D] in query's dtype, any strides, the last dimension contiguous. H is Hq, or divides it
            with enable_gqa.
        is_causal: query i sees keys 0 to i: aligned top-left, as torch means it, whatever L and S.
        scale: D ** -0.5 by default.

    Returns:
        [B, Hq, L, D] in query's dtype, contiguous as [B, L, Hq, D]. With S = 0 it is 0.

    Raises:
        Unsupported: attn_mask, dropout_p.

    Example:
        >>> q, k, v = torch.randn(1, 4, 10, 64), torch.randn(1, 2, 30, 64), torch.randn(1, 2, 30, 64)
        >>> list(sdpa(q, k, v, enable_gqa=True).shape)
        [1, 4, 10, 64]
    """
    refuse(attn_mask=attn_mask, dropout_p=dropout_p)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, H, L, D], got {list(x.shape)}")
        if x.dtype != query.dtype:
            raise ValueError(f"{name} must be {query.dtype} like query, got {x.dtype}")
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    if key.shape != value.shape or (key.shape[0], key.shape[3]) != (batch, width):
        raise ValueError(
            f"key and value must be [{batch}, H, S, {width}] alike, got {list(key.shape)} and {list(value.shape)}"
        )
    if key.shape[1] != heads and not (enable_gqa and heads % key.shape[1] == 0):
        raise ValueError(
            f"key must have query's {heads} heads, or a divisor of them with enable_gqa=True, got {key.shape[1]}"
        )
    sequences = dense(key.transpose(1, 2), value.transpose(1, 2), names=("key", "value"))
    ends = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * queries
    plan = sequences.plan(ends, (-1, 0) if is_causal else (-1, -1))
    if plan.page_positions is not None:  # from the last query at the last key to the first at the first
        plan = plan._replace(page_positions=plan.page_positions + (keys - queries))
    out, _ = paged_attention(query.transpose(1, 2).reshape(-1, heads, width), [sequences.pool], plan, scale=scale)
    return out.view(batch, queries, heads, width).transpose(1, 2)
