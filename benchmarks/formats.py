"""What each page format costs and loses: bytes per token and head, and the error of attention with it.

Keys have outlier channels, as real models' do; the error is given with the frozen key mean taken off, as the KV store
does, and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inferix_kernels import KVPages, PageList, kv_append, make_plan, paged_attention
from inferix_kernels.layout import FORMATS, KV_FORMATS
from inferix_kernels.store.memory import page_bytes
from inferix_kernels.testing import clustered_keys_and_values

from .harness.measure import Settings
from .harness.rows import Row

TOKENS, QUERIES, HEADS, HEAD_DIM, PAGE = 4096, 256, 2, 128, 64


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    q, k, v = clustered_keys_and_values(TOKENS, QUERIES, HEADS, HEAD_DIM)
    where = PageList.of(range(TOKENS // PAGE), [PAGE] * (TOKENS // PAGE))
    plan = make_plan([(QUERIES, where.ids.tolist(), where.lens.tolist())])

    def attend(format: str, mean: Tensor) -> Tensor:
        """The reference: what is measured is the format, not a kernel."""
        pages = KVPages.empty(format, TOKENS // PAGE, HEADS, PAGE, HEAD_DIM)
        kv_append(k - mean, v, pages, where, backend="reference")
        return paged_attention(q, [pages], plan, backend="reference")[0]

    none, mean = torch.zeros(HEADS, HEAD_DIM), k[: 3 * PAGE].mean(0)
    exact = attend("fp32", none)
    for format in KV_FORMATS:
        size = page_bytes(format, 1, PAGE, HEAD_DIM) / PAGE
        row = Row("formats", "cost and error", f"D={HEAD_DIM}, pages of {PAGE}", "reference", format, "cpu", "ok")
        row.metrics = {"bytes per token-head": size, "of bf16": 4 * HEAD_DIM / size}
        for name, offset in (("error %", none), ("with frozen mean %", mean)):
            if offset is none or FORMATS[format].quantized:
                row.metrics[name] = 100 * float((attend(format, offset) - exact).norm() / exact.norm())
        yield row
