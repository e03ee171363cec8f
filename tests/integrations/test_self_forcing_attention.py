"""attention and flash_attention of wan/modules/attention.py: what a replacement must do (as ABot-World's #14 lists it),
against dense float64."""

import types

import pytest
import torch

from inferix_kernels import Unsupported
from inferix_kernels.integrations import self_forcing

# Inputs and result have 8 bits of mantissa in bfloat16, 11 in float16.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-6}


def oracle(q, k, v, q_lens=None, k_lens=None, scale=None, causal=False, window=(-1, -1)):
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    batch, queries, _, width = q.shape
    out = torch.zeros_like(q)
    for b in range(batch):
        n = queries if q_lens is None else int(q_lens[b])
        m = k.shape[1] if k_lens is None else int(k_lens[b])
        offset = torch.arange(m) - (torch.arange(n)[:, None] + m - n)  # of a key from a query's own place
        left, right = window[0], 0 if causal else window[1]
        seen = torch.ones(n, m, dtype=torch.bool)
        seen &= True if left < 0 else offset >= -left
        seen &= True if right < 0 else offset <= right
        scores = torch.einsum("ihd,jhd->hij", q[b, :n], k[b, :m]) * (width**-0.5 if scale is None else scale)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        out[b, :n] = torch.einsum("hij,jhd->ihd", weights, v[b, :m])
    return out


def inputs(queries=7, keys=9, heads=4, kv_heads=4, width=32, batch=3, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, heads), (keys, kv_heads), (keys, kv_heads)
    return [torch.randn(batch, n, h, width, generator=generator).to(dtype) for n, h in sizes]


LENGTHS = {"all": (None, None), "k": (None, [9, 4, 0]), "q": ([7, 0, 3], None), "both": ([2, 7, 5], [9, 1, 5])}


@pytest.mark.parametrize(
    "causal, window", [(False, (-1, -1)), (True, (-1, -1)), (False, (2, 1)), (True, (3, 5)), (False, (-1, 0))]
)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kv_heads, dtype", [(4, torch.bfloat16), (2, torch.float16), (1, torch.float32)])
def test_keys_rows_windows_and_groups(lengths, causal, window, kv_heads, dtype):
    q, k, v = inputs(kv_heads=kv_heads, dtype=dtype)
    q_lens, k_lens = (None if n is None else torch.tensor(n) for n in LENGTHS[lengths])
    for function in (self_forcing.attention, self_forcing.flash_attention):
        out = function(q, k, v, q_lens, k_lens, causal=causal, window_size=window)
        assert out.dtype == dtype and out.shape == q.shape
        halves = [x if dtype != torch.float32 else x.bfloat16() for x in (q, k, v)]
        expected = oracle(*halves, q_lens, k_lens, None, causal, window)
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)
        assert bool((out[expected.abs().sum((-2, -1)) == 0] == 0).all())  # rows without a key, and past q_lens


def test_what_lies_past_the_lengths_is_not_read():
    q, k, v = inputs()
    expected = self_forcing.attention(q, k, v, k_lens=torch.tensor([9, 4, 2]))
    for x in (k, v):
        x[1, 4:], x[2, 2:] = torch.nan, torch.inf
    assert torch.equal(self_forcing.attention(q, k, v, k_lens=torch.tensor([9, 4, 2])), expected)


def test_scales():
    q, k, v = inputs()
    out = self_forcing.attention(q, k, v, softmax_scale=0.3, q_scale=0.5)
    torch.testing.assert_close(out.double(), oracle(q * 0.5, k, v, scale=0.3), atol=2**-6, rtol=0)


def test_other_dtypes_become_halves():
    """float32 becomes `dtype`, and q and k what v is; the result is q's."""
    q, k, v = inputs(dtype=torch.float32)
    out = self_forcing.attention(q, k, v, dtype=torch.float16)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), oracle(q.half(), k.half(), v.half()), atol=2**-9, rtol=0)
    mixed = self_forcing.attention(q, k.bfloat16(), v.half())
    torch.testing.assert_close(
        mixed, self_forcing.attention(q.bfloat16().half(), k.bfloat16().half(), v.half()).float()
    )


@pytest.mark.parametrize(
    "change, kind, error",
    [
        ({"dropout_p": 0.1}, Unsupported, "dropout_p must be 0, got 0.1"),
        ({"fa_version": 3}, Unsupported, "fa_version must be None, as no flash-attn is asked, got 3"),
        ({"dtype": torch.float32}, ValueError, "dtype must be torch.float16 or torch.bfloat16"),
        ({"window_size": (-2, 0)}, ValueError, r"window_size must be \(left, right\), each -1 or more"),
        ({"v": torch.zeros(3, 9, 4, 16)}, Unsupported, "v must have the shape of k, and k the width of q"),
        ({"k": torch.zeros(3, 9, 32)}, ValueError, r"k must be \[B, L, H, D\], .*, got \[3, 9, 32\]"),
        ({"q": torch.zeros(3, 7, 4, 32, requires_grad=True)}, Unsupported, "q, k and v must not require gradients"),
    ],
)
def test_arguments(change, kind, error):
    q, k, v = inputs()
    with pytest.raises(kind, match=error):
        self_forcing.attention(**({"q": q, "k": k, "v": v} | change))


def test_one_graph():
    q, k, v = inputs()
    lens = torch.tensor([7, 0, 3]), torch.tensor([9, 4, 0])
    compiled = torch.compile(self_forcing.attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v, *lens, causal=True), self_forcing.attention(q, k, v, *lens, causal=True))


def test_modules_that_have_the_functions():
    module = types.ModuleType("wan.modules.model")

    def flash_attention(q, k, v, q_lens=None, k_lens=None, dropout_p=0.0, softmax_scale=None, q_scale=None,
                        causal=False, window_size=(-1, -1), deterministic=False, dtype=torch.bfloat16,
                        version=None):  # fmt: skip
        raise AssertionError("Torch not compiled with CUDA enabled")

    module.flash_attention = flash_attention
    assert str(self_forcing.patch(module)) == "wan.modules.model (functions): wan.modules.model.flash_attention"
    q, k, v = inputs()
    assert torch.equal(module.flash_attention(q, k, v), self_forcing.flash_attention(q, k, v))
    self_forcing.unpatch(module)
    assert module.flash_attention is flash_attention
