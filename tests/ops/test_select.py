"""page_summaries, page_scores, select_pages: the reference against the formulas, Triton against the reference."""

import pytest
import torch

from inferix_kernels import PageList, even_plan, kv_gather, page_scores, page_summaries, paged_attention, select_pages
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.testing import filled_pool, mixed_pools, poison_unused
from inferix_kernels.triton_kernels import codecs
from tests.triton_kernels import triton_mode
from tests.triton_kernels.triton_mode import on

device = triton_mode.device
LENS = [8, 3, 0, 8, 5]


def pages_of(formats, heads=2, head_dim=24, page_size=8, lens=LENS):
    pools, ids, lens = mixed_pools(lens, heads, page_size, head_dim, formats)
    return pools, PageList.of(ids, lens)


def test_a_summary_is_the_mean_or_the_bounds_of_a_pages_keys():
    pools, where = pages_of(["fp32", "int8"])
    untouched = 7.0
    for bounds in (False, True):
        out = torch.full((sum(pool.pages for pool in pools), 2, 1 + bounds, 24), untouched)
        got = page_summaries(pools, where, bounds, out=out, backend="reference")
        k, start = kv_gather(pools, where, backend="reference")[0], 0
        for page, length in zip(where.ids.tolist(), where.lens.tolist()):
            keys, start = k[start : start + length], start + length
            if length == 0:
                assert not got[page].any()
            elif bounds:
                assert torch.equal(got[page, :, 0], keys.amin(0)) and torch.equal(got[page, :, 1], keys.amax(0))
            else:
                torch.testing.assert_close(got[page, :, 0], keys.mean(0))
        others = [page for page in range(len(out)) if page not in where.ids.tolist()]
        assert others and (got[others] == untouched).all()


def test_scores_are_of_the_mean_query_and_bounds_bound_them():
    pools, where = pages_of(["fp32"])
    q, starts = torch.randn(9, 4, 24), torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    mean, bounds = (page_summaries(pools, where, wide) for wide in (False, True))
    got, most = (page_scores(q, starts, x, where, scale=0.3, backend="reference") for x in (mean, bounds))
    assert got.shape == most.shape == (3, 2, 5)
    empty = (where.lens == 0).expand(3, 2, 5) | torch.tensor([False, True, False])[:, None, None]
    assert ((got == -torch.inf) == empty).all() and ((most == -torch.inf) == empty).all()
    k, _ = kv_gather(pools, where, backend="reference")
    runs = [where.lens[:i].sum() for i in range(6)]
    for s, (a, b) in enumerate([(0, 4), (4, 4), (4, 9)]):
        for h in range(2):
            for i in range(5):
                scores = 0.3 * q[a:b, 2 * h : 2 * h + 2].mean((0, 1)) @ k[runs[i] : runs[i + 1], h].T
                if not empty[s, h, i]:
                    torch.testing.assert_close(got[s, h, i], scores.mean())
                    assert most[s, h, i] >= scores.max() - 1e-6


def test_the_best_pages_in_the_order_of_the_list():
    where = PageList.of([10, 11, 12, 13, 14, 15], [8, 8, 0, 8, 5, 8])
    scores = torch.tensor([[[1.0, 5, 9, 2, 5, 5], [0, -1, 9, -torch.inf, -torch.inf, -torch.inf]]])

    def ids(*args, **options):
        got = select_pages(scores, where, *args, **options, backend="reference")
        return got.ids.view(2, -1).tolist(), got.lens.view(2, -1).tolist()

    # Page 12 has no tokens; of equals the earlier; a short list ends in pages without tokens.
    assert ids(2) == ([[11, 14], [10, 11]], [[8, 5], [8, 8]])
    assert ids(4) == ([[11, 13, 14, 15], [10, 11, 0, 0]], [[8, 8, 5, 8], [8, 8, 0, 0]])
    keep = torch.tensor([False, False, True, True, False, False])
    assert ids(2, keep=keep) == ([[11, 13], [10, 13]], [[8, 8], [8, 8]])
    # Frames (10, 11), (12, 13), (14, 15): the first of the best two have 5 and 5.
    assert ids(3, frames=2, pages_per_frame=2)[0] == [[11, 14, 15], [10, 11, 0]]
    assert ids(3, frames=1, pages_per_frame=3)[0] == [[10, 11, 0], [10, 11, 0]]
    assert ids(1, keep=keep, frames=1, pages_per_frame=2)[0] == [[13], [13]]


def test_attention_over_all_pages_selected_is_attention_over_all_pages():
    pools, where = pages_of(["fp32", "int8"])
    q, starts = torch.randn(9, 4, 24), torch.tensor([0, 4, 9], dtype=torch.int32)
    scores = page_scores(q, starts, page_summaries(pools, where), where)
    plan = even_plan(starts, select_pages(scores, where, 12), 4)
    everything = even_plan(starts, PageList(where.ids.repeat(4), where.lens.repeat(4)), 4)
    got, want = (paged_attention(q, pools, p, backend="reference") for p in (plan, everything))
    torch.testing.assert_close(got, want)


def test_a_page_that_matters_is_found():
    """One page's keys point where a head's queries do: that head's list has it, and its attention is nearly dense."""
    pool, where = filled_pool("fp32", [8] * 40, 2, 8, 32)
    q = torch.randn(16, 2, 32, generator=torch.Generator().manual_seed(1)) * 0.3
    q[:, 0, 0] += 6
    pool.k[where.ids[17], 0, :, 0] = 8
    starts = torch.tensor([0, 16], dtype=torch.int32)
    for bounds in (False, True):
        scores = page_scores(q, starts, page_summaries([pool], where, bounds), where)
        chosen = select_pages(scores, where, 4)
        assert where.ids[17] in chosen.ids[:4]
        sparse = paged_attention(q, [pool], even_plan(starts, chosen, 2))[0]
        dense = paged_attention(q, [pool], even_plan(starts, PageList(where.ids.repeat(2), where.lens.repeat(2)), 2))[0]
        assert (sparse - dense)[:, 0].abs().max() < 0.05 < (sparse - dense)[:, 1].abs().max()


@pytest.mark.parametrize("bounds, dtype", [(False, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("format", [*KV_FORMATS, "latent8"])
def test_summaries_match_the_reference(format, dtype, bounds, device):
    pool, where = filled_pool(format, LENS, 1, 8, (20, 12) if format == "latent8" else 20)
    other, _ = filled_pool("fp32", [2], 1, 8, (20, 12) if format == "latent8" else 20)
    check_summaries([other, pool], PageList(where.ids + other.pages, where.lens), bounds, dtype, device)


def check_summaries(pools, where, bounds, dtype, device):
    shape = sum(pool.pages for pool in pools), pools[0].heads, 1 + bounds, pools[0].head_dim
    got, want = torch.full((2, *shape), 7, dtype=dtype)
    got = page_summaries(
        [on(device, x) for x in pools], on(device, where), bounds, out=got.to(device), backend="triton"
    )
    page_summaries(pools, where, bounds, out=want, backend="reference")
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
    return want


def test_summaries_of_a_tile_in_parts(device, monkeypatch):
    monkeypatch.setattr(codecs, "_PART", 32)
    monkeypatch.setattr(codecs, "_LEAST_CHANNELS", 4)
    check_summaries(*pages_of(["int4", "i8f8"], heads=1, lens=[8, 5]), True, torch.float32, device)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("heads, group, width, dtype", [(1, 1, 16, torch.float32), (2, 3, 20, torch.bfloat16)])
def test_scores_match_the_reference(heads, group, width, dtype, rows, device):
    check_scores(heads, group, width, dtype, rows, device, [0, 70, 70, 71, 90], 45)


def check_scores(heads, group, width, dtype, rows, device, starts, pages):
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(starts[-1], heads * group, width, generator=generator).to(dtype)
    summaries = torch.randn(pages + 3, heads, rows, width, generator=generator)
    ids = torch.randperm(pages + 3, generator=generator)[:pages].int()
    where = PageList(ids, torch.randint(0, 9, (pages,), generator=generator, dtype=torch.int32))
    starts = torch.tensor(starts, dtype=torch.int32)
    want = page_scores(q, starts, summaries, where, backend="reference")
    given = q.to(device), starts.to(device), summaries.to(device), on(device, where)
    got = page_scores(*given, backend="triton").cpu()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    return want, where


@pytest.mark.parametrize(
    "k, keep, frames, per_frame",
    [(1, False, None, 1), (7, True, None, 1), (7, True, 2, 3), (20, False, 3, 7), (3, True, 9, 1)],
)
def test_selection_matches_the_reference(k, frames, per_frame, keep, device):
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(-5, 5, (2, 1, 21), generator=generator).float()  # many ties
    scores[scores < -3] = -torch.inf
    where = PageList(*torch.randint(0, 9, (2, 21), generator=generator, dtype=torch.int32))
    options = {"frames": frames, "pages_per_frame": per_frame}
    kept = torch.rand(21, generator=generator) < 0.1 if keep else None
    want = select_pages(scores, where, k, keep=kept, **options, backend="reference")
    kept = None if kept is None else kept.to(device)
    got = select_pages(scores.to(device), on(device, where), k, keep=kept, **options, backend="triton")
    assert torch.equal(got.ids.cpu(), want.ids) and torch.equal(got.lens.cpu(), want.lens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 2])
def test_real_sizes(rows):
    pool, where = filled_pool("int8", [64] * 24 + [24], 12, 64, 128)
    poison_unused(pool, where)
    check_summaries([pool], where, rows == 2, torch.float32, "cuda")
    scores, where = check_scores(12, 1, 128, torch.bfloat16, rows, "cuda", list(range(0, 4681, 60)), 525)
    for options in ({}, {"frames": 6, "pages_per_frame": 25}):
        got, want = (
            select_pages(scores.to(to), on(to, where), 64, **options, backend=backend)
            for to, backend in (("cuda", "triton"), ("cpu", "reference"))
        )
        assert torch.equal(got.ids.cpu(), want.ids) and torch.equal(got.lens.cpu(), want.lens)


def test_nothing_to_choose_from(device):
    nothing, scores = PageList.of([], [], device), torch.empty(2, 1, 0, device=device)
    got = select_pages(scores, nothing, 3, backend="triton")
    assert got.ids.tolist() == got.lens.tolist() == [0] * 6
