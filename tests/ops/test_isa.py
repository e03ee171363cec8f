"""Every op at every level of instructions, on shapes that hurt, against float64 or the reference's bits."""

import pytest
import torch
import torch.nn.functional as F

from inferix_kernels import (
    KVPages,
    PageList,
    kv_append,
    kv_commit,
    kv_gather,
    make_plan,
    merge_attention,
    paged_attention,
    qkv_prologue,
    quantize_rows,
)
from inferix_kernels import linear as linear_op
from inferix_kernels.layout import FORMATS, KV_FORMATS, as_bytes
from inferix_kernels.testing import assert_close, attention_inputs, filled_pool, poisoned_pool, rope_table

# queries, lens of the pages, Hq, H, D, page_size
SHAPES = {
    "one token": ([1], [1], 1, 1, 16, 16),
    "tails, 12 / 4 heads": ([17, 3], [64, 24, 1, 0], 12, 4, 48, 64),
    "24 / 8 heads": ([5], [40, 39], 24, 8, 80, 40),
    "D = 112": ([33], [64, 64, 7], 2, 2, 112, 64),
    "D = 96": ([20], [64, 30], 3, 3, 96, 64),
    "D = 18": ([2], [9, 3], 2, 1, 18, 9),
    "a page of several tiles": ([20], [200, 130], 1, 1, 128, 200),
    "rows of several tasks": ([300], [64, 33], 1, 1, 64, 64),
}
# What rounding queries and weights as the pages are may add: test_attention.ROUNDING says why.
BOUNDS = {"fp32": 2e-6, "fp16": 2e-6, "bf16": 4e-3, "int4": 6e-3, "fp8": 6e-3, "i8f8": 1.2e-2, "int8": 1.2e-2}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def inputs(shape, format):
    queries, lens, query_heads, heads, head_dim, page_size = shape
    sizes = {"query_heads": query_heads, "heads": heads, "head_dim": head_dim, "page_size": page_size}
    return attention_inputs(queries, lens, **sizes, formats=(format,))


def in_float64(q, pools, plan):
    """(out, lse) in float64, of what the pages hold."""
    starts, lists, bias = plan.q_indptr.tolist(), plan.page_indptr.tolist(), plan.page_bias
    outs, lses = [], []
    for s in range(len(starts) - 1):
        entries = slice(lists[s], lists[s + 1])
        lens = plan.page_lens[entries]
        k, v = kv_gather(pools, PageList(plan.page_ids[entries], lens), backend="reference")
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1).double() for x in (k, v))
        rows = q[starts[s] : starts[s + 1]].transpose(0, 1).double()
        scores = rows @ k.mT * q.shape[2] ** -0.5
        scores = scores if bias is None else scores + bias[entries].repeat_interleave(lens)
        lses.append(scores.logsumexp(-1).T)
        outs.append(((scores - lses[-1].T[..., None]).exp() @ v).nan_to_num(0).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("format", KV_FORMATS)
def test_attention(shape, format, isa):
    q, pools, plan = inputs(shape, format)
    out, lse = paged_attention(q, pools, plan, backend="compiled")
    want, want_lse = in_float64(q, pools, plan)
    bound = BOUNDS[format] if isa in ("avx512_vnni", "avx512_bf16", "amx") else BOUNDS["fp32"]
    assert (out - want).norm() <= bound * want.norm() + 1e-12
    assert (lse - want_lse).abs().max() <= 3 * bound + 1e-6 * want_lse.abs().max()


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_attention_that_sees_nothing(format, isa):
    q, pools, plan = inputs(SHAPES["tails, 12 / 4 heads"], format)
    nothing = plan._replace(page_bias=torch.full(plan.page_ids.shape, -torch.inf))
    out, lse = paged_attention(q, pools, nothing, backend="compiled")
    assert not out.any() and (lse == -torch.inf).all()
    empty = make_plan([(len(q), [], [])])
    out, lse = paged_attention(q, pools, empty, backend="compiled")
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_a_query_of_nan_spoils_its_row_alone(format, isa):
    q, pools, plan = inputs(SHAPES["tails, 12 / 4 heads"], format)
    want, _ = paged_attention(q, pools, plan, backend="compiled")
    q[1, 0, 3] = torch.nan
    out, lse = paged_attention(q, pools, plan, backend="compiled")
    assert out[1, 0].isnan().all() and lse[1, 0].isnan()
    out[1, 0] = want[1, 0]
    assert torch.equal(out, want)


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_what_a_row_gets_does_not_depend_on_its_neighbours(format, isa):
    q, pools, plan = inputs(SHAPES["rows of several tasks"], format)
    q[:16] *= 40  # rows whose scores outgrow those of others
    out, lse = paged_attention(q, pools, plan, backend="compiled")
    one = plan._replace(q_indptr=torch.tensor([0, 1], dtype=torch.int32))
    for row in (0, 17, 299):
        got = paged_attention(q[row : row + 1], pools, one, backend="compiled")
        assert torch.equal(got[0][0], out[row]) and torch.equal(got[1][0], lse[row])


def test_merging(isa):
    (a, lse_a), (b, lse_b) = ((torch.randn(70, 3, 18), torch.randn(70, 3)) for _ in range(2))
    got = merge_attention(a, lse_a, b, lse_b, backend="compiled")
    weights = torch.stack((lse_a, lse_b)).double().softmax(0)[..., None]
    assert_close("out", got[0], (weights[0] * a + weights[1] * b).float(), 18)
    assert_close("lse", got[1], torch.logaddexp(lse_a.double(), lse_b.double()).float(), 18)


@pytest.mark.parametrize("format", FORMATS)
def test_pages_hold_the_bits_of_the_reference(shape, format, isa):
    _, lens, _, heads, head_dim, page_size = shape
    source, where = filled_pool("fp32", lens, heads, page_size, head_dim)
    pools = [poisoned_pool(format, source.pages, heads, page_size, head_dim) for _ in range(4)]
    k, v = kv_gather([source], where, backend="reference")
    for pool, backend in zip(pools, ("compiled", "reference")):
        kv_append(k, v, pool, where, backend=backend)
    for pool, backend in zip(pools[2:], ("compiled", "reference")):
        kv_commit(source, where, pool, where, backend=backend)
    for got, want in zip(pools[::2], pools[1::2]):
        for name, x in got.tensors.items():
            assert torch.equal(x.view(torch.uint8), want.tensors[name].view(torch.uint8)), name
    got, want = (kv_gather([pools[0]], where, torch.bfloat16, backend=backend) for backend in ("compiled", "reference"))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def normalised(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


@pytest.mark.parametrize("per_head", [False, True])
def test_the_prologue(shape, per_head, isa):
    _, lens, query_heads, heads, head_dim, page_size = shape
    generator = torch.Generator().manual_seed(0)
    tokens, width = sum(lens), (query_heads + 2 * heads) * head_dim
    qkv = torch.randn(tokens, width, generator=generator)
    weights = [torch.rand(head_dim * (1 if per_head else n), generator=generator) + 0.5 for n in (query_heads, heads)]
    rope = rope_table(tokens, head_dim)
    pool, where = KVPages.empty("fp32", len(lens), heads, page_size, head_dim), PageList.of(range(len(lens)), lens)
    q = qkv_prologue(qkv, *weights, rope, pool, where, backend="compiled")
    k, v = kv_gather([pool], where, backend="reference")
    parts = qkv.double().split([query_heads * head_dim, heads * head_dim, heads * head_dim], 1)
    turn = torch.view_as_complex(rope.double())[:, None]
    for got, part, weight in zip((q, k), parts, weights):
        x = normalised(part.unflatten(1, (-1, len(weight))), weight.double()).flatten(1).unflatten(1, (-1, head_dim))
        x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
        assert_close("q or k", got, x.float(), head_dim)
    assert torch.equal(v.flatten(1), parts[2].float())


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (3, 17, 18), (17, 33, 64), (40, 48, 260), (130, 70, 1536)])
def test_linear_layers(M, N, K, codes, isa):
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(n, K, generator=generator) for n in (M, N))
    rows[0, 0] = -rows[0].abs().max() * 1.5
    bias, gate, residual = (torch.randn(*size, generator=generator) for size in ((N,), (1, N), (M, N)))
    x, weight = (quantize_rows(y, codes, backend="compiled") for y in (rows, columns))
    for mine, y in ((x, rows), (weight, columns)):
        want = quantize_rows(y, codes, backend="reference")
        assert torch.equal(as_bytes(mine.codes), as_bytes(want.codes)) and torch.equal(mine.scales, want.scales)
    epilogue = {"bias": bias, "activation": "gelu", "gate": gate, "residual": residual, "dtype": torch.float32}
    got = linear_op(x, weight, **epilogue, backend="compiled")
    product = (x.codes.double() @ weight.codes.double().T) * x.scales.double()[:, None] * weight.scales.double()
    want = residual + gate * F.gelu(product + bias)
    assert_close("out", got, want.float(), K)
