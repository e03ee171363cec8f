"""Writing tokens into pages, converting pages, reading them back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..layout import KVPages, PageList, Side, as_bytes
from .codecs import AMAX_FLOOR, LARGEST, STEP_FLOOR, decode, encode

__all__ = ["kv_append", "kv_commit", "kv_gather", "read_page", "read_side", "spans", "starts_of", "write_page"]


def kv_append(k: Tensor, v: Tensor, pages: KVPages, where: PageList) -> None:
    first_slots = starts_of("where", where, pages.page_size)
    for i, (page, start, stop) in enumerate(spans("where", where, pages, tokens=k.shape[0], written=True)):
        if where.starts is None:
            write_page(pages, page, k[start:stop].float(), v[start:stop].float())
        else:
            slots = slice(first_slots[i], first_slots[i] + stop - start)
            pages.k[page, :, slots], pages.v[page, :, slots] = (x[start:stop].transpose(0, 1) for x in (k, v))


def kv_commit(
    source: KVPages, source_list: PageList, target: KVPages, target_list: PageList, k_mean: Tensor | None = None
) -> None:
    reads = spans("source_list", source_list, source)
    writes = spans("target_list", target_list, target, written=True)
    if source_list.lens.tolist() != target_list.lens.tolist():
        raise ValueError(
            "target_list.lens must equal source_list.lens, "
            f"got {target_list.lens.tolist()} and {source_list.lens.tolist()}"
        )
    for (from_page, start, stop), (to_page, _, _) in zip(reads, writes, strict=True):
        if source.format == target.format and k_mean is None:
            copy_page(source, from_page, target, to_page, stop - start)
        else:
            k, v = read_page(source, from_page, stop - start)
            write_page(target, to_page, k if k_mean is None else k - k_mean, v)


def kv_gather(
    pools: Sequence[KVPages], where: PageList, dtype: torch.dtype = torch.float32, *, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    for page, start, stop in spans("where", where, *pools, tokens=out[0].shape[0]):
        k, v = read_page(*locate(pools, page), stop - start)
        out[0][start:stop], out[1][start:stop] = k, v
    return out


def write_page(pages: KVPages, page: int, k: Tensor, v: Tensor) -> None:
    """k [L, H, D] and v [L, H, Dv] float32 fill slots 0 : L. The others hold code 0: no NaN hides there."""
    for side, x in zip(pages.sides, (k, v), strict=True):
        write_side(side, page, *encode(x.transpose(0, 1), side.codec))


def write_side(side: Side, page: int, codes: Tensor, scales: Tensor | None, offsets: Tensor | None) -> None:
    """Store encode's results for the first L tokens; unused slots hold code 0, the least scale and offset 0."""
    codec, length = side.codec, codes.shape[1]
    tile = as_bytes(side.codes[page])  # [H, ...]: torch can't assign to slices of float8
    tile.zero_()
    rows = tile.transpose(1, 2) if codec.transposed else tile  # [H, page_size, stored]
    rows[:, :length] = codes[..., 0::2] | codes[..., 1::2] << 4 if codec.packed else as_bytes(codes)
    if side.scales is not None and scales is not None:
        side.scales[page] = STEP_FLOOR if codec.packed else torch.tensor(AMAX_FLOOR) / LARGEST[codec.dtype]
        side.scales[page, :, : scales.shape[1]] = scales
    if side.offsets is not None and offsets is not None:
        side.offsets[page] = 0
        side.offsets[page, :, : offsets.shape[1]] = offsets


def read_side(side: Side, page: int, length: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What write_side was given for the first `length` tokens."""
    codec = side.codec
    codes = side.codes[page].transpose(1, 2) if codec.transposed else side.codes[page]
    codes = codes[:, :length]
    if codec.packed:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    scales, offsets = (
        x if x is None else x[page, :, :length] if codec.scaled_by == "token" else x[page]
        for x in (side.scales, side.offsets)
    )
    return codes, scales, offsets


def read_page(pages: KVPages, page: int, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens from slot `start` of a page on, dequantized: k [length, H, D], v [length, H, Dv] float32."""
    k, v = (decode(*read_side(side, page, start + length), side.codec).transpose(0, 1) for side in pages.sides)
    return k[start:], v[start:]


def copy_page(source: KVPages, from_page: int, target: KVPages, to_page: int, length: int) -> None:
    """Bit for bit; slots past length as write_page leaves them."""
    for from_side, to_side in zip(source.sides, target.sides, strict=True):
        write_side(to_side, to_page, *read_side(from_side, from_page, length))


def locate(pools: Sequence[KVPages], page: int) -> tuple[KVPages, int]:
    """Page ids count through the pools in the order given."""
    for pages in pools:
        if page < pages.pages:
            return pages, page
        page -= pages.pages
    raise AssertionError("spans() checked the ids")


def spans(
    name: str, where: PageList, *pools: KVPages, tokens: int | None = None, written: bool = False
) -> list[tuple[int, int, int]]:
    """(page, first token, one past the last token) of every entry of a page list, checked."""
    num_pages, page_size = sum(pages.pages for pages in pools), pools[0].page_size
    ids, lens = where.ids.tolist(), where.lens.tolist()
    # plan.page_ids and plan.page_lens are fields of their own; where.ids and where.lens belong to a PageList.
    ids_name, lens_name = (f"{name}_ids", f"{name}_lens") if name == "plan.page" else (f"{name}.ids", f"{name}.lens")
    check_ids(ids_name, ids, num_pages)
    for i, length in enumerate(lens):
        if not 0 <= length <= page_size:
            raise ValueError(f"{lens_name}[{i}] must be in [0, {page_size}], got {length}")
    if tokens is not None and sum(lens) != tokens:
        raise ValueError(f"{lens_name} must sum to T={tokens}, got {sum(lens)}")
    # No tokens from some slot on: nothing is written.
    targets = [page for page, length in zip(ids, lens, strict=True) if length or where.starts is None]
    if written and len(set(targets)) != len(targets):
        raise ValueError(f"{ids_name} must name each written page once, got {max(targets, key=targets.count)} twice")
    return list(_spans(ids, lens))


def starts_of(name: str, where: PageList, page_size: int) -> list[int]:
    """The slot of every entry's first token, checked."""
    if where.starts is None:
        return [0] * len(where.ids)
    starts: list[int] = where.starts.tolist()
    field = f"{name}_starts" if name == "plan.page" else f"{name}.starts"
    for i, (start, length) in enumerate(zip(starts, where.lens.tolist(), strict=True)):
        if not 0 <= start <= page_size - length:
            raise ValueError(f"{field}[{i}] must be in [0, {page_size - length}], got {start}")
    return starts


def check_ids(name: str, ids: Sequence[int], num_pages: int) -> None:
    for i, page in enumerate(ids):
        if not 0 <= page < num_pages:
            raise ValueError(f"{name}[{i}] must be in [0, {num_pages}), got {page}")


def _spans(ids: list[int], lens: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for page, length in zip(ids, lens, strict=True):
        yield page, start, start + length
        start += length
