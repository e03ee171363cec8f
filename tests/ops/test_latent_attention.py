"""latent_attention: the reference against the form that makes keys and values, Triton against the reference."""

import inspect

import pytest
import torch

from inferix_kernels import KVPages, kv_append, kv_gather, latent_attention, make_plan, paged_attention, reference
from inferix_kernels.testing import assert_close, mixed_pools
from inferix_kernels.triton_kernels import latent
from inferix_kernels.triton_kernels.launch import Call
from tests.triton_kernels import triton_mode

device = triton_mode.device
TILES = {"m": 32, "n": 16, "part": 512, "warps": 4, "stages": 2}
SCALE = 0.15


def inputs(device, formats=("latent8",), queries=(3, 2), lens=(16, 5, 0), heads=4, widths=(48, 8), dtype=torch.float32):
    """(q, pools, plan): segment s attends to all pages but its s first ones."""
    pools, ids, page_lens = mixed_pools(lens, 1, 16, widths, formats, device)
    plan = make_plan([(n, ids[s:], page_lens[s:]) for s, n in enumerate(queries)], device)
    q = torch.randn(sum(queries), heads, sum(widths), generator=torch.Generator().manual_seed(9))
    return q.to(device=device, dtype=dtype), pools, plan


def check(q, pools, plan, **kwargs):
    out = torch.full((*q.shape[-3:-1], pools[0].head_dim), 7.0, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[-3:-1], 7.0, device=q.device)
    latent.run_latent_attention(Call(q, pools, plan, SCALE, out, lse), **{"chosen": TILES, **kwargs})
    want_out, want_lse = latent_attention(q, pools, plan, scale=SCALE, out=torch.empty_like(out), backend="reference")
    assert not out.isnan().any()
    assert_close("out", out, want_out, 64)
    assert_close("lse", lse, want_lse, q.shape[-1])


def test_it_is_attention_with_keys_and_values_made_from_the_latent():
    """Heads of 24 + 8 channels for keys and 32 for values, from a latent of 48."""
    generator = torch.Generator().manual_seed(2)
    heads, nope, rotary, wide = 3, 24, 8, 48
    up_k, up_v = torch.randn(heads, nope, wide, generator=generator), torch.randn(heads, 32, wide, generator=generator)
    q = torch.randn(6, heads, nope + rotary, generator=generator)
    _, pools, _ = inputs("cpu")
    where = reference.kv_pages.PageList.of(*pages_of(pools[0]))
    plan = make_plan([(6, where.ids.tolist(), where.lens.tolist())])

    rows, turned = kv_gather(pools, where)  # [L, 1, 48], [L, 1, 8]
    k = torch.cat((torch.einsum("lxw,hnw->lhn", rows, up_k), turned.expand(-1, heads, -1)), -1)
    v = torch.einsum("lxw,hvw->lhv", rows, up_v)
    expanded = KVPages.empty("fp32", pools[0].pages, heads, 16, 32)
    kv_append(k, v, expanded, where)
    want, want_lse = paged_attention(q, [expanded], plan, scale=SCALE, backend="reference")

    absorbed = torch.cat((torch.einsum("thn,hnw->thw", q[..., :nope], up_k), q[..., nope:]), -1)
    out, lse = latent_attention(absorbed, pools, plan, scale=SCALE, backend="reference")
    out = torch.einsum("thw,hvw->thv", out, up_v)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def pages_of(pool):
    """Pages that mixed_pools filled: those whose rows have a scale."""
    ids = [page for page in range(pool.pages) if pool.k_scales[page, 0, 0].isfinite()]
    lens = [int(pool.k_scales[page, 0].isfinite().sum()) for page in ids]
    return ids, lens


@pytest.mark.parametrize("formats", [("latent8",), ("fp32",), ("fp8",), ("int4",), ("latent8", "bf16")], ids=str)
def test_pages_of_every_kind(formats, device):
    check(*inputs(device, formats))


@pytest.mark.parametrize("formats", [("latent8",), ("int4",)], ids=str)
def test_two_programs_share_a_wide_latent(formats, device, monkeypatch):
    monkeypatch.setitem(TILES, "part", 32)
    monkeypatch.setattr(latent, "config", lambda *args: TILES)
    q, pools, plan = inputs(device, formats, widths=(52, 8))  # parts of 32 and 20
    check(q, pools, plan)
    out, lse = torch.full((5, 4, 52), torch.nan, device=device), torch.full((5, 4), -torch.inf, device=device)
    nothing = make_plan([(5, [], [])], device)
    for listed in (nothing, plan, nothing):
        latent_attention(q, pools, listed, scale=SCALE, out=out, lse=lse, accumulate=True, backend="triton")
    want_out, want_lse = latent_attention(q, pools, plan, scale=SCALE, backend="reference")
    assert_close("out", out, want_out, 64)
    assert_close("lse", lse, want_lse, 60)


@pytest.mark.parametrize("splits", [1, 2])
def test_splits_variants_and_bias(splits, device):
    q, pools, plan = inputs(device, lens=(16, 5, 9))
    bias = torch.tensor([0.5, -torch.inf, 1.0, 0.0, -2.0], device=device)
    variants = torch.tensor([1, 0, 0, 1, 1], dtype=torch.int32, device=device)
    check(torch.stack((q, -q)), pools, plan._replace(page_bias=bias, page_variants=variants), splits=splits)


def test_accumulating_over_groups_of_pages_equals_one_call(device):
    q, pools, whole = inputs(device, queries=(3,), lens=(16, 5, 12))
    ids, lens = whole.page_ids.tolist(), whole.page_lens.tolist()
    out, lse = torch.full((3, 4, 48), torch.nan, device=device), torch.full((3, 4), -torch.inf, device=device)
    for part in (slice(0, 1), slice(1, 3)):
        plan = make_plan([(3, ids[part], lens[part])], device)
        latent_attention(q, pools, plan, scale=SCALE, out=out, lse=lse, accumulate=True, backend="triton")
    want_out, want_lse = latent_attention(q, pools, whole, scale=SCALE, backend="reference")
    assert_close("out", out, want_out, 64)
    assert_close("lse", lse, want_lse, 56)


def test_products_of_halves(device):
    """Weights times a row's scale are rounded once, half a step of 2^-8; the rows' codes are exact."""
    q, pools, plan = inputs(device, queries=(17,), lens=(16, 5, 12), dtype=torch.bfloat16)
    out, _ = latent_attention(q, pools, plan, scale=SCALE, out=torch.empty(17, 4, 48, device=device), backend="triton")
    want, _ = latent_attention(q, pools, plan, scale=SCALE, out=torch.empty_like(out), backend="reference")
    sizes = pools[0]._replace(k=pools[0].k.abs())  # sums of |weight * row|, with the weights of the row's size: a bound
    largest, _ = kv_gather([sizes], reference.kv_pages.PageList.of(*pages_of(sizes)), torch.float32)
    assert float((out - want).abs().max()) <= 1.1 * 2.0**-9 * float(largest.max())


def test_nothing_seen_is_zero_and_minus_infinity(device):
    q, pools, _ = inputs(device)
    out, lse = latent_attention(q, pools, make_plan([(5, [], [])], device), scale=SCALE, backend="triton")
    assert not out.any() and (lse == -torch.inf).all()


def test_parameters_are_the_references():
    assert inspect.signature(latent.latent_attention) == inspect.signature(reference.latent_attention)
