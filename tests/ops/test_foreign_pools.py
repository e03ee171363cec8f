"""Pools that are another's cache, strided as it is: read and written where it lies, by every backend."""

import pytest
import torch

from inferix_kernels import KVPages, PageList, kv_append, kv_commit, kv_gather, make_plan, paged_attention
from inferix_kernels.plans import Segment
from tests.triton_kernels import triton_mode  # noqa: F401

P, SIZE, H, D = 5, 12, 2, 16
PLAN = make_plan([Segment(7, [3, 0], [12, 5], window=(-1, 0)), Segment(4, [1, 2], [12, 1])])


def layouts(dtype):
    """Of one cache, as libraries lay it out: what it is in memory, and its keys and values as [P, H, SIZE, D]."""
    nhd = torch.zeros(P, SIZE, H, D, dtype=dtype), torch.zeros(P, SIZE, H, D, dtype=dtype)
    one = torch.zeros(P, 2, SIZE, H, D, dtype=dtype)
    hnd = torch.zeros(P, 2, H, SIZE, D, dtype=dtype)
    wide = torch.zeros(P, SIZE, H, 3 * D, dtype=dtype)  # beside other things
    return {
        "NHD": (nhd, [x.transpose(1, 2) for x in nhd]),
        "NHD, in one": ((one,), [one[:, 0].transpose(1, 2), one[:, 1].transpose(1, 2)]),
        "HND, in one": ((hnd,), [hnd[:, 0], hnd[:, 1]]),
        "parts of wider rows": ((wide,), [wide[..., :D].transpose(1, 2), wide[..., 2 * D :].transpose(1, 2)]),
    }


@pytest.fixture(params=["NHD", "NHD, in one", "HND, in one", "parts of wider rows"])
def layout(request, where):
    if where == "triton" and request.param in ("NHD", "HND, in one"):
        pytest.skip("two layouts are enough for Triton's interpreter")
    return request.param


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
def test_what_is_written_lies_in_the_others_memory(layout, format, where):
    """Within its pages, and nothing else changes there."""
    dense = KVPages.empty(format, P, H, SIZE, D)
    memory, (k_cache, v_cache) = layouts(dense.k.dtype)[layout]
    pool = KVPages(format, k_cache, v_cache)
    generator = torch.Generator().manual_seed(0)
    for x in (*memory, *dense.tensors.values()):
        x.fill_(7.0)
    k, v = (torch.randn(20, H, D, generator=generator) for _ in "kv")
    starts = torch.tensor([9, 0, 4], dtype=torch.int32)
    within = PageList.of([2, 4, 0], [3, 12, 5])._replace(starts=starts)
    for pages in (pool, dense):
        kv_append(k, v, pages, within, backend=where)
    at = 0
    for page, start, length in ((2, 9, 3), (4, 0, 12), (0, 4, 5)):
        for cache, x in ((k_cache, k), (v_cache, v)):
            want = torch.full((H, SIZE, D), 7.0)
            want[:, start : start + length] = x[at : at + length].transpose(0, 1)
            assert torch.equal(cache[page], want.to(cache.dtype))
        at += length
    assert all(torch.equal(a, b) for a, b in zip(pool.tensors.values(), dense.tensors.values(), strict=True))
    untouched = k_cache[[1, 3]], v_cache[[1, 3]]
    assert all((x == 7).all() for x in untouched)
    if layout == "parts of wider rows":
        assert (memory[0][..., D : 2 * D] == 7).all()


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_read_as_a_pool_of_ours_would_be(layout, format, where):
    if where == "triton" and format != "bf16":
        pytest.skip("one type is enough for Triton's interpreter")
    dense = KVPages.empty(format, P, H, SIZE, D)
    _, (k_cache, v_cache) = layouts(dense.k.dtype)[layout]
    pool = KVPages(format, k_cache, v_cache)
    generator = torch.Generator().manual_seed(1)
    whole = PageList.of(range(P), [SIZE] * P)
    k, v = (torch.randn(P * SIZE, H, D, generator=generator) for _ in "kv")
    for pages in (pool, dense):
        kv_append(k, v, pages, whole, backend=where)
    q = torch.randn(11, 2 * H, D, generator=generator)
    found, want = (paged_attention(q, [pages], PLAN, backend=where) for pages in (pool, dense))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    found, want = (kv_gather([pages], whole, backend=where) for pages in (pool, dense))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    # Into pages of ours, and back.
    for target in ("int8", format):
        copies = [KVPages.empty(target, P, H, SIZE, D) for _ in range(2)]
        for pages, copy in zip((pool, dense), copies, strict=True):
            kv_commit(pages, whole, copy, whole, backend=where)
        assert all(torch.equal(a, b) for a, b in zip(*(copy.tensors.values() for copy in copies), strict=True))
    k_cache.zero_(), v_cache.zero_()
    kv_commit(copies[1], PageList.of([0, 3], [SIZE, 4]), pool, PageList.of([4, 1], [SIZE, 4]), backend=where)
    assert torch.equal(pool.k[4], dense.k[0]) and torch.equal(pool.v[1, :, :4], dense.v[3, :, :4])
    assert not pool.v[1, :, 4:].any() and not pool.k[0].any()


def test_a_page_may_begin_at_every_token(where):
    """Pages that overlap: a run of tokens anywhere in a row of them is a page."""
    row = torch.randn(40, H, 2 * D, generator=torch.Generator().manual_seed(2))
    views = [x.as_strided((40 - SIZE + 1, H, SIZE, D), (x.stride(0), x.stride(1), x.stride(0), 1), x.storage_offset())
             for x in (row[..., :D], row[..., D:])]  # fmt: skip
    pool = KVPages("fp32", *views)
    q = torch.randn(3, H, D)
    out, _ = paged_attention(q, [pool], make_plan([(3, [13, 2], [12, 5])]), backend=where)
    tokens = torch.cat((row[13:25], row[2:7]))
    k, v = (x.transpose(0, 1) for x in (tokens[..., :D], tokens[..., D:]))
    want = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v).transpose(0, 1)
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("starts", "lens", "message"),
    [
        ([3, 10], [5, 3], r"where.starts\[1\] must be in \[0, 9\], got 10"),
        ([-1, 0], [5, 3], r"where.starts\[0\] must be in \[0, 7\], got -1"),
        ([0, 0, 0], [5, 3], r"where.starts must be \[len\(where\)=2\], got \[3\]"),
    ],
)
def test_a_slot_that_is_none_is_refused_before_anything_is_written(starts, lens, message, where):
    pool = KVPages.empty("fp32", P, H, SIZE, D).map(torch.zero_)
    where_ = PageList.of([1, 2], lens)._replace(starts=torch.tensor(starts, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        kv_append(torch.ones(8, H, D), torch.ones(8, H, D), pool, where_, backend=where)
    assert not pool.k.any()


def test_only_floats_may_lie_so_or_be_written_within_a_page():
    int8 = KVPages.empty("int8", P, H, SIZE, D)
    strided = int8._replace(k=torch.zeros(P, SIZE, H, D, dtype=torch.int8).transpose(1, 2))
    within = PageList.of([1], [5])._replace(starts=torch.tensor([2], dtype=torch.int32))
    x = torch.ones(5, H, D)
    with pytest.raises(ValueError, match=r"pages.k must be contiguous for int8 pages, got strides"):
        kv_append(x, x, strided, PageList.of([1], [5]))
    with pytest.raises(ValueError, match=r"where.starts must be None here: only kv_append to pages of floats"):
        kv_append(x, x, int8, within)
    with pytest.raises(ValueError, match=r"where.starts must be None here"):
        kv_gather([KVPages.empty("fp32", P, H, SIZE, D)], within)
