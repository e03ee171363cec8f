"""Attention of one sequence under a mask, in float64."""

import math

import torch


def attention(q, k, v, mask, scale=None, softcap=0.0):
    """q [T, Hq, D], k and v [S, H, D], mask [T, S] bool -> out [T, Hq, D], natural lse [T, Hq]. A row that sees nothing
    is 0 and -inf."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.where(lse != -math.inf, 0.0)[..., None]).exp()
    return (weights @ v).transpose(0, 1), lse.transpose(0, 1)


def window(queries, keys, left=-1, right=-1):
    """[T, S]: the last query stands at the last key; -1 for no limit."""
    distance = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    return (distance >= (-math.inf if left == -1 else -left)) & (distance <= (math.inf if right == -1 else right))
