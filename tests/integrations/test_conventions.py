"""Log-sum-exps as each library has them: base, shape, rows that see no key. A library is a row of LIBRARIES."""

import math

import pytest
import torch

from inferix_kernels.integrations import flash_attn, flash_attn_interface
from tests.integrations.dense import attention, visible

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, WIDTH = 2, 5, 3, 4, 2, 16  # causal: the first two queries see no key
ENDS = {
    "q": torch.arange(BATCH + 1, dtype=torch.int32) * QUERIES,
    "k": torch.arange(BATCH + 1, dtype=torch.int32) * KEYS,
}


def fa2_dense(q, k, v):
    return flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2]


def fa2_packed(q, k, v):
    flat = (x.flatten(0, 1) for x in (q, k, v))
    options = {"causal": True, "return_attn_probs": True}
    return flash_attn.flash_attn_varlen_func(*flat, ENDS["q"], ENDS["k"], QUERIES, KEYS, **options)[:2]


def fa2_cached(q, k, v):
    return flash_attn.flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True)


def fa3_dense(q, k, v):
    return flash_attn_interface.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)


def fa3_packed(q, k, v):
    flat = (x.flatten(0, 1) for x in (q, k, v))
    options = {"causal": True, "return_attn_probs": True}
    return flash_attn_interface.flash_attn_varlen_func(*flat, ENDS["q"], ENDS["k"], QUERIES, KEYS, **options)


def fa3_cached(q, k, v):
    return flash_attn_interface.flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True)[:2]


def fa3_cached_packed(q, k, v):
    options = {"cu_seqlens_q": ENDS["q"], "max_seqlen_q": QUERIES, "causal": True, "return_softmax_lse": True}
    return flash_attn_interface.flash_attn_with_kvcache(q.flatten(0, 1), k, v, **options)[:2]


DENSE, PACKED = "batch heads queries", "heads tokens"
LIBRARIES = {  # function, base, shape of its log-sum-exp, its value where a row sees no key
    "FlashAttention 2, dense": (fa2_dense, math.e, DENSE, math.inf),
    "FlashAttention 2, packed": (fa2_packed, math.e, PACKED, math.inf),
    "FlashAttention 2, cache": (fa2_cached, math.e, DENSE, math.inf),
    "FlashAttention 3, dense": (fa3_dense, math.e, DENSE, -math.inf),
    "FlashAttention 3, packed": (fa3_packed, math.e, PACKED, -math.inf),
    "FlashAttention 3, cache": (fa3_cached, math.e, DENSE, -math.inf),
    "FlashAttention 3, cache, packed": (fa3_cached_packed, math.e, PACKED, -math.inf),
}


def shaped(lse, shape):
    """[batch, heads, queries], shaped as a library has it."""
    tokens = lse.transpose(0, 1).flatten(1)  # [heads, tokens]
    return {DENSE: lse, PACKED: tokens, "tokens heads": tokens.T}[shape]


@pytest.mark.parametrize("library", LIBRARIES)
def test_base_shape_and_empty_rows_of_the_log_sum_exp(library):
    function, base, shape, empty = LIBRARIES[library]
    torch.manual_seed(0)
    q = torch.randn(BATCH, QUERIES, HEADS, WIDTH)
    k, v = torch.randn(2, BATCH, KEYS, KV_HEADS, WIDTH)
    lengths = torch.tensor([QUERIES] * BATCH)
    mask = visible(QUERIES, KEYS, lengths * 0, torch.tensor([KEYS] * BATCH), lengths, (-1, 0))
    want_out, want = attention(q, k, v, mask)
    want = shaped(want / math.log(base), shape)
    want = want.where(want != -math.inf, empty)
    out, lse = function(q, k, v)
    assert lse.dtype == torch.float32 and lse.shape == want.shape and lse.is_contiguous()
    torch.testing.assert_close(lse, want.float(), atol=1e-5, rtol=1e-5)
    out = out.view(want_out.shape)
    torch.testing.assert_close(out, want_out.float(), atol=1e-5, rtol=1e-5)
    assert not out[:, : QUERIES - KEYS].any() and out[:, QUERIES - KEYS :].all()
