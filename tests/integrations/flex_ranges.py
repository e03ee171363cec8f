"""Pairs of ranges as flex_flash_attn_func means them, key by key in float64."""

import math

import torch

from tests.integrations.masked import attention

HEADS, KV_HEADS, WIDTH = 4, 2, 16


def seen(q_len, k_len, kind):
    """[q_len, k_len] of one pair of ranges."""
    distance = torch.arange(k_len) - torch.arange(q_len)[:, None]
    mask = torch.ones(q_len, k_len, dtype=torch.bool)
    return mask & (distance <= k_len - q_len if kind & 1 else True) & (distance >= 0 if kind & 2 else True)


def wanted(q, k, v, q_ranges, k_ranges, kinds=None, **options):
    """A key for each pair in which a query sees it."""
    kinds = [0] * len(q_ranges) if kinds is None else kinds
    columns, masks = [], []
    for (a, b), (c, d), kind in zip(q_ranges, k_ranges, kinds):
        mask = torch.zeros(len(q), d - c, dtype=torch.bool)
        mask[a:b] = seen(b - a, d - c, kind)
        columns.append(torch.arange(c, d))
        masks.append(mask)
    rows = torch.cat(columns) if columns else torch.zeros(0, dtype=torch.long)
    mask = torch.cat(masks, 1) if masks else torch.zeros(len(q), 0, dtype=torch.bool)
    if not mask.shape[1]:
        return torch.zeros_like(q).double(), torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    return attention(q, k[rows], v[rows], mask, **options)


def inputs(queries, keys, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    q = torch.randn(queries, HEADS, WIDTH, generator=generator).to(dtype)
    k, v = torch.randn(2, keys, KV_HEADS, WIDTH, generator=generator).to(dtype).unbind()
    return q, k, v


def told(*lists):
    return [None if x is None else torch.tensor(x).int().view(len(x), -1).squeeze(-1) for x in lists]
