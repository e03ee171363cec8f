"""The public ops: what each computes, what it accepts, what it refuses. No kernels here.

Long because it is the manual: more than half of it is docstrings.

Every op takes `backend`: "auto", "compiled", "triton" or "reference". "auto" takes the first that can run (the table
is in _dispatch.py); a backend asked for by name never falls back, it raises Unsupported. Every op that returns
tensors takes `out`, so that a pass over a model can run without an allocation. There is no backward.

A page list's numbers (ids, lens) must fit the pools: on the CPU every backend checks them before it writes;
a CUDA kernel skips what does not fit, since looking would cost a wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import (
    ACTIVATIONS,
    CODES,
    FLOATS,
    check_groups,
    check_inference,
    check_is_quantized,
    check_norm,
    check_optional,
    check_page_list,
    check_pages,
    check_plan,
    check_pools,
    check_quantized,
    check_same_width,
    check_tensor,
    check_word,
)
from ._library import call
from .layout import FORMATS, KVPages, PageList, Plan, Quantized


def kv_append(k: Tensor, v: Tensor, pages: KVPages, where: PageList, *, backend: str = "auto") -> None:
    """Write T tokens into pages, from the first slot of each page on.

    Slots past lens[i] store code 0, so that no NaN can hide there (0 * NaN is NaN). How a format quantizes is written
    in reference.encode; scales are taken over a page's valid tokens. What is quantized must be finite.

    Args:
        k, v: [T, H, D] and [T, H, Dv] float32, bfloat16 or float16, same dtype.
        pages: written. Any format.
        where: lens sum to T; no page twice.
    """
    sizes: dict[str, int] = {}
    check_inference("kv_append", k, v)
    check_tensor("k", k, FLOATS, "T H D", sizes, k.device)
    check_tensor("v", v, (k.dtype,), "T H Dv", sizes, k.device)
    check_pages("pages", pages, sizes, k.device)
    check_page_list("where", where, sizes, k.device)
    call("kv_append", backend, k.device, k, v, pages, where)


def kv_commit(
    source: KVPages,
    source_list: PageList,
    target: KVPages,
    target_list: PageList,
    k_mean: Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Copy whole pages from one pool to another, page i of the one list to page i of the other.

    Same format: bit for bit. Another format: through float32, quantized by kv_append's rule. Within one pool no
    page may be both read and written.

    Args:
        source, target: same H, page_size, D and Dv; any two formats.
        source_list, target_list: same lens; no target page twice.
        k_mean: [H, D] float32, subtracted from every key on the way, or None. One frozen mean for all keys that a
            query sees leaves softmax as it is (each lse falls by scale * q . mean) and makes 8 bits go further.

    Raises:
        ValueError: k_mean with a quantized source: it must be taken off before keys are first quantized.
    """
    sizes: dict[str, int] = {}
    device = source.k.device
    check_pages("source", source, sizes, device)
    check_pages("target", target, sizes, device)
    check_page_list("source_list", source_list, sizes, device)
    sizes["len(target_list)"] = sizes["len(source_list)"]
    check_page_list("target_list", target_list, sizes, device)
    check_optional("k_mean", k_mean, (torch.float32,), "H D", sizes, device)
    if k_mean is not None and FORMATS[source.format].quantized:
        raise ValueError(
            f"k_mean must be None for {source.format} source pages: a mean is taken off before keys are first "
            "quantized, give it to the op that does"
        )
    call("kv_commit", backend, device, source, source_list, target, target_list, k_mean)


def kv_gather(
    pools: Sequence[KVPages],
    where: PageList,
    dtype: torch.dtype = torch.float32,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read the tokens of a page list, dequantized, as (k, v): [T, H, D] and [T, H, Dv].

    Args:
        pools: one to 8, same H, page_size, D and Dv, formats may differ. A page id counts through them in order.
        where: T is the sum of its lens.
        dtype: float32, bfloat16 or float16, of the tensors returned. Not used when out is given.
        out: (k, v) to write to. Without it T must be read from the device, which waits for it.
    """
    sizes: dict[str, int] = {}
    device = where.ids.device
    check_pools(pools, sizes, device)
    check_page_list("where", where, sizes, device)
    if out is None:
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
        tokens = int(where.lens.sum())
        k, v = (torch.empty(tokens, sizes["H"], sizes[width], dtype=dtype, device=device) for width in ("D", "Dv"))
        out = k, v
    check_tensor("out[0]", out[0], FLOATS, "T H D", sizes, device)
    check_tensor("out[1]", out[1], (out[0].dtype,), "T H Dv", sizes, device)
    call("kv_gather", backend, device, pools, where, out[0].dtype, out=out)
    return out


def paged_attention(
    q: Tensor,
    pools: Sequence[KVPages],
    plan: Plan,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    accumulate: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of ragged segments of queries over lists of pages: (out, lse).

    One softmax runs across all pages of a list, whatever their formats. Where a list is empty, or the bias of all its
    pages is -inf, out = 0 and lse = -inf, never NaN. Nothing past a page's valid tokens is read.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16. Hq is a multiple of H; query head j reads KV head j // (Hq // H).
            Or [V, T, Hq, D]: V variants of the same queries, turned to V positions, of which each page meets the one
            that plan.page_variants names. So time can be counted anew without touching keys, which are stored rotated.
        pools: one to 8, same H, page_size and D, formats may differ. A page id counts through them in order.
            Either all or none of their keys had a mean removed.
        plan: its segments cover the T queries; one page list per segment, or one per segment and KV head. A page's
            bias is finite or -inf.
        scale: of q . k; D ** -0.5 by default.
        out: [T, Hq, D] in q's dtype or float32, to write to.
        lse: [T, Hq] float32, to write to: log of the sum of exp(scale * q . k), natural.
        accumulate: out and lse hold the result over other keys; merge these into it. Give a float32 out, or every
            call rounds.

    Source: online softmax, arXiv:1805.02867; its use over tiles, arXiv:2205.14135.
    """
    sizes: dict[str, int] = {}
    check_inference("paged_attention", q)
    check_tensor("q", q, FLOATS, "T Hq D" if q.ndim == 3 else "V T Hq D", sizes, q.device)
    check_pools(pools, sizes, q.device)
    check_same_width("pools", sizes)
    check_plan(plan, sizes["H"], q)
    if sizes["Hq"] % sizes["H"]:
        raise ValueError(f"q must have a multiple of the pools' H={sizes['H']} heads, got {sizes['Hq']}")
    if accumulate and (out is None or lse is None):
        raise ValueError("out and lse must be given with accumulate=True: they are what is added to, got None")
    if out is None:
        out = torch.empty(q.shape[-3:], dtype=q.dtype, device=q.device)
    if lse is None:
        lse = torch.empty(q.shape[-3:-1], dtype=torch.float32, device=q.device)
    check_tensor("out", out, (q.dtype, torch.float32), "T Hq D", sizes, q.device)
    check_tensor("lse", lse, (torch.float32,), "T Hq", sizes, q.device)
    call(
        "paged_attention",
        backend,
        q.device,
        q,
        pools,
        plan,
        scale=sizes["D"] ** -0.5 if scale is None else scale,
        out=out,
        lse=lse,
        accumulate=accumulate,
    )
    return out, lse


def merge_attention(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys into attention over both: (out, lse).

    A side whose lse is -inf saw no key and contributes nothing, whatever its out holds; both sides -inf give 0, -inf.

    Args:
        out_a, out_b: [T, Hq, D] float32, bfloat16 or float16, same dtype.
        lse_a, lse_b: [T, Hq] float32, natural logarithm.
        out: [T, Hq, D] in out_a's dtype or float32, to write to; may be out_a or out_b.
        lse: [T, Hq] float32, to write to; may be lse_a or lse_b.
    """
    sizes: dict[str, int] = {}
    device = out_a.device
    check_inference("merge_attention", out_a, lse_a, out_b, lse_b)
    out = torch.empty_like(out_a) if out is None else out
    lse = torch.empty_like(lse_a) if lse is None else lse
    for name, x, dtypes in (
        ("out_a", out_a, FLOATS),
        ("out_b", out_b, (out_a.dtype,)),
        ("out", out, (out_a.dtype, torch.float32)),
    ):
        check_tensor(name, x, dtypes, "T Hq D", sizes, device)
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b), ("lse", lse)):
        check_tensor(name, x, (torch.float32,), "T Hq", sizes, device)
    call("merge_attention", backend, device, out_a, lse_a, out_b, lse_b, out=out, lse=lse)
    return out, lse


def qkv_prologue(
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    rope: Tensor | None,
    pages: KVPages,
    where: PageList,
    *,
    norm_q_bias: Tensor | None = None,
    norm_k_bias: Tensor | None = None,
    bias: Tensor | None = None,
    k_mean: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = True,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """From the output of a layer's QKV projection to q, with K and V written to their pages: bias, norm, rotate, store.

    All arithmetic is float32. K and V are stored by kv_append's rule.

    Args:
        qkv: [T, (Hq + 2H) * D] float32, bfloat16 or float16: q, k and v side by side, each head by head. H and D are
            the pages'; Hq follows from the width.
        norm_q, norm_k: RMS norm weights of any of these dtypes; [Hq * D] and [H * D] normalise all heads together
            (Wan), [D] each head by itself (MAGI); None is no norm.
        norm_q_bias, norm_k_bias: as large as the weight: makes the norm a layer norm, which takes off the mean first.
        rope: [T, R/2, 2] float32, (cos, sin) of each token's angles; the first R <= D channels of every q and k
            head are turned. None turns nothing.
        pages, where: as for kv_append. pages is written.
        bias: [(Hq + 2H) * D] float32, bfloat16 or float16, added to qkv first.
        k_mean: [H, D] float32, subtracted from the rotated keys. See kv_commit.
        eps: added to the mean square, or the variance.
        interleaved: a pair of channels is (2j, 2j+1) (Wan); otherwise (j, j + R/2).
        out: [T, Hq, D] in qkv's dtype, to write to.

    Returns:
        q, [T, Hq, D] in qkv's dtype.

    Source: RMSNorm, arXiv:1910.07467; rotary embedding, arXiv:2104.09864.
    """
    sizes: dict[str, int] = {}
    device = qkv.device
    check_inference("qkv_prologue", qkv)
    check_tensor("qkv", qkv, FLOATS, "T width", sizes, device)
    check_pages("pages", pages, sizes, device)
    check_same_width("pages", sizes)
    check_page_list("where", where, sizes, device)
    T, H, D = sizes["T"], sizes["H"], sizes["D"]
    query_heads = sizes["Hq"] = sizes["width"] // D - 2 * H
    if query_heads < 1 or sizes["width"] % D or query_heads % H:
        raise ValueError(
            f"qkv must be (Hq + 2H) * D wide with the pages' H={H}, D={D} and Hq a multiple of H, got {sizes['width']}"
        )
    check_norm("norm_q", norm_q, norm_q_bias, query_heads, sizes, device)
    check_norm("norm_k", norm_k, norm_k_bias, H, sizes, device)
    check_optional("rope", rope, (torch.float32,), "T R/2 2", sizes, device)
    if rope is not None and 2 * rope.shape[1] > D:
        raise ValueError(f"rope must turn at most D={D} channels, got {2 * rope.shape[1]}")
    check_optional("bias", bias, FLOATS, "width", sizes, device)
    check_optional("k_mean", k_mean, (torch.float32,), "H D", sizes, device)
    if out is None:
        out = torch.empty(T, query_heads, D, dtype=qkv.dtype, device=device)
    check_tensor("out", out, (qkv.dtype,), "T Hq D", sizes, device)
    call(
        "qkv_prologue",
        backend,
        device,
        qkv,
        norm_q,
        norm_k,
        rope,
        pages,
        where,
        norm_q_bias=norm_q_bias,
        norm_k_bias=norm_k_bias,
        bias=bias,
        k_mean=k_mean,
        eps=eps,
        interleaved=interleaved,
        out=out,
    )
    return out


def quantize_rows(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    *,
    norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    activation: str | None = None,
    out: Quantized | None = None,
    backend: str = "auto",
) -> Quantized:
    """The rows of x in 8 bits, on the way through what stands before a linear layer: norm, modulation, activation.

    y = activation((norm(x) * weight + bias) * (1 + scale) + shift), each step only if it is given; then codes and
    scales of each row by the rule of int8 keys (reference.encode). All arithmetic before the codes is float32. What is
    quantized must be finite. Weights of linear layers are quantized by the same op: a row is an output channel.

    Args:
        x: [M, K] float32, bfloat16 or float16.
        dtype: int8 or float8_e4m3fn. Not used when out is given.
        norm: "layer" or "rms", over a row; None is no norm.
        weight, bias: [K] float32, bfloat16 or float16; the norm's.
        scale, shift: [G, K] of these dtypes, G a divisor of M: the first M / G rows take the first row of each, and so
            on. A frame's modulation (adaLN), given once per frame.
        eps: added to the variance, or the mean square.
        activation: "gelu", "gelu_tanh" or None.
        out: codes [M, K] int8 or float8_e4m3fn and scales [M] float32, to write to.

    Source: adaLN, arXiv:2212.09748.
    """
    sizes: dict[str, int] = {}
    device = x.device
    check_inference("quantize_rows", x)
    check_tensor("x", x, FLOATS, "M K", sizes, device)
    check_word("norm", norm, ("layer", "rms"))
    check_word("activation", activation, ACTIVATIONS)
    for name, vector in (("weight", weight), ("bias", bias)):
        check_optional(name, vector, FLOATS, "K", sizes, device)
    for name, groups in (("scale", scale), ("shift", shift)):
        check_groups(name, groups, "K", sizes, device)
    if out is None:
        codes = torch.empty(x.shape, dtype=dtype, device=device)
        out = Quantized(codes, torch.empty(len(x), dtype=torch.float32, device=device))
    check_quantized("out", out, CODES, "M K", sizes, device)
    call(
        "quantize_rows",
        backend,
        device,
        x,
        out.codes.dtype,
        norm=norm,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        eps=eps,
        activation=activation,
        out=out,
    )
    return out


def linear(
    x: Quantized | Tensor,
    weight: Quantized,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A linear layer in 8 bits: residual + gate * activation(x @ weight.T + bias), each step only if it is given.

    Products of int8 codes are summed exactly, those of e4m3 codes in float32 or better; everything after is float32.

    Args:
        x: codes [M, K] and scales [M], or a [M, K] float tensor, which is quantized first (quantize_rows).
        weight: codes [N, K] of the same dtype, scales [N].
        bias: [N] float32, bfloat16 or float16.
        activation: "gelu", "gelu_tanh" or None.
        gate: [G, N] of these dtypes, G a divisor of M, as scale in quantize_rows.
        residual: [M, N] of these dtypes; may be out.
        dtype: float32, bfloat16 or float16, of the result. Not used when out is given.
        out: [M, N], to write to.
    """
    check_is_quantized("weight", weight)
    if isinstance(x, Tensor):
        x = quantize_rows(x, weight.codes.dtype, backend=backend)
    sizes: dict[str, int] = {}
    device = x.codes.device
    check_quantized("x", x, CODES, "M K", sizes, device)
    check_quantized("weight", weight, (x.codes.dtype,), "N K", sizes, device)
    check_word("activation", activation, ACTIVATIONS)
    check_optional("bias", bias, FLOATS, "N", sizes, device)
    check_groups("gate", gate, "N", sizes, device)
    check_optional("residual", residual, FLOATS, "M N", sizes, device)
    if out is None:
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
        out = torch.empty(sizes["M"], sizes["N"], dtype=dtype, device=device)
    check_tensor("out", out, FLOATS, "M N", sizes, device)
    call(
        "linear",
        backend,
        device,
        x,
        weight,
        bias=bias,
        activation=activation,
        gate=gate,
        residual=residual,
        dtype=out.dtype,
        out=out,
    )
    return out
