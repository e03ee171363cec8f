"""paged_attention in FlashAttention's kernels, where one of its versions is installed: backend="flash-attn".

Never needed, and never chosen by "auto". Never run on a GPU: the tests call functions of the same signatures that
compute densely on a CPU.

The library takes one cache of half precision, sequences of whole pages but for their last, and one window for all; a
call that is anything else is Unsupported and says so. To find out, and since it takes lengths as Python's numbers, the
plan is read from the device, which waits for it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import Unsupported
from .layout import KVPages
from .plans import UNLIMITED, Plan
from .reference.attention import check_plan, merge

__all__ = ["paged_attention"]

Results = tuple[Tensor, Tensor]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Call(NamedTuple):
    """What all versions are given, under different names."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [P, page_size, H, D]
    v: Tensor
    ends: Tensor  # [S + 1] int32: where each sequence's queries begin
    table: Tensor  # [S, n] int32: its pages
    lens: Tensor  # [S] int32: its keys
    most_queries: int
    most_keys: int
    window: tuple[int, int]
    scale: float
    softcap: float


def version_2(module: ModuleType, x: Call) -> Results:
    key_ends = torch.cat((x.lens.new_zeros(1), x.lens.cumsum(0, dtype=torch.int32)))
    out, lse, _ = module.flash_attn_varlen_func(
        x.q, x.k, x.v, x.ends, key_ends, x.most_queries, x.most_keys, softmax_scale=x.scale, window_size=x.window,
        softcap=x.softcap, return_attn_probs=True, block_table=x.table,
    )  # fmt: skip
    return out, lse.where(lse != math.inf, -math.inf)  # of rows that see no key


def version_3(module: ModuleType, x: Call) -> Results:
    out, lse, *_ = module.flash_attn_with_kvcache(
        x.q, x.k, x.v, cache_seqlens=x.lens, page_table=x.table, cu_seqlens_q=x.ends, max_seqlen_q=x.most_queries,
        softmax_scale=x.scale, window_size=x.window, softcap=x.softcap, return_softmax_lse=True,
    )  # fmt: skip
    return out, lse


def version_4(module: ModuleType, x: Call) -> Results:
    results: Results = module.flash_attn_varlen_func(
        x.q, x.k, x.v, cu_seqlens_q=x.ends, max_seqlen_q=x.most_queries, seqused_k=x.lens, page_table=x.table,
        softmax_scale=x.scale, window_size=tuple(None if side == -1 else side for side in x.window),
        softcap=x.softcap, return_lse=True,
    )  # fmt: skip
    return results


class Version(NamedTuple):
    module: str
    function: str  # by which it is known to be there: one package holds versions 2 and 4, or either
    call: Callable[[ModuleType, Call], Results]
    page_multiple: int = 1


VERSIONS = (  # the first that is installed: who has a later one wants it
    Version("flash_attn_interface", "flash_attn_with_kvcache", version_3),
    Version("flash_attn.cute", "flash_attn_varlen_func", version_4),
    Version("flash_attn", "flash_attn_varlen_func", version_2, 256),
)


def paged_attention(
    q: Tensor,
    pools: Sequence[KVPages],
    plan: Plan,
    *,
    scale: float,
    out: Tensor,
    lse: Tensor,
    accumulate: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    precision: str = "auto",
    deadline: float = 60.0,
) -> tuple[Tensor, Tensor]:
    if plan.arrivals is not None:
        raise Unsupported("flash-attn waits for no pages: plan.arrivals must be None")
    if alibi_slopes is not None:
        raise Unsupported("flash-attn is not asked for alibi_slopes, which its versions 3 and 4 have not")
    version, module = installed()
    check_pools(q, pools, version)
    call = sequences(q, pools[0], plan)._replace(scale=scale, softcap=softcap)
    if call.most_queries:
        new_out, new_lse = version.call(module, call)
        new_lse = new_lse.T  # [T, Hq]
        if accumulate:
            new_out, new_lse = merge(out.float(), lse, new_out.float(), new_lse)
        out.copy_(new_out)
        lse.copy_(new_lse)
    return out, lse


def installed() -> tuple[Version, ModuleType]:
    for version in VERSIONS:
        try:
            module = importlib.import_module(version.module)
        except ImportError:
            continue
        if hasattr(module, version.function):
            return version, module
    raise Unsupported("flash-attn is not installed: none of " + ", ".join(version.module for version in VERSIONS))


def check_pools(q: Tensor, pools: Sequence[KVPages], version: Version) -> None:
    if len(pools) > 1:
        raise Unsupported(f"flash-attn reads one pool, got {len(pools)}")
    format, head_dim, page_size = pools[0].format, pools[0].head_dim, pools[0].page_size
    if format not in HALF:
        raise Unsupported(f"flash-attn reads {' and '.join(HALF)} pages, got {format}")
    if q.dtype != HALF[format]:
        raise Unsupported(f"flash-attn takes q in the pages' dtype, {HALF[format]}, got {q.dtype}")
    if q.ndim != 3:
        raise Unsupported("flash-attn has no variants of q, got [V, T, Hq, D]")
    if head_dim % 8 or head_dim > 256:
        raise Unsupported(f"flash-attn takes a head_dim that is a multiple of 8 up to 256, got {head_dim}")
    if page_size % version.page_multiple:
        multiple = version.page_multiple
        raise Unsupported(f"{version.module} takes a page_size that is a multiple of {multiple}, got {page_size}")


def sequences(q: Tensor, pool: KVPages, plan: Plan) -> Call:
    """A plan as one sequence per segment; scale and softcap are still to be set."""
    starts, lists, entries, slots, _, _ = check_plan(q, [pool], plan)
    if plan.page_bias is not None:
        raise Unsupported("flash-attn has no plan.page_bias")
    if len(lists) != len(starts):
        raise Unsupported("flash-attn takes one page list per segment, got one for each KV head")
    found = [  # of each segment, (entry, page, tokens)
        [(j, page, end - begin) for j, (page, begin, end) in enumerate(entries[a:b], a) if end > begin]
        for a, b in pairwise(lists)
    ]
    for pages in found:
        for j, _, length in pages:
            if slots[j] or (length < pool.page_size and j != pages[-1][0]):
                raise Unsupported(
                    f"flash-attn reads whole pages, and of a list's last its first tokens: entry {j} of the plan has"
                    f" {length} of {pool.page_size} from slot {slots[j]} on"
                )
    queries = [b - a for a, b in pairwise(starts)]
    lens = [sum(length for *_, length in pages) for pages in found]
    width = max([1, *map(len, found)])
    table = [[page for _, page, _ in pages] + [0] * (width - len(pages)) for pages in found]

    def int32(numbers: object) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=q.device)

    return Call(
        q, pool.k.transpose(1, 2), pool.v.transpose(1, 2), plan.q_indptr, int32(table), int32(lens),
        max(queries, default=0), max([1, *lens]), window_of(plan, queries, found), 1.0, 0.0,
    )  # fmt: skip


def window_of(plan: Plan, queries: list[int], found: list[list[tuple[int, int, int]]]) -> tuple[int, int]:
    """(left, right), -1 for no limit, of all segments that see keys."""
    if plan.windows is None or plan.page_positions is None:
        return -1, -1
    windows, positions = plan.windows.tolist(), plan.page_positions.tolist()
    seen = {tuple(window) for window, count, pages in zip(windows, queries, found, strict=True) if count and pages}
    if len(seen) > 1:
        raise Unsupported(f"flash-attn takes one window for all segments, got {len(seen)}")
    for count, pages in zip(queries, found, strict=True):
        lens = [length for *_, length in pages]
        wanted = list(accumulate(lens, initial=count - sum(lens)))[:-1]
        if count and [positions[j] for j, *_ in pages] != wanted:
            raise Unsupported("flash-attn takes windows aligned bottom-right, as make_plan makes them")
    left, right = next(iter(seen), (UNLIMITED, UNLIMITED))
    return -1 if left >= UNLIMITED else left, -1 if right >= UNLIMITED else right
