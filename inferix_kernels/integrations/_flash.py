"""What FlashAttention 2 and 3 share: attention over dense, packed and cached keys by paged_attention, where they lie.

Every form comes down to packed queries [T, Hq, D] with their cu_seqlens, and keys as Sequences (_sequences.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._check import FLOATS, check_optional, check_softcap, check_tensor, device_of
from .._dispatch import Unsupported
from ..layout import KVPages
from ..ops import paged_attention
from ._sequences import Sequences, append_pages, append_rows, dense, flat, format_of, paged

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

    @property
    def window(self) -> tuple[int, int]:
        left, right = (max(int(side), -1) for side in self.window_size)
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


def refuse(**arguments: Any) -> None:
    """Those that we do not have: each must be None, False or 0."""
    for name, x in arguments.items():
        if isinstance(x, Tensor) or x:
            shown = f"a {type(x).__name__}" if isinstance(x, Tensor) else repr(x)
            raise Unsupported(f"{name} is not supported, leave it out; got {shown}")


def batched(q: Tensor, k: Tensor, v: Tensor, options: Options, convention: Convention) -> tuple[Tensor, Tensor]:
    """q [B, Sq, Hq, D] over k, v [B, Sk, H, D]: out as q, lse [B, Hq, Sq]."""
    sizes: dict[str, int] = {}
    _check_keys("", q, k, v, "B Sk H", sizes)
    check_tensor("q", q, (k.dtype,), "B Sq Hq D", sizes, q.device)
    _check_options(options, sizes)
    return _shaped(q, *_attend(q.flatten(0, 1), _even(q), dense(k, v), options), convention)


def packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int,
    options: Options, convention: Convention,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [T, Hq, D] over k, v [Tk, H, D], or [P, page_size, H, D] with a table: out as q, lse [Hq, T]."""
    sizes: dict[str, int] = {}
    _check_keys("", q, k, v, "Tk H" if table is None else "P page_size H", sizes)
    check_tensor("q", q, (k.dtype,), "T Hq D", sizes, q.device)
    _check_options(options, sizes)
    for name, indptr, end in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, sizes.get("Tk"))):
        check_tensor(name, indptr, INT, "B+1", sizes, q.device)
        _check_indptr(name, indptr, end)
    sizes["B"] = sizes["B+1"] - 1
    used = {"seqused_q": (seqused_q, cu_seqlens_q), "seqused_k": (seqused_k, cu_seqlens_k)}
    for name, (count, indptr) in used.items():
        check_optional(name, count, INT, "B", sizes, q.device)
        _check_range(name, count, 0, indptr.diff())
    lens = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    _check_range("the lengths in cu_seqlens_k", lens, 0, max_seqlen_k, "max_seqlen_k")
    if table is None:
        sequences = flat(k, v, cu_seqlens_k[:-1], lens, max_seqlen_k)
    else:
        check_tensor(convention.table, table, INT, "B n", sizes, q.device)
        _check_table(convention.table, table, lens, *k.shape[:2])
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
    _check_keys("_cache", q, cache.k, cache.v, "R S H" if cache.table is None else "P page_size H", sizes)
    check_tensor("q", q, (cache.k.dtype,), "T Hq D" if cu_seqlens_q is not None else "B Sq Hq D", sizes, q.device)
    _check_options(options, sizes)
    if cu_seqlens_q is None:
        indptr = _even(q)
        max_seqlen_q = q.shape[1]
    else:
        check_tensor("cu_seqlens_q", cu_seqlens_q, INT, "B+1", sizes, q.device)
        _check_indptr("cu_seqlens_q", cu_seqlens_q, len(q))
        indptr = cu_seqlens_q.contiguous()
        sizes["B"] = sizes["B+1"] - 1
        if max_seqlen_q is None:
            raise ValueError("max_seqlen_q must be given with cu_seqlens_q, got None")
    seqlens, rows, table, capacity = _check_cache(cache, sizes, convention)
    new_k, new_v, new_indptr = _check_new(new, cache, sizes)
    counts = new_indptr.diff()
    _check_range("cache_seqlens", seqlens, 0, capacity - counts, _room(cache, convention))
    if table is not None:
        _check_table(convention.table, table, seqlens + counts, *cache.k.shape[:2])
    queries = q if q.ndim == 3 else q.flatten(0, 1)
    if new.cos is not None and new.sin is not None:
        at = seqlens if new.seqlens is None else new.seqlens
        reach = convention.reach(max_seqlen_q, capacity)
        moving = options.causal or any(0 <= side < end for side, end in zip(options.window, reach, strict=True))
        queries = _rotated("q", queries, new, _positions(indptr, len(queries), at, moving))
        new_k = _rotated("k", new_k, new, _positions(new_indptr, len(new_k), at, True))
    if len(new_k):
        pool = KVPages(format_of("k_cache", cache.k), cache.k.transpose(1, 2), cache.v.transpose(1, 2))
        if table is None:
            append_rows(new_k, new_v, pool, rows, seqlens, counts)
        else:
            most = len(new_k) if new.indptr is not None else new.k.shape[1]  # type: ignore[union-attr]
            append_pages(new_k, new_v, pool, table, seqlens, counts, most)
    lens = seqlens + counts
    if table is None:
        sequences = dense(cache.k, cache.v, lens, cache.leftpad, rows, ("k_cache", "v_cache"))
    else:
        sequences = paged(cache.k, cache.v, table, lens, cache.leftpad)
    return _shaped(q, *_attend(queries, indptr, sequences, options), convention)


def _attend(q: Tensor, indptr: Tensor, sequences: Sequences, options: Options) -> tuple[Tensor, Tensor]:
    plan = sequences.plan(indptr, options.window)
    return paged_attention(q, [sequences.pool], plan, scale=options.softmax_scale, softcap=options.softcap)


def _shaped(q: Tensor, out: Tensor, lse: Tensor, convention: Convention) -> tuple[Tensor, Tensor]:
    """out like q; lse [T, Hq] as [Hq, T], or [B, Hq, Sq] for q [B, Sq, Hq, D]."""
    lse = (lse if q.ndim == 3 else lse.view(q.shape[:3])).transpose(-1, -2).contiguous()
    return out.view(q.shape), torch.where(lse == -math.inf, convention.empty_lse, lse)


def _even(x: Tensor) -> Tensor:
    """[B + 1] int32: where each of x [B, S, ...] begins when they are packed."""
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]


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


def _rotated(name: str, x: Tensor, new: New, positions: Tensor) -> Tensor:
    """x [T, H, D] with its first channels turned by the angles at positions [T], in float32."""
    cos, sin = new.cos, new.sin
    assert cos is not None and sin is not None
    _check_range(f"positions of {name}", positions, 0, len(cos) - 1, "rotary_cos")
    cos, sin = (table[positions].float()[:, None] for table in (cos, sin))
    turned, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    a, b = (turned[..., ::2], turned[..., 1::2]) if new.interleaved else turned.chunk(2, -1)
    a, b = a.float(), b.float()
    pair = a * cos - b * sin, a * sin + b * cos
    result = torch.stack(pair, -1).flatten(-2) if new.interleaved else torch.cat(pair, -1)
    return torch.cat((result.to(x.dtype), rest), -1)


def _check_keys(suffix: str, q: Tensor, k: Tensor, v: Tensor, layout: str, sizes: dict[str, int]) -> None:
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


def _check_options(options: Options, sizes: dict[str, int]) -> None:
    if sizes["Hq"] % sizes["H"]:
        raise ValueError(f"q must have a multiple of the keys' H={sizes['H']} heads, got {sizes['Hq']}")
    if len(options.window_size) != 2:
        raise ValueError(f"window_size must be two numbers (left, right), got {options.window_size}")
    check_softcap(options.softcap)


def _check_cache(
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
        _check_range("cache_batch_idx", rows, 0, given - 1)
        table = None if table is None else table.index_select(0, rows)
    seqlens = capacity if cache.seqlens is None else cache.seqlens
    if not isinstance(seqlens, Tensor):
        seqlens = torch.full((batch,), seqlens, dtype=torch.int32, device=device)
    check_tensor("cache_seqlens", seqlens, INT, "B", sizes, device)
    _check_range("cache_leftpad", cache.leftpad, 0, seqlens, "cache_seqlens")
    return seqlens, rows, table, capacity


def _check_new(new: New, cache: Cache, sizes: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [T, H, D] and indptr [B + 1] of what is appended: no tokens if nothing is."""
    device, dtype = cache.k.device, (cache.k.dtype,)
    if (new.k is None) != (new.v is None):
        raise ValueError("k and v must be given together, or neither, got one of them")
    if (new.cos is None) != (new.sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together, or neither, got one of them")
    if new.k is None or new.v is None:
        if new.cos is not None or new.indptr is not None or new.seqlens is not None:
            raise ValueError("k and v must be given with rotary_cos, rotary_seqlens or cu_seqlens_k_new, got None")
        nothing = cache.k.new_empty(0, *cache.k.shape[2:])
        return nothing, nothing, torch.zeros(sizes["B"] + 1, dtype=torch.int32, device=device)
    if cache.seqlens is None:
        raise ValueError("cache_seqlens must be given with k and v: they say where these go, got None")
    layout = "B Snew H D" if new.indptr is None else "Tnew H D"
    for name, x in (("k", new.k), ("v", new.v)):
        check_tensor(name, x, dtype, layout, sizes, device)
    if new.indptr is not None:
        sizes["B+1"] = sizes["B"] + 1
        check_tensor("cu_seqlens_k_new", new.indptr, INT, "B+1", sizes, device)
        _check_indptr("cu_seqlens_k_new", new.indptr, len(new.k))
    for name, x in (("rotary_cos", new.cos), ("rotary_sin", new.sin)):
        check_optional(name, x, FLOATS, "positions R/2", sizes, device)
    if 2 * sizes.get("R/2", 0) > sizes["D"]:
        raise ValueError(f"rotary_cos must turn at most D={sizes['D']} channels, got {2 * sizes['R/2']}")
    check_optional("rotary_seqlens", new.seqlens, INT, "B", sizes, device)
    if new.seqlens is not None and new.cos is None:
        raise ValueError("rotary_cos must be given with rotary_seqlens, got None")
    _check_once("cache_batch_idx", cache.batch_idx)
    if new.indptr is not None:
        return new.k, new.v, new.indptr
    return new.k.flatten(0, 1), new.v.flatten(0, 1), _even(new.k)


def _room(cache: Cache, convention: Convention) -> str:
    what = "k_cache" if cache.table is None else f"the pages of {convention.table}"
    return f"{what} with what is appended"


def _readable(x: Tensor) -> bool:
    """Numbers are looked at where that costs no wait, and where they are there."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(name: str, x: Tensor | None, least: int, most: int | Tensor, by: str = "") -> None:
    if x is None or not _readable(x) or not x.numel():
        return
    most = torch.as_tensor(most).expand_as(x)
    wrong = (x < least) | (x > most)
    if wrong.any():
        i = int(wrong.int().argmax())
        limit = f"{int(most[i])}{f', the room in {by}' * bool(by)}"
        raise ValueError(f"{name} must be from {least} to {limit}, got {int(x[i])} at [{i}]")


def _check_indptr(name: str, indptr: Tensor, end: int | None) -> None:
    if not indptr.numel():
        raise ValueError(f"{name} must hold at least its leading 0, got an empty tensor")
    if _readable(indptr):
        last = int(indptr[-1])
        if int(indptr[0]) or (indptr.diff() < 0).any() or (end is not None and last != end):
            raise ValueError(f"{name} must rise from 0 to {last if end is None else end}, got {indptr.tolist()}")


def _check_table(name: str, table: Tensor, lens: Tensor, pages: int, page_size: int) -> None:
    """The pages that hold each sequence's tokens are there."""
    if not _readable(table):
        return
    _check_range("sequences", lens, 0, table.shape[1] * page_size, f"the pages of {name}")
    used = torch.arange(table.shape[1]) * page_size < lens[:, None]
    wrong = used & ((table < 0) | (table >= pages))
    if wrong.any():
        b, i = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(f"{name} must hold pages from 0 to {pages - 1}, got {int(table[b, i])} at [{b}, {i}]")


def _check_once(name: str, rows: Tensor | None) -> None:
    if rows is not None and _readable(rows) and len(rows.unique()) < len(rows):
        raise ValueError(f"{name} must name no row twice when k and v are appended, got {rows.tolist()}")
