"""paged_attention in Triton against the reference: in its interpreter, or on a GPU where there is one.

The interpreter takes some 20 ms for a tile of keys, so these cases are the smallest that still hurt.
"""

import inspect

import pytest
import torch

from inferix_kernels import PageList, Unsupported, kv_append, kv_gather, make_plan, paged_attention, reference
from inferix_kernels.layout import FORMATS, KV_FORMATS, Codec
from inferix_kernels.testing import assert_close, attention_inputs, clustered_keys_and_values, filled_pool
from inferix_kernels.triton_kernels import attention, online, work
from inferix_kernels.triton_kernels.launch import Call
from tests.triton_kernels import triton_mode

device = triton_mode.device
TILES = {"m": 32, "n": 32, "warps": 4, "stages": 2}


def inputs(device, queries=(3, 18), lens=(16, 5, 0), query_heads=2, heads=2, head_dim=32, page_size=16, **kwargs):
    sizes = {"query_heads": query_heads, "heads": heads, "head_dim": head_dim, "page_size": page_size}
    return attention_inputs(queries, lens, **sizes, device=device, **kwargs)


def attend(q, pools, plan, scale=0.2, out=None, lse=None, accumulate=False, eight_bit=False, tiles=TILES, splits=None):
    out = torch.full(q.shape[-3:], 7.0, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.full(q.shape[-3:-1], 7.0, device=q.device) if lse is None else lse
    return attention.run_paged_attention(Call(q, pools, plan, scale, out, lse, accumulate), eight_bit, tiles, splits)


def check(q, pools, plan, terms=64, **kwargs):
    """In float32, where there is nothing but the order of a sum to differ."""
    out, lse = attend(q, pools, plan, **kwargs)
    want_out, want_lse = paged_attention(q, pools, plan, scale=0.2, backend="reference")
    assert not out.isnan().any()  # every slot that must not be read is poisoned
    assert_close("out", out, want_out, terms)
    assert_close("lse", lse, want_lse, q.shape[-1])


@pytest.mark.parametrize("format", KV_FORMATS)
def test_pages_of_every_format(format, device):
    check(*inputs(device, formats=(format,)))


# queries per segment, lens, Hq, H, D, page_size
SHAPES = {
    "one token": ((1,), (1,), 1, 1, 64, 16),
    "three query heads read one": ((5, 20), (8, 3), 6, 2, 16, 8),
    "six query heads read one": ((13,), (40, 39), 6, 1, 48, 40),
    "pages of several tiles": ((20,), (72, 30), 1, 1, 32, 72),
    "odd sizes": ((7, 0, 1), (7, 3), 3, 3, 20, 7),
    "rows of several tiles": ((70, 33), (16,), 1, 1, 16, 16),
}


@pytest.mark.parametrize("formats", [("fp32",), ("i8f8",)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, formats, device):
    queries, lens, query_heads, heads, head_dim, page_size = SHAPES[shape]
    check(*inputs(device, queries, lens, query_heads, heads, head_dim, page_size, formats=formats))


@pytest.mark.parametrize("keys", [16, 64])
@pytest.mark.parametrize("what", ["formats", "bias", "an offset for each page", "one page"])
def test_tiles_of_one_page_and_of_several(what, keys, device):
    """Five pages of 16, in tiles of one or of four: the last tile is not full, and pages of other pools lie between."""
    formats = ("fp32", "i8f8", "int4") if what == "formats" else ("fp32",)
    lens = (7,) if what == "one page" else (16, 5, 0, 12, 16)
    q, pools, plan = inputs(device, queries=(3,), lens=lens, heads=1, formats=formats)
    if what == "bias":
        plan = plan._replace(page_bias=torch.tensor([2.0, -3.0, 1e30, -torch.inf, 0.5], device=device))
    if what == "an offset for each page":  # the valid tokens are some in the middle
        starts = (torch.tensor([3, 1, 0, 2, 9], device=device) * (plan.page_lens > 0)).int()
        plan = plan._replace(page_starts=starts, page_lens=(plan.page_lens - starts).clamp(min=0))
    check(q, pools, plan, tiles={**TILES, "n": keys})


def test_every_format_in_one_launch(device):
    check(*inputs(device, queries=(3,), lens=(9,), formats=KV_FORMATS))


def test_formats_that_lie_in_runs_or_mixed(device):
    q, pools, plan = inputs(device, queries=(5,), lens=(16, 5), heads=1, query_heads=1, formats=("bf16", "int8"))
    in_runs = plan.page_ids.argsort()
    for order in (in_runs, in_runs[[0, 2, 1, 3]], in_runs[[2, 3]], in_runs[:0]):
        listed = make_plan([(5, plan.page_ids[order].tolist(), plan.page_lens[order].tolist())], device)
        check(q, pools, listed)


@triton_mode.IN_INTERPRETER
def test_a_pass_for_each_pool_walks_over_its_own_pages(device, monkeypatch):
    seen = []
    whole = attention.attend_pages
    monkeypatch.setattr(attention, "attend_pages", lambda *args: seen.append(args[5:7]) or whole(*args))
    q, pools, plan = inputs(device, queries=(5,), lens=(16, 5), heads=1, query_heads=1, formats=("bf16", "int8"))
    order = plan.page_ids.argsort()
    attend(q, pools, make_plan([(5, plan.page_ids[order].tolist(), plan.page_lens[order].tolist())], device))
    assert [tuple(int(x.handle.data.item()) for x in run) for run in seen] == [(0, 2), (2, 4)]


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


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("what", ["lists per head", "bias", "variants", "all of them"])
def test_plans_of_every_kind(what, splits, device):
    formats = ("int8",) if what == "variants" else ("fp32", "int4")
    q, pools, plan = inputs(device, lens=(16, 5, 0, 12), query_heads=4, formats=formats)
    generator = torch.Generator().manual_seed(7)
    if what in ("lists per head", "all of them"):
        plan = lists_per_head(plan, pools[0].heads, generator)
    pages = len(plan.page_ids)
    if what in ("bias", "all of them"):
        bias = torch.randn(pages, generator=generator) * 3
        bias[torch.rand(pages, generator=generator) < 0.3] = -torch.inf
        plan = plan._replace(page_bias=bias.to(device))
    if what in ("variants", "all of them"):
        q = torch.stack((q, torch.full_like(q, torch.nan), -q, q * 0.5))  # NaN: a variant that no page names
        variants = torch.tensor([0, 2, 3])[torch.randint(3, (pages,), generator=generator)].int()
        plan = plan._replace(page_variants=variants.to(device))
    check(q, pools, plan, splits=splits)


@pytest.mark.parametrize("splits", [2, 5])
def test_splits_add_up(splits, device):
    """Also more splits than pages: some programs have none."""
    q, pools, plan = inputs(device, queries=(3, 2), lens=(16, 9, 16))
    check(q, pools, plan, splits=splits)
    first, again = (attend(q, pools, plan, splits=splits) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_splits_fill_the_gpu():
    """Wan 1.3B, 4,680 queries on 32,760 keys, tiles of 128 x 64 on 132 processors."""
    programs, key_tiles = 37 * 12, 525
    splits = online.splits_for(programs, key_tiles, 132)
    waves = -(-programs * splits // 132)
    assert splits > 1 and programs * splits / (132 * waves) >= 0.96 > programs / (132 * 4)
    assert online.splits_for(programs, 1, 132) == 1  # nothing to split
    assert online.splits_for(12, 525, 132) >= 11  # few queries: every processor has keys to read
    assert online.splits_for(132, 525, 132) == 1  # it is full


@pytest.mark.parametrize("splits", [1, 2])
def test_accumulating_over_groups_of_pages_equals_one_call(splits, device):
    q, pools, whole = inputs(device, queries=(5,), lens=(16, 7, 12, 16))
    ids, lens = whole.page_ids.tolist(), whole.page_lens.tolist()
    # Garbage where lse is -inf: it must contribute nothing.
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], -torch.inf, device=device)
    for part in (slice(0, 2), slice(0, 0), slice(2, 4)):
        plan = make_plan([(5, ids[part], lens[part])], device)
        attend(q, pools, plan, out=out, lse=lse, accumulate=True, splits=splits)
    want_out, want_lse = paged_attention(q, pools, whole, scale=0.2, backend="reference")
    assert_close("out", out, want_out, 64)
    assert_close("lse", lse, want_lse, q.shape[2])


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("accumulate", [False, True])
def test_nothing_seen_is_zero_and_minus_infinity(accumulate, splits, device):
    q, pools, plan = inputs(device, queries=(2, 3), lens=(8, 3))
    unseen = plan._replace(page_bias=torch.full(plan.page_ids.shape, -torch.inf, device=device))
    for listed in (unseen, make_plan([(5, [], [])], device), make_plan([(5, [0], [0])], device)):
        out, lse = torch.ones_like(q), torch.full(q.shape[:2], 0.5, device=device)
        attend(q, pools, listed, out=out, lse=lse, accumulate=accumulate, splits=splits)
        assert (out == (1 if accumulate else 0)).all() and (lse == (0.5 if accumulate else -torch.inf)).all()


def test_no_queries_and_no_segments_are_no_error(device):
    q, pools, _ = inputs(device, queries=(1,), lens=(8,))
    for segments in ([], [(0, [], [])]):
        out, lse = paged_attention(q[:0], pools, make_plan(segments, device), backend="triton")
        assert out.shape == (0, 2, 32) and lse.shape == (0, 2)


def test_large_scores_and_a_nan_in_a_query(device):
    q, pools, plan = inputs(device, queries=(4,), lens=(16, 5))
    q *= 300
    want_out, want_lse = paged_attention(q, pools, plan, backend="reference")
    q[1, 0, 3] = torch.nan
    out, lse = paged_attention(q, pools, plan, backend="triton")
    assert out[1, 0].isnan().all() and lse[1, 0].isnan()
    out[1, 0], lse[1, 0] = want_out[1, 0], want_lse[1, 0]
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=0)
    # Scores of about 1,000 carry an absolute error of 1e-4, and so do the exponentials.
    torch.testing.assert_close(out, want_out, rtol=0, atol=2e-3)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_may_be_any_number(scale, device):
    q, pools, plan = inputs(device, queries=(3,), lens=(9, 16))
    got = attend(q, pools, plan, scale=scale)
    want = paged_attention(q, pools, plan, scale=scale, backend="reference")
    assert_close("out", got[0], want[0], 64)
    assert_close("lse", got[1], want[1], 64)


def test_strides_are_taken_as_they_are(device):
    q, pools, plan = inputs(device, queries=(3,), lens=(9,))
    packed = torch.cat((q, torch.full_like(q, torch.nan)), dim=1)[:, :2]
    out = torch.full((3, 4, 64), 7.0, device=device)
    lse = torch.full((3, 4), 7.0, device=device)
    want_out, want_lse = attend(q, pools, plan)
    attend(packed, pools, plan, out=out[:, 1:3, ::2], lse=lse[:, ::2])
    assert torch.equal(out[:, 1:3, ::2], want_out) and torch.equal(lse[:, ::2], want_lse)
    assert (out[:, [0, 3]] == 7).all() and (out[..., 1::2] == 7).all() and (lse[:, 1::2] == 7).all()


def dense(q, pools, plan, scale=0.2):
    """Of a plan with one segment: keys [L, Hq, D], weights [T, Hq, L] and values [L, Hq, D], in float64."""
    k, v = kv_gather(pools, PageList(plan.page_ids, plan.page_lens), backend="reference")
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.repeat_interleave(group, 1).double() for x in (k, v))
    return k, (torch.einsum("thd,lhd->thl", q, k) * scale).softmax(-1), v


def error_bound(q, pools, plan, weight_error, score_error):
    """[T, Hq, D]: how far out may be off if the products of weights and values are by a factor of 1 +- weight_error,
    and scores by score_error times the sum of |q k|. To first order, so with a tenth to spare."""
    k, weights, v = dense(q, pools, plan)
    moved = score_error * 0.2 * torch.einsum("thd,lhd->thl", q.double().abs(), k.abs()).amax(-1, keepdim=True)
    return 1.1 * (weight_error + 2 * moved) * torch.einsum("thl,lhd->thd", weights, v.abs()) + 1e-6


def check_within(bound, got, q, pools, plan):
    _, weights, v = dense(q, pools, plan)
    want = torch.einsum("thl,lhd->thd", weights, v)
    excess = (got.double() - want).abs() - bound
    assert excess.max() <= 0, f"{float(excess.max()):.2g} over a bound of {float(bound.mean()):.2g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("formats", [("bf16",), ("fp16",), ("i8f8",), ("fp8", "int4")], ids=str)
def test_products_of_halves(formats, dtype, device):
    """Weights and values are rounded once each, half a step; where keys are not exact, they are too; and out."""
    q, pools, plan = inputs(device, queries=(17,), lens=(16, 5, 12), formats=formats, dtype=dtype)
    out, _ = attend(q, pools, plan, out=torch.empty(q.shape, device=device))
    half = torch.finfo(dtype).eps / 2
    exact = all(FORMATS[format].k.scaled_by == "token" or FORMATS[format].k.dtype == dtype for format in formats)
    check_within(error_bound(q, pools, plan, 2 * half, 0 if exact else half), out, q, pools, plan)
    rounded, _ = attend(q, pools, plan)
    assert torch.equal(rounded, out.to(dtype))


@pytest.mark.parametrize("format", ["int8", "i8f8", "fp8"])
def test_8_bit_scores_are_those_of_rounded_queries(format, device):
    """int8 products are exact, and those of e4m3 in float32: what differs is q, rounded once, row by row.

    The weights of e4m3 values are rounded to 4 bits: 2^-4 at most, and 2^-18 of the largest where they are tiny.
    """
    q, pools, plan = inputs(device, queries=(5, 18), lens=(32, 9), heads=1, page_size=32, formats=(format,))
    out, lse = attend(q, pools, plan, eight_bit=True)
    codes, scales, _ = reference.encode(q.cpu(), Codec(FORMATS[format].k.dtype, "token"))
    rounded = (codes.float() * scales[..., None]).to(device)
    want_out, want_lse = paged_attention(rounded, pools, plan, scale=0.2, backend="reference")
    assert_close("lse", lse, want_lse, 32)
    if format == "int8":
        return assert_close("out", out, want_out, 64)
    for s, (start, stop) in enumerate(((0, 5), (5, 23))):
        pages = slice(int(plan.page_indptr[s]), int(plan.page_indptr[s + 1]))
        part = make_plan([(stop - start, plan.page_ids[pages].tolist(), plan.page_lens[pages].tolist())], device)
        rows = rounded[start:stop]
        tiny = dense(rows, pools, part)[2].abs().sum(0) * 2.0**-18
        check_within(error_bound(rows, pools, part, 2.0**-4, 0) + tiny, out[start:stop], rows, pools, part)


def test_the_error_of_8_bit_products(device):
    """On keys and values as quantization meets them, against the same pages in float32: relative L2 error of out.

    int8 pages lose what q loses, 0.5 %; e4m3 weights, right to 3 % each, make it about 1 %; e4m3 queries 2 to 3 %.
    """
    q, k, v = clustered_keys_and_values(256, 64, 1, 64)
    for format, limit in (("int8", 0.006), ("i8f8", 0.015), ("fp8", 0.035)):
        pool, where = filled_pool(format, [64] * 4, 1, 64, 64, device)
        kv_append((k - k.mean(0)).to(device), v.to(device), pool, where, backend="reference")
        plan = make_plan([(64, where.ids.tolist(), where.lens.tolist())], device)
        want, _ = paged_attention(q.to(device), [pool], plan, backend="reference")
        out, _ = attend(q.to(device), [pool], plan, scale=64**-0.5, eight_bit=True, tiles={**TILES, "m": 64, "n": 64})
        error = float((out - want).norm() / want.norm())
        print(f"{format}: {error:.4f}")
        assert 0 < error < limit, f"{format}: {error:.4f}"


def test_8_bit_products_mix_with_others(device):
    q, pools, plan = inputs(device, queries=(5,), lens=(9,), heads=1, formats=("int8", "bf16", "int4"))
    out, lse = attend(q, pools, plan, eight_bit=True)
    want_out, want_lse = paged_attention(q, pools, plan, scale=0.2, backend="reference")
    torch.testing.assert_close(out, want_out, rtol=0, atol=2e-2)  # q is rounded to int8 for the int8 pages alone
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=2e-2)
    assert not torch.equal(out, attend(q, pools, plan)[0])


def test_8_bits_are_asked_for(device, monkeypatch):
    """Only half queries on keys with a scale for each token are multiplied so, and only if the caller asks for it."""
    seen = []
    monkeypatch.setattr(attention, "run_paged_attention", lambda call, eight_bit: seen.append(eight_bit))
    for precision in ("exact", "auto", "8bit"):
        for formats, dtype in ((("i8f8",), torch.bfloat16), (("i8f8",), torch.float32), (("int4",), torch.bfloat16)):
            q, pools, plan = inputs(device, queries=(1,), lens=(1,), formats=formats, dtype=dtype)
            paged_attention(q, pools, plan, precision=precision, backend="triton")
    assert seen == [False] * 6 + [True, False, False]


def test_what_an_architecture_cannot_do_is_said(device, monkeypatch):
    monkeypatch.setattr(attention, "architecture", lambda device: 80)
    q, pools, plan = inputs(device, queries=(1,), lens=(1,), formats=("fp8",))
    with pytest.raises(Unsupported, match="paged_attention: sm_80 multiplies no e4m3"):
        attend(q, pools, plan, eight_bit=True)
    check(q, pools, plan)  # in floats it reads them
    with pytest.raises(Unsupported, match="pools must be at most 8, got 9"):
        attend(q, pools * 9, plan)
    q, pools, plan = inputs(device, queries=(1,), lens=(1,), head_dim=260)
    with pytest.raises(Unsupported, match="heads must be at most 256 wide, got D=260"):
        attend(q, pools, plan)


WRONG_PLANS = {
    "id": ([(3, [7], [1])], r"plan.page_ids\[0\] must be in \[0, 3\), got 7"),
    "len": ([(3, [0], [17])], r"plan.page_lens\[0\] must be in \[0, 16\], got 17"),
    "queries": ([(2, [0], [3])], "plan.q_indptr must rise from 0 to 3, got"),
}


@triton_mode.IN_INTERPRETER
@pytest.mark.parametrize("mistake", WRONG_PLANS)
def test_a_wrong_plan_is_named(mistake, device):
    segments, message = WRONG_PLANS[mistake]
    q, pools, _ = inputs(device, queries=(3,), lens=(1,))
    with pytest.raises(ValueError, match=message):
        paged_attention(q, pools, make_plan(segments), backend="triton")


def test_an_entry_that_does_not_fit_is_skipped(device, monkeypatch):
    """On a GPU nobody looks at a plan before the kernel does. In tiles of one page: what is beside a page in its tile
    changes the order of its sum."""
    tiles = {**TILES, "n": 16}
    q, pools, plan = inputs(device, queries=(3,), lens=(9, 4), heads=1)
    ids, lens = plan.page_ids.tolist(), plan.page_lens.tolist()
    wrong = make_plan([(3, [ids[0], 99, ids[1], 0], [lens[0], 3, lens[1], 99])], device)
    wrong = wrong._replace(page_ids=torch.where(wrong.page_ids == 99, -1, wrong.page_ids))
    for got, want in zip(attend(q, pools, wrong, tiles=tiles), attend(q, pools, plan, tiles=tiles)):
        assert torch.equal(got, want)
    wrong = wrong._replace(page_indptr=torch.tensor([0, 900], dtype=torch.int32, device=device))
    for got, want in zip(attend(q, pools, wrong, tiles=tiles), attend(q, pools, plan, tiles=tiles)):
        assert torch.equal(got, want)


@triton_mode.IN_INTERPRETER
def test_plans_of_many_segments_are_looked_through_in_steps(device, monkeypatch):
    monkeypatch.setattr(work, "STEP", type(work.STEP)(2))
    q, pools, plan = inputs(device, queries=(1, 0, 20, 0, 3), lens=(5, 3), heads=1, formats=("fp32", "bf16"))
    check(q, pools, plan)


def test_parameters_are_the_references():
    assert inspect.signature(attention.paged_attention) == inspect.signature(reference.paged_attention)
