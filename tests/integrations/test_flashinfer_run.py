"""FlashInfer's wrappers: conventions, what they refuse, whose memory they read, and that they compile."""

import math

import pytest
import torch

from inferix_kernels import KVPages, PageList, kv_append, kv_gather
from inferix_kernels._dispatch import Unsupported
from inferix_kernels.integrations import flashinfer
from inferix_kernels.integrations.flashinfer.page import pool_of
from tests.integrations.bytes import Allocations
from tests.integrations.flashinfer_grid import KV_HEADS, WORKSPACE, batch
from tests.integrations.masked import attention, window

QUERIES, KEYS, PAGE, HEADS, WIDTH = [5, 2, 9], [40, 7, 23], 8, 8, 64
LOG2_E = math.log2(math.e)
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def planned(x, kv_layout="NHD", **options):
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, kv_layout)
    wrapper.plan(x.qo_indptr, *x.pages, HEADS, KV_HEADS, WIDTH, PAGE, **options)
    return wrapper


@pytest.fixture(scope="module")
def x():
    return batch(QUERIES, KEYS, PAGE, HEADS, WIDTH)


def ragged(x, **options):
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    kv_indptr = torch.tensor([0, *KEYS]).cumsum(0)
    wrapper.plan(x.qo_indptr, kv_indptr, HEADS, KV_HEADS, WIDTH, **options)
    return wrapper


def of(cache, kind):
    nhd, hnd = cache, cache.transpose(2, 3).contiguous()
    return {
        "NHD": ("NHD", nhd),
        "HND": ("HND", hnd),
        "NHD, two": ("NHD", tuple(nhd.unbind(1))),
        "HND, two": ("HND", tuple(hnd.unbind(1))),
        "KVPages": ("NHD", KVPages("fp16", *(side.transpose(1, 2) for side in nhd.unbind(1)))),
    }[kind]


@pytest.mark.parametrize("kind", ["NHD", "HND", "NHD, two", "HND, two", "KVPages"])
def test_a_cache_is_read_where_it_lies_and_never_copied(kind, x):
    kv_layout, cache = of(x.cache, kind)
    pool = pool_of(cache, kv_layout)
    sides = cache[:2] if isinstance(cache, tuple) else cache.unbind(1)
    if kind == "KVPages":
        sides = cache.k, cache.v
    assert [side.data_ptr() for side in (pool.k, pool.v)] == [side.data_ptr() for side in sides]
    wrapper = planned(x, kv_layout, causal=True)
    out = torch.empty_like(x.q)
    with Allocations() as made:
        got, lse = wrapper.run(x.q, cache, out=out, return_lse=True)
    assert got is out and made.nbytes <= lse.nbytes * 2  # nothing but lse
    torch.testing.assert_close(out.double(), x.wanted(right=0)[0], **CLOSE)


def test_ragged_keys_are_read_where_they_lie(x):
    """Also where they are every other token, head by head, of a larger tensor."""
    wrapper, sides = ragged(x), [torch.cat(side) for side in (x.k, x.v)]
    wide = torch.zeros(len(sides[0]), 2, KV_HEADS, 2, WIDTH, dtype=torch.float16)
    wide[:, 0, :, 0], wide[:, 1, :, 1] = sides
    with Allocations() as made:
        out = wrapper.run(x.q, wide[:, 0, :, 0], wide[:, 1, :, 1])
    torch.testing.assert_close(out.double(), x.wanted()[0], **CLOSE)
    assert made.nbytes < out.nbytes + 2000  # and a plan of a few numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    x = batch(QUERIES, KEYS, PAGE, HEADS, WIDTH, dtype=dtype)
    out = planned(x, causal=True, q_data_type=dtype).run(x.q, x.cache)
    assert out.dtype == dtype
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5  # of a result near 1, half a unit in the last place and more
    torch.testing.assert_close(out.double(), x.wanted(right=0)[0], rtol=bound, atol=bound)


def test_o_data_type_may_be_float32(x):
    out = planned(x, o_data_type="float32").run(x.q, x.cache)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), x.wanted()[0], **CLOSE)


@pytest.mark.parametrize("make", [planned, ragged])
@pytest.mark.parametrize(
    "left, causal, softcap, scale", [(7, True, 0.0, None), (0, False, 5.0, 0.2), (3, True, 30.0, 1.0)]
)
def test_windows_softcap_and_scale(make, left, causal, softcap, scale, x):
    """A window alone does not hide what comes later, as in FlashInfer."""
    wrapper = make(x, window_left=left, causal=causal, logits_soft_cap=softcap, sm_scale=scale)
    sides = (x.cache,) if make is planned else (torch.cat(x.k), torch.cat(x.v))
    wanted = x.wanted(left, 0 if causal else -1, softcap=softcap, scale=scale)
    torch.testing.assert_close(wrapper.run(x.q, *sides).double(), wanted[0], **CLOSE)
    old, lse = wrapper.forward_return_lse(x.q, *sides, causal=True)  # which says all of it anew
    torch.testing.assert_close(old.double(), x.wanted(right=0)[0], **CLOSE)
    torch.testing.assert_close(lse.double(), x.wanted(right=0)[1] * LOG2_E, **CLOSE)


def test_a_window_may_be_another_for_one_run(x):
    wrapper = planned(x, causal=True, window_left=4)
    for left in (2, -1, 0, None):
        wanted = x.wanted(4 if left is None else left, 0)
        torch.testing.assert_close(wrapper.run(x.q, x.cache, window_left=left).double(), wanted[0], **CLOSE)


# lse_base, lse_layout: what a natural lse [T, H] becomes. The defaults come first.
LSE = {
    None: lambda natural: natural * LOG2_E,
    ("log2", "NH"): lambda natural: natural * LOG2_E,
    ("ln", "NH"): lambda natural: natural,
    ("log2", "HN"): lambda natural: (natural * LOG2_E).t(),
    ("ln", "HN"): lambda natural: natural.t(),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("make", [planned, ragged])
@pytest.mark.parametrize("words", LSE)
def test_lse_conventions(words, make, given):
    """Queries without a key, of an empty sequence or before the first one, have 0 and -inf."""
    x = batch([4, 3, 6], [9, 0, 2], PAGE, HEADS, WIDTH)
    if make is ragged:
        wrapper, sides = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE), (torch.cat(x.k), torch.cat(x.v))
        wrapper.plan(x.qo_indptr, torch.tensor([0, 9, 9, 11]), HEADS, KV_HEADS, WIDTH, causal=True)
    else:
        wrapper, sides = planned(x, causal=True), (x.cache,)
    wanted = LSE[words](x.wanted(right=0)[1])
    options = {} if words is None else dict(zip(("lse_base", "lse_layout"), words))
    if given:
        options["lse"] = torch.empty(wanted.shape)
    out, lse = wrapper.run(x.q, *sides, return_lse=True, **options)
    assert lse.is_contiguous() and lse.dtype == torch.float32 and (not given or lse is options["lse"])
    torch.testing.assert_close(lse.double(), wanted, **CLOSE)
    assert torch.isinf(lse).sum() == (3 + 4) * HEADS and not out[4:11].any()


@pytest.mark.parametrize("format", ["int8", "i8f8", "fp8", "int4", "bf16"])
def test_our_pages_in_place_of_a_cache(format, x):
    """What they hold, dequantized, under dense attention; 2 % of it is what 8 bits of q and weights may add."""
    ids = x.indices.tolist()
    pages = KVPages.empty(format, len(x.cache), KV_HEADS, PAGE, WIDTH)
    lens = [min(PAGE, length - first) for length in KEYS for first in range(0, length, PAGE)]
    where = PageList.of(ids, lens)
    kv_append(torch.cat(x.k), torch.cat(x.v), pages, where)
    k, v = (side.split(KEYS) for side in kv_gather([pages], where))
    wrapper = planned(x, causal=True, kv_data_type=pages.k.dtype)
    out, lse = wrapper.run(x.q, pages, return_lse=True)
    wanted = x._replace(k=k, v=v).wanted(right=0)
    assert (out.double() - wanted[0]).norm() < 0.02 * wanted[0].norm()
    torch.testing.assert_close(lse.double(), wanted[1] * LOG2_E, rtol=0, atol=0.05)
    k[0].mul_(2)
    assert (out.double() - x._replace(k=k, v=v).wanted(right=0)[0]).norm() > 0.05 * wanted[0].norm()


def test_runs_compile_to_one_graph_that_serves_every_layer(x):
    """Layers whose caches are one tensor: at offsets of which the first call knows nothing."""
    paged, loose = planned(x, causal=True, window_left=9), ragged(x, causal=True, window_left=9)
    caches = torch.stack((x.cache, -x.cache))
    k, v = (torch.stack((side, -side)) for side in (torch.cat(x.k), torch.cat(x.v)))

    def both(q, cache, k, v):
        first = paged.run(q, cache, return_lse=True)
        return *first, loose.run(q, k, v, lse_layout="HN", return_lse=True)[1], paged.run(q, cache, window_left=3)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for layer in zip(caches, k, v):
        for got, wanted in zip(compiled(x.q, *layer), both(x.q, *layer)):
            assert torch.equal(got, wanted)


def test_single_prefill_compiles_to_one_graph():
    q, k, v = torch.randn(3, 20, 4, 64).half().unbind()
    compiled = torch.compile(flashinfer.single_prefill_with_kv_cache, fullgraph=True, backend="aot_eager")
    wanted = attention(q, k, v, window(20, 20, -1, 0))[0]
    torch.testing.assert_close(compiled(q, k, v, causal=True).double(), wanted, **CLOSE)


def test_what_does_not_fit_the_plan_is_refused(x):
    wrapper = planned(x)
    for said, q, cache, options in [
        ("q must have qo_indptr", x.q[:-1], x.cache, {}),
        ("q must be torch.float16, the q_data_type", x.q.float(), x.cache, {}),
        ("paged_kv_cache must be torch.float16, the kv_data_type", x.q, x.cache.bfloat16(), {}),
        (r"q must be \[16, 8, 64\]", x.q[:, :4], x.cache, {}),
        (r"paged_kv_cache must have the \(KV heads, head_dim, page_size\)", x.q, x.cache[:, :, :4], {}),
        ("paged_kv_cache must be", x.q, x.cache[:, :1], {}),
        ("out must be torch.float16, the o_data_type", x.q, x.cache, {"out": torch.empty(x.q.shape)}),
        ("lse must be None without return_lse", x.q, x.cache, {"lse": torch.empty(16, HEADS)}),
        ("lse must be", x.q, x.cache, {"lse": torch.empty(16, HEADS), "return_lse": True, "lse_layout": "HN"}),
        ("lse must be", x.q, x.cache, {"lse": torch.empty(HEADS, 16), "return_lse": True}),
        ("lse_base must be", x.q, x.cache, {"lse_base": "e", "return_lse": True}),
        ("lse_layout must be", x.q, x.cache, {"lse_layout": "TH", "return_lse": True}),
    ]:
        with pytest.raises(ValueError, match=said):
            wrapper.run(q, cache, **options)
    with pytest.raises(RuntimeError, match=r"call plan\(\) first"):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE).run(x.q, x.cache)


def test_a_plan_that_makes_no_sense_is_refused(x):
    wrapper = planned(x)
    good = [x.qo_indptr, *x.pages, HEADS, KV_HEADS, WIDTH, PAGE]
    for i, bad, said in [
        (0, x.qo_indptr + 1, "qo_indptr must rise from 0"),
        (1, x.indptr.flip(0), "paged_kv_indptr must rise from 0"),
        (1, x.indptr[:-1], r"paged_kv_indptr must be \[4\] like qo_indptr"),
        (2, x.indices[:-1], "paged_kv_indices must be"),
        (3, x.last_page_len + PAGE, "paged_kv_last_page_len must be"),
        (4, 6, "num_qo_heads must be a multiple"),
    ]:
        with pytest.raises(ValueError, match=said):
            wrapper.plan(*[bad if i == j else argument for j, argument in enumerate(good)], causal=True)
    for name, bad in [("window_left", -2), ("logits_soft_cap", -1.0), ("q_data_type", "half precision")]:
        with pytest.raises(ValueError, match=f"{name} must be"):
            wrapper.plan(
                x.qo_indptr[:2], x.indptr[:2], x.indices, x.last_page_len[:1], *good[4:], **{"causal": True, name: bad}
            )
    torch.testing.assert_close(wrapper.run(x.q, x.cache).double(), x.wanted()[0], **CLOSE)  # the plan of before


UNSUPPORTED = {
    "init": {"use_cuda_graph": True, "jit_args": [1], "backend": "fa2", "variant_owns_mask": True},
    "plan": {
        "custom_mask": torch.ones(4), "packed_custom_mask": torch.ones(4), "pos_encoding_mode": "ROPE_LLAMA",
        "use_fp16_qk_reduction": True, "rope_theta": 1e4, "head_dim_vo": 128, "seq_lens": torch.ones(3),
        "fixed_split_size": 4, "use_token_head_sf": True, "q_data_type": "float8_e4m3fn", "o_data_type": "bfloat16",
    },
    "run": {"k_scale": 0.5, "v_scale": torch.ones(1), "sinks": torch.ones(HEADS), "kv_cache_sf": torch.ones(1)},
}  # fmt: skip


@pytest.mark.parametrize("call, name", [(call, name) for call, names in UNSUPPORTED.items() for name in names])
def test_what_we_do_not_have_is_refused_by_its_name(call, name, x):
    option = {name: UNSUPPORTED[call][name]}
    wrapper = planned(x)
    with pytest.raises(Unsupported, match=name):
        if call == "init":
            flashinfer.BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, **option)
        elif call == "plan":
            wrapper.plan(x.qo_indptr, *x.pages, HEADS, KV_HEADS, WIDTH, PAGE, **option)
        else:
            wrapper.run(x.q, x.cache, **option)
    wrapper.run(x.q, x.cache, k_scale=1.0, enable_pdl=True)  # which change nothing
