"""The arguments of FlashAttention 2 and 3, and what they must be.

Numbers in tensors are looked at on a CPU only: elsewhere that would cost a wait for the device, and what does not fit
is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._check import FLOATS, check_optional, check_scale, check_softcap, check_tensor, device_of, is_whole, whole
from .._dispatch import Unsupported
from ._arguments import check_range, readable
from ._sequences import format_of

INT = (torch.int32,)


class Convention(NamedTuple):
    """Where the two libraries differ."""

    empty_lse: float  # log-sum-exp of a row that sees no key
    table: str  # what they call a cache's table of pages
    reach: Callable[[int, int], tuple[int, int]]  # of Sq, Sk: a window's sides from which on they count as unlimited


FA2 = Convention(math.inf, "block_table", lambda queries, keys: (keys, keys))
FA3 = Convention(-math.inf, "page_table", lambda queries, keys: (keys - 1, queries - 1))


class Options(NamedTuple):
    causal: bool
    window_size: Sequence[int]
    softcap: float
    softmax_scale: float | None
    alibi_slopes: Tensor | None = None  # [Hq] or [B, Hq] float32

    @property
    def window(self) -> tuple[int, int]:
        left, right = (max(side, -1) for side in self.window_size)
        return left, 0 if self.causal else right


class Cache(NamedTuple):
    """The arguments of flash_attn_with_kvcache that say where keys lie."""

    k: Tensor  # [R, S, H, D], or [P, page_size, H, D] with a table
    v: Tensor
    seqlens: int | Tensor | None  # [B] int32
    batch_idx: Tensor | None  # [B] int32, rows of the cache or of the table
    leftpad: Tensor | None  # [B] int32, first token of each sequence
    table: Tensor | None  # [B, n] int32


class New(NamedTuple):
    """Its arguments that say what is appended, and how that and the queries are rotated."""

    k: Tensor | None  # [B, S, H, D], or [T, H, D] with indptr
    v: Tensor | None
    indptr: Tensor | None  # [B + 1] int32
    cos: Tensor | None  # [positions, R / 2]
    sin: Tensor | None
    interleaved: bool
    seqlens: Tensor | None  # [B] int32, positions of the first new tokens; the cache's seqlens by default


def even_indptr(x: Tensor) -> Tensor:
    """[B + 1] int32: where each of x [B, S, ...] begins when they are packed."""
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]


def check_keys(suffix: str, q: Tensor, k: Tensor, v: Tensor, layout: str, sizes: dict[str, int]) -> None:
    """Dtype, shape and layout of k and v, or of k_cache and v_cache; sets H and D."""
    k_name, v_name = f"k{suffix}", f"v{suffix}"
    device = device_of("q", q)
    for name, x in ((k_name, k), (v_name, v)):
        device_of(name, x)
        format_of(name, x)
    check_tensor(k_name, k, FLOATS, f"{layout} D", sizes, device)
    check_tensor(v_name, v, (k.dtype,), f"{layout} Dv", sizes, device)
    if sizes["D"] != sizes["Dv"]:
        raise Unsupported(f"{v_name} must be as wide as {k_name}, {sizes['D']}, got {sizes['Dv']}")
    for name, x in ((k_name, k), (v_name, v)):
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")


def check_options(options: Options, sizes: dict[str, int], device: torch.device) -> None:
    if sizes["Hq"] % sizes["H"]:
        raise ValueError(
            f"q must have a multiple of the keys' H={sizes['H']} heads, got {sizes['Hq']} (tokens come before heads)"
        )
    window = options.window_size
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(is_whole(side) for side in window):
        raise ValueError(f"window_size must be two numbers of tokens (left, right), got {window!r}")
    check_scale("softmax_scale", options.softmax_scale)
    check_softcap(options.softcap)
    if (slopes := options.alibi_slopes) is not None:
        layout = "B Hq" if isinstance(slopes, Tensor) and slopes.ndim == 2 else "Hq"
        check_tensor("alibi_slopes", slopes, (torch.float32,), layout, sizes, device)


def check_cache(
    cache: Cache, sizes: dict[str, int], convention: Convention
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """seqlens [B], rows [B] of the cache or of the table, table [B, n], and how many tokens a sequence has room for."""
    device, batch = cache.k.device, sizes["B"]
    check_optional("cache_batch_idx", cache.batch_idx, INT, "B", sizes, device)
    check_optional("cache_leftpad", cache.leftpad, INT, "B", sizes, device)
    table, capacity, name, given = cache.table, cache.k.shape[1], "k_cache", len(cache.k)
    if table is not None:
        check_tensor(convention.table, table, INT, "rows n", sizes, device)
        given, n = table.shape
        capacity, name = capacity * n, convention.table
    if cache.batch_idx is None:
        if given != batch:
            raise ValueError(f"{name} must have the B={batch} rows of q without cache_batch_idx, got {given}")
        rows = torch.arange(batch, dtype=torch.int32, device=device)
    else:
        rows = cache.batch_idx
        check_range("cache_batch_idx", rows, 0, given - 1)
        table = None if table is None else table.index_select(0, rows)
    seqlens = capacity if cache.seqlens is None else cache.seqlens
    if not isinstance(seqlens, Tensor):
        seqlens = torch.full((batch,), whole("cache_seqlens", seqlens), dtype=torch.int32, device=device)
    check_tensor("cache_seqlens", seqlens, INT, "B", sizes, device)
    check_range("cache_leftpad", cache.leftpad, 0, seqlens, "cache_seqlens")
    return seqlens, rows, table, capacity


def check_new(new: New, cache: Cache, sizes: dict[str, int]) -> tuple[Tensor, Tensor, Tensor, int]:
    """k, v [T, H, D], indptr [B + 1] and a bound of the longest run of what is appended: no tokens if nothing is."""
    device, dtype = cache.k.device, (cache.k.dtype,)
    if (new.k is None) != (new.v is None):
        raise ValueError("k and v must be given together, or neither, got one of them")
    if (new.cos is None) != (new.sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together, or neither, got one of them")
    if new.k is None or new.v is None:
        if new.cos is not None or new.indptr is not None or new.seqlens is not None:
            raise ValueError("k and v must be given with rotary_cos, rotary_seqlens or cu_seqlens_k_new, got None")
        nothing = cache.k.new_empty(0, *cache.k.shape[2:])
        return nothing, nothing, torch.zeros(sizes["B"] + 1, dtype=torch.int32, device=device), 0
    if cache.seqlens is None:
        raise ValueError("cache_seqlens must be given with k and v: they say where these go, got None")
    layout = "B Snew H D" if new.indptr is None else "Tnew H D"
    for name, x in (("k", new.k), ("v", new.v)):
        check_tensor(name, x, dtype, layout, sizes, device)
    if new.indptr is not None:
        sizes["B+1"] = sizes["B"] + 1
        check_tensor("cu_seqlens_k_new", new.indptr, INT, "B+1", sizes, device)
        check_indptr("cu_seqlens_k_new", new.indptr, len(new.k))
    for name, angles in (("rotary_cos", new.cos), ("rotary_sin", new.sin)):
        check_optional(name, angles, FLOATS, "positions R/2", sizes, device)
    if 2 * sizes.get("R/2", 0) > sizes["D"]:
        raise ValueError(f"rotary_cos must turn at most D={sizes['D']} channels, got {2 * sizes['R/2']}")
    check_optional("rotary_seqlens", new.seqlens, INT, "B", sizes, device)
    if new.seqlens is not None and new.cos is None:
        raise ValueError("rotary_cos must be given with rotary_seqlens, got None")
    check_once("cache_batch_idx", cache.batch_idx)
    if new.indptr is not None:
        return new.k, new.v, new.indptr, len(new.k)
    return new.k.flatten(0, 1), new.v.flatten(0, 1), even_indptr(new.k), new.k.shape[1]


def room(cache: Cache, convention: Convention) -> str:
    what = "k_cache" if cache.table is None else f"the pages of {convention.table}"
    return f"{what} with what is appended"


def check_indptr(name: str, indptr: Tensor, end: int | None) -> None:
    if not indptr.numel():
        raise ValueError(f"{name} must hold at least its leading 0, got an empty tensor")
    if readable(indptr):
        last = int(indptr[-1])
        if int(indptr[0]) or (indptr.diff() < 0).any() or (end is not None and last != end):
            raise ValueError(f"{name} must rise from 0 to {last if end is None else end}, got {indptr.tolist()}")


def check_table(name: str, table: Tensor, lens: Tensor, pages: int, page_size: int) -> None:
    """The pages that hold each sequence's tokens are there."""
    if not readable(table):
        return
    check_range("sequences", lens, 0, table.shape[1] * page_size, f"the pages of {name}")
    used = torch.arange(table.shape[1]) * page_size < lens[:, None]
    wrong = used & ((table < 0) | (table >= pages))
    if wrong.any():
        b, i = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(f"{name} must hold pages from 0 to {pages - 1}, got {int(table[b, i])} at [{b}, {i}]")


def check_written(name: str, table: Tensor, first: Tensor, end: Tensor, page_size: int) -> None:
    """No page is written by two sequences, from token first[b] to end[b] - 1."""
    if not readable(table):
        return
    begin = torch.arange(table.shape[1]) * page_size
    written = table[(begin < end[:, None]) & (begin + page_size > first[:, None]) & (end > first)[:, None]]
    pages, counts = written.unique(return_counts=True)
    if (counts > 1).any():
        page = int(pages[counts.argmax()])
        raise ValueError(f"{name} must name no page twice that k and v are appended to, got {page} twice")


def check_once(name: str, rows: Tensor | None) -> None:
    if rows is not None and readable(rows) and len(rows.unique()) < len(rows):
        raise ValueError(f"{name} must name no row twice when k and v are appended, got {rows.tolist()}")
