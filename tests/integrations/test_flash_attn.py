"""What FlashAttention's functions compute beyond their grids, against dense float64."""

import pytest
import torch

from inferix_kernels.integrations import flash_attn, flash_attn_interface
from tests.integrations.dense import attention, rotate, visible
from tests.integrations.flash_attn_calls import FUNCTIONS, appended, given, int32


@pytest.mark.parametrize("width", [*range(8, 257, 8), 20, 59, 111])
def test_head_widths(width):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 3, 2, width), torch.randn(2, 1, 140, 1, width)
    want, _ = attention(q, k, v, torch.ones(1, 3, 140, dtype=torch.bool), softcap=2.0, scale=0.25)
    for module in (flash_attn, flash_attn_interface):
        out = module.flash_attn_func(q, k, v, softmax_scale=0.25, softcap=2.0)
        torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)


def rotated_by(function, options, q, lens, causal, **more):
    """What a call returns and what it should, with keys appended at lens and rotated from more's positions on."""
    k_cache, v_cache, k, v, table = options
    at = more.get("rotary_seqlens", lens)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    for b in range(len(q)):
        put = slice(int(lens[b]), int(lens[b]) + k.shape[1])
        want_k[b, put] = rotate(k, table, table, at[:, None] + torch.arange(k.shape[1]), True)[b]
        want_v[b, put] = v[b]
    positions = at[:, None] + torch.arange(q.shape[1]) * causal
    ends, lengths = lens + k.shape[1], torch.tensor([q.shape[1]] * len(q))
    mask = visible(q.shape[1], k_cache.shape[1], ends * 0, ends, lengths, (-1, 0) if causal else (-1, -1))
    want, _ = attention(rotate(q, table, table, positions, True), want_k, want_v, mask)
    out = function(q, k_cache, v_cache, k, v, rotary_cos=table, rotary_sin=table, cache_seqlens=lens, causal=causal,
                   **more)  # fmt: skip
    return out, want


@pytest.mark.parametrize("causal", [False, True])
def test_rotary_seqlens_move_the_angles_and_not_the_place(causal):
    torch.manual_seed(0)
    caches = (*torch.randn(2, 2, 20, 2, 32), *torch.randn(2, 2, 3, 2, 32), torch.rand(32, 8))
    function = flash_attn_interface.flash_attn_with_kvcache
    more = {"rotary_seqlens": int32(2, 29)}
    out, want = rotated_by(function, caches, torch.randn(2, 3, 4, 32), int32(4, 17), causal, **more)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


def test_a_window_that_reaches_everything_is_none_where_queries_are_rotated():
    """All queries stand at cache_seqlens then, as without a window."""
    torch.manual_seed(0)
    caches = (*torch.randn(2, 2, 20, 2, 32), *torch.randn(2, 2, 3, 2, 32), torch.rand(32, 8))
    q = torch.randn(2, 3, 4, 32)
    for module, window in ((flash_attn, (20, 20)), (flash_attn_interface, (19, 2))):
        function = module.flash_attn_with_kvcache
        out, want = rotated_by(function, caches, q, int32(4, 17), False, window_size=window)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
        nearly = (window[0] - 1, window[1])
        other, _ = rotated_by(function, caches, q, int32(4, 17), False, window_size=nearly)
        assert not torch.allclose(other, out)


def test_only_the_used_queries_and_keys_count():
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 4, 4, 32), torch.randn(2, 2, 8, 2, 32)
    used_q, used_k = int32(2, 0), int32(5, 8)
    mask = visible(4, 8, used_k * 0, used_k, used_q, (-1, 0))
    want, want_lse = attention(q, k, v, mask)
    arguments = given("varlen", q=q.flatten(0, 1), k=k.flatten(0, 1), v=v.flatten(0, 1))
    options = {"seqused_q": used_q, "seqused_k": used_k, "causal": True, "return_attn_probs": True}
    out, lse = flash_attn_interface.flash_attn_varlen_func(**arguments, **options)
    torch.testing.assert_close(out.view(q.shape).double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse.transpose(0, 1).flatten(1), atol=1e-6, rtol=1e-5)


def test_packed_sequences_read_pages_by_a_block_table():
    torch.manual_seed(0)
    k_cache, v_cache, table = torch.randn(6, 4, 2, 32), torch.randn(6, 4, 2, 32), int32([5, 1], [2, 3])
    q, lens = torch.randn(2, 4, 4, 32), int32(5, 8)
    k, v = (x[table.long()].flatten(1, 2) for x in (k_cache, v_cache))
    want, _ = attention(q, k, v, visible(4, 8, lens * 0, lens, int32(4, 4), (2, 0)))
    arguments = given("varlen", q=q.flatten(0, 1), k=k_cache, v=v_cache, cu_seqlens_k=int32(0, 5, 13))
    out = flash_attn.flash_attn_varlen_func(**arguments, block_table=table, causal=True, window_size=(2, 9))
    torch.testing.assert_close(out.view(q.shape).double(), want, atol=1e-6, rtol=1e-5)


NOTHING = {  # no keys, no queries, no sequences
    "_func": [{"k": torch.empty(2, 0, 2, 32), "v": torch.empty(2, 0, 2, 32)}, {"q": torch.empty(2, 0, 4, 32)},
              {x: torch.empty(0, 4, 4, 32) for x in ("q", "k", "v")}],
    "varlen_func": [{"k": torch.empty(0, 2, 32), "v": torch.empty(0, 2, 32), "cu_seqlens_k": int32(0, 0, 0)},
                    {"q": torch.empty(0, 4, 32), "cu_seqlens_q": int32(0, 0, 0)}],
    "kvcache": [{"cache_seqlens": 0}, {"k_cache": torch.empty(2, 0, 2, 32), "v_cache": torch.empty(2, 0, 2, 32),
                                       "cache_seqlens": None}, appended(k=torch.empty(2, 0, 2, 32), cache_seqlens=0,
                                                                        v=torch.empty(2, 0, 2, 32))],
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_to_attend_to_is_zero(name):
    kind = max((end for end in NOTHING if name.endswith(end)), key=len)
    more = {"return_softmax_lse" if kind == "kvcache" else "return_attn_probs": True}
    for changes in NOTHING[kind]:
        arguments = given(name, **changes)
        out, lse, *_ = FUNCTIONS[name](**arguments, **more)
        assert out.shape == arguments["q"].shape and not out.any() and lse.isinf().all()
