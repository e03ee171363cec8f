"""attention and flash_attention, as Wan and its relatives have them in wan/modules/attention.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dispatch import Unsupported
from ...ops import paged_attention
from ...plans import Plan
from .._arguments import check_range
from .._sequences import dense

HALVES = (torch.float16, torch.bfloat16)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
) -> Tensor:
    """Attention of B sequences, each of which may be shorter than its rows.

    Keys past k_lens are not seen. Rows past q_lens, and rows that see no key, are zero.

    Args:
        q: [B, Lq, Hq, D]; q, k and v in other dtypes than float16 and bfloat16 become `dtype`, and q and k v's.
        k, v: [B, Lk, H, D]; Hq is a multiple of H.
        q_lens, k_lens: [B], at most Lq and Lk; None: all.
        softmax_scale: of q . k; D ** -0.5 by default.
        q_scale: q is multiplied by it, in half precision.
        causal, window_size: (left, right) in tokens, -1 for no limit, aligned so that the last query of a sequence is
            at its last key; causal: right is 0.
        deterministic: it is, either way.
        dropout_p, version: must be 0 and None.

    Returns:
        [B, Lq, Hq, D] in q's dtype.

    Raises:
        ValueError, Unsupported: an argument is not what it must be.

    Example:
        >>> q, k, v = (torch.randn(2, 6, 4, 32) for _ in range(3))
        >>> out = flash_attention(q, k, v, k_lens=torch.tensor([6, 2]), causal=True)
        >>> list(out.shape), out.dtype, bool((out[1, :4] == 0).all())
        ([2, 6, 4, 32], torch.float32, True)
    """
    if dropout_p:
        raise Unsupported(f"dropout_p must be 0, got {dropout_p}")
    if version is not None:
        raise Unsupported(f"version must be None, as no flash-attn is asked, got {version}")
    if dtype not in HALVES:
        raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or len(x) != len(q):
            raise ValueError(f"{name} must be [B, L, H, D], with one B in q, k and v, got {list(x.shape)}")
    if v.shape != k.shape or k.shape[-1] != q.shape[-1]:
        raise Unsupported(f"v must have the shape of k, and k the width of q, got {list(v.shape)} and {list(k.shape)}")
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"window_size must be (left, right), each -1 or more, got {tuple(window_size)}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise Unsupported("q, k and v must not require gradients: run under torch.no_grad()")
    batch, most, heads, width = q.shape
    given = q.dtype
    if not given.is_floating_point:
        raise ValueError(f"q must be of a float dtype, got {given}")
    if not batch:
        return torch.empty_like(q)
    q, k, v = (x if x.dtype in HALVES else x.to(dtype) for x in (q, k, v))
    q, k = q.to(v.dtype), k.to(v.dtype)
    if q_scale is not None:
        q = q * q_scale
    q_lens = _lens("q_lens", q_lens, "q", q)
    lens = torch.full((batch,), most, dtype=torch.int32, device=q.device) if q_lens is None else q_lens
    k_lens = _lens("k_lens", k_lens, "k", k)
    window = (window_size[0], 0 if causal else window_size[1])
    ends = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    keys = dense(k, v, k_lens)
    plan = _padded(keys.plan(ends, window), lens, most)
    out, _ = paged_attention(q.reshape(batch * most, heads, width), [keys.pool], plan, scale=softmax_scale)
    return out.view(batch, most, heads, width).to(given)


def _lens(name: str, lens: Tensor | None, of: str, x: Tensor) -> Tensor | None:
    """[B] int32 on x's device. What they say is looked at on a CPU alone."""
    if lens is None:
        return None
    if not isinstance(lens, Tensor) or lens.shape != x.shape[:1] or lens.is_floating_point():
        got = f"{list(lens.shape)} {lens.dtype}" if isinstance(lens, Tensor) else repr(lens)
        raise ValueError(f"{name} must be [{len(x)}] integers, got {got}")
    check_range(name, lens, 0, x.shape[1], of)
    return lens.to(x.device, torch.int32).clamp(0, x.shape[1])


def _padded(plan: Plan, lens: Tensor, most: int) -> Plan:
    """A plan for lens[b] queries of each sequence, as one for `most`, of which the others see nothing."""
    rows = torch.arange(len(lens), dtype=torch.int32, device=lens.device) * most

    def between(first: Tensor, second: Tensor, end: Tensor) -> Tensor:
        return torch.cat([torch.stack([first, second], 1).flatten(), end])

    pages = plan.page_indptr
    windows = plan.windows
    return plan._replace(
        q_indptr=between(rows, rows + lens, rows[-1:] + most),
        page_indptr=between(pages[:-1], pages[1:], pages[-1:]),
        windows=None if windows is None else windows.repeat_interleave(2, 0),
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    fa_version: int | None = None,
) -> Tensor:
    """`flash_attention`, where `version` is called fa_version. The repositories' own ignores lengths where there is no
    flash-attn; this one does not.

    Example:
        >>> q, k, v = (torch.randn(1, 6, 4, 32, dtype=torch.bfloat16) for _ in range(3))
        >>> attention(q, k, v, window_size=(2, 2)).dtype
        torch.bfloat16
    """
    if fa_version is not None:
        raise Unsupported(f"fa_version must be None, as no flash-attn is asked, got {fa_version}")
    given = (q, k, v, q_lens, k_lens, dropout_p, softmax_scale, q_scale, causal, window_size, deterministic, dtype)
    return flash_attention(*given)
