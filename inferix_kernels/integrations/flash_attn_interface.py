"""FlashAttention 3's functions, over our kernels: change `from flash_attn_interface import` to
`from inferix_kernels.integrations.flash_attn_interface import`.

Signatures, layouts and results are flash_attn_interface's. A row that sees no key has a log-sum-exp of -inf. Beyond it
they run on CPUs and take float32 and any head width.

Unsupported are qv, attention_chunk, 8-bit tensors and with them q_descale, k_descale and v_descale, and values of
another width than keys. num_splits, pack_gqa, deterministic, sm_margin and scheduler_metadata change no result here and
are not used. What is said in flash_attn.py about gradients and about what tables hold, and what the arguments are that
both have, holds here too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import refuse
from ._flash import batched, cached, packed
from ._flash_arguments import FA3, Cache, New, Options

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

Results = Tensor | tuple[Tensor, ...]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Results:
    """Attention of each sequence's queries over its keys.

    Args:
        q, k, v, softmax_scale, causal, window_size, softcap: as in flash_attn.flash_attn_func.
        return_attn_probs: return (out, softmax_lse [B, Hq, Sq]).

    Example:
        >>> from inferix_kernels.integrations.flash_attn_interface import flash_attn_func
        >>> q, k = torch.randn(2, 10, 4, 64), torch.randn(2, 30, 2, 64)
        >>> out, lse = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
        >>> list(out.shape), list(lse.shape)
        ([2, 10, 4, 64], [2, 4, 10])
    """
    refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk)
    out, lse = batched(q, k, v, Options(causal, window_size, softcap, softmax_scale), FA3)
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Results:
    """As flash_attn_func, over sequences of any lengths, packed one after the other.

    Args:
        q: [T, Hq, D], of which sequence b is the tokens cu_seqlens_q[b] : cu_seqlens_q[b + 1].
        k, v: [Tk, H, D], by cu_seqlens_k.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, from 0 to T and to Tk.
        max_seqlen_k: no sequence of keys is longer.
        seqused_q, seqused_k: [B] int32: of each sequence only the first so many count. Queries past them get out = 0.
        return_attn_probs: return (out, softmax_lse [Hq, T]).

    Example:
        >>> from inferix_kernels.integrations.flash_attn_interface import flash_attn_varlen_func
        >>> ends, used = torch.tensor([0, 3, 10], dtype=torch.int32), torch.tensor([3, 5], dtype=torch.int32)
        >>> q, k = torch.randn(10, 4, 64), torch.randn(10, 2, 64)
        >>> out = flash_attn_varlen_func(q, k, k, ends, ends, 7, 7, seqused_q=used, seqused_k=used)
        >>> out[8:].count_nonzero().item()
        0
    """
    refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk)
    options = Options(causal, window_size, softcap, softmax_scale)
    out, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, options, FA3, seqused_q, seqused_k)
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Results:
    """Append k and v to a cache, in its memory, and attend to the cache. As flash_attn.flash_attn_with_kvcache, which
    says what the arguments are that both have; page_table is its block_table.

    Args:
        q: [B, Sq, Hq, D], or [T, Hq, D] with cu_seqlens_q.
        k, v: [B, Snew, H, D], or [Tnew, H, D] with cu_seqlens_k_new; or None.
        cu_seqlens_q, cu_seqlens_k_new: [B + 1] int32: sequence b is the tokens from its entry to the next.
        max_seqlen_q: no sequence of queries is longer; with cu_seqlens_q.
        rotary_seqlens: [B] int32, positions of the first new tokens; cache_seqlens by default.

    Returns:
        out as q, or (out, softmax_lse, out_accum, softmax_lse_accum): [B, Hq, Sq], with cu_seqlens_q [Hq, T]; and two
        empty tensors, as without splits.

    Example:
        >>> from inferix_kernels.integrations.flash_attn_interface import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.randn(8, 16, 2, 64), torch.randn(8, 16, 2, 64)  # 8 pages of 16 tokens
        >>> table = torch.tensor([[5, 1, 7]], dtype=torch.int32)
        >>> q = torch.randn(1, 20, 4, 64)
        >>> list(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=40, page_table=table).shape)
        [1, 20, 4, 64]
    """
    refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk)
    cache = Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, page_table)
    new = New(k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens)
    options = Options(causal, window_size, softcap, softmax_scale)
    out, lse = cached(q, cache, new, options, FA3, cu_seqlens_q, max_seqlen_q)
    empty = (q.new_empty(0, dtype=torch.float32) for _ in range(2))
    return (out, lse, *empty) if return_softmax_lse else out
