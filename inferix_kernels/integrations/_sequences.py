"""Other libraries' caches as pools of ours, in their own memory, and plans over them, made on their device.

Nothing here is read from a device, so that a call costs no wait and torch.compile sees one graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import Unsupported
from .._library import opaque
from ..layout import FORMATS, KVPages, PageList
from ..ops import kv_append
from ..plans import UNLIMITED, Plan

FLAT_PAGE = 128  # tokens of the pages that a run of tokens is cut into: fixed, as kernels are compiled for it
_FORMATS = {format.k.dtype: name for name, format in FORMATS.items() if not format.quantized and name != "latent8"}


class Sequences(NamedTuple):
    """The keys and values of B sequences: of each n runs of tokens, of which the last ones may be empty."""

    pool: KVPages
    ids: Tensor  # [B, n] int32
    lens: Tensor  # [B, n] int32
    starts: Tensor | None  # [B, n] int32, the first token's slot

    def plan(self, q_indptr: Tensor, window: tuple[int, int] = (-1, -1), positions: bool = False) -> Plan:
        """Sequence b for queries q_indptr[b] : q_indptr[b + 1], [B + 1] int32; window (left, right) aligned
        bottom-right, -1 for no limit. positions: of the keys, even if there is no limit."""
        batch, runs = self.ids.shape
        steps = torch.arange(batch + 1, dtype=torch.int32, device=self.ids.device)
        starts = None if self.starts is None else self.starts.flatten()
        plan = Plan(q_indptr, steps * runs, self.ids.flatten(), self.lens.flatten(), page_starts=starts)
        if window == (-1, -1) and not positions:
            return plan
        limits = [UNLIMITED if side == -1 else min(side, UNLIMITED) for side in window]
        before = self.lens.cumsum(1, dtype=torch.int32) - self.lens
        places = before + (q_indptr.diff() - self.lens.sum(1, dtype=torch.int32))[:, None]
        windows = torch.stack([torch.full_like(steps[1:], side) for side in limits], 1)
        return plan._replace(windows=windows, page_positions=places.flatten())


def format_of(name: str, cache: Tensor) -> str:
    if cache.dtype not in _FORMATS:
        raise Unsupported(f"{name} must be float32, bfloat16 or float16, got {cache.dtype}")
    return _FORMATS[cache.dtype]


def dense(k: Tensor, v: Tensor, lens: Tensor | None = None, begins: Tensor | None = None,
          rows: Tensor | None = None, names: tuple[str, str] = ("k", "v")) -> Sequences:  # fmt: skip
    """k, v: [R, S, H, D], a sequence to a row, or to rows[b]; of it tokens begins[b] : lens[b], all by default."""
    count, length = k.shape[:2]
    first = torch.arange(count, dtype=torch.int32, device=k.device) if rows is None else rows.int()
    end = torch.full_like(first, length) if lens is None else lens.int()
    begin = torch.zeros_like(first) if begins is None else begins.int()
    one_run = all(x.shape[0] == 1 or x.stride(0) == length * x.stride(1) for x in (k, v))
    if one_run and count * length >= FLAT_PAGE:
        return flat(k.flatten(0, 1), v.flatten(0, 1), first * length + begin, end - begin, length, names)
    pool = KVPages(format_of(names[0], k), k.transpose(1, 2), v.transpose(1, 2))
    return Sequences(pool, first[:, None], (end - begin)[:, None], begin[:, None])


def flat(k: Tensor, v: Tensor, begins: Tensor, lens: Tensor, longest: int,
         names: tuple[str, str] = ("k", "v")) -> Sequences:  # fmt: skip
    """k, v: [T, H, D], sequence b the tokens from begins[b] on, lens[b] of them, none of them more than `longest`.

    Every token begins a page of a fixed size, whose tokens other pages hold too: so a sequence is cut into pages
    wherever it begins. A page that would end after the last token begins earlier, and its first slots are passed over.
    """
    tokens = len(k)
    page = min(FLAT_PAGE, 1 << (max(tokens, 1).bit_length() - 1))
    last = max(tokens - page, 0)

    def pages(x: Tensor) -> Tensor:  # not as_strided: a compiled graph would keep the offset of the first call's tensor
        return x.unfold(0, page, 1).transpose(2, 3)

    if tokens == 0:
        k, v = (torch.zeros(1, *x.shape[1:], dtype=x.dtype, device=x.device) for x in (k, v))
    pool = KVPages(format_of(names[0], k), pages(k), pages(v))
    offsets = torch.arange(max(1, -(-longest // page)), dtype=torch.int32, device=k.device) * page
    found = (lens.int()[:, None] - offsets).clamp(0, page)
    at = torch.where(found > 0, begins.int()[:, None] + offsets, 0)
    ids = at.clamp(max=last)
    return Sequences(pool, ids, found, at - ids)


def paged(k: Tensor, v: Tensor, table: Tensor, lens: Tensor, begins: Tensor | None = None,
          names: tuple[str, str] = ("k_cache", "v_cache")) -> Sequences:  # fmt: skip
    """k, v: [P, page_size, H, D]; table [B, n]: the pages of sequence b, of which tokens begins[b] : lens[b] count."""
    pool = KVPages(format_of(names[0], k), k.transpose(1, 2), v.transpose(1, 2))
    offsets = torch.arange(table.shape[1], dtype=torch.int32, device=table.device) * pool.page_size
    end = (lens.int()[:, None] - offsets).clamp(0, pool.page_size)
    if begins is None:
        return Sequences(pool, torch.where(end > 0, table.int(), 0), end, None)
    begin = (begins.int()[:, None] - offsets).clamp(0, pool.page_size).minimum(end)
    return Sequences(pool, torch.where(end > begin, table.int(), 0), end - begin, begin)


def append_rows(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, at: Tensor, counts: Tensor
) -> None:
    """k, v: [T, H, D], counts[b] tokens of each sequence in turn, into row rows[b] of a cache [R, S, H, D], from token
    at[b] on."""
    _append_to_cache(k, v, k_cache, v_cache, rows.int(), counts.int(), at.int())


def append_pages(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, at: Tensor, counts: Tensor, most: int
) -> None:
    """As append_rows, into the pages table[b] of a cache [P, page_size, H, D]. most: tokens of any sequence."""
    size = k_cache.shape[1]
    offsets = torch.arange((most + size - 1) // size + 1, dtype=torch.int32, device=table.device)
    page = at.int()[:, None] // size + offsets
    starts = torch.where(offsets == 0, at.int()[:, None] % size, 0)
    before = (page * size + starts - at.int()[:, None]).clamp(min=0)  # tokens in earlier pages
    lens = (counts.int()[:, None] - before).clamp(min=0).minimum(size - starts)
    ids = table.int().gather(1, page.clamp(max=table.shape[1] - 1).long())
    ids = torch.where(page < table.shape[1], ids, -1)  # no page: refused on a CPU, skipped on a GPU
    ids = torch.where(lens > 0, ids, 0)
    _append_to_cache(k, v, k_cache, v_cache, ids.flatten(), lens.flatten(), starts.flatten())


def _append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, ids: Tensor, lens: Tensor, starts: Tensor) -> None:
    """kv_append to a cache [P, page_size, H, D]."""
    pool = KVPages(format_of("k_cache", k_cache), k_cache.transpose(1, 2), v_cache.transpose(1, 2))
    kv_append(k, v, pool, PageList(ids, lens, starts))


def _check_caches(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, ids: Tensor, lens: Tensor, starts: Tensor
) -> None:
    """Raises Unsupported where one cache lies between parts of the other: both are views of what lies around them."""
    begins, ends = zip(*(_extent(x) for x in (k_cache, v_cache)), strict=True)
    shared = k_cache.untyped_storage()._cdata == v_cache.untyped_storage()._cdata
    if shared and max(begins) < min(ends):
        raise Unsupported(
            "k_cache and v_cache must lie apart in a compiled graph, not between one another in one tensor: torch would"
            " write to where the first call's began"
        )


def _extent(x: Tensor) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """In its storage, from its first element to the one after its last."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.storage_offset(), x.storage_offset() + span + 1


# An op of its own, since a compiled graph writes to views of a tensor at the offset that it was compiled with.
_append_to_cache = opaque(
    "append_to_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor ids, Tensor lens,"
    " Tensor starts) -> ()",
    _append,
    _check_caches,
)
