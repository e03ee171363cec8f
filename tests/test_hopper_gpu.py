"""The Hopper attention kernel on a GPU, in the order of a first meeting: a load, a product, the whole."""

import pytest
import torch

from inferix_kernels import KVPages, compiled, make_plan, paged_attention, reference
from inferix_kernels.testing import attention_inputs, filled_pool

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (HOPPER and compiled.HAS_CUDA), reason="needs a Hopper GPU and an extension built with nvcc"
    ),
]
KINDS = ("bf16", "i8f8", "fp8")
# Of a result to the largest |value|: bf16 weights and outputs; 8 bits of q and 3 bits of mantissa of the weights.
TOLERANCE = {"bf16": 1e-2, "i8f8": 4e-2, "fp8": 6e-2}


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def tile_offsets(rows: int, width: int) -> torch.Tensor:
    """[rows, width]: where each byte of a tile lies in shared memory. 128 bytes of a row to a panel, chunks of 16
    permuted by the row's place among the eight (128-byte rows) or by half of it among the eight (64-byte rows)."""
    wide = min(width, 128)
    row, byte = torch.arange(rows)[:, None], torch.arange(width)[None]
    linear = byte // wide * rows * wide + row * wide + byte % wide
    line = linear // 128 % 8
    flip = line if wide == 128 else line % 4
    return linear // 128 * 128 + (linear // 16 % 8 ^ flip) * 16 + linear % 16


def key_order() -> torch.Tensor:
    """Which key lies in each row of a loaded unit of 8-bit keys: 16a + 4c + 2j + b in row 16a + 8j + 2c + b."""
    row = torch.arange(64)
    return row // 16 * 16 + row // 2 % 4 * 4 + row // 8 % 2 * 2 + row % 2


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_1_tma_brings_a_key_tile(kind, D, page_size):
    H, head, pages = 3, 2, (4, 1)
    pool, _ = filled_pool(kind, [page_size] * 5, H, page_size, D, "cuda")
    width, eight_bit = (2 * D, False) if kind == "bf16" else (D, True)
    keys, values = (torch.zeros(128 * width, dtype=torch.uint8, device="cuda") for _ in range(2))
    scales = torch.zeros(128, device="cuda"), torch.zeros(2, D, device="cuda")
    slots = [(page, page_size - 64) for page in pages]  # the last 64 of a page
    first, second = (page * H * page_size + slot for page, slot in slots)
    compiled._C.probe_load(
        pages=compiled._pool(pool), shape=compiled._shape(pool), first_row=first, second_row=second, head=head,
        keys=keys.data_ptr(), values=values.data_ptr(), key_scales=scales[0].data_ptr(),
        value_scales=scales[1].data_ptr(), stream=stream(),
    )  # fmt: skip
    torch.cuda.synchronize()

    def unit(x: torch.Tensor, page: int, slot: int) -> torch.Tensor:
        return x[page, head, slot : slot + 64].contiguous().view(torch.uint8).cpu()

    want_keys = [unit(pool.k, *at) for at in slots]
    if not eight_bit:
        want_values = torch.cat([unit(pool.v, *at) for at in slots])
        assert torch.equal(keys.cpu()[tile_offsets(128, width)], torch.cat(want_keys))
        assert torch.equal(values.cpu()[tile_offsets(128, width)], want_values)
        return
    assert torch.equal(keys.cpu()[tile_offsets(128, width)], torch.cat([x[key_order()] for x in want_keys]))
    for u, (page, slot) in enumerate(slots):
        got = values.cpu()[u * 64 * D :][tile_offsets(D, 64)]
        assert torch.equal(got, pool.v[page, head].view(torch.uint8).cpu()[:, slot : slot + 64])
        assert torch.equal(scales[0][64 * u : 64 * u + 64], pool.k_scales[page, head, slot : slot + 64])
        assert torch.equal(scales[1][u], pool.v_scales[page, head])


def codes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).cuda()


def probe(kind: str, D: int, values: bool, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    like = KVPages.empty(kind, 1, 1, 64, D, "cuda")
    out = torch.full((64, D if values else 128), torch.nan, device="cuda")
    compiled._C.probe_multiply(like=compiled._pool(like), values=values, a=a.data_ptr(), b=b.data_ptr(),
                               out=out.data_ptr(), stream=stream())  # fmt: skip
    torch.cuda.synchronize()
    return out.double()


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_2_scores_are_exact_sums(kind, D):
    dtype = KVPages.empty(kind, 1, 1, 64, D).k.dtype
    q, k = codes((64, D), dtype), codes((128, D), dtype)
    assert torch.equal(probe(kind, D, False, q, k), q.double() @ k.double().mT)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_2_weighted_values_are_exact_sums(kind, D):
    dtype = KVPages.empty(kind, 1, 1, 64, D).v.dtype
    weights = torch.randint(9, (64, 128), generator=torch.Generator().manual_seed(5)).float().cuda()
    if kind == "bf16":
        v = codes((128, D), dtype)
        keys_first = v.double()
    else:
        v = codes((2, D, 64), dtype)
        keys_first = v.double().transpose(1, 2).reshape(128, D)
    assert torch.equal(probe(kind, D, True, weights, v), weights.double() @ keys_first)


def close(kind: str, got: torch.Tensor, want: torch.Tensor) -> None:
    largest = want.float().abs().max().clamp(min=1e-3)
    assert not got.isnan().any()
    assert (got.float() - want.float()).abs().max() <= TOLERANCE[kind] * largest


# queries of each segment, lens, Hq, H, page_size: one tile, many tiles, ragged ends, grouped heads, large pages.
CASES = {
    "one key tile": ([64], [64, 64], 1, 1, 64),
    "one query": ([1], [5], 2, 2, 64),
    "ragged": ([200, 3, 77], [64, 64, 17, 0, 64, 1], 4, 4, 64),
    "grouped heads": ([130], [64] * 9 + [33], 8, 2, 64),
    "large pages": ([300], [256, 100, 256], 2, 2, 256),
    "a whole wave and more": ([2000], [64] * 40 + [24], 16, 16, 64),
}


def inputs(case: str, formats: tuple[str, ...], D: int, dtype: torch.dtype = torch.bfloat16):
    queries, lens, query_heads, heads, page_size = CASES[case]
    return attention_inputs(queries, lens, query_heads=query_heads, heads=heads, head_dim=D, page_size=page_size,
                            formats=formats, dtype=dtype, device="cuda")  # fmt: skip


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_3_attention_is_the_reference(case, kind, D):
    q, pools, plan = inputs(case, (kind,), D)
    out, lse = paged_attention(q, pools, plan, backend="compiled")
    want_out, want_lse = paged_attention(q, pools, plan, backend="reference")
    close(kind, out, want_out)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=2e-3 if kind == "bf16" else 3e-2)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_3_pools_of_several_formats_and_out_dtypes(out_dtype):
    q, pools, plan = inputs("ragged", KINDS, 128)
    out = torch.full(q.shape, torch.nan, dtype=out_dtype, device="cuda")
    paged_attention(q, pools, plan, out=out, backend="compiled")
    close("fp8", out, paged_attention(q, pools, plan, backend="reference")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_3_bias_variants_and_lists_per_head(kind):
    q, pools, plan = inputs("ragged", (kind,), 128)
    generator = torch.Generator().manual_seed(3)
    pages, starts, lists = len(plan.page_ids), plan.q_indptr.tolist(), plan.page_indptr.tolist()
    bias = torch.randn(pages, generator=generator)
    bias[::4] = -torch.inf
    variants = torch.randint(3, (pages,), generator=generator, dtype=torch.int32)
    plan = plan._replace(page_bias=bias.cuda(), page_variants=variants.cuda())
    q = torch.stack((q, -q, q.flip(0)))
    close(kind, *(paged_attention(q, pools, plan, backend=which)[0] for which in ("compiled", "reference")))
    segments = []
    for s in range(len(starts) - 1):
        for head in range(pools[0].heads):
            part = slice(lists[s] + head, lists[s + 1])
            segments.append((starts[s + 1] - starts[s], plan.page_ids[part].tolist(), plan.page_lens[part].tolist()))
    per_head = make_plan(segments, "cuda", lists_per_segment=pools[0].heads)
    close(kind, *(paged_attention(q[0], pools, per_head, backend=which)[0] for which in ("compiled", "reference")))


@pytest.mark.parametrize("kind", KINDS)
def test_3_accumulate(kind):
    q, pools, plan = inputs("grouped heads", (kind,), 128)
    ids, lens = plan.page_ids.tolist(), plan.page_lens.tolist()
    out, lse = torch.full(q.shape, torch.nan, device="cuda"), torch.full(q.shape[:2], -torch.inf, device="cuda")
    for part in (slice(0, 4), slice(4, None), slice(0, 0)):
        some = make_plan([(len(q), ids[part], lens[part])], "cuda")
        paged_attention(q, pools, some, out=out, lse=lse, accumulate=True, backend="compiled")
    want_out, want_lse = paged_attention(q, pools, plan, backend="reference")
    close(kind, out, want_out)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=3e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_3_the_same_bits_in_every_run(kind):
    q, pools, plan = inputs("a whole wave and more", (kind,), 128)
    first = paged_attention(q, pools, plan, backend="compiled")
    for _ in range(5):
        again = paged_attention(q, pools, plan, backend="compiled")
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_3_a_graph_replays_it():
    q, pools, plan = inputs("ragged", ("i8f8",), 128)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
    paged_attention(q, pools, plan, out=out, lse=lse, backend="compiled")
    want = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention(q, pools, plan, out=out, lse=lse, backend="compiled")
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "i8f8", "fp8", "int4"])
def test_4_page_ops_store_what_the_reference_stores(format):
    lens, heads, page_size, D = [64, 64, 17, 0], 3, 64, 128
    x = torch.randn(sum(lens), heads, D, device="cuda").bfloat16()
    _, where = filled_pool("bf16", lens, heads, page_size, D, "cuda")
    pools = []
    for which in (compiled, reference):
        pool = KVPages.empty(format, len(lens) + 2, heads, page_size, D, "cuda")
        for tensor in pool:
            if tensor is not None:
                tensor.view(torch.uint8).zero_()
        which.kv_append(x, x, pool, where)
        pools.append(pool)
    for a, b in zip(*pools):
        assert a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
