"""The Hopper attention kernel on a GPU. What it is made of: test_hopper_stages.py."""

import pytest
import torch

from inferix_kernels import KVPages, compiled, make_plan, paged_attention, quantize_rows, reference
from inferix_kernels.proofs.cases import tolerance
from inferix_kernels.sass import KINDS
from inferix_kernels.testing import attention_inputs, filled_pool

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (HOPPER and compiled.HAS_CUDA), reason="needs a Hopper GPU and an extension built with nvcc"
    ),
]
# What rounding q costs is in `wanted`: for fp8 it is most of the error.
TOLERANCE = {kind: tolerance(*how) for kind, how in KINDS.items()}
LSE_TOLERANCE = {kind: 2e-3 for kind in KINDS} | {"i8f8": 3e-2, "fp8": 3e-2, "wide int4": 1e-2}


def attend(kind: str, *arguments, **options):
    precision = "8bit" if KINDS[kind][1] else "exact"
    return paged_attention(*arguments, **options, precision=precision, backend="compiled")


def wanted(kind: str, q: torch.Tensor, pools, plan) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference, of q rounded as the kernel rounds it: to the codes of the keys, with a scale for each row."""
    codes = pools[0].sides[0].codec.dtype
    if KINDS[kind][1] and len(pools) == 1:
        rounded = quantize_rows(q.flatten(0, -2), codes, backend="reference")
        q = (rounded.codes.float() * rounded.scales[:, None]).view(q.shape)
    return paged_attention(q, pools, plan, backend="reference")


def close(kind: str, got: torch.Tensor, want: torch.Tensor, tolerance: float | None = None) -> None:
    largest = want.float().abs().max().clamp(min=1e-3)
    assert not got.isnan().any()
    assert (got.float() - want.float()).abs().max() <= (tolerance or TOLERANCE[kind]) * largest


# queries of each segment, lens, Hq, H, page_size: one tile, many tiles, ragged ends, grouped heads, large pages.
CASES = {
    "one key tile": ([64], [64, 64], 1, 1, 64),
    "one query": ([1], [5], 2, 2, 64),
    "ragged": ([200, 3, 77], [64, 64, 17, 0, 64, 1], 4, 4, 64),
    "grouped heads": ([130], [64] * 9 + [33], 8, 2, 64),
    "large pages": ([300], [256, 100, 256], 2, 2, 256),
    "a whole wave and more": ([2000], [64] * 40 + [24], 16, 16, 64),
}


def inputs(case: str, formats: tuple[str, ...], D: int):
    queries, lens, query_heads, heads, page_size = CASES[case]
    dtype = torch.float16 if formats == ("fp16",) else torch.bfloat16
    return attention_inputs(queries, lens, query_heads=query_heads, heads=heads, head_dim=D, page_size=page_size,
                            formats=formats, dtype=dtype, device="cuda")  # fmt: skip


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_3_floats_in_pages_of_any_size(kind):
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    q, pools, plan = attention_inputs([130], [40] * 9 + [33], query_heads=2, heads=2, head_dim=128, page_size=40,
                                      formats=(KINDS[kind][0],), dtype=dtype, device="cuda")  # fmt: skip
    close(kind, attend(kind, q, pools, plan)[0], paged_attention(q, pools, plan, backend="reference")[0])


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_3_attention_is_the_reference(case, kind, D):
    q, pools, plan = inputs(case, (KINDS[kind][0],), D)
    out, lse = attend(kind, q, pools, plan)
    want_out, want_lse = wanted(kind, q, pools, plan)
    close(kind, out, want_out)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=LSE_TOLERANCE[kind])


@pytest.mark.parametrize("kind", ["fp8", "wide int4"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_3_pools_of_several_formats_and_out_dtypes(out_dtype, kind):
    q, pools, plan = inputs("ragged", ("bf16", "int8", "i8f8", "fp8", "int4"), 128)
    out = torch.full(q.shape, torch.nan, dtype=out_dtype, device="cuda")
    attend(kind, q, pools, plan, out=out)
    # q is rounded to each pool's codes in turn; to e4m3 for all of them it would cost 4e-2 at the most.
    tolerance = 6e-2 if kind == "fp8" else None
    close(kind, out, paged_attention(q, pools, plan, backend="reference")[0], tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_3_bias_variants_and_lists_per_head(kind):
    q, pools, plan = inputs("ragged", (KINDS[kind][0],), 128)
    generator = torch.Generator().manual_seed(3)
    pages, starts, lists = len(plan.page_ids), plan.q_indptr.tolist(), plan.page_indptr.tolist()
    bias = torch.randn(pages, generator=generator)
    bias[::4] = -torch.inf
    variants = torch.randint(3, (pages,), generator=generator, dtype=torch.int32)
    plan = plan._replace(page_bias=bias.cuda(), page_variants=variants.cuda())
    q = torch.stack((q, -q, q.flip(0)))
    close(kind, attend(kind, q, pools, plan)[0], wanted(kind, q, pools, plan)[0])
    segments = []
    for s in range(len(starts) - 1):
        for head in range(pools[0].heads):
            part = slice(lists[s] + head, lists[s + 1])
            segments.append((starts[s + 1] - starts[s], plan.page_ids[part].tolist(), plan.page_lens[part].tolist()))
    per_head = make_plan(segments, "cuda", lists_per_segment=pools[0].heads)
    close(kind, attend(kind, q[0], pools, per_head)[0], wanted(kind, q[0], pools, per_head)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_3_accumulate(kind):
    q, pools, plan = inputs("grouped heads", (KINDS[kind][0],), 128)
    ids, lens = plan.page_ids.tolist(), plan.page_lens.tolist()
    out, lse = torch.full(q.shape, torch.nan, device="cuda"), torch.full(q.shape[:2], -torch.inf, device="cuda")
    for part in (slice(0, 4), slice(4, None), slice(0, 0)):
        some = make_plan([(len(q), ids[part], lens[part])], "cuda")
        attend(kind, q, pools, some, out=out, lse=lse, accumulate=True)
    want_out, want_lse = wanted(kind, q, pools, plan)
    close(kind, out, want_out)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=3e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_3_the_same_bits_in_every_run(kind):
    q, pools, plan = inputs("a whole wave and more", (KINDS[kind][0],), 128)
    first = attend(kind, q, pools, plan)
    for _ in range(5):
        again = attend(kind, q, pools, plan)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("kind", ["i8f8", "wide int8"])
def test_3_a_graph_replays_it(kind):
    q, pools, plan = inputs("ragged", (KINDS[kind][0],), 128)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
    attend(kind, q, pools, plan, out=out, lse=lse)
    want = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(kind, q, pools, plan, out=out, lse=lse)
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
        for tensor in pool.tensors.values():
            tensor.view(torch.uint8).zero_()
        which.kv_append(x, x, pool, where)
        pools.append(pool)
    for a, b in zip(*(pool.tensors.values() for pool in pools)):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
