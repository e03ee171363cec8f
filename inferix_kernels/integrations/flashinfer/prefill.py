"""Prefill: several new queries for each sequence, over pages or over ragged keys and values.

Long because FlashInfer's argument lists are: each is written out, so that what we do not have is refused by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...layout import KVPages
from .._arguments import refuse, refuse_but
from .._sequences import dense, flat
from ._paged import PagedWrapper, lists_of
from ._wrapper import Wrapper, check_same_batch, host_indptr, planned_of, scores_of
from .page import check_kv_layout

Result = Tensor | tuple[Tensor, Tensor]


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of a batch's new queries over a paged cache.

    Args:
        float_workspace_buffer: taken, and not needed; its device is the wrapper's.
        kv_layout: "NHD" or "HND".
        backend: "auto", or one of ours.

    Raises:
        Unsupported: use_cuda_graph, its buffers, jit_args, jit_kwargs, variant_owns_mask, max_total_num_rows, and
            backends that are not ours.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
        max_total_num_rows: int | None = None,
    ) -> None:
        refuse(use_cuda_graph=use_cuda_graph, qo_indptr_buf=qo_indptr_buf, paged_kv_indptr_buf=paged_kv_indptr_buf,
               paged_kv_indices_buf=paged_kv_indices_buf, paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
               custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf, jit_args=jit_args,
               jit_kwargs=jit_kwargs, variant_owns_mask=variant_owns_mask,
               max_total_num_rows=max_total_num_rows)  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        """Settle a batch's lengths and pages, for all its layers. Waits for the device if the indptr are there.

        Args:
            qo_indptr: [B + 1] integers: queries qo_indptr[b] : qo_indptr[b + 1] are sequence b's.
            paged_kv_indptr, paged_kv_indices: [B + 1] and [N] integers: the pages of each sequence.
            paged_kv_last_page_len: [B] integers: tokens in the last page of each.
            causal, window_left: aligned bottom-right: a sequence's last query stands at its last token. -1: no window.
            sm_scale: head_dim ** -0.5 by default.
            logits_soft_cap: None or 0 for none.
            q_data_type, kv_data_type: of q and of the cache; of KVPages the dtype of the codes of their keys.
            o_data_type: q_data_type, the default, or float32.
            non_blocking: nothing is read from it: a copy that is not waited for is what is made anyway.

        Raises:
            Unsupported: every argument that is not in this list.
        """
        refuse(custom_mask=custom_mask, packed_custom_mask=packed_custom_mask, prefix_len_ptr=prefix_len_ptr,
               token_pos_in_items_ptr=token_pos_in_items_ptr, token_pos_in_items_len=token_pos_in_items_len,
               max_item_len_ptr=max_item_len_ptr, seq_lens=seq_lens, seq_lens_q=seq_lens_q, block_tables=block_tables,
               max_token_per_sequence=max_token_per_sequence, max_sequence_kv=max_sequence_kv,
               fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv, uniform_q_len=uniform_q_len,
               use_token_head_sf=use_token_head_sf)  # fmt: skip
        refuse_but(head_dim_qk, head_dim_vo=head_dim_vo)
        rest = (logits_soft_cap, sm_scale, pos_encoding_mode, use_fp16_qk_reduction, rope_scale, rope_theta)
        scores = scores_of(causal, window_left, *rest)
        names = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
        pages = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        queries = host_indptr("qo_indptr", qo_indptr)
        lists = lists_of(queries, *pages, page_size, names, self.device)
        shape, dtypes = (num_kv_heads, head_dim_qk, page_size), (q_data_type, kv_data_type, o_data_type)
        self._settle(planned_of(int(queries[-1]), num_qo_heads, *shape, *dtypes), scores, lists)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | Sequence[Tensor] | KVPages,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: object = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Result:
        """Attention over the planned pages: out, or (out, lse).

        Args:
            q: [qo_indptr[-1], num_qo_heads, head_dim_qk].
            paged_kv_cache: [P, 2, page_size, H, D] (NHD) or [P, 2, H, page_size, D] (HND), a tuple of keys and values
                without the second dimension, or KVPages of any format; read where it lies.
            out, lse: to write to; lse float32, as lse_layout says.
            lse_base: "log2" or "ln"; a query that sees no key has out 0 and lse -inf.
            lse_layout: "NH", [T, H], or "HN", [H, T].
            enable_pdl: how kernels are launched: changes no result, and is not needed.
            window_left: instead of plan's.

        Raises:
            Unsupported: every other argument, but for scales of 1.0.
        """
        refuse(args=args, sinks=sinks, kv_cache_sf=kv_cache_sf, use_fp16_softmax=use_fp16_softmax,
               skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
               uses_spcompress=uses_spcompress)  # fmt: skip
        scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        return self._run_pages(q, paged_kv_cache, scales, window_left, out, lse, return_lse, lse_base, lse_layout)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | Sequence[Tensor] | KVPages,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        return_lse: bool = False,
    ) -> Result:
        """Deprecated by FlashInfer: run, with what it says of scores in place of plan's, from here on."""
        rest = (logits_soft_cap, sm_scale, pos_encoding_mode, use_fp16_qk_reduction, rope_scale, rope_theta)
        scores = scores_of(causal, window_left, *rest)
        self._settle(self._settled(), scores, self._lists)
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    """Attention of a batch's new queries over its keys and values side by side.

    Args and errors: as BatchPrefillWithPagedKVCacheWrapper's.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
    ) -> None:
        refuse(use_cuda_graph=use_cuda_graph, qo_indptr_buf=qo_indptr_buf, kv_indptr_buf=kv_indptr_buf,
               custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf, jit_args=jit_args,
               jit_kwargs=jit_kwargs, variant_owns_mask=variant_owns_mask)  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: Tensor | None = None,
        o_indptr: Tensor | None = None,
        qo_indptr_cpu: Tensor | None = None,
        kv_indptr_cpu: Tensor | None = None,
        uniform_q_len: int | None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        """Settle a batch's lengths. Waits for the device if the indptr are there and no copies of them are given.

        Args:
            qo_indptr, kv_indptr: [B + 1] integers: sequence b's queries and tokens.
            qo_indptr_cpu, kv_indptr_cpu: the same, on the host.
            The others: as the paged wrapper's.

        Raises:
            Unsupported: every argument that is neither here nor there.
        """
        refuse(custom_mask=custom_mask, packed_custom_mask=packed_custom_mask, prefix_len_ptr=prefix_len_ptr,
               token_pos_in_items_ptr=token_pos_in_items_ptr, token_pos_in_items_len=token_pos_in_items_len,
               max_item_len_ptr=max_item_len_ptr, fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv,
               seq_lens=seq_lens, seq_lens_q=seq_lens_q, max_token_per_sequence=max_token_per_sequence,
               max_sequence_kv=max_sequence_kv, v_indptr=v_indptr, o_indptr=o_indptr, uniform_q_len=uniform_q_len,
               use_token_head_sf=use_token_head_sf)  # fmt: skip
        refuse_but(head_dim_qk, head_dim_vo=head_dim_vo)
        rest = (logits_soft_cap, sm_scale, pos_encoding_mode, use_fp16_qk_reduction, rope_scale, rope_theta)
        scores = scores_of(causal, window_left, *rest)
        queries = host_indptr("qo_indptr", qo_indptr if qo_indptr_cpu is None else qo_indptr_cpu)
        keys = host_indptr("kv_indptr", kv_indptr if kv_indptr_cpu is None else kv_indptr_cpu)
        check_same_batch("kv_indptr", keys, queries)
        dtypes = q_data_type, kv_data_type, o_data_type
        planned = planned_of(int(queries[-1]), num_qo_heads, num_kv_heads, head_dim_qk, None, *dtypes)
        numbers = [x.to(self.device, torch.int32) for x in (queries, keys[:-1], keys.diff())]
        self._planned, self._scores, (self._q_indptr, self._begins, self._lens) = planned, scores, numbers
        self._keys, self._longest = int(keys[-1]), int(keys.diff().max()) if len(keys) > 1 else 0

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        kv_cache_sf: object = None,
    ) -> Result:
        """Attention over the planned tokens: out, or (out, lse).

        Args:
            q: [qo_indptr[-1], num_qo_heads, head_dim_qk].
            k, v: [kv_indptr[-1], H, D] (NHD) or [H, kv_indptr[-1], D] (HND), read where they lie.
            The others, and errors: as the paged wrapper's.
        """
        refuse(args=args, kv_cache_sf=kv_cache_sf)
        refuse_but(1.0, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, o_scale=o_scale)
        self._settled()
        if self._kv_layout == "HND":
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        if len(k) != self._keys or v.shape != k.shape or v.dtype != k.dtype:
            raise ValueError(
                f"k and v must be alike, of kv_indptr[-1] = {self._keys} tokens, got {len(k)} and {len(v)}"
            )
        sequences = flat(k, v, self._begins, self._lens, self._longest)
        plan = sequences.plan(self._q_indptr, (self._scores.window_left, 0 if self._scores.causal else -1))
        return self._attend(q, sequences.pool, plan, out, lse, return_lse, lse_base, lse_layout)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        return_lse: bool = False,
    ) -> Result:
        """Deprecated by FlashInfer: run, with what it says of scores in place of plan's, from here on."""
        rest = (logits_soft_cap, sm_scale, pos_encoding_mode, use_fp16_qk_reduction, rope_scale, rope_theta)
        self._settled()
        self._scores = scores_of(causal, window_left, *rest)
        return self.run(q, k, v, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: object = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> Result:
    """Attention of one sequence's new queries: out [T, Hq, D], or (out, lse [T, Hq] to base 2).

    Args:
        q: [T, Hq, D]; k, v: [L, H, D] (NHD) or [H, L, D] (HND), read where they lie.
        The others, and errors: as the wrappers'.
    """
    refuse(scale_q=scale_q, scale_k=scale_k, scale_v=scale_v, custom_mask=custom_mask, kv_cache_sf=kv_cache_sf,
           packed_custom_mask=packed_custom_mask)  # fmt: skip
    refuse_but(1.0, k_scale=k_scale, v_scale=v_scale)
    check_kv_layout(kv_layout)
    wrapper = Wrapper(q, kv_layout, backend)
    rest = (logits_soft_cap, sm_scale, pos_encoding_mode, use_fp16_qk_reduction, rope_scale, rope_theta)
    wrapper._scores = scores_of(causal, window_left, *rest)
    if kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    sequences = dense(k[None], v[None])
    ends = torch.arange(2, dtype=torch.int32, device=q.device) * len(q)
    plan = sequences.plan(ends, (window_left, 0 if causal else -1))
    heads = q.shape[1], k.shape[1], q.shape[2]
    wrapper._planned = planned_of(len(q), *heads, None, q.dtype, k.dtype, o_dtype)
    return wrapper._attend(q, sequences.pool, plan, None, None, return_lse)
