"""FlashInfer's grids of prefill against dense attention in float64, with its pass rule."""

import pytest
import torch

from inferix_kernels.integrations import flashinfer
from tests.integrations.flashinfer_grid import GRID, KV_HEADS, MOST, WORKSPACE, batch, cases
from tests.integrations.masked import attention, window

CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # theirs
LOG2_E = torch.tensor(2.0).log().reciprocal().item()
THERE, SMALL, RUN = cases()


def test_the_slice_of_the_grid_has_every_value_and_what_it_leaves_out_is_too_large():
    assert [len(x) for x in (THERE, SMALL, RUN)] == [2916, 756, 25]
    for i, (name, values) in enumerate(GRID.items()):
        assert {case[i] for case in SMALL} == set(values), name
        assert {case[i] for case in RUN} == set(values), name
    left_out = set(THERE) - set(SMALL)
    assert all(case.size > MOST for case in left_out)


@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
def test_paged(case):
    """None is refused. The layouts take turns."""
    x = batch([case.qo_len] * case.batch, [case.kv_len] * case.batch, case.page_size, case.heads, case.head_dim)
    kv_layout = ("NHD", "HND")[RUN.index(case) % 2]
    cache = x.cache if kv_layout == "NHD" else x.cache.transpose(2, 3).contiguous()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, kv_layout)
    wrapper.plan(x.qo_indptr, *x.pages, case.heads, KV_HEADS, case.head_dim, case.page_size, causal=case.causal)
    got = wrapper.run(x.q, cache, return_lse=case.return_lse)
    out, lse = x.wanted(right=0 if case.causal else -1)
    if case.return_lse:
        torch.testing.assert_close(got[1].double(), lse * LOG2_E, **CLOSE)
        got = got[0]
    torch.testing.assert_close(got.double(), out, **CLOSE)


@pytest.mark.parametrize("case", RUN[::4], ids=lambda case: case.name)
def test_ragged(case):
    x = batch([case.qo_len] * case.batch, [case.kv_len] * case.batch, case.page_size, case.heads, case.head_dim)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    kv_indptr = torch.arange(case.batch + 1).int() * case.kv_len
    wrapper.plan(x.qo_indptr, kv_indptr, case.heads, KV_HEADS, case.head_dim, causal=case.causal)
    out, lse = wrapper.run(x.q, torch.cat(x.k), torch.cat(x.v), return_lse=True)
    wanted = x.wanted(right=0 if case.causal else -1)
    torch.testing.assert_close(out.double(), wanted[0], **CLOSE)
    torch.testing.assert_close(lse.double(), wanted[1] * LOG2_E, **CLOSE)


# Of their Hopper grid's lengths 9999 and 32767 are left out for their size, and 1763 has one head.
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("logits_soft_cap", [0.0, 30.0])
@pytest.mark.parametrize("length, heads, causal", [(11, 1, False), (12, 4, True), (99, 8, True), (1763, 1, True)])
def test_single(length, heads, causal, logits_soft_cap, kv_layout):
    q, k, v = torch.randn(3, length, heads, 128, generator=torch.Generator().manual_seed(length)).half().unbind()
    sides = (k, v) if kv_layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    options = {"causal": causal, "logits_soft_cap": logits_soft_cap, "kv_layout": kv_layout, "return_lse": True}
    out, lse = flashinfer.single_prefill_with_kv_cache(q, *sides, **options)
    wanted = attention(q, k, v, window(length, length, -1, 0 if causal else -1), softcap=logits_soft_cap)
    torch.testing.assert_close(out.double(), wanted[0], **CLOSE)
    torch.testing.assert_close(lse.double(), wanted[1] * LOG2_E, **CLOSE)


@pytest.mark.parametrize("q_len_per_req", [1, 3])
@pytest.mark.parametrize("page_size", [1, 8, 16])
def test_decode(page_size, q_len_per_req):
    x = batch([q_len_per_req] * 4, [54, 97, 3, 512], page_size, 8, 128)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(*x.pages, 8, KV_HEADS, 128, page_size, q_len_per_req=q_len_per_req, data_type=torch.float16)
    out, lse = wrapper.run(x.q, x.cache, return_lse=True)
    wanted = x.wanted(right=0)
    torch.testing.assert_close(out.double(), wanted[0], **CLOSE)
    torch.testing.assert_close(lse.double(), wanted[1] * LOG2_E, **CLOSE)
    narrow = x.wanted(6, 0, scale=0.1)[0]
    torch.testing.assert_close(wrapper.forward(x.q, x.cache, window_left=6, sm_scale=0.1).double(), narrow, **CLOSE)
