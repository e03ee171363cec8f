"""MagiAttention's flex_flash_attn_func: queries of some ranges attend to keys of some ranges. Takes both forms of the
call: the one that MAGI-1 pins (MagiAttention 1.0.0 to 1.0.3, with max_seqlen_k) and that of 1.1.1.

Keys and values stay where they lie, also side by side in one buffer, as MAGI-1 keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._check import check_shape
from .._dispatch import Unsupported
from ..ops import paged_attention
from ..plans import Plan
from ._arguments import refuse, refuse_but
from ._ranges import RangePlan, disjoint_plan, plan_ranges
from ._sequences import Sequences, flat

__all__ = ["AttnForwardMeta", "RangePlan", "flex_flash_attn_func", "plan_ranges"]


@dataclass
class AttnForwardMeta:
    """lse: [T, Hq] float32, natural; max_logits: None."""

    lse: Tensor | None
    max_logits: Tensor | None = None


def flex_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor | None = None,
    k_ranges: Tensor | None = None,
    attn_type_map: Tensor | None = None,
    *,
    index_attn_indices: Tensor | None = None,
    q_block_size: int = 1,
    k_block_size: int = 1,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    disable_fwd_atomic_reduction: bool = False,
    disable_bwd_dkv_atomic_reduction: bool = False,
    ref_block_size: tuple[int, int] | None = None,
    max_seqlen_q: int | None = None,
    auto_range_merge: bool = False,
    swap_ab: bool = False,
    pack_gqa: bool = False,
    cat_gqa: bool = False,
    sparse_load: bool = False,
    index_attn: bool = False,
    swap_bwd_qk_loop: bool = False,
    return_max_logits: bool = False,
    max_seqlen_k: int | None = None,
    return_dtype: torch.dtype | None = None,
    plan: RangePlan | None = None,
    backend: str = "auto",
) -> tuple[Tensor, AttnForwardMeta | Tensor]:
    """Attention where q_ranges[i] sees k_ranges[i]; a query of several ranges has one softmax over the keys of all. A
    key that two of them hold counts twice.

    With disable_fwd_atomic_reduction, which says that no two q ranges overlap, or with a plan, nothing is read from
    the device. Otherwise the ranges are read, once a call: make a plan, for as many calls as have the same ranges.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16; Hq is a multiple of H.
        k, v: [S, H, D] float32, bfloat16 or float16, same dtype; any strides, the last dimension contiguous.
        q_ranges, k_ranges: [n, 2] integers, half-open. Queries in no range get out 0 and lse -inf.
        attn_type_map: [n] integers: 0 full, 1 causal (bottom-right), 2 inverse causal (top-left), 3 both; None: all 0.
        softmax_scale: D ** -0.5 by default.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        disable_fwd_atomic_reduction: the caller's word that no two q ranges overlap.
        max_seqlen_k: only the pinned form has it: (out, lse [Hq, T]) is returned then. The number is not needed.
        return_dtype: of out: q's, the default, or float32.
        deterministic, max_seqlen_q, ref_block_size, auto_range_merge, swap_ab, pack_gqa, cat_gqa, sparse_load,
            disable_bwd_dkv_atomic_reduction, swap_bwd_qk_loop: choose among MagiAttention's kernels. They change no
            result, and none is needed; results are the same every time.
        plan: of plan_ranges, in place of the ranges. Ours alone.
        backend: as in ops.paged_attention. Ours alone.

    Returns:
        (out [T, Hq, D], AttnForwardMeta with lse [T, Hq]), or the pinned form's. lse is natural.

    Raises:
        Unsupported: sink, index_attn_indices, index_attn, block sizes other than 1, sm_margin, return_max_logits.

    Example:
        >>> q, k, v = torch.randn(6, 4, 64), torch.randn(9, 2, 64), torch.randn(9, 2, 64)
        >>> q_ranges, k_ranges = torch.tensor([[0, 3], [3, 6]]), torch.tensor([[0, 5], [2, 9]])
        >>> out, meta = flex_flash_attn_func(q, k, v, q_ranges, k_ranges, disable_fwd_atomic_reduction=True)
        >>> list(out.shape), list(meta.lse.shape)
        ([6, 4, 64], [6, 4])
    """
    refuse(index_attn_indices=index_attn_indices, index_attn=index_attn, sink=sink, sm_margin=sm_margin,
           return_max_logits=return_max_logits)  # fmt: skip
    refuse_but(1, q_block_size=q_block_size, k_block_size=k_block_size)
    refuse_but("sh", sink_layout=sink_layout)
    if return_dtype not in (None, q.dtype, torch.float32):
        raise Unsupported(f"return_dtype must be q's dtype or float32, got {return_dtype}")
    sizes: dict[str, int] = {}
    for name, x, layout in (("q", q, "T Hq D"), ("k", k, "S H D"), ("v", v, "S H D")):
        check_shape(name, x, layout, sizes)
    if v.dtype != k.dtype:
        raise ValueError(f"v must be {k.dtype} like k, got {v.dtype}")
    if plan is None:
        if q_ranges is None or k_ranges is None:
            raise ValueError("q_ranges and k_ranges must be given, or a plan, got None")
        make = disjoint_plan if disable_fwd_atomic_reduction else plan_ranges
        plan = make(q_ranges, k_ranges, attn_type_map, queries=len(q), keys=len(k))
    elif not (q_ranges is k_ranges is attn_type_map is None):
        raise ValueError("q_ranges, k_ranges and attn_type_map must be None with a plan, which holds them")
    _check_plan(plan, q, k)
    out = None if return_dtype is None else torch.empty(q.shape, dtype=return_dtype, device=q.device)
    runs = flat(k, v, plan.begins, plan.lens, plan.longest)
    out, lse = paged_attention(q, [runs.pool], _pages(plan, runs), scale=softmax_scale, softcap=softcap, out=out,
                               backend=backend)  # fmt: skip
    return (out, AttnForwardMeta(lse)) if max_seqlen_k is None else (out, lse.t().contiguous())


def _check_plan(plan: RangePlan, q: Tensor, k: Tensor) -> None:
    if (plan.queries, plan.keys) != (len(q), len(k)):
        raise ValueError(f"plan must be for {len(q)} queries and {len(k)} keys, got {plan.queries} and {plan.keys}")
    if plan.q_indptr.device != q.device:
        raise ValueError(f"q_ranges, or the plan, must be on {q.device} like q, got {plan.q_indptr.device}")


def _pages(plan: RangePlan, runs: Sequences) -> Plan:
    """runs: a row of pages for each of the plan's runs of keys."""
    pointers = plan.row_indptr * runs.ids.shape[1]
    starts = None if runs.starts is None else runs.starts.flatten()
    found = Plan(plan.q_indptr, pointers, runs.ids.flatten(), runs.lens.flatten(), page_starts=starts)
    if plan.windows is None:
        return found
    positions = plan.positions[:, None] + runs.lens.cumsum(1, dtype=torch.int32) - runs.lens
    return found._replace(windows=plan.windows, page_positions=positions.flatten())
