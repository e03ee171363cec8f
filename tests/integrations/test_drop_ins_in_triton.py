"""FlashInfer's wrappers and flex_flash_attn_func in Triton: on a GPU or, without one, in its interpreter."""

import math

import torch

from inferix_kernels.integrations import flashinfer
from inferix_kernels.integrations.flex_flash_attn import flex_flash_attn_func
from tests.integrations.flashinfer_grid import batch
from tests.integrations.flex_ranges import inputs, told, wanted
from tests.triton_kernels.triton_mode import device  # noqa: F401, a fixture

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
QUERIES, KEYS, HEADS, KV_HEADS, WIDTH = [3, 2], [20, 7], 4, 2, 64


def test_paged(device):  # noqa: F811
    page_size = 5
    x = batch(QUERIES, KEYS, page_size, HEADS, WIDTH, kv_heads=KV_HEADS)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(0, device=device), backend="triton")
    options = {"causal": True, "window_left": 6, "logits_soft_cap": 10.0}
    wrapper.plan(x.qo_indptr, *x.pages, HEADS, KV_HEADS, WIDTH, page_size, **options)
    out, lse = wrapper.run(x.q.to(device), x.cache.to(device), return_lse=True, lse_base="ln")
    check(out, lse, x.wanted(6, 0, softcap=10.0))


def test_ragged(device):  # noqa: F811
    x = batch(QUERIES, KEYS, 16, HEADS, WIDTH, kv_heads=KV_HEADS)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(0, device=device), backend="triton")
    wrapper.plan(x.qo_indptr, torch.tensor([0, 20, 27]), HEADS, KV_HEADS, WIDTH, causal=True)
    sides = (torch.cat(side).to(device) for side in (x.k, x.v))
    out, lse = wrapper.run(x.q.to(device), *sides, return_lse=True, lse_base="ln")
    check(out, lse, x.wanted(right=0))


def test_ranges(device):  # noqa: F811
    """That overlap, each of another type."""
    q_ranges, k_ranges, kinds = [[0, 8], [4, 20]], [[0, 30], [10, 50]], [1, 3]
    q, k, v = inputs(20, 50)
    tensors = (x.to(device) for x in told(q_ranges, k_ranges, kinds))
    out, meta = flex_flash_attn_func(*(x.to(device) for x in (q, k, v)), *tensors, backend="triton")
    check(out, meta.lse, wanted(q, k, v, q_ranges, k_ranges, kinds))


def check(out, lse, want):
    assert math.isfinite(out.abs().sum())
    torch.testing.assert_close(out.double().cpu(), want[0], **CLOSE)
    torch.testing.assert_close(lse.double().cpu(), want[1], **CLOSE)
