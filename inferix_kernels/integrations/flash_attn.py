"""FlashAttention 2's functions, over our kernels: change `from flash_attn import` to
`from inferix_kernels.integrations.flash_attn import`.

Signatures, layouts and results are flash_attn's, and a log-sum-exp of +inf where a row sees no key. Beyond it they run
on CPUs, take float32, any head width, any page size, and cache_leftpad and cache_batch_idx along with a block_table.

There is no dropout, no ALiBi and no backward: dropout_p and alibi_slopes are Unsupported, and a tensor that requires a
gradient is an error. num_splits and deterministic change no result here and are not used; nor is max_seqlen_q.

What a table or a length holds is looked at on a CPU only. On a GPU that would cost a wait: there what does not fit is
skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._arguments import refuse
from ._flash import batched, cached, packed
from ._flash_arguments import FA2, Cache, New, Options

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

Results = Tensor | tuple[Tensor, ...]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """Attention of each sequence's queries over its keys.

    Args:
        q: [B, Sq, Hq, D] float32, bfloat16 or float16; Hq is a multiple of H.
        k, v: [B, Sk, H, D] in q's dtype.
        softmax_scale: of q . k; D ** -0.5 by default.
        causal: the last query stands at the last key, and none sees what comes after it.
        window_size: (left, right), how many keys before and after its own a query sees; -1 for any number.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        return_attn_probs: return more than out.

    Returns:
        out as q, or (out, softmax_lse, S_dmask): [B, Hq, Sq] float32, natural; and an empty tensor, as without dropout.

    Raises:
        Unsupported: dropout_p, alibi_slopes, another dtype, v of another width.
        ValueError: sizes that do not fit.

    Example:
        >>> from inferix_kernels.integrations.flash_attn import flash_attn_func
        >>> q, k = torch.randn(2, 10, 4, 64), torch.randn(2, 30, 2, 64)
        >>> list(flash_attn_func(q, k, k, causal=True).shape)
        [2, 10, 4, 64]
    """
    refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    out, lse = batched(q, k, v, Options(causal, window_size, softcap, softmax_scale), FA2)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Results:
    """As flash_attn_func, over sequences of any lengths, packed one after the other.

    Args:
        q: [T, Hq, D], of which sequence b is the tokens cu_seqlens_q[b] : cu_seqlens_q[b + 1].
        k, v: [Tk, H, D], by cu_seqlens_k; or [P, page_size, H, D] with a block_table.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, from 0 to T and to Tk.
        max_seqlen_k: no sequence of keys is longer.
        block_table: [B, n] int32, the pages of each sequence, which cu_seqlens_k gives the length of.

    Returns:
        out as q, or (out, softmax_lse, S_dmask): softmax_lse is [Hq, T].

    Example:
        >>> from inferix_kernels.integrations.flash_attn import flash_attn_varlen_func
        >>> ends = torch.tensor([0, 3, 10], dtype=torch.int32)
        >>> q, k = torch.randn(10, 4, 64), torch.randn(10, 2, 64)
        >>> out, lse, _ = flash_attn_varlen_func(q, k, k, ends, ends, 7, 7, causal=True, return_attn_probs=True)
        >>> list(out.shape), list(lse.shape)
        ([10, 4, 64], [4, 10])
    """
    refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    options = Options(causal, window_size, softcap, softmax_scale)
    out, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, options, FA2, table=block_table)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Results:
    """Append k and v to a cache, in its memory, and attend to the cache. What is not given is as in flash_attn_func.

    Args:
        q: [B, Sq, Hq, D].
        k_cache, v_cache: [R, S, H, D], or [P, page_size, H, D] with a block_table. Read where they lie, never copied;
            their first three dimensions may have any strides. In a graph of torch.compile, to append they must not lie
            between one another in one tensor.
        k, v: [B, Snew, H, D], written from token cache_seqlens[b] on, or None.
        rotary_cos, rotary_sin: [positions, R / 2]: the first R channels of k are turned, to position
            cache_seqlens[b] + i, and those of q likewise if causal or a window is set; else all to cache_seqlens[b].
        cache_seqlens: tokens in the cache before the call, an int or [B] int32; all that there is room for by default.
        cache_batch_idx: [B] int32, rows of the cache, or of the block_table; b by default.
        cache_leftpad: [B] int32, tokens to skip at the beginning of each sequence.
        block_table: [B, n] int32, the pages of each sequence. Entries past its length are not read.
        rotary_interleaved: a pair of channels is (2j, 2j + 1); otherwise (j, j + R / 2).

    Returns:
        out as q, or (out, softmax_lse [B, Hq, Sq]).

    Example:
        >>> from inferix_kernels.integrations.flash_attn import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.zeros(8, 16, 2, 64), torch.zeros(8, 16, 2, 64)  # 8 pages of 16 tokens
        >>> table = torch.tensor([[5, 1, 7]], dtype=torch.int32)
        >>> q, k = torch.randn(1, 20, 4, 64), torch.randn(1, 20, 2, 64)
        >>> out = flash_attn_with_kvcache(q, k_cache, v_cache, k, k, cache_seqlens=0, block_table=table, causal=True)
        >>> torch.equal(k_cache[5], k[0, :16]) and torch.equal(k_cache[1, :4], k[0, 16:])
        True
    """
    refuse(alibi_slopes=alibi_slopes)
    cache = Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    new = New(k, v, None, rotary_cos, rotary_sin, rotary_interleaved, None)
    out, lse = cached(q, cache, new, Options(causal, window_size, softcap, softmax_scale), FA2)
    return (out, lse) if return_softmax_lse else out
