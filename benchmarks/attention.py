"""Attention over pages beside torch's attention over contiguous K and V."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table

from inferix_kernels import KVPages, PageList, Unsupported, kv_append, make_plan, paged_attention

from .timing import measure, quartiles


class Shape(NamedTuple):
    """Queries of one block over the keys it sees; pages of 64."""

    name: str
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = (
    Shape("tiny world, window 9", 192, 576, 4, 4, 64),
    Shape("Wan 1.3B frame, 3 frames of past", 1560, 6240, 4, 4, 128),  # 4 of its 12 heads
    Shape("MAGI-1 4.5B slice, grouped heads", 1024, 4096, 6, 2, 128),
)
# Relative error of the output allowed to a format: rounding of its inputs, in the mean over random data.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "int8": 2e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}


def contenders(shape: Shape) -> dict[str, tuple[Callable[[], torch.Tensor], float]]:
    """Name -> (call that returns out [T, Hq, D], tolerance)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(shape.queries, shape.heads, shape.head_dim, generator=generator)
    k, v = (torch.randn(shape.keys, shape.kv_heads, shape.head_dim, generator=generator) for _ in range(2))
    count = -(-shape.keys // 64)
    ids = torch.randperm(count, generator=generator).tolist()
    lens = [64] * (count - 1) + [shape.keys - 64 * (count - 1)]
    plan = make_plan([(shape.queries, ids, lens)])
    calls: dict[str, tuple[Callable[[], torch.Tensor], float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        heads_first = [x.to(dtype).transpose(0, 1)[None].contiguous() for x in (q, k, v)]

        def sdpa(qkv: list[torch.Tensor] = heads_first) -> torch.Tensor:
            return F.scaled_dot_product_attention(*qkv, enable_gqa=True)[0].transpose(0, 1)

        name = "fp32" if dtype == torch.float32 else "bf16"
        calls[f"torch SDPA, {name}"] = sdpa, TOLERANCE[name]
    for format, dtype in DTYPES.items():
        pages = KVPages.empty(format, count, shape.kv_heads, 64, shape.head_dim)
        kv_append(k, v, pages, PageList.of(ids, lens))

        def ours(q: torch.Tensor = q.to(dtype), pages: KVPages = pages) -> torch.Tensor:
            return paged_attention(q, [pages], plan, backend="compiled")[0]

        calls[f"inferix, {format} pages"] = ours, TOLERANCE[format]
    return calls


def tables(rounds: int) -> Iterator[Table]:
    for shape in SHAPES:
        yield _table(shape, rounds)


def _table(shape: Shape, rounds: int) -> Table:
    table = Table(title=f"{shape.name}: {shape[1:]}", title_justify="left")
    for column in ("contender", "error", "median ms", "p20", "p80", "GFLOP/s", "x torch"):
        table.add_column(column, justify="left" if column == "contender" else "right", no_wrap=True)
    calls = contenders(shape)
    exact = next(iter(calls.values()))[0]().float()
    errors = {}
    for name, (call, _) in calls.items():
        try:
            errors[name] = float((call().float() - exact).norm() / exact.norm())
        except (Unsupported, ImportError) as error:
            table.add_row(name, str(error))
    right = [name for name, error in errors.items() if error <= calls[name][1]]
    times = dict(zip(right, measure([calls[name][0] for name in right], rounds)))
    torch_best = min(statistics.median(times[name]) for name in right if name.startswith("torch"))
    work = 4 * shape.queries * shape.keys * shape.heads * shape.head_dim
    for name, error in errors.items():
        if name not in times:
            table.add_row(name, f"{error:.1e} WRONG")
            continue
        median = statistics.median(times[name])
        speed = f"{work / median / 1e9:.0f}", f"{torch_best / median:.2f}"
        table.add_row(name, f"{error:.1e}", *quartiles(times[name]), *speed)
    return table
