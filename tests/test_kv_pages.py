"""kv_append, kv_commit, kv_gather: every backend against the reference, which is checked by itself first."""

import pytest
import torch

from inferix_kernels import FORMATS, KVPages, PageList, kv_append, kv_commit, kv_gather
from inferix_kernels.testing import filled_pool, mixed_pools, poisoned_pool

# (lens, H, page_size, D): one token, a full and a partial page, an empty one in between, odd sizes.
SHAPES = [([1], 1, 8, 16), ([8, 3], 2, 8, 64), ([16, 0, 5], 3, 16, 96), ([40, 40, 39, 1], 2, 40, 128), ([7], 2, 8, 20)]
DTYPES = [torch.float32, torch.bfloat16]


def tokens(lens, heads, head_dim, dtype=torch.float32, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(sum(lens), heads, head_dim, generator=generator) for _ in range(2))
    k[-1], v[:, 0, 0] = 0, 0  # a key and a channel of zeros: their scale must not be 0
    return k.to(device, dtype), v.to(device, dtype)


def same_bits(a: KVPages, b: KVPages) -> bool:
    return all(x is y is None or torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens, heads, page_size, head_dim", SHAPES)
def test_append_stores_what_the_reference_stores(lens, heads, page_size, head_dim, dtype, format, backend, device):
    k, v = tokens(lens, heads, head_dim, dtype, device)
    where = PageList.of(range(len(lens), 0, -1), lens, device)
    got, want = (poisoned_pool(format, len(lens) + 2, heads, page_size, head_dim, device) for _ in range(2))
    kv_append(k, v, got, where, backend=backend)
    kv_append(k, v, want, where, backend="reference")
    assert same_bits(got, want)  # exact: every rounding is defined


def test_append_reads_slices_of_a_packed_projection(backend, device):
    k, v = tokens([5], 2, 16, device=device)
    packed = torch.cat((k, v), dim=1)
    got, want = (poisoned_pool("int8", 1, 2, 8, 16, device) for _ in range(2))
    kv_append(packed[:, :2], packed[:, 2:], got, PageList.of([0], [5], device), backend=backend)
    kv_append(k, v, want, PageList.of([0], [5], device), backend="reference")
    assert same_bits(got, want)


@pytest.mark.parametrize("format", FORMATS)
def test_unused_slots_hold_zeros_after_an_append(format, backend, device):
    pool = poisoned_pool(format, 1, 2, 8, 16, device)
    kv_append(*tokens([3], 2, 16, device=device), pool, PageList.of([0], [3], device), backend=backend)
    assert not pool.k[:, :, 3:].any() and not pool.v[:, :, 3:].any()
    assert all(scales is None or scales.isfinite().all() for scales in (pool.k_scales, pool.v_scales))


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("source_format", FORMATS)
@pytest.mark.parametrize("target_format", FORMATS)
@pytest.mark.parametrize("lens, heads, page_size, head_dim", SHAPES)
def test_commit_stores_what_the_reference_stores(
    lens, heads, page_size, head_dim, source_format, target_format, with_mean, backend, device
):
    if with_mean and source_format == target_format == "int8":
        pytest.skip("refused, see test_ops.py")
    source, where = filled_pool(source_format, lens, heads, page_size, head_dim, device)
    to = PageList.of(range(len(lens)), lens, device)
    mean = torch.randn(heads, head_dim).to(device) if with_mean else None
    got, want = (poisoned_pool(target_format, len(lens), heads, page_size, head_dim, device) for _ in range(2))
    kv_commit(source, where, got, to, mean, backend=backend)
    kv_commit(source, where, want, to, mean, backend="reference")
    assert same_bits(got, want)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_commit_within_a_format_copies_bits(format, which):
    lens = [8, 3]
    source, where = filled_pool(format, lens, 2, 8, 16)
    target, to = poisoned_pool(format, 2, 2, 8, 16), PageList.of([0, 1], lens)
    kv_commit(source, where, target, to, backend=which)
    for i, (page, length) in enumerate(zip(where.ids.tolist(), lens)):
        assert torch.equal(target.k[i, :, :length], source.k[page, :, :length])
        assert torch.equal(target.v[i, :, :length], source.v[page, :, :length])


def test_commit_may_copy_within_one_pool(backend, device):
    pool, where = filled_pool("int8", [4], 2, 8, 16, device)
    free = next(page for page in range(pool.pages) if page != int(where.ids[0]))
    kv_commit(pool, where, pool, PageList.of([free], [4], device), backend=backend)
    a, b = (kv_gather([pool], PageList.of([page], [4], device)) for page in (int(where.ids[0]), free))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens, heads, page_size, head_dim", SHAPES)
def test_gather_reads_all_formats_in_the_order_of_the_list(lens, heads, page_size, head_dim, dtype, backend, device):
    pools, ids, page_lens = mixed_pools(lens, heads, page_size, head_dim, FORMATS, device)
    where = PageList.of(ids, page_lens, device)
    got = kv_gather(pools, where, dtype, backend=backend)
    want = kv_gather(pools, where, dtype, backend="reference")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_gather_of_an_empty_list_is_empty(which):
    pool, _ = filled_pool("fp32", [1], 2, 8, 16)
    k, v = kv_gather([pool], PageList.of([], []), backend=which)
    assert k.shape == v.shape == (0, 2, 16)


@pytest.mark.parametrize("format, bound", [("fp32", 0.0), ("bf16", 2.0**-8), ("int8", 0.5 / 127)])
def test_a_round_trip_loses_what_the_format_says(format, bound):
    """The specification by itself: half a step of bfloat16's 8 bits, half a step of 127 of the largest in its group."""
    k, v = tokens([8, 5], 2, 32)
    pool, where = KVPages.empty(format, 2, 2, 8, 32), PageList.of([1, 0], [8, 5])
    kv_append(k, v, pool, where, backend="reference")
    got_k, got_v = kv_gather([pool], where, backend="reference")
    key_peaks = k.abs() if format == "bf16" else k.abs().amax(-1, keepdim=True)
    value_peaks = (
        v.abs()
        if format == "bf16"
        else torch.cat([page.abs().amax(0, keepdim=True).expand_as(page) for page in v.split([8, 5])])
    )
    slack = 1 + 1e-5  # the scale itself is rounded
    assert ((got_k - k).abs() <= bound * key_peaks * slack + 1e-12).all()
    assert ((got_v - v).abs() <= bound * value_peaks * slack + 1e-12).all()


def test_halves_round_to_even(backend, device):
    k = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], device=device).view(1, 1, 8)
    pool = KVPages.empty("int8", 1, 1, 8, 8, device)
    kv_append(k, k, pool, PageList.of([0], [1], device), backend=backend)
    assert pool.k[0, 0, 0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_nan_and_infinity_survive_bfloat16_pages(backend, device):
    k = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38], device=device).view(1, 1, 4)
    pool = KVPages.empty("bf16", 1, 1, 8, 4, device)
    kv_append(k, k, pool, PageList.of([0], [1], device), backend=backend)
    assert torch.equal(pool.k[0, 0, 0], k[0, 0].bfloat16()) or pool.k[0, 0, 0, 0].isnan()
    assert pool.k[0, 0, 0, 1:].tolist() == k[0, 0, 1:].bfloat16().tolist()


def test_the_number_of_threads_changes_no_bit(threads):
    k, v = tokens([8, 8, 3], 3, 32)
    stored = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        pool = poisoned_pool("int8", 3, 3, 8, 32)
        kv_append(k, v, pool, PageList.of([2, 0, 1], [8, 8, 3]), backend="compiled")
        stored.append(pool)
    assert same_bits(stored[0], stored[1]) and same_bits(stored[0], stored[2])
