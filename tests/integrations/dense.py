"""Attention as it is defined, over dense keys: exact in float64, or rounded after each step as torch does in a half
precision, by which the libraries' tests measure what error is fair."""

import math

import torch


def visible(queries, keys, begin, end, q_lens, window):
    """[B, Sq, Sk] bool: keys begin[b] : end[b], and of them those in the window; the last query is at the last key."""
    key, query = torch.arange(keys), torch.arange(queries)[:, None]
    begin, end, q_lens = (x.view(-1, 1, 1) for x in (begin, end, q_lens))
    left, right = (math.inf if side < 0 else side for side in window)
    distance = key - (query + end - q_lens)
    return (key >= begin) & (key < end) & (distance >= -left) & (distance <= right) & (query < q_lens)


def attention(q, k, v, mask, scale=None, softcap=0.0, rounded=None):
    """q [B, Sq, Hq, D], k, v [B, Sk, H, D], mask [B, Sq, Sk]: out [B, Sq, Hq, D], lse [B, Hq, Sq]; rows that see
    nothing are 0 and -inf. rounded: a dtype that every step's result is rounded to, computed in float32; None: float64.
    """
    wide = torch.float64 if rounded is None else torch.float32
    near = (lambda x: x) if rounded is None else (lambda x: x.to(rounded).to(wide))
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = near(q @ near(k * scale).transpose(-1, -2))
    if softcap:
        scores = near(near(near(scores / softcap).tanh()) * softcap)
    scores = scores.masked_fill(~mask[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    weights = near(torch.exp(scores - lse.where(lse != -math.inf, 0)[..., None]))
    return near(weights @ v).transpose(1, 2), lse


def rotate(x, cos, sin, positions, interleaved):
    """x [B, S, H, D] with its first channels turned by the rows `positions` [B, S] of cos and sin, in float32."""
    half = cos.shape[1]
    c, s = (table.float()[positions.long()][:, :, None] for table in (cos, sin))
    result = x.float().clone()
    one, two = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    )
    a, b = x[..., one].float(), x[..., two].float()
    result[..., one], result[..., two] = a * c - b * s, b * c + a * s
    return result.to(x.dtype)
