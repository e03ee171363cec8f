"""Attention of one block over its past: ours from pages, in every format, against attention over contiguous K and V.

Peers get K and V contiguous for free, as no cache of pages could hand them over; "gather-sdpa" pays for it. "int8+bf16"
are two pools in one plan, as a world has them: the past in int8, the block's own keys and values in bf16 scratch.
Names of ours say the precision of products: "ours-..." is "auto", "ours-...-8bit" and "ours-...-exact" what they say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inferix_kernels import (
    KVPages,
    PageList,
    Plan,
    Unsupported,
    kv_append,
    make_plan,
    merge_attention,
    paged_attention,
)
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.store.memory import page_bytes

from . import peers
from .harness.case import DTYPES, LIMITS, LIMITS_8_BIT, Case, Contender, Limit, Prepared
from .harness.ours import BACKENDS, kernel_of
from .shapes import Shape

# Queries are in the precision that a model with pages of this format would have.
QUERY_DTYPE = {"fp32": torch.float32, "fp16": torch.float16}
# Ours beside precision="auto", where it makes a difference: (format, precision) -> the relative error allowed.
OTHERS = {
    "cuda": {(format, "8bit"): limit.relative for format, limit in LIMITS_8_BIT.items()},
    "cpu": {("int8", precision): LIMITS["int8"].relative for precision in ("8bit", "exact")},
}
WORLD_FORMATS = ("int8+bf16", "int8+fp32")  # of the past, and of the block's own keys and values
SCORES = 1 << 30  # bytes of scores that the reference may hold, which limits its queries per call


@dataclasses.dataclass(frozen=True)
class Inputs:
    """q [T, Hq, D], k and v [N, H, D]: float32 holding bfloat16 numbers, so that formats differ in what they lose.

    Tokens of k and v, in order, belong into the shuffled pages `where`. Each segment is a number of queries and the
    entries of `where`, from first to last, that they see.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    where: PageList
    page_size: int
    segments: tuple[tuple[int, int, int], ...]
    # What pools hold, by what they were made of: the reference writes page by page, so each is written once and copied.
    written: dict[Any, KVPages] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def every(self) -> int:
        """Every n-th row is compared with the reference: 1, unless all rows would take too much memory."""
        return -(-4 * len(self.q) * len(self.k) * self.q.shape[1] // len(self.segments) // SCORES)

    def plan(self, every: int = 1, ids: Tensor | None = None) -> Plan:
        """For every n-th query of each segment, over `where` or the same pages under other ids."""
        pages, lens = (self.where.ids if ids is None else ids).tolist(), self.where.lens.tolist()
        return make_plan([(-(-n // every), pages[a:b], lens[a:b]) for n, a, b in self.segments], self.q.device)

    def rows(self) -> Tensor:
        """Which queries are compared: as many as plan(every) has, each at another place among its neighbours."""
        parts, start, every = [], 0, self.every
        for queries, _, _ in self.segments:
            tiles = torch.arange(-(-queries // every))
            parts.append(start + (every * tiles + 7 * tiles % every).clamp(max=queries - 1))
            start += queries
        return torch.cat(parts).to(self.q.device)

    def pool(self, format: str) -> KVPages:
        return self._filled((format,), self.where, slice(None))

    def pools(self, format: str) -> tuple[list[KVPages], Plan]:
        """Pools of "int8+bf16" say, and the plan over them: the last tokens of each segment, as many as it has queries,
        lie in the second."""
        formats = format.split("+")
        if len(formats) == 1:
            return [self.pool(format)], self.plan()
        own = torch.zeros(len(self.where.ids), dtype=torch.bool)
        for queries, first, last in self.segments:
            own[max(first, last - -(-queries // self.page_size)) : last] = True
        if own.all():
            raise Unsupported(f"{format} needs pages before the block's own, got {len(own)} pages for its own")
        ids, lens = self.where.ids.cpu(), self.where.lens.cpu()
        made, base = torch.empty_like(ids), 0
        pools: list[KVPages] = []
        for part, here in zip(formats, (~own, own), strict=True):
            places = ids[here].argsort().argsort()  # in the same shuffled order, without gaps
            where = PageList.of(places.tolist(), lens[here].tolist(), self.q.device)
            tokens = here.repeat_interleave(lens).to(self.q.device)
            pools.append(self._filled((part, len(pools)), where, tokens))
            made[here] = places.to(made.dtype) + base
            base += int(here.sum())
        return pools, self.plan(ids=made)

    def _filled(self, key: tuple[Any, ...], where: PageList, tokens: slice | Tensor) -> KVPages:
        """A copy of its own; key: the format, and which part of the tokens."""
        if key not in self.written:
            _, heads, dim = self.k.shape
            pool = KVPages.empty(key[0], len(where.ids), heads, self.page_size, dim, self.k.device)
            kv_append(self.k[tokens], self.v[tokens], pool, where, backend="reference")
            self.written[key] = pool
        return self.written[key].map(torch.clone)


def make_inputs(shape: Shape, device: torch.device, listed: float = 1.0, worlds: int = 1) -> Inputs:
    """The shape's queries over a share of its pages; of several worlds, each with pages of its own, in one call."""
    generator = torch.Generator().manual_seed(0)
    there = torch.Generator(device).manual_seed(0)  # a GPU draws in milliseconds what takes a processor seconds

    def draw(tokens: int, heads: int) -> Tensor:
        size = worlds * tokens, heads, shape.head_dim
        return torch.randn(size, generator=there, device=device).bfloat16().float()

    count = -(-shape.keys // shape.page_size)
    lens = [shape.page_size] * (count - 1) + [shape.keys - shape.page_size * (count - 1)]
    where = PageList.of(torch.randperm(worlds * count, generator=generator).tolist(), worlds * lens, device)
    q, k, v = (draw(*size) for size in ((shape.queries, shape.heads), *2 * ((shape.keys, shape.kv_heads),)))
    seen = max(1, round(listed * count))
    segments = tuple((shape.queries, world * count, world * count + seen) for world in range(worlds))
    return Inputs(q, k, v, where, shape.page_size, segments)


def expected(inputs: Inputs) -> Tensor:
    """The reference over fp32 pages."""
    q = inputs.q[inputs.rows()]
    return paged_attention(q, [inputs.pool("fp32")], inputs.plan(inputs.every), backend="reference")[0]


def limits_of(device: str) -> dict[tuple[str, str], float]:
    """(format, precision) of ours on a device -> the relative error allowed."""
    formats = (*KV_FORMATS, *WORLD_FORMATS)
    return {(format, "auto"): LIMITS[format.split("+")[0]].relative for format in formats} | OTHERS[device]


def ours(inputs: Inputs, format: str, backend: str, precision: str = "auto") -> Prepared:
    pools, plan = inputs.pools(format)
    q = inputs.q.to(QUERY_DTYPE.get(format, torch.bfloat16))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)

    def run() -> Tensor:
        return paged_attention(q, pools, plan, out=out, lse=lse, precision=precision, backend=backend)[0]

    return Prepared(run, lambda result: sampled(result, inputs))


def sampled(out: Tensor, inputs: Inputs) -> Tensor:
    """The rows to compare of out [T, Hq, D]; NaN if any other row holds one."""
    rows = out[inputs.rows()].float()
    return rows if out.isfinite().all() else rows * torch.nan


def bytes_of(shape: Shape, format: str) -> int:
    """Q, K and V read, the result written, once each."""
    q = shape.queries * shape.heads * shape.head_dim * QUERY_DTYPE.get(format, torch.bfloat16).itemsize
    past, *scratch = format.split("+")
    own = shape.queries if scratch else 0
    tokens = {past: shape.keys - own, **dict.fromkeys(scratch, own)}
    stored = (n * page_bytes(f, shape.kv_heads, shape.page_size, shape.head_dim) for f, n in tokens.items())
    return int(2 * q + sum(stored) / shape.page_size)


def flops_of(shape: Shape) -> float:
    return 4.0 * shape.queries * shape.keys * shape.heads * shape.head_dim


@dataclasses.dataclass(frozen=True)
class Halves:
    """Attention over the two halves of the keys: out [T, Hq, D] and natural lse [T, Hq] of each."""

    a: tuple[Tensor, Tensor]
    b: tuple[Tensor, Tensor]


def make_halves(shape: Shape, device: torch.device) -> Halves:
    generator = torch.Generator().manual_seed(0)
    size = (shape.queries, shape.heads, shape.head_dim)

    def half() -> tuple[Tensor, Tensor]:
        out = torch.randn(size, generator=generator).bfloat16().float()
        return out.to(device), (torch.randn(size[:2], generator=generator) + 7).to(device)

    return Halves(half(), half())


def merge(halves: Halves, backend: str, format: str) -> Prepared:
    (out_a, lse_a), (out_b, lse_b) = halves.a, halves.b
    out_a, out_b = (x.to(DTYPES[format]) for x in (out_a, out_b))
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    return Prepared(
        lambda: merge_attention(out_a, lse_a, out_b, lse_b, out=out, lse=lse, backend=backend),
        lambda result: (result[0].float(), result[1]),
    )


def merged(halves: Halves) -> tuple[Tensor, ...]:
    prepared = merge(halves, "reference", "fp32")
    result: tuple[Tensor, ...] = prepared.run()
    return result


def cases(shape: Shape, device: str) -> Iterator[Case]:
    mine = [
        Contender(
            f"ours-{backend}" if precision == "auto" else f"ours-{backend}-{precision}",
            format,
            partial(ours, format=format, backend=backend, precision=precision),
            flops_of(shape),
            bytes_of(shape, format),
            Limit.of(limit),
            kernel_of(backend, device, "attention"),
        )
        for backend in BACKENDS[device]
        for (format, precision), limit in limits_of(device).items()
    ]
    theirs = peers.contenders("attention", device, flops_of(shape), partial(bytes_of, shape), op="paged_attention")
    yield Case("attention", "paged_attention", shape.name, partial(make_inputs, shape), expected, [*mine, *theirs])

    def moved(format: str) -> int:
        return shape.queries * shape.heads * (3 * shape.head_dim * DTYPES[format].itemsize + 3 * 4)

    mine = [
        Contender(
            f"ours-{backend}",
            format,
            partial(merge, backend=backend, format=format),
            0.0,
            moved(format),
            LIMITS[format],
            kernel_of(backend, device, "attention"),
        )
        for backend in BACKENDS[device]
        for format in DTYPES
    ]
    theirs = peers.contenders("attention", device, 0.0, moved, op="merge_attention")
    yield Case("attention", "merge_attention", shape.name, partial(make_halves, shape), merged, [*mine, *theirs])
