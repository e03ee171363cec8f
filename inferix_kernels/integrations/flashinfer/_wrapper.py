"""What the wrappers have in common: what was planned, what is checked against it, and how results are delivered."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._check import check_tensor, device_of
from ..._dispatch import BACKENDS, Unsupported
from ...layout import KVPages
from ...ops import paged_attention
from ...plans import UNLIMITED, Plan
from .._arguments import refuse, refuse_but
from .cascade import LOG2_E
from .page import check_kv_layout


class Planned(NamedTuple):
    """The numbers that a plan settles."""

    tokens: int  # qo_indptr[-1]
    query_heads: int
    heads: int
    head_dim: int
    page_size: int | None  # None: keys and values are no pages
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    o_dtype: torch.dtype

    def check(self, q: Tensor, pool: KVPages) -> None:
        cache = "k and v" if self.page_size is None else "paged_kv_cache"
        for name, x, planned, of in (
            ("q", q, self.q_dtype, "q_data_type"),
            (cache, pool.k, self.kv_dtype, "kv_data_type"),
        ):
            if x.dtype != planned:
                raise ValueError(f"{name} must be {planned}, the {of} of plan, got {x.dtype}")
        if q.shape[0] != self.tokens:
            raise ValueError(f"q must have qo_indptr[-1] = {self.tokens} rows, got {q.shape[0]}")
        if q.shape[1:] != (self.query_heads, self.head_dim):
            raise ValueError(f"q must be [{self.tokens}, {self.query_heads}, {self.head_dim}], got {list(q.shape)}")
        page_size = pool.page_size if self.page_size is None else self.page_size
        wanted, found = (self.heads, self.head_dim, page_size), (pool.heads, pool.head_dim, pool.page_size)
        if wanted != found:
            raise ValueError(f"{cache} must have the (KV heads, head_dim, page_size) of plan, {wanted}, got {found}")


class Scores(NamedTuple):
    """What plan, or the deprecated forward, says of scores."""

    causal: bool
    window_left: int
    softcap: float
    scale: float | None


class Wrapper:
    """plan() once for all layers, run() for each."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str, backend: str) -> None:
        check_kv_layout(kv_layout)
        if backend != "auto" and backend not in BACKENDS:
            raise Unsupported(f"backend must be 'auto' or one of ours, {', '.join(BACKENDS)}, got {backend!r}")
        self.device = device_of("float_workspace_buffer", float_workspace_buffer)
        self._kv_layout, self._backend = kv_layout, backend
        self._planned: Planned | None = None

    _scores: Scores

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return False

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """Taken, and not needed; the device stays."""

    def _attend(
        self, q: Tensor, pool: KVPages, plan: Plan, out: Tensor | None, lse: Tensor | None, return_lse: bool,
        lse_base: str = "log2", lse_layout: str = "NH",
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        check_lse_words(lse_base, lse_layout)
        if lse is not None and not return_lse:
            raise ValueError("lse must be None without return_lse=True: it would not be written")
        planned = self._settled()
        planned.check(q, pool)
        if out is None:
            out = torch.empty(q.shape, dtype=planned.o_dtype, device=q.device)
        elif out.dtype != planned.o_dtype:
            raise ValueError(f"out must be {planned.o_dtype}, the o_data_type of plan, got {out.dtype}")
        if lse is not None and lse_layout == "HN":
            check_tensor("lse", lse, (torch.float32,), "Hq T", {"Hq": q.shape[1], "T": q.shape[0]}, q.device)
        direct, scores = (lse if lse_layout == "NH" else None), self._scores
        out, natural = paged_attention(q, [pool], plan, scale=scores.scale, softcap=scores.softcap, out=out, lse=direct,
                                       backend=self._backend)  # fmt: skip
        return (out, deliver_lse(natural, lse_base, lse_layout, lse)) if return_lse else out

    def _settled(self) -> Planned:
        if self._planned is None:
            raise RuntimeError("run needs a plan: call plan() first")
        return self._planned


def scores_of(
    causal: bool, window_left: int, logits_soft_cap: float | None, sm_scale: float | None,
    pos_encoding_mode: str, use_fp16_qk_reduction: bool, rope_scale: float | None, rope_theta: float | None,
) -> Scores:  # fmt: skip
    refuse_but("NONE", pos_encoding_mode=pos_encoding_mode)
    refuse(use_fp16_qk_reduction=use_fp16_qk_reduction, rope_scale=rope_scale, rope_theta=rope_theta)
    check_window_left(window_left)
    if not 0 <= (logits_soft_cap or 0.0) < math.inf:
        raise ValueError(f"logits_soft_cap must be None, or 0 for none, or a positive number, got {logits_soft_cap}")
    return Scores(causal, window_left, logits_soft_cap or 0.0, sm_scale)


def check_window_left(window_left: int) -> None:
    if not -1 <= window_left <= UNLIMITED:
        raise ValueError(f"window_left must be a number of tokens, or -1 for any, got {window_left}")


def check_lse_words(lse_base: str, lse_layout: str) -> None:
    for name, word, words in (("lse_base", lse_base, ("log2", "ln")), ("lse_layout", lse_layout, ("NH", "HN"))):
        if word not in words:
            raise ValueError(f"{name} must be {words[0]!r} or {words[1]!r}, got {word!r}")


def deliver_lse(natural: Tensor, lse_base: str, lse_layout: str, lse: Tensor | None) -> Tensor:
    """natural: [T, H], ours or `lse` itself, written to. Returns [T, H] (NH) or contiguous [H, T] (HN)."""
    if lse_base == "log2":
        natural.mul_(LOG2_E)
    if lse_layout == "NH":
        return natural
    return natural.t().contiguous() if lse is None else lse.copy_(natural.t())


def planned_of(
    tokens: int, num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int | None,
    q_data_type: str | torch.dtype, kv_data_type: str | torch.dtype | None, o_data_type: str | torch.dtype | None,
) -> Planned:  # fmt: skip
    if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads must be a multiple of num_kv_heads={num_kv_heads}, got {num_qo_heads}")
    q_dtype = dtype_of("q_data_type", q_data_type)
    kv_dtype = q_dtype if kv_data_type is None else dtype_of("kv_data_type", kv_data_type)
    o_dtype = q_dtype if o_data_type is None else dtype_of("o_data_type", o_data_type)
    if q_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise Unsupported(f"q_data_type must be float16, bfloat16 or float32, got {q_dtype}")
    if o_dtype not in (q_dtype, torch.float32):
        raise Unsupported(f"o_data_type must be q_data_type or float32, got {o_dtype}")
    return Planned(tokens, num_qo_heads, num_kv_heads, head_dim, page_size, q_dtype, kv_dtype, o_dtype)


def dtype_of(name: str, dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} must be a dtype or its name, got {dtype!r}")
    return found


def host_indptr(name: str, indptr: Tensor) -> Tensor:
    """On the host, [B + 1] int64, checked."""
    host = indptr.to("cpu", torch.int64)
    if host.ndim != 1 or not len(host) or host[0] != 0 or bool((host.diff() < 0).any()):
        raise ValueError(f"{name} must rise from 0, got {host.tolist()}")
    return host


def check_same_batch(name: str, indptr: Tensor, qo_indptr: Tensor) -> None:
    if len(indptr) != len(qo_indptr):
        raise ValueError(f"{name} must be [{len(qo_indptr)}] like qo_indptr, got [{len(indptr)}]")
