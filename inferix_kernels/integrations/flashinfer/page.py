"""Paged caches as FlashInfer lays them out, and the tokens that are appended to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._check import FLOATS, check_apart, check_tensor
from ..._dispatch import Unsupported
from ..._library import opaque
from ...layout import FORMATS, KVPages
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
        batch_indices, positions: [T] integers: token t becomes token positions[t] of sequence batch_indices[t], and no
            two the same. One that is in no page, such as the -1 that get_batch_indices_positions fills up with, is an
            error on a CPU; on a GPU, and in a compiled graph, it is left out.
        paged_kv_cache: of floats; see the wrappers.
        kv_indices, kv_indptr: [N] and [B + 1] integers: the pages of each sequence.
        kv_last_page_len: [B]; not needed.

    Raises:
        Unsupported: pages with scales, which are written whole, by kv_append or kv_commit.
    """
    check_kv_layout(kv_layout)
    pool = pool_of(paged_kv_cache, kv_layout)
    if FORMATS[pool.format].quantized:
        raise Unsupported(f"paged_kv_cache must hold floats, got {pool.format} pages: write whole pages with kv_append")
    sizes = {"H": pool.heads, "D": pool.head_dim, "B": len(kv_last_page_len), "B+1": len(kv_last_page_len) + 1}
    for name, x, layout in (("append_key", append_key, "T H D"), ("append_value", append_value, "T H D"),
                            ("batch_indices", batch_indices, "T"), ("positions", positions, "T"),
                            ("kv_indptr", kv_indptr, "B+1"), ("kv_indices", kv_indices, "N")):  # fmt: skip
        floats = name.startswith("append_")
        check_tensor(name, x, FLOATS if floats else (torch.int32, torch.int64), layout, sizes, pool.k.device)
    check_apart("paged_kv_cache", pool)
    if not (sizes["T"] and sizes["B"] and sizes["N"] and pool.pages):
        if sizes["T"]:
            raise ValueError(f"kv_indices must name pages for {sizes['T']} tokens, got none")
        return
    page, slot, there = _place(pool, batch_indices.long(), positions.long(), kv_indices.long(), kv_indptr.long())
    if there.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(there.all()):
        t = int((~there).int().argmax())
        raise ValueError(
            "batch_indices and positions must name tokens of the listed pages, got token"
            f" {positions[t].item()} of sequence {batch_indices[t].item()}"
        )
    if isinstance(paged_kv_cache, KVPages):
        caches, kv_layout = [pool.k, pool.v], "HND"
    else:
        caches = [paged_kv_cache] if isinstance(paged_kv_cache, Tensor) else list(paged_kv_cache)
    _write(append_key, append_value, caches, kv_layout, page, slot, there)


def _write_tokens(
    k: Tensor, v: Tensor, caches: list[Tensor], kv_layout: str, page: Tensor, slot: Tensor, there: Tensor
) -> None:
    """k, v: [T, H, D]; token t goes into a slot of a page, if it is `there`. caches: one, of both, or two.

    One that is not there writes what the first that is writes, or, without such, what the cache holds.
    """
    pool = pool_of(caches[0] if len(caches) == 1 else caches, kv_layout)
    source = torch.where(there, torch.arange(len(there), device=there.device), there.int().argmax())
    at = page[source], slot[source]
    for new, codes in ((k, pool.k), (v, pool.v)):
        tokens = codes.transpose(1, 2)  # [P, page_size, H, D]
        tokens[at] = torch.where(there.any(), new.to(codes.dtype)[source], tokens[at])


def _check_storage(
    k: Tensor, v: Tensor, caches: list[Tensor], kv_layout: str, page: Tensor, slot: Tensor, there: Tensor
) -> None:
    if len({cache.untyped_storage()._cdata for cache in caches}) < len(caches):
        raise Unsupported(
            "paged_kv_cache must be one tensor [pages, 2, ...] in a compiled graph, not two views of it: torch would"
            " write to where the first call's views began"
        )


# An op of its own, since a compiled graph writes to views of a tensor at the offset that it was compiled with.
_write = opaque(
    "write_tokens(Tensor k, Tensor v, Tensor(a!)[] caches, str kv_layout, Tensor page, Tensor slot, Tensor there)"
    " -> ()",
    _write_tokens,
    _check_storage,
)


def _place(
    pool: KVPages, batch: Tensor, position: Tensor, indices: Tensor, indptr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token its page and its slot, some if it has none, and whether it has."""
    entry = indptr[batch.clamp(0, len(indptr) - 2)] + position.div(pool.page_size, rounding_mode="floor")
    inside = (batch >= 0) & (batch < len(indptr) - 1) & (position >= 0)
    there = inside & (entry < indptr[batch.clamp(0, len(indptr) - 2) + 1]) & (entry < len(indices))
    page = indices[entry.clamp(0, len(indices) - 1)]
    there &= (page >= 0) & (page < pool.pages)
    return page.clamp(0, pool.pages - 1), position.remainder(pool.page_size), there


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
