"""The page ops on one block: append, commit and convert between formats, gather. Bytes per second against a copy.

Ours are held to the reference's very numbers. Peers quantize by rules of their own and are held to the numbers that
were to be stored, within what their format loses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from inferix_kernels import KVPages, PageList, kv_append, kv_commit, kv_gather
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.store.memory import page_bytes

from . import peers
from .harness.case import EXACT, Case, Contender, Prepared, Result
from .harness.ours import BACKENDS, kernel_of
from .shapes import Shape

SOURCES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What a world commits from: scratch in working precision, committed pages that age (Policy.older), and a plain copy.
COMMITS = {
    "fp32": ("int8", "i8f8", "fp8", "int4"),
    "bf16": ("bf16", "int8", "i8f8", "fp8", "int4"),
    "int8": ("int8", "int4"),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """k, v [T, H, D] in `dtype`, of normal numbers; pages in shuffled order."""

    k: Tensor
    v: Tensor
    where: PageList
    page_size: int

    def empty(self, format: str) -> KVPages:
        _, heads, dim = self.k.shape
        return KVPages.empty(format, len(self.where.ids), heads, self.page_size, dim, self.k.device)

    def pool(self, format: str) -> KVPages:
        pool = self.empty(format)
        kv_append(self.k, self.v, pool, self.where, backend="reference")
        return pool

    def read(self, pool: KVPages) -> Tensor:
        """[2, T, H, D] float32: what a pool holds, as the reference reads it."""
        return torch.stack(kv_gather([pool], self.where, torch.float32, backend="reference"))


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    size = (shape.queries, shape.kv_heads, shape.head_dim)
    k, v = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
    count = -(-shape.queries // shape.page_size)
    lens = [shape.page_size] * (count - 1) + [shape.queries - shape.page_size * (count - 1)]
    where = PageList.of(torch.randperm(count, generator=generator).tolist(), lens, device)
    return Inputs(k, v, where, shape.page_size)


def truth(inputs: Inputs) -> Tensor:
    return torch.stack((inputs.k, inputs.v)).float()


def append(inputs: Inputs, backend: str, format: str) -> Prepared:
    pool = inputs.empty(format)
    return Prepared(
        lambda: kv_append(inputs.k, inputs.v, pool, inputs.where, backend=backend), lambda _: inputs.read(pool)
    )


def gather(inputs: Inputs, backend: str, format: str) -> Prepared:
    pool, out = inputs.pool(format), (torch.empty_like(inputs.k), torch.empty_like(inputs.v))
    return Prepared(
        lambda: kv_gather([pool], inputs.where, out=out, backend=backend), lambda _: torch.stack(out).float()
    )


def commit(inputs: Inputs, backend: str, format: str, source: str) -> Prepared:
    pool, target, where = inputs.pool(source), inputs.empty(format), inputs.where
    return Prepared(lambda: kv_commit(pool, where, target, where, backend=backend), lambda _: inputs.read(target))


def cases(shape: Shape, device: str) -> Iterator[Case]:
    def stored(format: str) -> int:
        """Bytes of the block's K and V in pages."""
        return page_bytes(format, shape.kv_heads, shape.page_size, shape.head_dim) * shape.queries // shape.page_size

    def ours(prepare: Callable[..., Prepared], formats: Sequence[str], others: int, **more: str) -> list[Contender]:
        """others: bytes on the other side of the op."""

        def want(inputs: Inputs, format: str) -> Result:
            prepared = prepare(inputs, "reference", format, **more)
            return prepared.read(prepared.run())

        return [
            Contender(
                f"ours-{backend}",
                format,
                partial(prepare, backend=backend, format=format, **more),
                0.0,
                others + stored(format),
                EXACT,
                kernel_of(backend, device, "kv_pages"),
                reference=partial(want, format=format),
            )
            for backend in BACKENDS[device]
            for format in formats
        ]

    for source, dtype in SOURCES.items():
        inputs = partial(make_inputs, shape, dtype)
        loose = 2 * shape.queries * shape.kv_heads * shape.head_dim * dtype.itemsize
        moved = {format: loose + stored(format) for format in KV_FORMATS}
        for op, prepare in (("append-from", append), ("gather-to", gather)):
            theirs = peers.contenders("kv_pages", device, 0.0, moved.__getitem__, op=op)
            contenders = [*ours(prepare, KV_FORMATS, loose), *theirs]
            yield Case("kv_pages", f"{op}-{source}", shape.name, inputs, truth, contenders)
    for source, formats in COMMITS.items():
        contenders = ours(commit, formats, stored(source), source=source)
        yield Case(
            "kv_pages",
            f"commit-from-{source}",
            shape.name,
            partial(make_inputs, shape, torch.bfloat16),
            truth,
            contenders,
        )
