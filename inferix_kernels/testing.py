"""Inputs that hurt, and what counts as equal: shared by the tests, the benchmarks and `python -m inferix_kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import KVPages, PageList, as_bytes
from .plans import Plan, make_plan
from .reference import kv_append, spans

# Bytes that are NaN in every float format, a large code as int8 and a pair of them as 4 bits.
POISON = 0x7F
# The largest e4m3 number: of values whose tokens lie side by side, which are read to the end of a page that has tokens,
# with weight 0 past the valid ones. No op writes a code that is not finite.
LARGEST_CODE = 0x7E


def poisoned_pool(
    format: str,
    pages: int,
    heads: int,
    page_size: int,
    head_dim: int | tuple[int, int],
    device: torch.device | str = "cpu",
) -> KVPages:
    """A pool that nobody has written: whoever reads a slot of it gets NaN, if only from its scale."""
    pool = KVPages.empty(format, pages, heads, page_size, head_dim, device)
    for tensor in pool.tensors.values():
        _poison(tensor)
    return pool


def poison_unused(pool: KVPages, where: PageList) -> None:
    """Overwrite every slot past the valid tokens of each page with what must not be read."""
    for page, start, stop in spans("where", where, pool):
        for side in pool.sides:
            if side.codec.transposed:
                as_bytes(side.codes)[page, :, :, stop - start :] = LARGEST_CODE if stop > start else POISON
            else:
                _poison(side.codes[page, :, stop - start :])
            for tensor in (side.scales, side.offsets):
                if tensor is not None and side.codec.scaled_by == "token":
                    _poison(tensor[page, :, stop - start :])


def _poison(x: Tensor) -> None:
    x.fill_(torch.nan) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else as_bytes(x).fill_(POISON)


def random_page_list(pool: KVPages, lens: Sequence[int], generator: torch.Generator) -> PageList:
    """Pages in shuffled order, one for each length."""
    ids = torch.randperm(pool.pages, generator=generator)[: len(lens)]
    return PageList.of(ids.tolist(), lens, pool.k.device)


def filled_pool(
    format: str,
    lens: Sequence[int],
    heads: int,
    page_size: int,
    head_dim: int | tuple[int, int],
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[KVPages, PageList]:
    """A pool holding random tokens in shuffled pages, two pages more than needed; all that is unused is poisoned."""
    generator = torch.Generator().manual_seed(seed)
    pool = poisoned_pool(format, len(lens) + 2, heads, page_size, head_dim, device)
    where = random_page_list(pool, lens, generator)
    widths = (pool.head_dim, pool.value_dim)
    k, v = (torch.randn(sum(lens), heads, width, generator=generator).to(device) for width in widths)
    kv_append(k, v, pool, where)
    poison_unused(pool, where)
    return pool, where


def mixed_pools(
    lens: Sequence[int],
    heads: int,
    page_size: int,
    head_dim: int,
    formats: Sequence[str],
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[list[KVPages], list[int], list[int]]:
    """One filled pool per format, and the pages of all of them as one shuffled list of (ids, lens)."""
    pools: list[KVPages] = []
    entries: list[tuple[int, int]] = []
    for i, format in enumerate(formats):
        pool, where = filled_pool(format, lens, heads, page_size, head_dim, device, seed + i)
        base = sum(earlier.pages for earlier in pools)
        entries += [(base + page, stop - start) for page, start, stop in spans("where", where, pool)]
        pools.append(pool)
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed)).tolist()
    return pools, [entries[i][0] for i in order], [entries[i][1] for i in order]


def attention_inputs(
    queries: Sequence[int],
    lens: Sequence[int],
    *,
    query_heads: int,
    heads: int,
    head_dim: int,
    page_size: int = 16,
    formats: Sequence[str] = ("fp32",),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, list[KVPages], Plan]:
    """(q, pools, plan): segment s of queries[s] queries attends to all pages but its s first ones."""
    pools, ids, page_lens = mixed_pools(lens, heads, page_size, head_dim, formats, device, seed)
    plan = make_plan([(n, ids[s:], page_lens[s:]) for s, n in enumerate(queries)], device)
    q = torch.randn(sum(queries), query_heads, head_dim, generator=torch.Generator().manual_seed(seed + 100))
    return q.to(device=device, dtype=dtype), pools, plan


def clustered_keys_and_values(
    tokens: int, queries: int, heads: int, head_dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q [queries, heads, D], k and v [tokens, heads, D] as quantization meets them in real models: tokens that gather
    in 64 clusters, and six channels of the keys whose mean is eight times what varies."""
    generator = torch.Generator().manual_seed(seed)
    k_centres, v_centres = (torch.randn(64, heads, head_dim, generator=generator) for _ in range(2))
    cluster = torch.randint(64, (tokens,), generator=generator)
    k, v = (
        centres[cluster] + 0.5 * torch.randn(tokens, heads, head_dim, generator=generator)
        for centres in (k_centres, v_centres)
    )
    k[:, :, torch.randperm(head_dim, generator=generator)[:6]] += 8 * torch.randn(heads, 6, generator=generator)
    return torch.randn(queries, heads, head_dim, generator=generator), k, v


def rope_table(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """[tokens, channels / 2, 2] cosines and sines of random angles."""
    angles = torch.rand(tokens, channels // 2, generator=torch.Generator().manual_seed(seed)) * 6.2832
    return torch.stack((angles.cos(), angles.sin()), -1)


def assert_close(name: str, got: Tensor, want: Tensor, terms: int) -> None:
    """Equal up to rounding: float32 sums of `terms` products taken in another order, then one rounding to got's dtype.

    The error of a sum grows with the square root of its terms; 8 leaves room for the exponentials. A half
    result may in addition fall to the other side of a rounding boundary: one step, 2^-7 of the value in bfloat16.
    """
    assert got.dtype == want.dtype, f"{name} must be {want.dtype}, got {got.dtype}"
    rtol = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
    atol = (
        8 * max(terms, 1) ** 0.5 * 2.0**-24 * float(want[want.isfinite()].abs().max() if want.isfinite().any() else 1)
    )
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")
