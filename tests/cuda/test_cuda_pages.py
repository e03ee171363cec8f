"""The CUDA kernels of the page ops and of the prologue, from their own source, against the reference."""

import pytest
import torch

from inferix_kernels import KVPages, PageList, reference
from inferix_kernels.layout import FORMATS, KV_FORMATS
from inferix_kernels.testing import filled_pool, mixed_pools, poisoned_pool, random_page_list, rope_table
from tests.cuda import machine
from tests.ops import test_not_finite as not_finite

# lens of the pages, heads, page_size, D: an empty page, ragged tails, pages larger than a staged part, odd widths.
CASES = {
    "whole": ([64, 64], 1, 64, 128),
    "ragged": ([16, 0, 5, 16, 1], 2, 16, 32),
    "large pages": ([100, 130], 1, 136, 64),
    "odd sizes": ([7, 3], 2, 7, 20),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    return machine.PageOps(tmp_path_factory.mktemp("pages"))


def tokens(lens, heads, width, dtype=torch.float32, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lens), heads, width, generator=generator) * 3
    x[:1] = 0.0
    return x.to(dtype)


def assert_same(got: KVPages, want: KVPages):
    """Bit for bit."""
    for name, x in got.tensors.items():
        assert torch.equal(x.view(torch.uint8), want.tensors[name].view(torch.uint8)), name


def written(ops_or_reference, x, v, format, lens, heads, page_size, width):
    pool = poisoned_pool(format, len(lens) + 1, heads, page_size, width)
    where = random_page_list(pool, lens, torch.Generator().manual_seed(1))
    ops_or_reference.kv_append(x, v, pool, where)
    return pool, where


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_append_stores_what_the_reference_stores(ops, case, format):
    lens, heads, page_size, D = CASES[case]
    width = (D, 16) if format == "latent8" else D
    for dtype in DTYPES if format in ("fp16", "i8f8") else DTYPES[:1]:
        k, v = tokens(lens, heads, D, dtype), tokens(lens, heads, 16 if format == "latent8" else D, dtype, seed=4)
        got, _ = written(ops, k, v, format, lens, heads, page_size, width)
        want, _ = written(reference, k, v, format, lens, heads, page_size, width)
        assert_same(got, want)


def test_append_reads_slices_of_a_packed_row(ops):
    lens, heads, page_size, D = CASES["ragged"]
    packed = tokens(lens, 2 * heads, D + 1, torch.bfloat16)[:, :, 1:]  # and none of it aligned
    k, v = packed[:, :heads], packed[:, heads:]
    for format in ("bf16", "i8f8"):
        got, _ = written(ops, k, v, format, lens, heads, page_size, D)
        want, _ = written(reference, k, v, format, lens, heads, page_size, D)
        assert_same(got, want)


def test_entries_that_do_not_fit_are_skipped(ops):
    pool = poisoned_pool("int8", 3, 1, 8, 16)
    before = pool.map(torch.clone)
    x = tokens([8, 4], 1, 16)
    where = PageList.of([0, 0, 1], [8, 4, 0])
    where.ids[:], where.lens[:] = torch.tensor([3, -1, 1]), torch.tensor([8, 4, 9])
    ops.kv_append(x, x, pool, where)
    assert_same(pool, before)


@pytest.mark.parametrize("source", KV_FORMATS)
@pytest.mark.parametrize("case", ["ragged", "odd sizes"])
def test_commit_converts_as_the_reference(ops, case, source):
    lens, heads, page_size, D = CASES[case]
    pool, where = filled_pool(source, lens, heads, page_size, D)
    k_mean = torch.randn(heads, D, generator=torch.Generator().manual_seed(9))
    for target in KV_FORMATS:
        for mean in (None, k_mean) if target in (source, "int8") else (k_mean,):
            results = []
            for which in (ops, reference):
                to = poisoned_pool(target, len(lens) + 2, heads, page_size, D)
                which.kv_commit(pool, where, to, where, mean)
                results.append(to)
            assert_same(*results)


@pytest.mark.parametrize("case", CASES)
def test_gather_reads_what_the_reference_reads(ops, case):
    lens, heads, page_size, D = CASES[case]
    pools, ids, page_lens = mixed_pools(lens, heads, page_size, D, KV_FORMATS)
    where = PageList.of(ids, page_lens)
    for dtype in DTYPES:
        shape = (sum(page_lens), heads, D)
        got, want = ([torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)] for _ in range(2))
        ops.kv_gather(pools, where, out=got)
        reference.kv_gather(pools, where, dtype, out=want)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("format", ["fp32", "i8f8", "int4"])
@pytest.mark.parametrize("norm", [None, "rms", "rms of each head", "layer", "layer of each head"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_the_prologue_does_what_the_reference_does(ops, norm, interleaved, format):
    lens, heads, query_heads, page_size, D = [16, 0, 5], 2, 4, 16, 24
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(sum(lens), (query_heads + 2 * heads) * D, generator=generator)
    options = {"bias": torch.randn(qkv.shape[1], generator=generator), "interleaved": interleaved,
               "k_mean": torch.randn(heads, D, generator=generator)}  # fmt: skip
    norm_q = norm_k = None
    if norm:
        norm_q, norm_k = (torch.rand(D if "each" in norm else n * D, generator=generator) for n in (query_heads, heads))
        if "layer" in norm:
            options |= {"norm_q_bias": torch.randn_like(norm_q), "norm_k_bias": torch.randn_like(norm_k)}
    rope = rope_table(len(qkv), 16)  # 8 of the 24 channels are not turned
    results = []
    for which in (ops, reference):
        pool = poisoned_pool(format, 4, heads, page_size, D)
        where = random_page_list(pool, lens, torch.Generator().manual_seed(1))
        q = torch.full((len(qkv), query_heads, D), torch.nan)
        which.qkv_prologue(qkv, norm_q, norm_k, rope, pool, where, out=q, **options)
        k, v = torch.empty(sum(lens), heads, D), torch.empty(sum(lens), heads, D)
        reference.kv_gather([pool], where, out=(k, v))
        results.append((q, k, v))
    (q, k, v), (want_q, want_k, want_v) = results
    torch.testing.assert_close(q, want_q, rtol=0, atol=2e-6)
    # Sums of squares in another order may move a number over the boundary of a code.
    step = {"fp32": 2e-6, "i8f8": 5e-2, "int4": 0.6}[format]
    torch.testing.assert_close(k, want_k, rtol=0, atol=step)
    assert (k - want_k).abs().gt(2e-5).float().mean() < 1e-2
    assert torch.equal(v, want_v)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_what_is_not_finite_is_stored_as_reads_as_the_references(format, side, ops):
    for strange in not_finite.STRANGE.values():
        k, v = not_finite.numbers(side, strange)
        pool = KVPages.empty(format, 2, not_finite.H, not_finite.PAGE, not_finite.D)
        ops.kv_append(k, v, pool, PageList.of([1, 0], not_finite.LENS))
        not_finite.same(not_finite.read(pool), not_finite.read(not_finite.stored(format, k, v, "reference")))
