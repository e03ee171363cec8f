"""paged_attention and merge_attention: the reference against plain softmax, every backend against the reference."""

import concurrent.futures
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from inferix_kernels import PageList, compiled, kv_gather, make_plan, merge_attention, paged_attention
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.testing import assert_close, attention_inputs, filled_pool

ROOT = Path(__file__).parents[2]

# queries per segment, lens of the pages, Hq, H, D, page_size: ragged tails, one token, empty pages, GQA 1 / 3 / 6,
# rows that do not fill a register, pages larger than the tile of a kernel.
CASES = {
    "one token": ([1], [1], 1, 1, 64, 16),
    "ragged": ([3, 2], [16, 5, 16, 1], 2, 2, 16, 16),
    "an empty page": ([17], [16, 0, 9], 2, 2, 96, 16),
    "three query heads read one": ([5, 20], [8, 8, 3], 6, 2, 64, 8),
    "six query heads read one": ([33], [40, 40, 39], 6, 1, 128, 40),
    "rows of several tasks": ([150, 3], [64, 64, 17], 4, 4, 64, 64),
    "a page of several tiles": ([20], [200, 130], 2, 2, 64, 200),
    "odd sizes": ([7, 1], [7, 3], 3, 3, 20, 7),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXES = [((format,), torch.float32) for format in KV_FORMATS] + [(KV_FORMATS, dtype) for dtype in DTYPES]


# Where the CPU has instructions for it, queries and weights are rounded as the pages are. What that may add to the
# output (a share of its L2 norm) and to an lse; measured: 0.25 % for 8 bits of mantissa; 0.8 % where a query is held in
# 127ths of its largest number and a weight in 255ths of the largest in its page.
ROUNDING = {
    "bf16": (0.004, 0.01),
    "int4": (0.006, 0.01),
    "fp8": (0.006, 0.01),
    "i8f8": (0.012, 0.03),
    "int8": (0.012, 0.03),
}


def assert_attention(got, want, plan, formats, backend="compiled"):
    """(out, lse) of a backend against the reference's."""
    bounds = [ROUNDING[format] for format in formats if format in ROUNDING]
    if backend != "compiled" or not bounds or compiled.Isa.avx512_vnni > compiled.ISA:
        assert_close("out", got[0], want[0], keys(plan))
        return assert_close("lse", got[1], want[1], got[0].shape[2])
    share, step = max(bounds)
    out, wanted = (x[0].float() for x in (got, want))
    half = torch.finfo(got[0].dtype).eps / 2 if got[0].dtype != torch.float32 else 0.0
    assert (out - wanted).norm() <= (share + half) * wanted.norm()
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=step)


def inputs(case: str, **kwargs):
    queries, lens, query_heads, heads, head_dim, page_size = CASES[case]
    sizes = {"query_heads": query_heads, "heads": heads, "head_dim": head_dim, "page_size": page_size}
    return attention_inputs(queries, lens, **sizes, **kwargs)


def keys(plan) -> int:
    return int(plan.page_lens.sum())


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_softmax_over_gathered_tokens(case):
    q, pools, plan = inputs(case, formats=KV_FORMATS)
    out, lse = paged_attention(q, pools, plan, backend="reference")
    starts, lists = plan.q_indptr.tolist(), plan.page_indptr.tolist()
    for s in range(len(starts) - 1):
        entries = slice(lists[s], lists[s + 1])
        k, v = kv_gather(pools, PageList(plan.page_ids[entries], plan.page_lens[entries]), backend="reference")
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1).double() for x in (k, v))
        rows = q[starts[s] : starts[s + 1]].transpose(0, 1).double()
        scores = rows @ k.mT * q.shape[2] ** -0.5
        assert_close(
            "out", out[starts[s] : starts[s + 1]], (scores.softmax(-1) @ v).transpose(0, 1).float(), keys(plan)
        )
        assert_close("lse", lse[starts[s] : starts[s + 1]], scores.logsumexp(-1).T.float(), q.shape[2])


@pytest.mark.parametrize("formats, dtype", MIXES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_matches_the_reference(case, formats, dtype, backend, device):
    q, pools, plan = inputs(case, formats=formats, dtype=dtype, device=device)
    got, want = (paged_attention(q, pools, plan, backend=which) for which in (backend, "reference"))
    assert not got[0].isnan().any()  # every slot that must not be read is poisoned
    assert_attention(got, want, plan, formats, backend)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    queries=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    lens=st.lists(st.integers(0, 24), min_size=1, max_size=8),
    heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 6]),
    head_dim=st.integers(1, 72),
    formats=st.sampled_from([formats for formats, _ in MIXES]),
)
def test_attention_matches_the_reference_on_any_sizes(queries, lens, heads, group, head_dim, formats):
    hypothesis.assume(head_dim % 2 == 0 or "int4" not in formats)  # its codes come in pairs
    sizes = {"query_heads": heads * group, "heads": heads, "head_dim": head_dim, "page_size": 24}
    q, pools, plan = attention_inputs(queries, lens, **sizes, formats=formats)
    got, want = (paged_attention(q, pools, plan, backend=which) for which in ("compiled", "reference"))
    assert_attention(got, want, plan, formats)


def lists_per_head(plan, heads, generator):
    """The same segments, each KV head with a random part of the pages, in an order of its own: perhaps none."""
    starts, lists = plan.q_indptr.tolist(), plan.page_indptr.tolist()
    segments = []
    for s in range(len(starts) - 1):
        for _ in range(heads):
            entries = torch.randperm(lists[s + 1] - lists[s], generator=generator) + lists[s]
            entries = entries[: int(torch.randint(len(entries) + 1, (), generator=generator))]
            ids, lens = plan.page_ids[entries].tolist(), plan.page_lens[entries].tolist()
            segments.append((starts[s + 1] - starts[s], ids, lens))
    return make_plan(segments, plan.page_ids.device, lists_per_segment=heads)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_lists_per_head_are_calls_per_head(case, threads, request):
    """Bit for bit, with however many threads torch multiplies."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    q, pools, plan = inputs(case, formats=KV_FORMATS)
    H, generator = pools[0].heads, torch.Generator().manual_seed(5)
    group = q.shape[1] // H
    plan = lists_per_head(plan, H, generator)
    out, lse = paged_attention(q, pools, plan, backend="reference")
    starts, lists = plan.q_indptr.tolist(), plan.page_indptr.tolist()
    for head in range(H):
        entries = [slice(lists[s * H + head], lists[s * H + head + 1]) for s in range(len(starts) - 1)]
        own = make_plan(
            [
                (starts[s + 1] - starts[s], plan.page_ids[part].tolist(), plan.page_lens[part].tolist())
                for s, part in enumerate(entries)
            ]
        )
        want_out, want_lse = paged_attention(q, pools, own, backend="reference")
        heads = slice(head * group, (head + 1) * group)
        assert torch.equal(out[:, heads], want_out[:, heads]) and torch.equal(lse[:, heads], want_lse[:, heads])


def test_the_bias_of_a_page_is_added_to_its_scores():
    q, pools, plan = inputs("ragged")
    bias = torch.tensor([0.7, -torch.inf, -1.3, 2.0, 0.0, 0.0, -torch.inf])
    assert len(bias) == len(plan.page_ids)
    out, lse = paged_attention(q, pools, plan._replace(page_bias=bias), backend="reference")
    starts, lists = plan.q_indptr.tolist(), plan.page_indptr.tolist()
    for s in range(2):
        entries = slice(lists[s], lists[s + 1])
        lens = plan.page_lens[entries]
        k, v = kv_gather(pools, PageList(plan.page_ids[entries], lens), backend="reference")
        k, v = (x.transpose(0, 1).double() for x in (k, v))
        scores = q[starts[s] : starts[s + 1]].transpose(0, 1).double() @ k.mT * q.shape[2] ** -0.5
        scores = scores + bias[entries].repeat_interleave(lens)
        want = (scores.softmax(-1) @ v).transpose(0, 1).float()
        assert_close("out", out[starts[s] : starts[s + 1]], want, keys(plan))
        assert_close("lse", lse[starts[s] : starts[s + 1]], scores.logsumexp(-1).T.float(), q.shape[2])


def test_a_page_meets_the_variant_of_q_that_the_plan_names():
    q, pools, plan = inputs("ragged")
    others = torch.stack((torch.full_like(q, torch.nan), q, q * 2))
    variants = torch.full_like(plan.page_ids, 1)
    out, lse = paged_attention(others, pools, plan._replace(page_variants=variants), backend="reference")
    want_out, want_lse = paged_attention(q, pools, plan, backend="reference")
    assert torch.equal(out, want_out) and torch.equal(lse, want_lse)  # the NaN of variant 0 is not read
    parts = []  # each half of the pages with its own variant, joined
    for variant in (1, 2):
        chosen = (torch.arange(len(plan.page_ids)) % 2 == variant - 1).float().log()  # 0 or -inf
        parts.append(paged_attention(others[variant], pools, plan._replace(page_bias=chosen), backend="reference"))
    variants = torch.arange(len(plan.page_ids), dtype=torch.int32) % 2 + 1
    out, lse = paged_attention(others, pools, plan._replace(page_variants=variants), backend="reference")
    want_out, want_lse = merge_attention(*parts[0], *parts[1], backend="reference")
    assert_close("out", out, want_out, keys(plan))
    assert_close("lse", lse, want_lse, q.shape[2])


@pytest.mark.parametrize("formats, dtype", [(KV_FORMATS, torch.float32), (("bf16", "int8"), torch.bfloat16)], ids=str)
@pytest.mark.parametrize("what", ["lists per head", "bias", "variants", "all of them"])
@pytest.mark.parametrize("case", CASES)
def test_plans_of_every_kind_match_the_reference(case, what, formats, dtype, backend, device):
    q, pools, plan = inputs(case, formats=formats, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(7)
    if what in ("lists per head", "all of them"):
        plan = lists_per_head(plan, pools[0].heads, generator)
    pages = len(plan.page_ids)
    if what in ("bias", "all of them"):
        bias = torch.randn(pages, generator=generator) * 3
        bias[torch.rand(pages, generator=generator) < 0.3] = -torch.inf
        plan = plan._replace(page_bias=bias.to(device))
    if what in ("variants", "all of them"):
        q = torch.stack((q, q.flip(0), -q, q * 0.5))
        variants = torch.randint(4, (pages,), generator=generator, dtype=torch.int32)
        plan = plan._replace(page_variants=variants.to(device))
    got, want = (paged_attention(q, pools, plan, backend=which) for which in (backend, "reference"))
    assert not got[0].isnan().any()
    assert_attention(got, want, plan, formats, backend)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_bias_of_minus_infinity_everywhere_sees_nothing(accumulate, backend, device):
    q, pools, plan = inputs("ragged", device=device)
    plan = plan._replace(page_bias=torch.full(plan.page_ids.shape, -torch.inf, device=device))
    out, lse = torch.ones_like(q), torch.full(q.shape[:2], 0.5, device=device)
    paged_attention(q, pools, plan, out=out, lse=lse, accumulate=accumulate, backend=backend)
    assert (out == (1 if accumulate else 0)).all() and (lse == (0.5 if accumulate else -torch.inf)).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_given_out_may_be_float32(dtype, backend, device):
    q, pools, plan = inputs("ragged", dtype=dtype, device=device)
    out = torch.full(q.shape, torch.nan, device=device)
    got, _ = paged_attention(q, pools, plan, out=out, backend=backend)
    want, _ = paged_attention(q, pools, plan, out=torch.empty_like(out), backend="reference")
    assert got is out
    assert_close("out", out, want, keys(plan))


def test_a_query_may_be_a_slice_of_a_packed_projection(backend, device):
    q, pools, plan = inputs("ragged", device=device)
    packed = torch.cat((q, torch.full_like(q, torch.nan)), dim=1)
    out, _ = paged_attention(packed[:, : q.shape[1]], pools, plan, backend=backend)
    assert torch.equal(out, paged_attention(q, pools, plan, backend=backend)[0])


def test_scale_is_an_argument(backend, device):
    q, pools, plan = inputs("ragged", device=device)
    got = paged_attention(q, pools, plan, scale=0.3, backend=backend)
    want = paged_attention(q * (0.3 * q.shape[2] ** 0.5), pools, plan, backend="reference")
    assert_close("out", got[0], want[0], keys(plan))
    assert_close("lse", got[1], want[1], q.shape[2])


@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_an_empty_list_gives_zero_and_minus_infinity(which):
    pool, where = filled_pool("fp32", [8], 1, 8, 16)
    plan = make_plan([(2, [], []), (1, where.ids.tolist(), [8]), (3, where.ids.tolist(), [0])])
    out, lse = paged_attention(torch.randn(6, 2, 16), [pool], plan, backend=which)
    assert not out[:2].any() and not out[3:].any() and out[2].any()
    assert (lse[:2] == -torch.inf).all() and (lse[3:] == -torch.inf).all() and lse[2].isfinite().all()


@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_no_queries_and_no_segments_are_no_error(which):
    pool, _ = filled_pool("fp32", [8], 1, 8, 16)
    for segments in ([], [(0, [], [])]):
        out, lse = paged_attention(torch.empty(0, 2, 16), [pool], make_plan(segments), backend=which)
        assert out.shape == (0, 2, 16) and lse.shape == (0, 2)


@pytest.mark.parametrize("formats", [("fp32",), KV_FORMATS], ids="+".join)
def test_accumulating_over_groups_of_pages_equals_one_call(formats, backend, device):
    q, pools, whole = inputs("rows of several tasks", formats=formats, device=device)
    want_out, want_lse = paged_attention(q, pools, whole, backend="reference")
    starts, lists = whole.q_indptr.tolist(), whole.page_indptr.tolist()
    ids, lens = whole.page_ids.tolist(), whole.page_lens.tolist()
    # Garbage where lse is -inf: it must contribute nothing.
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], -torch.inf, device=device)
    for part in (0, 1, 2):  # the last group is empty
        segments = []
        for s in range(len(starts) - 1):
            middle = (lists[s] + lists[s + 1]) // 2
            entries = (slice(lists[s], middle), slice(middle, lists[s + 1]), slice(0, 0))[part]
            segments.append((starts[s + 1] - starts[s], ids[entries], lens[entries]))
        paged_attention(q, pools, make_plan(segments, device), out=out, lse=lse, accumulate=True, backend=backend)
    assert_attention((out, lse), (want_out, want_lse), whole, formats, backend)


def test_large_scores_do_not_overflow(backend, device):
    q, pools, plan = inputs("ragged", device=device)
    out, lse = paged_attention(q * 300, pools, plan, backend=backend)
    want_out, want_lse = paged_attention(q * 300, pools, plan, backend="reference")
    assert out.isfinite().all() and lse.isfinite().all()
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=0)
    # Scores of about 1,000 carry an absolute error of 1e-4, and so do the exponentials.
    torch.testing.assert_close(out, want_out, rtol=0, atol=2e-3)


def test_nan_in_a_query_stays_in_its_row(backend, device):
    q, pools, plan = inputs("ragged", device=device)
    q[1, 0, 3] = torch.nan
    out, lse = paged_attention(q, pools, plan, backend=backend)
    assert out[1, 0].isnan().all() and lse[1, 0].isnan()
    out[1, 0], lse[1, 0] = 0, 0
    assert out.isfinite().all() and lse.isfinite().all()


def test_the_number_of_threads_changes_no_bit(threads):
    q, pools, plan = inputs("rows of several tasks", formats=KV_FORMATS)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(paged_attention(q, pools, plan, backend="compiled"))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_merging_two_halves_equals_the_whole(which, dtype):
    q, pools, whole = inputs("six query heads read one")
    ids, lens = whole.page_ids.tolist(), whole.page_lens.tolist()
    a, b = (paged_attention(q, pools, make_plan([(len(q), ids[part], lens[part])]), backend="reference")
            for part in (slice(0, 1), slice(1, None)))  # fmt: skip
    out, lse = merge_attention(a[0].to(dtype), a[1], b[0].to(dtype), b[1], backend=which)
    want_out, want_lse = paged_attention(q, pools, whole, backend="reference")
    assert out.dtype == dtype
    # bfloat16 inputs carry half a step of 2^-8 each, float16 ones less.
    torch.testing.assert_close(out.float(), want_out, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
    assert_close("lse", lse, want_lse, q.shape[2])


@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_merging_with_a_side_that_saw_nothing(which):
    empty = torch.tensor([[-torch.inf]])
    some = torch.tensor([[0.7]])
    out, garbage = torch.randn(1, 1, 16), torch.full((1, 1, 16), torch.nan)
    for a, b in (((out, some), (garbage, empty)), ((garbage, empty), (out, some))):
        merged, lse = merge_attention(*a, *b, backend=which)
        assert torch.equal(merged, out) and torch.equal(lse, some)
    merged, lse = merge_attention(garbage, empty, garbage, empty, backend=which)
    assert not merged.any() and lse.item() == -torch.inf


@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_merging_in_place(which):
    (a, lse_a), (b, lse_b) = ((torch.randn(3, 2, 16), torch.randn(3, 2)) for _ in range(2))
    want, want_lse = merge_attention(a, lse_a, b, lse_b, backend=which)
    out, lse = merge_attention(a, lse_a, b, lse_b, out=a, lse=lse_a, backend=which)
    assert out is a and lse is lse_a and torch.equal(a, want) and torch.equal(lse_a, want_lse)


def test_calls_from_several_python_threads_do_not_mix(threads):
    torch.set_num_threads(2)
    q, pools, plan = inputs("rows of several tasks")
    want, _ = paged_attention(q, pools, plan, backend="compiled")
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda _: paged_attention(q, pools, plan, backend="compiled")[0], range(40)))
    assert all(torch.equal(out, want) for out in results)


def test_a_forked_child_has_threads_of_its_own():
    code = (
        "import os, torch, inferix_kernels as ik\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(600, 2, 16)\n"
        "lse = x[..., 0].contiguous()\n"
        "run = lambda: ik.merge_attention(x, lse, x, lse, backend='compiled')[0]\n"
        "want = run()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if torch.equal(run(), want) else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.stdout.strip() == "0", result.stderr
