"""backend="flash-attn": our arguments in the library's terms, and what it can not take. The library is a stand-in with
its functions' parameters that computes densely on a CPU."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

from inferix_kernels import KVPages, PageList, Plan, Segment, flash_attn_backend, kv_append, make_plan, paged_attention
from inferix_kernels._dispatch import AUTO, PEERS, Unsupported
from tests.integrations.dense import attention, visible


def dense(q, k, v, ends, lens, table, window, softcap, scale, empty):
    """Sequences q[ends[b] : ends[b + 1]] over lens[b] tokens of the pages table[b]: out [T, Hq, D], lse [Hq, T]."""
    assert all(x.dtype == torch.int32 for x in (ends, lens, table)) and k.shape[2] < q.shape[1]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    for b, keys in enumerate(lens.tolist()):
        rows = slice(int(ends[b]), int(ends[b + 1]))
        k_b, v_b = (x[table[b].long()].flatten(0, 1)[None, :keys] for x in (k, v))
        count = torch.tensor([rows.stop - rows.start])
        mask = visible(int(count), keys, count * 0, torch.tensor([keys]), count, window)
        found, sums = attention(q[None, rows], k_b, v_b, mask, scale, softcap)
        out[rows], lse[:, rows] = found[0].to(q.dtype), torch.where(sums == -torch.inf, empty, sums)[0].float()
    return out, lse


def version_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
              causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
              return_attn_probs=False, block_table=None):  # fmt: skip
    lens = cu_seqlens_k.diff()
    assert k.shape[1] % 256 == 0 and max_seqlen_k == max(1, lens.max()) and max_seqlen_q == cu_seqlens_q.diff().max()
    assert return_attn_probs and not causal
    inf = torch.inf
    out, lse = dense(q, k, v, cu_seqlens_q, lens, block_table, window_size, softcap, softmax_scale, inf)
    return out, lse, q.new_empty(0)


def version_3(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
              cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
              max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None,
              softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
              rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
              return_softmax_lse=False):  # fmt: skip
    assert max_seqlen_q == cu_seqlens_q.diff().max() and return_softmax_lse
    arguments = (cu_seqlens_q, cache_seqlens, page_table, window_size, softcap, softmax_scale, -torch.inf)
    return *dense(q, k_cache, v_cache, *arguments), q.new_empty(0), q.new_empty(0)


def version_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
              min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
              softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
              num_splits=1, pack_gqa=None, deterministic=False, return_lse=False):  # fmt: skip
    assert cu_seqlens_k is None and max_seqlen_q == cu_seqlens_q.diff().max() and return_lse and -1 not in window_size
    window = tuple(-1 if side is None else side for side in window_size)
    return dense(q, k, v, cu_seqlens_q, seqused_k, page_table, window, softcap, softmax_scale, -torch.inf)


STAND_INS = {
    2: {"flash_attn": {"flash_attn_varlen_func": version_2}, "flash_attn.cute": None, "flash_attn_interface": None},
    3: {"flash_attn_interface": {"flash_attn_with_kvcache": version_3}},
    4: {"flash_attn": {}, "flash_attn.cute": {"flash_attn_varlen_func": version_4}, "flash_attn_interface": None},
}


@pytest.fixture
def install(monkeypatch):
    def install(version):
        for name, functions in STAND_INS[version].items():
            module = None if functions is None else SimpleNamespace(**functions)  # None: importing it fails
            monkeypatch.setitem(sys.modules, name, module)

    return install


PAGE = 256
IDS, LENS = [4, 0, 3], [PAGE, PAGE, 20]
PLANS = {
    "lists": [Segment(5, IDS, LENS), Segment(3, [1], [7])],
    "empty lists and pages": [Segment(2, [], []), Segment(3, [2, 1, 0], [PAGE, 100, 0]), Segment(0, [1], [9])],
    "causal": [Segment(5, IDS, LENS, window=(-1, 0)), Segment(9, [1], [7], window=(-1, 0))],
    "a window": [Segment(5, IDS, LENS, window=(300, 2)), Segment(3, [1], [7], window=(300, 2))],
}


def pool(format="bf16", page_size=PAGE, width=32):
    torch.manual_seed(0)
    pages = KVPages.empty(format, 5, 2, page_size, width)
    k, v = torch.randn(2, 5 * page_size, 2, width)
    kv_append(k, v, pages, PageList.of(range(5), [page_size] * 5))
    return pages


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("version", STAND_INS)
@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_a_call_is_the_same_in_the_librarys_terms(install, version, name, format):
    install(version)
    pages, plan = pool(format), make_plan(PLANS[name])
    q = torch.randn(int(plan.q_indptr[-1]), 4, 32).to(pages.k.dtype)
    for options in ({}, {"scale": 0.3, "softcap": 4.0}):
        want, want_lse = paged_attention(q, [pages], plan, **options, backend="reference")
        out, lse = paged_attention(q, [pages], plan, **options, backend="flash-attn")
        torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", STAND_INS)
def test_it_adds_to_what_is_there(install, version):
    install(version)
    pages, q = pool(), torch.randn(5, 4, 32).bfloat16()
    other, plan = make_plan([(5, [1], [50])]), make_plan(PLANS["lists"][:1])
    results = []
    for backend in ("reference", "flash-attn"):
        out, lse = paged_attention(q, [pages], other, out=torch.empty(5, 4, 32), backend="reference")
        results.append(paged_attention(q, [pages], plan, out=out, lse=lse, accumulate=True, backend=backend))
    torch.testing.assert_close(results[1], results[0], atol=1e-2, rtol=1e-2)
    whole, _ = paged_attention(q, [pages], make_plan([(5, [1, *IDS], [50, *LENS])]), backend="reference")
    torch.testing.assert_close(results[1][0], whole.float(), atol=1e-2, rtol=1e-2)


def changed(**fields):
    return make_plan(PLANS["lists"])._replace(**fields)


REFUSED = {
    "quantized pages": ({"pools": [pool("int8")]}, "reads bf16 and fp16 pages, got int8"),
    "float32 pages": ({"pools": [pool("fp32")]}, "reads bf16 and fp16 pages, got fp32"),
    "two pools": ({"pools": [pool(), pool()]}, "reads one pool, got 2"),
    "q of another dtype": ({"q": torch.randn(8, 4, 32)}, r"takes q in the pages' dtype, torch.bfloat16, got"),
    "a head width": ({"q": torch.randn(8, 4, 20).bfloat16(), "pools": [pool(width=20)]}, "a head_dim that is a mult"),
    "variants": ({"q": torch.randn(2, 8, 4, 32).bfloat16(),
                  "plan": changed(page_variants=torch.tensor([0, 1, 0, 1], dtype=torch.int32))}, "no variants of q"),
    "bias": ({"plan": changed(page_bias=torch.zeros(4))}, "has no plan.page_bias"),
    "starts": ({"plan": make_plan([(8, [1], [7], None, None, [3])])}, "entry 0 of the plan has 7 of 256 from slot 3"),
    "a page that is not full": ({"plan": make_plan([(8, [1, 2], [7, PAGE])])}, "entry 0 of the plan has 7 of 256"),
    "a list for each head": ({"plan": make_plan([(8, [1], [7]), (8, [2], [7])], lists_per_segment=2)}, "one page list"),
    "two windows": ({"plan": make_plan([Segment(5, IDS, LENS, window=(1, 0)), Segment(3, [1], [7], window=(2, 0))])},
                    "takes one window for all segments, got 2"),
    "another alignment": ({"plan": make_plan([Segment(8, [1], [7], window=(2, 0))])._replace(
        page_positions=torch.zeros(1, dtype=torch.int32))}, "takes windows aligned bottom-right"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_library_has_not_is_refused_before_anything_is_written(install, what):
    install(2)
    changes, message = REFUSED[what]
    arguments = {"q": torch.randn(8, 4, 32).bfloat16(), "pools": [pool()], "plan": changed()} | changes
    out = torch.full((8, *arguments["q"].shape[-2:]), 3.0)
    with pytest.raises(Unsupported, match=f"^flash-attn .*{message}"):
        paged_attention(**arguments, out=out, backend="flash-attn")
    assert (out == 3).all()


def test_version_2_takes_pages_of_256_tokens(install):
    install(2)
    small, plan, q = pool(page_size=64), make_plan([(3, [1], [7])]), torch.randn(3, 4, 32).bfloat16()
    with pytest.raises(Unsupported, match="flash_attn takes a page_size that is a multiple of 256, got 64"):
        paged_attention(q, [small], plan, backend="flash-attn")
    install(3)
    paged_attention(q, [small], plan, backend="flash-attn")


def test_pages_are_handed_over_where_they_lie(install, monkeypatch):
    install(3)
    pages, seen = pool(), []

    def look(q, k_cache, v_cache, **arguments):
        seen.extend((k_cache, v_cache))
        return version_3(q, k_cache, v_cache, **arguments)

    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_with_kvcache", look)
    paged_attention(torch.randn(3, 4, 32).bfloat16(), [pages], make_plan([(3, [1], [7])]), backend="flash-attn")
    assert [x.data_ptr() for x in seen] == [pages.k.data_ptr(), pages.v.data_ptr()]
    assert seen[0].shape == (5, PAGE, 2, 32)


def test_it_takes_what_the_op_takes():
    ours, public = (inspect.signature(x).parameters for x in (flash_attn_backend.paged_attention, paged_attention))
    assert [*ours, "backend"] == [*public]
    assert [x.kind for x in ours.values()] == [x.kind for x in public.values()][:-1]


def test_nothing_to_do_asks_nobody(install):
    install(4)
    empty = torch.zeros(1, dtype=torch.int32)
    plan = Plan(empty, empty, empty[:0], empty[:0])
    out, _ = paged_attention(torch.empty(0, 4, 32).bfloat16(), [pool()], plan, backend="flash-attn")
    assert out.shape == (0, 4, 32)


def test_without_the_library_it_says_so_and_auto_never_asks_for_it(monkeypatch):
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = torch.randn(3, 4, 32).bfloat16(), [pool()], make_plan([(3, [1], [7])])
    with pytest.raises(Unsupported, match="flash-attn is not installed"):
        paged_attention(*arguments, backend="flash-attn")
    assert not {"flash-attn"} & {name for names in AUTO.values() for name in names} and "flash-attn" in PEERS
    paged_attention(*arguments)
    with pytest.raises(Unsupported, match="kv_append: no Flash-Attn kernel"):
        kv_append(torch.randn(3, 2, 32), torch.randn(3, 2, 32), pool(), PageList.of([1], [3]), backend="flash-attn")
