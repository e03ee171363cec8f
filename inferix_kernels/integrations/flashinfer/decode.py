"""Decode: the newest query, or a few, of each sequence, over pages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...layout import KVPages
from .._arguments import refuse, refuse_but
from ._paged import PagedWrapper, lists_of
from ._wrapper import planned_of, scores_of


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of q_len_per_req queries of each sequence over a paged cache.

    Args and errors: as BatchPrefillWithPagedKVCacheWrapper's. use_tensor_cores chooses among FlashInfer's kernels,
    changes no result, and is not needed.
    """

    _indices = "indices"

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        refuse(use_cuda_graph=use_cuda_graph, paged_kv_indptr_buffer=paged_kv_indptr_buffer,
               paged_kv_indices_buffer=paged_kv_indices_buffer, jit_args=jit_args, jit_kwargs=jit_kwargs,
               paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer)  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        window_right: int = 0,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        is_causal: bool | None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        """Settle a batch's lengths and pages, for all its layers. Waits for the device if indptr is there.

        Args:
            indptr, indices, last_page_len: [B + 1], [N] and [B] integers: the pages of each sequence, and the tokens in
                its last one.
            q_len_per_req: queries of each sequence; of several, each sees the tokens up to its own.
            is_causal: None, or what q_len_per_req says.
            data_type: deprecated by FlashInfer: of what is not given by q_data_type and kv_data_type.
            The others, and errors: as the prefill wrapper's.
        """
        refuse(window_right=window_right, block_tables=block_tables, seq_lens=seq_lens,
               fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv,
               use_token_head_sf=use_token_head_sf)  # fmt: skip
        refuse_but(q_len_per_req > 1, is_causal=is_causal)
        rest = (logits_soft_cap, sm_scale, pos_encoding_mode, False, rope_scale, rope_theta)
        scores = scores_of(q_len_per_req > 1, window_left, *rest)
        queries, names = torch.arange(len(indptr)) * q_len_per_req, ("indptr", "indices", "last_page_len")
        lists = lists_of(queries, indptr, indices, last_page_len, page_size, names, self.device)
        shape = num_qo_heads, num_kv_heads, head_dim, page_size
        dtypes = q_data_type or data_type or "float16", kv_data_type or data_type, o_data_type
        self._settle(planned_of(int(queries[-1]), *shape, *dtypes), scores, lists)

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
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: object = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over the planned pages: out [B * q_len_per_req, Hq, D], or (out, lse [B * q_len_per_req, Hq], to
        base 2). Arguments and errors: as the prefill wrapper's; q_len_per_req is plan's."""
        refuse(args=args, sinks=sinks, kv_cache_sf=kv_cache_sf, q_len_per_req=q_len_per_req,
               skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)  # fmt: skip
        scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        return self._run_pages(q, paged_kv_cache, scales, window_left, out, lse, return_lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | Sequence[Tensor] | KVPages,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Deprecated by FlashInfer: run, with what it says of scores in place of plan's, from here on."""
        planned = self._settled()
        rest = (logits_soft_cap, sm_scale, pos_encoding_mode, False, rope_scale, rope_theta)
        self._settle(planned, scores_of(self._scores.causal, window_left, *rest), self._lists)
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)
