"""Writing tokens into a cache of pages, and reading them back, as others do it: [pages, page, H, D], slots by index."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inferix_kernels import PageList

from ..harness.case import DTYPES, Prepared
from . import peer

if TYPE_CHECKING:
    from ..kv_pages import Inputs

BOTH = ("cpu", "cuda")


def slots_of(where: PageList, page_size: int) -> Tensor:
    """[T] int64: where each token of a page list lies in a cache seen as [pages * page_size, H, D]."""
    pages = zip((where.ids * page_size).tolist(), where.lens.tolist())
    return torch.cat([torch.arange(first, first + length) for first, length in pages]).to(where.ids.device)


def cache_of(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Empty K and V, [pages * page, H, D]."""
    size = (len(inputs.where.ids) * inputs.page_size, *inputs.k.shape[1:])
    k, v = (torch.empty(size, dtype=dtype, device=inputs.k.device) for _ in range(2))
    return k, v


@peer("kv_pages", "torch", ("fp32", "bf16"), BOTH, op="append-from")
def append(inputs: Inputs, format: str) -> Prepared:
    cache, slots, dtype = cache_of(inputs, DTYPES[format]), slots_of(inputs.where, inputs.page_size), DTYPES[format]

    def run() -> None:
        for side, x in zip(cache, (inputs.k, inputs.v)):
            side.index_copy_(0, slots, x.to(dtype))

    return Prepared(run, lambda _: torch.stack([side[slots] for side in cache]).float())


@peer("kv_pages", "torch", ("int8",), BOTH, op="append-from")
def append_int8(inputs: Inputs, format: str) -> Prepared:
    """A scale per token and head for both sides, as caches without a page of their own to look at do it."""
    cache, slots = cache_of(inputs, torch.int8), slots_of(inputs.where, inputs.page_size)
    scales = [torch.empty(side.shape[:2], device=side.device) for side in cache]

    def run() -> None:
        for side, scale, x in zip(cache, scales, (inputs.k, inputs.v)):
            step = x.abs().amax(-1).float() / 127
            side.index_copy_(0, slots, (x / step[..., None]).round().to(torch.int8))
            scale.index_copy_(0, slots, step)

    return Prepared(
        run, lambda _: torch.stack([s[slots].float() * scale[slots][..., None] for s, scale in zip(cache, scales)])
    )


@peer("kv_pages", "torch", ("fp32", "bf16"), BOTH, op="gather-to")
def gather(inputs: Inputs, format: str) -> Prepared:
    cache, slots, dtype = cache_of(inputs, DTYPES[format]), slots_of(inputs.where, inputs.page_size), inputs.k.dtype
    for side, x in zip(cache, (inputs.k, inputs.v)):
        side[slots] = x.to(side.dtype)
    return Prepared(
        lambda: [side.index_select(0, slots).to(dtype) for side in cache], lambda out: torch.stack(out).float()
    )


@peer("kv_pages", "flashinfer", ("bf16", "fp16"), module="flashinfer", package="flashinfer-python", op="append-from")
def flashinfer_append(inputs: Inputs, format: str) -> Prepared:
    """One request whose pages are the list; tokens are handed over in the cache's precision."""
    library, device = importlib.import_module("flashinfer"), inputs.k.device
    k, v = (x.to(DTYPES[format]) for x in (inputs.k, inputs.v))
    pool = inputs.empty(format)
    tokens, where = len(k), inputs.where
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    request = torch.zeros_like(positions)
    indptr = torch.tensor([0, len(where.ids)], dtype=torch.int32, device=device)

    def run() -> None:
        library.append_paged_kv_cache(
            k, v, request, positions, (pool.k, pool.v), where.ids, indptr, where.lens[-1:], kv_layout="HND"
        )

    return Prepared(run, lambda _: inputs.read(pool))
