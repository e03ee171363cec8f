"""Paged caches as FlashInfer lays them out, and the tokens that are appended to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._check import check_shape
from ..._dispatch import Unsupported
from ...layout import FORMATS, KVPages, PageList
from ...ops import kv_append
from .._sequences import format_of

KV_LAYOUTS = ("NHD", "HND")


def check_kv_layout(kv_layout: str) -> None:
    if kv_layout is None or kv_layout not in KV_LAYOUTS:
        raise ValueError(f"kv_layout must be 'NHD' or 'HND', got {kv_layout!r}")


def pool_of(paged_kv_cache: Tensor | Sequence[Tensor] | KVPages, kv_layout: str) -> KVPages:
    """A cache as a pool, in its own memory.

    Args:
        paged_kv_cache: [P, 2, page_size, H, D] (NHD) or [P, 2, H, page_size, D] (HND); a tuple of keys and values, each
            without that second dimension; either without page_size, for pages of one token; or KVPages.
    """
    if isinstance(paged_kv_cache, KVPages):
        return paged_kv_cache
    if isinstance(paged_kv_cache, Tensor):
        if paged_kv_cache.ndim not in (4, 5) or paged_kv_cache.shape[1] != 2:
            raise ValueError(
                f"paged_kv_cache must be [pages, 2, ...] with 4 or 5 dimensions, got {list(paged_kv_cache.shape)}"
            )
        k, v = paged_kv_cache.unbind(1)
    elif isinstance(paged_kv_cache, (tuple, list)) and len(paged_kv_cache) == 2:
        k, v = paged_kv_cache
    else:
        raise TypeError(f"paged_kv_cache must be a tensor, two of them or KVPages, got {type(paged_kv_cache).__name__}")
    if k.shape != v.shape or k.dtype != v.dtype or k.ndim not in (3, 4):
        raise ValueError(
            "paged_kv_cache must be keys and values of one shape and dtype, with 3 or 4 dimensions, got"
            f" {list(k.shape)} {k.dtype} and {list(v.shape)} {v.dtype}"
        )
    if k.ndim == 3:
        k, v = k.unsqueeze(2), v.unsqueeze(2)
    elif kv_layout == "NHD":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    return KVPages(format_of("paged_kv_cache", k), k, v)


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: Tensor | Sequence[Tensor] | KVPages,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write T tokens into a paged cache, in its memory; nothing is read from the device.

    Args:
        append_key, append_value: [T, H, D] float32, bfloat16 or float16; rounded to the cache's dtype.
        batch_indices, positions: [T] integers: token t becomes token positions[t] of sequence batch_indices[t]. One
            that is in no page is an error on a CPU and left out on a GPU, such as the -1 that
            get_batch_indices_positions fills up with.
        paged_kv_cache: of floats; see the wrappers.
        kv_indices, kv_indptr: [N] and [B + 1] integers: the pages of each sequence.
        kv_last_page_len: [B]; not needed.

    Raises:
        Unsupported: pages with scales, which are written whole, by kv_append or kv_commit; keys and values of different
            strides.
    """
    check_kv_layout(kv_layout)
    pool = pool_of(paged_kv_cache, kv_layout)
    if FORMATS[pool.format].quantized:
        raise Unsupported(f"paged_kv_cache must hold floats, got {pool.format} pages: write whole pages with kv_append")
    if pool.k.stride() != pool.v.stride():
        raise Unsupported(
            f"paged_kv_cache must have keys and values of the same strides, got {pool.k.stride()} and {pool.v.stride()}"
        )
    sizes = {"T": append_key.shape[0]}
    check_shape("batch_indices", batch_indices, "T", sizes)
    check_shape("positions", positions, "T", sizes)
    check_shape("kv_last_page_len", kv_last_page_len, "B", sizes)
    check_shape("kv_indptr", kv_indptr, "B+1", sizes | {"B+1": sizes["B"] + 1})
    batch, at = batch_indices.long(), positions.long()
    begin, end = kv_indptr.long()[:-1], kv_indptr.long()[1:]
    sequence = batch.clamp(0, max(len(begin) - 1, 0))
    entry = begin[sequence] + at.div(pool.page_size, rounding_mode="floor")
    there = (batch >= 0) & (batch < len(begin)) & (at >= 0) & (entry < end[sequence])
    page = kv_indices.long()[entry.clamp(0, max(len(kv_indices) - 1, 0))]
    slots, ids = _slots(pool, page, at.remainder(pool.page_size))
    ids = torch.where(there & (page >= 0) & (page < pool.pages), ids, -1).int()
    kv_append(append_key, append_value, slots, PageList(ids, torch.ones_like(ids)))


def _slots(pool: KVPages, page: Tensor, slot: Tensor) -> tuple[KVPages, Tensor]:
    """The pool as one with a page for each token, in the same memory, and the page there of every given slot: then
    tokens need no order, and no page is written twice."""
    page_stride, head_stride, token_stride, width_stride = pool.k.stride()
    step = math.gcd(page_stride, token_stride) or 1  # every slot begins at a multiple of it
    count = ((pool.pages - 1) * page_stride + (pool.page_size - 1) * token_stride) // step + 1
    shape, strides = (count, pool.heads, 1, pool.head_dim), (step, head_stride, token_stride, width_stride)
    k, v = (x.as_strided(shape, strides) for x in (pool.k, pool.v))
    return KVPages(pool.format, k, v), page * (page_stride // step) + slot * (token_stride // step)


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """Tokens of each sequence, [B], from the pages that it has, [B + 1], and the tokens in its last one, [B]."""
    return (kv_indptr.diff() - 1).clamp(min=0) * page_size + kv_last_page_len


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of nnz tokens, the sequence of each and its place there, if they are the last ones of their sequences.

    Args:
        append_indptr: [B + 1] integers: tokens append_indptr[b] : append_indptr[b + 1] go to sequence b.
        seq_lens: [B] integers, with the new tokens.
        nnz: of the results; those past append_indptr[-1] get -1 and 0.
        batch_indices, positions: [nnz] int32, to write to.
    """
    indptr = append_indptr.int().contiguous()
    token = torch.arange(nnz, dtype=torch.int32, device=indptr.device)
    batch = torch.searchsorted(indptr[1:], token, right=True, out_int32=True)
    there = token < indptr[-1]
    of = batch.clamp(max=max(len(seq_lens) - 1, 0)).long()
    place = seq_lens.int()[of] - indptr[1:][of] + token
    found = torch.where(there, batch, -1), torch.where(there, place, 0)
    for name, given, x in (("batch_indices", batch_indices, found[0]), ("positions", positions, found[1])):
        if given is not None:
            if given.shape != x.shape or given.dtype != torch.int32:
                raise ValueError(f"{name} must be [{nnz}] int32, got {list(given.shape)} {given.dtype}")
            given.copy_(x)
    return (found[0] if batch_indices is None else batch_indices), (found[1] if positions is None else positions)
