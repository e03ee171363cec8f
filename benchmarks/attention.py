"""Attention of one block over its past: ours from pages, in every format, beside attention over contiguous K and V.

Peers get K and V contiguous for free, as no cache of pages could hand them over; "gather-sdpa" pays for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inferix_kernels import KVPages, PageList, Plan, kv_append, make_plan, paged_attention, reference
from inferix_kernels.layout import KV_FORMATS

from . import peers
from .harness.case import LIMITS, Case, Contender, Prepared
from .harness.ours import BACKENDS, kernel_of
from .shapes import Shape

OPS = ("paged_attention",)
# Queries are in the precision that a model would have beside pages of this format.
QUERY_DTYPE = {"fp32": torch.float32, "fp16": torch.float16}
EVERY = 16  # one row of so many is compared with the reference, at another place in each tile of 16


@dataclasses.dataclass(frozen=True)
class Inputs:
    """q [T, Hq, D], k and v [N, H, D]: float32 holding bfloat16 numbers, so that formats differ in what they lose."""

    q: Tensor
    k: Tensor
    v: Tensor
    where: PageList  # tokens of k and v, in order, belong into these shuffled pages
    page_size: int

    @property
    def rows(self) -> Tensor:
        tiles = torch.arange(0, len(self.q), EVERY)
        return (tiles + tiles // EVERY * 7 % EVERY).clamp(max=len(self.q) - 1).to(self.q.device)

    @property
    def pages(self) -> int:
        return len(self.where.ids)

    def plan(self, queries: int | None = None) -> Plan:
        """All queries over all pages."""
        segment = (queries or len(self.q), self.where.ids.tolist(), self.where.lens.tolist())
        return make_plan([segment], self.q.device)

    def pool(self, format: str) -> KVPages:
        _, heads, dim = self.k.shape
        pool = KVPages.empty(format, self.pages, heads, self.page_size, dim, self.k.device)
        kv_append(self.k, self.v, pool, self.where, backend="auto")
        return pool


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, shape.head_dim, generator=generator).bfloat16().float().to(device)

    count = -(-shape.keys // shape.page_size)
    lens = [shape.page_size] * (count - 1) + [shape.keys - shape.page_size * (count - 1)]
    where = PageList.of(torch.randperm(count, generator=generator).tolist(), lens, device)
    q, k, v = (draw(*size) for size in ((shape.queries, shape.heads), *2 * ((shape.keys, shape.kv_heads),)))
    return Inputs(q, k, v, where, shape.page_size)


def expected(inputs: Inputs) -> Tensor:
    """The reference over fp32 pages, for some of the rows."""
    rows = inputs.rows
    pool = inputs.pool("fp32")
    lse = torch.empty(len(rows), inputs.q.shape[1], device=rows.device)
    q = inputs.q[rows].contiguous()
    scale = q.shape[-1] ** -0.5
    plan = inputs.plan(len(rows))
    return reference.paged_attention(q, [pool], plan, scale=scale, out=torch.empty_like(q), lse=lse)[0]


def ours(inputs: Inputs, format: str, backend: str) -> Prepared:
    pool, plan = inputs.pool(format), inputs.plan()
    q = inputs.q.to(QUERY_DTYPE.get(format, torch.bfloat16))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)
    return Prepared(
        lambda: paged_attention(q, [pool], plan, out=out, lse=lse, backend=backend)[0],
        lambda result: sampled(result, inputs),
    )


def sampled(out: Tensor, inputs: Inputs) -> Tensor:
    """The rows to compare; NaN if any other row holds one."""
    rows = out[inputs.rows].float()
    return rows if out.isfinite().all() else rows * torch.nan


def bytes_of(shape: Shape, format: str) -> int:
    """Q, K and V read, the result written, once each."""
    from inferix_kernels.memory import page_bytes

    per_token = page_bytes(format, shape.kv_heads, shape.page_size, shape.head_dim) / shape.page_size
    q = shape.queries * shape.heads * shape.head_dim * QUERY_DTYPE.get(format, torch.bfloat16).itemsize
    return int(2 * q + shape.keys * per_token)


def cases(shape: Shape, device: str, formats: Sequence[str] = ()) -> Iterator[Case]:
    flops = 4.0 * shape.queries * shape.keys * shape.heads * shape.head_dim
    mine = [
        Contender(
            f"ours-{backend}",
            format,
            lambda inputs, f=format, b=backend: ours(inputs, f, b),
            flops,
            bytes_of(shape, format),
            LIMITS[format],
            kernel_of(backend, device, "attention"),
        )
        for backend in BACKENDS[device]
        for format in KV_FORMATS
    ]
    theirs = peers.contenders("attention", device, flops, lambda format: bytes_of(shape, format))
    yield Case("attention", OPS[0], shape.name, lambda device: make_inputs(shape, device), expected, mine + theirs)
