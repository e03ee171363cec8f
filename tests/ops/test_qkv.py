"""qkv_prologue: the reference against the formulas, every backend against the reference."""

import pytest
import torch

from inferix_kernels import FORMATS, PageList, kv_gather, qkv_prologue
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.testing import assert_close, poisoned_pool, rope_table

# lens, Hq, H, D, page_size
SHAPES = [
    ([1], 1, 1, 16, 8),
    ([8, 3], 4, 4, 64, 8),
    ([16, 0, 5], 6, 2, 96, 16),
    ([9], 6, 1, 128, 16),
    ([5], 3, 3, 20, 8),
]
NORMS = ["across all heads", "per head", "none"]


def arguments(shape, norm, *, channels=None, dtype=torch.float32, format="fp32", device="cpu", **options):
    """(args, kwargs) of one call, with a poisoned pool to write to."""
    lens, query_heads, heads, head_dim, page_size = shape
    generator = torch.Generator().manual_seed(3)
    width = (query_heads + 2 * heads) * head_dim
    qkv = (torch.randn(sum(lens), width, generator=generator) * 2).to(device, dtype)
    sizes = {"across all heads": (query_heads * head_dim, heads * head_dim), "per head": (head_dim, head_dim)}
    norms = [torch.rand(size, generator=generator).add(0.5).to(device) for size in sizes.get(norm, ())] or [None, None]
    rope = rope_table(sum(lens), head_dim if channels is None else channels).to(device)
    pool = poisoned_pool(format, len(lens) + 1, heads, page_size, head_dim, device)
    where = PageList.of(range(len(lens), 0, -1), lens, device)
    if options.pop("bias", False):
        options["bias"] = torch.randn(width, generator=generator).to(device, dtype)
    if options.pop("layer_norm", False):
        options |= {
            f"norm_{x}_bias": torch.randn(norm.shape, generator=generator).to(device) for x, norm in zip("qk", norms)
        }
    if options.pop("k_mean", False):
        options["k_mean"] = torch.randn(heads, head_dim, generator=generator).to(device)
    return (qkv, *norms, rope, pool, where), options


def run(args, options, backend):
    """(q, the keys and values that the pages hold, the pages), from a fresh copy of the pool."""
    *head, pool, where = args
    pool = pool.map(torch.clone)
    q = qkv_prologue(*head, pool, where, **options, backend=backend)
    return q, *kv_gather([pool], where, backend="reference"), pool


def steps(codes):
    """Codes as integers that count a format's steps."""
    if codes.dtype == torch.uint8:
        return torch.stack((codes & 15, codes >> 4), -1).int()
    if codes.dtype == torch.float8_e4m3fn:
        bits = codes.view(torch.uint8).int()
        return torch.where(bits > 127, 128 - bits, bits)
    return codes.int()


def assert_same(got, want, format, head_dim):
    assert_close("q", got[0], want[0], head_dim)
    pool, expected = (pages.part(1, pages.pages) for pages in (got[3], want[3]))
    if FORMATS[format].quantized:
        # Keys pass a norm whose sum is taken in another order: a code next to a boundary may go the other way.
        assert (steps(pool.k) - steps(expected.k)).abs().max() <= 1
        for name in ("k_scales", "k_offsets"):
            a, b = getattr(pool, name), getattr(expected, name)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 2**-10, atol=1e-6)
    else:
        dtype = pool.k.dtype
        assert_close("k", got[1].to(dtype), want[1].to(dtype), head_dim)
    # Values are only moved, and added to a bias: every bit.
    assert all(same(x, expected.tensors[name]) for name, x in pool.tensors.items() if name.startswith("v"))


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, norm", [(shape, NORMS[i % 3]) for i, shape in enumerate(SHAPES)], ids=str)
def test_prologue_stores_what_the_reference_stores(shape, norm, dtype, format, backend, device):
    args, options = arguments(shape, norm, dtype=dtype, format=format, device=device)
    assert_same(run(args, options, backend), run(args, options, "reference"), format, shape[3])


@pytest.mark.parametrize("format", ["fp32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prologue_matches_the_reference(shape, norm, dtype, format, backend, device):
    args, options = arguments(shape, norm, dtype=dtype, format=format, device=device)
    assert_same(run(args, options, backend), run(args, options, "reference"), format, shape[3])


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("channels", [0, 12, 64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k_mean", [True, False])
def test_prologue_options_match_the_reference(interleaved, channels, bias, k_mean, backend, device):
    args, options = arguments(
        SHAPES[1], NORMS[0], channels=channels, bias=bias, k_mean=k_mean, interleaved=interleaved, device=device
    )
    assert_same(run(args, options, backend), run(args, options, "reference"), "fp32", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS[:2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prologue_with_a_layer_norm_matches_the_reference(shape, norm, dtype, backend, device):
    channels = shape[3] // 4 * 2
    args, options = arguments(shape, norm, channels=channels, dtype=dtype, layer_norm=True, k_mean=True, device=device)
    options["interleaved"] = False
    assert_same(run(args, options, backend), run(args, options, "reference"), "fp32", shape[3])


def test_prologue_without_rope_or_norm_only_splits(backend, device):
    args, _ = arguments(SHAPES[1], "none", device=device)
    qkv, *_, pool, where = args
    q, k, v, _ = run((qkv, None, None, None, pool, where), {}, backend)
    assert torch.equal(torch.cat((q, k, v), dim=1).flatten(1), qkv)


def test_weights_may_be_bfloat16(backend, device):
    args, options = arguments(SHAPES[1], NORMS[0], device=device)
    qkv, norm_q, norm_k, *rest = args
    args = (qkv, norm_q.bfloat16(), norm_k.bfloat16(), *rest)
    assert_same(run(args, options, backend), run(args, options, "reference"), "fp32", 64)


def test_qkv_may_be_rows_of_a_wider_tensor(backend, device):
    args, options = arguments(SHAPES[1], NORMS[0], device=device)
    wide = torch.cat((args[0], torch.full_like(args[0], torch.nan)), dim=1)[:, : args[0].shape[1]]
    assert torch.equal(run((wide, *args[1:]), options, backend)[0], run(args, options, backend)[0])


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_reference_rotates_pairs_as_complex_numbers(interleaved):
    args, options = arguments(SHAPES[1], "none", channels=12, interleaved=interleaved)
    q = run(args, options, "reference")[0]
    x = args[0].unflatten(1, (-1, 64))[:, :4]
    turned = x[..., :12].unflatten(-1, (6, 2) if interleaved else (2, 6))
    turned = turned if interleaved else turned.mT
    angle = torch.view_as_complex(args[3])[:, None]
    turned = torch.view_as_real(torch.view_as_complex(turned.contiguous()) * angle)
    want = torch.cat(((turned if interleaved else turned.mT).flatten(-2), x[..., 12:]), dim=-1)
    assert_close("q", q, want, 2)


@pytest.mark.parametrize("norm", NORMS[:2])
def test_the_reference_normalises_as_torch_does(norm):
    args, options = arguments(SHAPES[1], norm, channels=0)
    qkv, norm_q = args[0], args[1]
    x = qkv[:, : 4 * 64].unflatten(1, (-1, len(norm_q)))
    want = torch.nn.functional.rms_norm(x, (len(norm_q),), norm_q, 1e-6).reshape(-1, 4, 64)
    assert_close("q", run(args, options, "reference")[0], want, 64)


@pytest.mark.parametrize("norm", NORMS[:2])
def test_the_reference_takes_a_layer_norm_as_torch_does(norm):
    args, options = arguments(SHAPES[1], norm, channels=0, layer_norm=True)
    qkv, norm_q = args[0], args[1]
    x = qkv[:, : 4 * 64].unflatten(1, (-1, len(norm_q)))
    want = torch.nn.functional.layer_norm(x, (len(norm_q),), norm_q, options["norm_q_bias"], 1e-6).reshape(-1, 4, 64)
    assert_close("q", run(args, options, "reference")[0], want, 64)


def test_the_number_of_threads_changes_no_bit(threads):
    args, options = arguments(([8, 8, 3], 6, 2, 64, 8), NORMS[0], format="int8", k_mean=True)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(args, options, "compiled"))
    for got in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(got[:3], results[0][:3]))
