"""What FlashAttention 2 and 3 share: attention over dense, packed and cached keys by paged_attention, where they lie.

Every form comes down to packed queries [T, Hq, D] with their cu_seqlens, and keys as Sequences (_sequences.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._check import check_optional, check_tensor, device_of
from ..ops import paged_attention
from ._arguments import check_range
from ._flash_arguments import (
    INT,
    Cache,
    Convention,
    New,
    Options,
    check_cache,
    check_indptr,
    check_keys,
    check_new,
    check_options,
    check_table,
    check_written,
    even_indptr,
    room,
)
from ._sequences import Sequences, append_pages, append_rows, dense, flat, paged


def batched(q: Tensor, k: Tensor, v: Tensor, options: Options, convention: Convention) -> tuple[Tensor, Tensor]:
    """q [B, Sq, Hq, D] over k, v [B, Sk, H, D]: out as q, lse [B, Hq, Sq]."""
    sizes: dict[str, int] = {}
    q, k, v = _with_rows("q", q), _with_rows("k", k), _with_rows("v", v)
    check_keys("", q, k, v, "B Sk H", sizes)
    check_tensor("q", q, (k.dtype,), "B Sq Hq D", sizes, q.device)
    check_options(options, sizes, q.device)
    return _shaped(q, *_attend(q.flatten(0, 1), even_indptr(q), dense(k, v), options), convention)


def packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int,
    options: Options, convention: Convention,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [T, Hq, D] over k, v [Tk, H, D], or [P, page_size, H, D] with a table: out as q, lse [Hq, T]."""
    sizes: dict[str, int] = {}
    q = _with_rows("q", q)
    if table is None:
        k, v = _with_rows("k", k), _with_rows("v", v)
    check_keys("", q, k, v, "Tk H" if table is None else "P page_size H", sizes)
    check_tensor("q", q, (k.dtype,), "T Hq D", sizes, q.device)
    for name, indptr, end in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, sizes.get("Tk"))):
        check_tensor(name, indptr, INT, "B+1", sizes, q.device)
        check_indptr(name, indptr, end)
    sizes["B"] = sizes["B+1"] - 1
    check_options(options, sizes, q.device)
    used = {"seqused_q": (seqused_q, cu_seqlens_q), "seqused_k": (seqused_k, cu_seqlens_k)}
    for name, (count, indptr) in used.items():
        check_optional(name, count, INT, "B", sizes, q.device)
        check_range(name, count, 0, indptr.diff())
    lens = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    check_range("the lengths in cu_seqlens_k", lens, 0, max_seqlen_k, "max_seqlen_k")
    if table is None:
        sequences = flat(k, v, cu_seqlens_k[:-1], lens, max_seqlen_k)
    else:
        check_tensor(convention.table, table, INT, "B n", sizes, q.device)
        check_table(convention.table, table, lens, *k.shape[:2])
        sequences = paged(k, v, table, lens, names=("k", "v"))
    if seqused_q is not None:
        cu_seqlens_q, sequences = _first_ones(cu_seqlens_q, seqused_q, sequences)
    return _shaped(q, *_attend(q, cu_seqlens_q.contiguous(), sequences, options), convention)


def cached(
    q: Tensor, cache: Cache, new: New, options: Options, convention: Convention,
    cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, Sq, Hq, D], or [T, Hq, D] with cu_seqlens_q, over a cache to which `new` is appended first."""
    sizes: dict[str, int] = {}
    q = _with_rows("q", q)
    check_keys("_cache", q, cache.k, cache.v, "R S H" if cache.table is None else "P page_size H", sizes)
    check_tensor("q", q, (cache.k.dtype,), "T Hq D" if cu_seqlens_q is not None else "B Sq Hq D", sizes, q.device)
    if cu_seqlens_q is None:
        indptr = even_indptr(q)
        max_seqlen_q = q.shape[1]
    else:
        check_tensor("cu_seqlens_q", cu_seqlens_q, INT, "B+1", sizes, q.device)
        check_indptr("cu_seqlens_q", cu_seqlens_q, len(q))
        indptr = cu_seqlens_q.contiguous()
        sizes["B"] = sizes["B+1"] - 1
        if max_seqlen_q is None:
            raise ValueError("max_seqlen_q must be given with cu_seqlens_q, got None")
    check_options(options, sizes, q.device)
    seqlens, rows, table, capacity = check_cache(cache, sizes, convention)
    new_k, new_v, new_indptr, longest = check_new(new, cache, sizes)
    new_k, new_v, counts = _with_rows("k", new_k), _with_rows("v", new_v), new_indptr.diff()
    check_range("cache_seqlens", seqlens, 0, capacity - counts, room(cache, convention))
    if table is not None:
        check_table(convention.table, table, seqlens + counts, *cache.k.shape[:2])
        check_written(convention.table, table, seqlens, seqlens + counts, cache.k.shape[1])
    queries = q if q.ndim == 3 else q.flatten(0, 1)
    if new.cos is not None and new.sin is not None:
        rotary = new.cos, new.sin, new.interleaved
        at = seqlens if new.seqlens is None else new.seqlens
        reach = convention.reach(max_seqlen_q, capacity)
        moving = options.causal or any(0 <= side < end for side, end in zip(options.window, reach, strict=True))
        queries = _rotated("q", queries, *rotary, _positions(indptr, len(queries), at, moving))
        new_k = _rotated("k", new_k, *rotary, _positions(new_indptr, len(new_k), at, True))
    if len(new_k):
        if table is None:
            append_rows(new_k, new_v, cache.k, cache.v, rows, seqlens, counts)
        else:
            append_pages(new_k, new_v, cache.k, cache.v, table, seqlens, counts, longest)
    lens = seqlens + counts
    if table is None:
        sequences = dense(cache.k, cache.v, lens, cache.leftpad, rows, ("k_cache", "v_cache"))
    else:
        sequences = paged(cache.k, cache.v, table, lens, cache.leftpad)
    return _shaped(q, *_attend(queries, indptr, sequences, options), convention)


def _attend(q: Tensor, indptr: Tensor, sequences: Sequences, options: Options) -> tuple[Tensor, Tensor]:
    slopes = None if options.alibi_slopes is None else options.alibi_slopes.contiguous()
    plan = sequences.plan(indptr, options.window, positions=slopes is not None)
    scale, softcap = options.softmax_scale, options.softcap
    return paged_attention(q, [sequences.pool], plan, scale=scale, softcap=softcap, alibi_slopes=slopes)


def _shaped(q: Tensor, out: Tensor, lse: Tensor, convention: Convention) -> tuple[Tensor, Tensor]:
    """out like q; lse [T, Hq] as [Hq, T], or [B, Hq, Sq] for q [B, Sq, Hq, D]."""
    lse = (lse if q.ndim == 3 else lse.view(q.shape[:3])).transpose(-1, -2).contiguous()
    return out.view(q.shape), torch.where(lse == -math.inf, convention.empty_lse, lse)


def _with_rows(name: str, x: Tensor) -> Tensor:
    """Contiguous in its last dimension, as the libraries make what they are given, but for caches."""
    device_of(name, x)
    return x if x.stride(-1) == 1 else x.contiguous()


def _first_ones(indptr: Tensor, used: Tensor, sequences: Sequences) -> tuple[Tensor, Sequences]:
    """Each sequence's first queries with its keys, and its other queries, which see none."""
    both = torch.stack((indptr[:-1], indptr[:-1] + used), 1).flatten()

    def with_nothing(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.stack((x, torch.zeros_like(x)), 1).flatten(0, 1)

    pool, *lists = sequences
    return torch.cat((both, indptr[-1:])), Sequences(pool, *map(with_nothing, lists))  # type: ignore[arg-type]


def _positions(indptr: Tensor, tokens: int, first: Tensor, moving: bool) -> Tensor:
    """[T]: of each token of packed sequences; sequence b begins at first[b], and all of it stands there or moves on."""
    token = torch.arange(tokens, dtype=torch.int32, device=indptr.device)
    sequence = torch.searchsorted(indptr[1:], token, right=True).clamp(max=len(first) - 1)
    return first[sequence] + (token - indptr[sequence] if moving else 0)


def _rotated(name: str, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, positions: Tensor) -> Tensor:
    """x [T, H, D] with its first channels turned by the angles at positions [T], in float32."""
    check_range(f"positions of {name}", positions, 0, len(cos) - 1, "rotary_cos")
    cos, sin = (table[positions].float()[:, None] for table in (cos, sin))
    turned, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    a, b = a.float(), b.float()
    pair = a * cos - b * sin, a * sin + b * cos
    result = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((result.to(x.dtype), rest), -1)
