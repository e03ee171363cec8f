"""From a layer's packed projection to q, and K and V in their pages: norm, rotate, quantize, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from inferix_kernels import KVPages, PageList, kv_gather, qkv_prologue
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.store.memory import page_bytes
from inferix_kernels.testing import rope_table

from . import peers
from .harness.case import LIMITS, Case, Contender, Limit, Prepared
from .harness.ours import BACKENDS, kernel_of
from .shapes import Shape

DTYPE = {"fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """qkv [T, (Hq + 2H) D] float32 of bfloat16 numbers, norm weights over all heads, rotation of all channels."""

    qkv: Tensor
    norm_q: Tensor
    norm_k: Tensor
    rope: Tensor
    where: PageList
    shape: Shape

    def empty(self, format: str) -> KVPages:
        s = self.shape
        return KVPages.empty(format, len(self.where.ids), s.kv_heads, s.page_size, s.head_dim, self.qkv.device)

    def read(self, q: Tensor, pool: KVPages) -> tuple[Tensor, ...]:
        return q.float(), *kv_gather([pool], self.where, torch.float32, backend="reference")


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = torch.randn(shape.queries, width, generator=generator).bfloat16().float()
    norms = (torch.rand(heads * shape.head_dim, generator=generator) + 0.5 for heads in (shape.heads, shape.kv_heads))
    count = -(-shape.queries // shape.page_size)
    lens = [shape.page_size] * (count - 1) + [shape.queries - shape.page_size * (count - 1)]
    where = PageList.of(torch.randperm(count, generator=generator).tolist(), lens, device)
    rope = rope_table(shape.queries, shape.head_dim)
    qkv, norm_q, norm_k, rope = (x.to(device) for x in (qkv, *norms, rope))
    return Inputs(qkv, norm_q, norm_k, rope, where, shape)


def prologue(inputs: Inputs, backend: str, format: str, dtype: torch.dtype) -> Prepared:
    pool, qkv = inputs.empty(format), inputs.qkv.to(dtype)
    out = torch.empty(len(qkv), inputs.shape.heads, inputs.shape.head_dim, dtype=dtype, device=qkv.device)
    return Prepared(
        lambda: qkv_prologue(
            qkv, inputs.norm_q, inputs.norm_k, inputs.rope, pool, inputs.where, out=out, backend=backend
        ),
        lambda q: inputs.read(q, pool),
    )


def expected(inputs: Inputs) -> tuple[Tensor, ...]:
    prepared = prologue(inputs, "reference", "fp32", torch.float32)
    result: tuple[Tensor, ...] = prepared.read(prepared.run())  # type: ignore[assignment]
    return result


def limit(format: str) -> Limit:
    """q is bfloat16 with all formats but fp32."""
    return max(LIMITS[format], LIMITS["bf16"]) if format != "fp32" else LIMITS["fp32"]


def cases(shape: Shape, device: str) -> Iterator[Case]:
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim

    def nbytes(format: str) -> int:
        """qkv read, q and pages written."""
        stored = page_bytes(format, shape.kv_heads, shape.page_size, shape.head_dim) // shape.page_size
        itemsize = DTYPE.get(format, torch.bfloat16).itemsize
        return shape.queries * ((width + shape.heads * shape.head_dim) * itemsize + stored)

    mine = [
        Contender(
            f"ours-{backend}",
            format,
            partial(prologue, backend=backend, format=format, dtype=DTYPE.get(format, torch.bfloat16)),
            0.0,
            nbytes(format),
            limit(format),
            kernel_of(backend, device, "qkv"),
        )
        for backend in BACKENDS[device]
        for format in KV_FORMATS
    ]
    theirs = peers.contenders("qkv", device, 0.0, nbytes, limit)
    yield Case("qkv", "qkv_prologue", shape.name, partial(make_inputs, shape), expected, [*mine, *theirs])
