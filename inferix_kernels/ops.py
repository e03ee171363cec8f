"""The public ops: what each computes, what it accepts, what it refuses. No kernels here.

Long because it is the manual: more than half of it is docstrings.

Every op takes `backend`: "auto", "compiled", "triton" or "reference". "auto" takes the first that can run (the table
is in _dispatch.py); a backend asked for by name never falls back, it raises Unsupported. paged_attention also takes
"flash-attn", for FlashAttention's kernels where they are installed (flash_attn_backend.py); quantize_rows and linear
take "torch", for torch's own (torch_backend.py). Every op that returns tensors takes `out`, so that a pass over a model
can run without an allocation. There is no backward.

A NaN or an infinity is never hidden. Where codes are stored, the numbers that share a scale with one are all read as
NaN, in every format and on every backend: their scale is NaN. Float pages keep it as it is. What is stored should be
finite all the same; this is for finding out where it was not.

Every tensor must be dense and lie in memory, on the CPU or a GPU, all of a call on one device.

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
    attention_outputs,
    check_alibi,
    check_apart,
    check_attention,
    check_dtype,
    check_given,
    check_groups,
    check_is,
    check_norm,
    check_number,
    check_optional,
    check_page_list,
    check_pages,
    check_pools,
    check_precision,
    check_quantized,
    check_rows,
    check_same_width,
    check_scale,
    check_softcap,
    check_tensor,
    check_word,
    device_of,
)
from ._library import call, op
from ._overlap import check_overlap
from ._remembered import Sizes, remembered
from .arrivals import check_deadline
from .layout import FORMATS, KVPages, PageList, Quantized
from .plans import Plan

__all__ = [
    "add_norm",
    "kv_append",
    "kv_commit",
    "kv_gather",
    "latent_attention",
    "linear",
    "merge_attention",
    "page_scores",
    "page_summaries",
    "paged_attention",
    "qkv_prologue",
    "quantize_rows",
    "select_pages",
]

ADDED_TO = "with accumulate=True: they are what is added to"


@remembered
def _accept_append(k: Tensor, v: Tensor, pages: KVPages, where: PageList) -> Sizes:
    sizes: dict[str, int] = {}
    device = device_of("k", k)
    check_tensor("k", k, FLOATS, "T H D", sizes, device)
    check_tensor("v", v, (k.dtype,), "T H Dv", sizes, device)
    check_pages("pages", pages, sizes, device)
    check_page_list("where", where, sizes, device, starts=not FORMATS[pages.format].quantized)
    check_apart("pages", pages)
    return sizes


@op(writes=["pages"])
def kv_append(k: Tensor, v: Tensor, pages: KVPages, where: PageList, *, backend: str = "auto") -> None:
    """Write T tokens into pages, from the first slot of each page on.

    Slots past lens[i] store code 0, so that no NaN can hide there (0 * NaN is NaN). How a format quantizes is written
    in reference.encode; scales are taken over a page's valid tokens. With where.starts tokens go to slots starts[i] :
    starts[i] + lens[i], and the other slots keep what they hold: for pages of floats, such as another's cache.

    Args:
        k, v: [T, H, D] and [T, H, Dv] float32, bfloat16 or float16, same dtype.
        pages: written. Any format.
        where: lens sum to T; no page twice.

    Example:
        >>> pages = KVPages.empty("int8", pages=4, heads=2, page_size=16, head_dim=32)
        >>> k, v = torch.randn(25, 2, 32), torch.randn(25, 2, 32)
        >>> kv_append(k, v, pages, PageList.of([3, 1], [16, 9]))  # 16 tokens into page 3, 9 into page 1
    """
    accepted = _accept_append(k, v, pages, where)
    call("kv_append", accepted, backend, k.device, k, v, pages, where)


@remembered
def _accept_commit(
    source: KVPages, source_list: PageList, target: KVPages, target_list: PageList, k_mean: Tensor | None
) -> Sizes:
    sizes: dict[str, int] = {}
    check_is("source", source, KVPages)
    device = device_of("source.k", source.k)
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
    return sizes


@op(writes=["target"])
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

    Example:
        >>> scratch, pages = (KVPages.empty(format, 4, 2, page_size=16, head_dim=32) for format in ("fp32", "int8"))
        >>> kv_append(torch.randn(25, 2, 32), torch.randn(25, 2, 32), scratch, PageList.of([0, 1], [16, 9]))
        >>> kv_commit(scratch, PageList.of([0, 1], [16, 9]), pages, PageList.of([3, 2], [16, 9]))  # quantizes
    """
    accepted = _accept_commit(source, source_list, target, target_list, k_mean)
    call("kv_commit", accepted, backend, source.k.device, source, source_list, target, target_list, k_mean)


@op(writes=["out"])
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

    Example:
        >>> pages = KVPages.empty("int8", pages=4, heads=2, page_size=16, head_dim=32)
        >>> kv_append(torch.randn(25, 2, 32), torch.randn(25, 2, 32), pages, PageList.of([3, 1], [16, 9]))
        >>> k, v = kv_gather([pages], PageList.of([1], [9]))
        >>> list(k.shape), k.dtype
        ([9, 2, 32], torch.float32)
    """
    sizes: dict[str, int] = {}
    check_is("where", where, PageList)
    device = device_of("where.ids", where.ids)
    check_pools(pools, sizes, device)
    check_page_list("where", where, sizes, device)
    if out is None:
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
        tokens = int(where.lens.sum())
        k, v = (torch.empty(tokens, sizes["H"], sizes[width], dtype=dtype, device=device) for width in ("D", "Dv"))
        out = k, v
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out must be a pair (k, v), got {type(out).__name__}")
    device_of("out[0]", out[0])
    check_tensor("out[0]", out[0], FLOATS, "T H D", sizes, device)
    check_tensor("out[1]", out[1], (out[0].dtype,), "T H Dv", sizes, device)
    call("kv_gather", None, backend, device, pools, where, out[0].dtype, out=out)
    return out


@remembered
def _accept_attention(
    q: Tensor,
    pools: Sequence[KVPages],
    plan: Plan,
    out: Tensor | None,
    lse: Tensor | None,
    latent: bool,
    scale: float | None,
    accumulate: bool,
    softcap: float,
    alibi_slopes: Tensor | None,
    precision: str,
    deadline: float,
) -> Sizes:
    sizes: dict[str, int] = {}
    check_attention(q, "D+Dv" if latent else "D", pools, plan, sizes, same_width=not latent)
    check_precision(precision)
    check_scale("scale", scale)
    check_softcap(softcap)
    check_deadline(deadline)
    check_alibi(alibi_slopes, plan, sizes, q.device)
    if accumulate:
        check_given(ADDED_TO, out=out, lse=lse)
    for field in ("page_starts", "windows", "arrivals") if latent else ():
        if getattr(plan, field) is not None:
            raise ValueError(f"plan.{field} must be None for latent_attention, got a tensor")
    check_optional("out", out, (q.dtype, torch.float32), "T Hq D", sizes, q.device)
    check_optional("lse", lse, (torch.float32,), "T Hq", sizes, q.device)
    sizes["q stride"] = q.stride(-1)
    return sizes


@op(writes=["out", "lse"])
def paged_attention(
    q: Tensor,
    pools: Sequence[KVPages],
    plan: Plan,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    accumulate: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    precision: str = "auto",
    deadline: float = 60.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of ragged segments of queries over lists of pages: (out, lse).

    One softmax runs across all pages of a list, whatever their formats. Where a list is empty, its window holds no key,
    or the bias of all its pages is -inf, out = 0 and lse = -inf, never NaN. Nothing past a page's valid tokens counts.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16. Hq is a multiple of H; query head j reads KV head j // (Hq // H).
            Or [V, T, Hq, D]: V variants of the same queries, turned to V positions, of which each page meets the one
            that plan.page_variants names. So time can be counted anew without touching keys, which are stored rotated.
        pools: one to 8, same H, page_size and D, formats may differ. A page id counts through them in order.
            Either all or none of their keys had a mean removed.
        plan: its segments cover the T queries; one page list per segment, or one per segment and KV head. A page's
            bias is -inf, which leaves the page out, or any finite number: biases count from the largest of their list,
            so that one on all pages changes no weight, however large.
        scale: of q . k; D ** -0.5 by default.
        out: [T, Hq, D] in q's dtype or float32, to write to.
        lse: [T, Hq] float32, to write to: log of the sum of exp(scale * q . k), natural.
        accumulate: out and lse hold the result over other keys; merge these into it. Give a float32 out, or every
            call rounds.
        softcap: scores become softcap * tanh(score / softcap), before a page's bias is added; 0 leaves them as they
            are.
        alibi_slopes: [Hq] or [S, Hq] float32, of all segments or of each: from a head's scores its slope is taken
            times the distance in tokens between query and key, after softcap. Needs plan.page_positions.
        precision: of the products over quantized pages. "exact": q and the softmax's weights have at least 16 bits.
            "8bit": both are rounded to 8 bits where that is faster: int8 pages on a CPU with VNNI, pages with a scale
            for each token on a GPU. Large channels in q cost the others their bits then. "auto": 8 bits where the error
            stays near the exact one whatever q holds: on a CPU q in two terms of 8 bits and weights in one, on a GPU
            not at all. Nothing is looked up in q to choose.
        deadline: seconds from the start of the call, after which pages that have not come are given up. For a plan with
            arrivals: work begins with the pages that are there, and goes on with each of the others once its counter
            says so, whatever its bias and length. The C++ kernel and the reference wait. Kernels on a GPU refuse such
            a plan; there a call for each group of pages that has come, with accumulate, takes its place.

    Raises:
        NotArrived: a page did not come before the deadline. out and lse then hold nothing of use.

    Source: online softmax, arXiv:1805.02867; its use over tiles, arXiv:2205.14135; softcap, arXiv:2408.00118;
    ALiBi, arXiv:2108.12409.

    Example:
        >>> pages = KVPages.empty("int8", pages=4, heads=2, page_size=16, head_dim=32)
        >>> kv_append(torch.randn(25, 2, 32), torch.randn(25, 2, 32), pages, PageList.of([3, 1], [16, 9]))
        >>> q = torch.randn(10, 4, 32)  # 10 queries, 4 heads: two read each KV head
        >>> plan = make_plan([(4, [3, 1], [16, 9]), (6, [3], [16])])  # 4 queries see both pages, 6 see page 3 alone
        >>> out, lse = paged_attention(q, [pages], plan)
        >>> list(out.shape), list(lse.shape)
        ([10, 4, 32], [10, 4])
    """
    options = {"scale": scale, "accumulate": bool(accumulate), "softcap": softcap, "alibi_slopes": alibi_slopes,
               "precision": precision, "deadline": deadline}  # fmt: skip
    accepted = _accept_attention(q, pools, plan, out, lse, False, *options.values())
    sizes = accepted.sizes
    if sizes["q stride"] != 1:  # which compiled kernels do not take: a copy costs less than another backend
        q = q.contiguous()
    if out is None or lse is None:
        out, lse = attention_outputs(q, out, lse, sizes)
    options["scale"] = sizes["D"] ** -0.5 if scale is None else scale
    call("paged_attention", accepted, backend, q.device, q, pools, plan, out=out, lse=lse, **options)
    return out, lse


@op(writes=["out", "lse"])
def latent_attention(
    q: Tensor,
    pools: Sequence[KVPages],
    plan: Plan,
    *,
    scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    accumulate: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Multi-head latent attention over pages of latent rows: (out, lse). As paged_attention, with three differences:
    a key is its page's row of keys and its row of values side by side, the latent part and the rotary part; the value
    is the latent part; and all heads read the same row, since H is 1 in such stores.

    This is the absorbed form: a head's projections from the latent to its keys and values, U and W, are multiplied
    into q before and into the output afterwards, and no key or value of a head is ever made. With many queries the
    other form costs less (4.25 times less at a latent of 512 and heads of 128): kv_gather the latent rows once for a
    block, multiply them with U and W, kv_append what that gives to pages of its own, and use paged_attention. Both
    give the same.

    Args:
        q: [T, Hq, D + Dv] or [V, T, Hq, D + Dv] float32, bfloat16 or float16: U.T @ (the part of a query that meets
            the latent), then the rotated part.
        pools: one to 8, same H, page_size, D (the latent's width) and Dv (the rotary part's), formats may differ:
            latent8, or any other.
        plan, lse, accumulate: as in paged_attention.
        scale: of q . k. No default: it goes by the widths before U was multiplied in.
        out: [T, Hq, D] in q's dtype or float32, to write to: sums of latent rows.

    Source: arXiv:2405.04434, section 2.1 and appendix C.

    Example:
        >>> pages = KVPages.empty("latent8", pages=2, heads=1, page_size=16, head_dim=(64, 16))  # latent, rotary
        >>> kv_append(torch.randn(20, 1, 64), torch.randn(20, 1, 16), pages, PageList.of([0, 1], [16, 4]))
        >>> q = torch.randn(5, 8, 64 + 16)
        >>> out, lse = latent_attention(q, [pages], make_plan([(5, [0, 1], [16, 4])]), scale=48**-0.5)
        >>> list(out.shape)
        [5, 8, 64]
    """
    options = {"scale": scale, "accumulate": bool(accumulate)}
    accepted = _accept_attention(q, pools, plan, out, lse, True, *options.values(), 0.0, None, "auto", 0.0)
    out, lse = attention_outputs(q, out, lse, accepted.sizes)
    call("latent_attention", accepted, backend, q.device, q, pools, plan, out=out, lse=lse, **options)
    return out, lse


@remembered
def _accept_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None, lse: Tensor | None
) -> Sizes:
    sizes: dict[str, int] = {}
    device = device_of("out_a", out_a)
    check_tensor("out_a", out_a, FLOATS, "T Hq D", sizes, device)
    check_tensor("out_b", out_b, (out_a.dtype,), "T Hq D", sizes, device)
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_tensor(name, x, (torch.float32,), "T Hq", sizes, device)
    check_optional("out", out, (out_a.dtype, torch.float32), "T Hq D", sizes, device)
    check_optional("lse", lse, (torch.float32,), "T Hq", sizes, device)
    return sizes


@op(writes=["out", "lse"])
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

    Example:
        >>> pages = KVPages.empty("fp32", pages=2, heads=2, page_size=16, head_dim=32)
        >>> kv_append(torch.randn(25, 2, 32), torch.randn(25, 2, 32), pages, PageList.of([0, 1], [16, 9]))
        >>> q = torch.randn(3, 2, 32)
        >>> first = paged_attention(q, [pages], make_plan([(3, [0], [16])]))
        >>> second = paged_attention(q, [pages], make_plan([(3, [1], [9])]))
        >>> out, lse = merge_attention(*first, *second)  # as if one call had seen both pages
        >>> torch.allclose(out, paged_attention(q, [pages], make_plan([(3, [0, 1], [16, 9])]))[0], atol=1e-5)
        True
    """
    accepted = _accept_merge(out_a, lse_a, out_b, lse_b, out, lse)
    out = torch.empty_like(out_a) if out is None else out
    lse = torch.empty_like(lse_a) if lse is None else lse
    call("merge_attention", accepted, backend, out_a.device, out_a, lse_a, out_b, lse_b, out=out, lse=lse)
    return out, lse


@remembered
def _accept_prologue(
    qkv: Tensor,
    norms: Sequence[Tensor | None],  # of q, of k, their biases
    rope: Tensor | None,
    pages: KVPages,
    where: PageList,
    bias: Tensor | None,
    k_mean: Tensor | None,
    out: Tensor | None,
    eps: float,
    interleaved: bool,  # for the replay
) -> Sizes:
    sizes: dict[str, int] = {}
    device = device_of("qkv", qkv)
    check_tensor("qkv", qkv, FLOATS, "T width", sizes, device)
    check_pages("pages", pages, sizes, device)
    check_same_width("pages", sizes)
    check_page_list("where", where, sizes, device)
    H, D = sizes["H"], sizes["D"]
    query_heads = sizes["Hq"] = sizes["width"] // D - 2 * H
    if query_heads < 1 or sizes["width"] % D or query_heads % H:
        raise ValueError(
            f"qkv must be (Hq + 2H) * D wide with the pages' H={H}, D={D} and Hq a multiple of H, got {sizes['width']}"
        )
    check_norm("norm_q", norms[0], norms[2], query_heads, sizes, device)
    check_norm("norm_k", norms[1], norms[3], H, sizes, device)
    check_optional("rope", rope, (torch.float32,), "T R/2 2", sizes, device)
    if rope is not None and 2 * rope.shape[1] > D:
        raise ValueError(f"rope must turn at most D={D} channels, got {2 * rope.shape[1]}")
    check_number("eps", eps)
    check_optional("bias", bias, FLOATS, "width", sizes, device)
    check_optional("k_mean", k_mean, (torch.float32,), "H D", sizes, device)
    check_optional("out", out, (qkv.dtype,), "T Hq D", sizes, device)
    return sizes


@op(writes=["pages", "out"])
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

    Example:
        >>> pages = KVPages.empty("int8", pages=2, heads=2, page_size=16, head_dim=32)
        >>> qkv = torch.randn(25, (4 + 2 * 2) * 32)  # 25 tokens, 4 query heads, 2 KV heads
        >>> angles = torch.rand(25, 16)
        >>> rope = torch.stack((angles.cos(), angles.sin()), -1)
        >>> norm_q, norm_k = torch.ones(32), torch.ones(32)  # each head by itself
        >>> q = qkv_prologue(qkv, norm_q, norm_k, rope, pages, PageList.of([0, 1], [16, 9]))
        >>> list(q.shape)
        [25, 4, 32]
    """
    norms = (norm_q, norm_k, norm_q_bias, norm_k_bias)
    interleaved = bool(interleaved)
    accepted = _accept_prologue(qkv, norms, rope, pages, where, bias, k_mean, out, eps, interleaved)
    if out is None:
        sizes = accepted.sizes
        out = torch.empty(sizes["T"], sizes["Hq"], sizes["D"], dtype=qkv.dtype, device=qkv.device)
    call(
        "qkv_prologue",
        accepted,
        backend,
        qkv.device,
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


@op(writes=["out"])
def page_summaries(
    pools: Sequence[KVPages], where: PageList, bounds: bool = False, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """What the keys of each page have in common, for page_scores: their mean or, with bounds, least and largest.

    Written when pages are: a page that is committed keeps its summary. A page without tokens gets zeros.

    Args:
        pools: one to 8, any formats, same H, page_size and D. A page id counts through them in order.
        where: the pages to summarise.
        bounds: the least and the largest key of each channel in place of the mean.
        out: [P, H, 1 or 2, D] float32, bfloat16 or float16, P pages of all pools together; rows of pages that are not
            in the list stay as they are. Zeros at first, if it is not given.

    Returns:
        out, indexed by page id.

    Source: bounds, Quest, arXiv:2406.10774; means, VSA, arXiv:2505.13389.

    Example:
        >>> pages = KVPages.empty("int8", pages=4, heads=2, page_size=16, head_dim=32)
        >>> kv_append(torch.randn(25, 2, 32), torch.randn(25, 2, 32), pages, PageList.of([3, 1], [16, 9]))
        >>> means = page_summaries([pages], PageList.of([3, 1], [16, 9]))
        >>> list(means.shape)  # one mean key per page and KV head
        [4, 2, 1, 32]
    """
    sizes: dict[str, int] = {}
    check_is("where", where, PageList)
    device = device_of("where.ids", where.ids)
    check_pools(pools, sizes, device)
    check_page_list("where", where, sizes, device)
    sizes["P"] = sum(pages.pages for pages in pools)
    if out is None:
        out = torch.zeros(sizes["P"], sizes["H"], 1 + bounds, sizes["D"], dtype=torch.float32, device=device)
    check_tensor("out", out, FLOATS, f"P H {1 + bounds} D", sizes, device)
    call("page_summaries", None, backend, device, pools, where, bounds, out=out)
    return out


@op(writes=["out"])
def page_scores(
    q: Tensor,
    q_indptr: Tensor,
    summaries: Tensor,
    where: PageList,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much runs of queries may have to do with each page, by its summary: [S, H, n].

    With the mean key of a page: the scaled score of the run's mean query. With bounds: the most that this could be for
    any key of the page. -inf for pages without tokens, and for runs without queries.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16; Hq is a multiple of H.
        q_indptr: [S + 1] int32 from 0 to T, as of a plan: run s is the queries q_indptr[s] : q_indptr[s + 1]. The mean
            is over them and over the query heads that share a KV head.
        summaries: [P, H, 1 or 2, D] float32, bfloat16 or float16, see page_summaries.
        where: n pages to choose among, the same for all runs.
        scale: D ** -0.5 by default.
        out: [S, H, n] float32, to write to.

    Example:
        >>> pages = KVPages.empty("int8", pages=4, heads=2, page_size=16, head_dim=32)
        >>> where = PageList.of([3, 1], [16, 9])
        >>> kv_append(torch.randn(25, 2, 32), torch.randn(25, 2, 32), pages, where)
        >>> runs = torch.tensor([0, 6, 10], dtype=torch.int32)  # two runs of queries: 0..5 and 6..9
        >>> scores = page_scores(torch.randn(10, 4, 32), runs, page_summaries([pages], where), where)
        >>> list(scores.shape)  # runs, KV heads, pages
        [2, 2, 2]
    """
    sizes: dict[str, int] = {}
    check_tensor("q", q, FLOATS, "T Hq D", sizes, device_of("q", q))
    check_tensor("q_indptr", q_indptr, (torch.int32,), "S+1", sizes, q.device)
    check_tensor("summaries", summaries, FLOATS, "P H rows D", sizes, q.device)
    check_page_list("where", where, sizes, q.device)
    if sizes["rows"] not in (1, 2) or not summaries.is_contiguous():
        raise ValueError(
            f"summaries must be contiguous [P, H, 1 or 2, D], got {list(summaries.shape)} with strides"
            f" {summaries.stride()}"
        )
    if sizes["Hq"] % sizes["H"]:
        raise ValueError(f"q must have a multiple of the summaries' H={sizes['H']} heads, got {sizes['Hq']}")
    if not len(q_indptr):
        raise ValueError("q_indptr must hold at least its leading 0, got an empty tensor")
    sizes["S"], sizes["n"] = sizes["S+1"] - 1, len(where.ids)
    if out is None:
        out = torch.empty(sizes["S"], sizes["H"], sizes["n"], dtype=torch.float32, device=q.device)
    check_tensor("out", out, (torch.float32,), "S H n", sizes, q.device)
    scale = sizes["D"] ** -0.5 if scale is None else scale
    call("page_scores", None, backend, q.device, q, q_indptr, summaries, where, scale=scale, out=out)
    return out


@op(writes=["out"])
def select_pages(
    scores: Tensor,
    where: PageList,
    k: int,
    *,
    keep: Tensor | None = None,
    frames: int | None = None,
    pages_per_frame: int = 1,
    out: PageList | None = None,
    backend: str = "auto",
) -> PageList:
    """The k best pages of each run and KV head, on the device: S * H lists of k entries, one after the other.

    Entries keep the order of `where`; of equal scores the earlier wins. Where fewer than k pages have tokens and a
    score above -inf, the rest of the list is page 0 with no tokens. So lists have one length, and a CUDA graph can
    hold what follows: even_plan makes a plan of them.

    Args:
        scores: [S, H, n] float32, see page_scores. Not NaN.
        where: the n pages that were scored.
        k: pages of each list, at least 1.
        keep: [n] bool: pages that go before all others, whatever their score, as those of the block itself.
        frames: choose among the pages of the so many best frames only, or None. A frame is as good as its best page.
        pages_per_frame: with frames: entries in a row that make a frame; a divisor of n.
        out: ids and lens, [S * H * k] each, to write to.

    Source: frames first, then pages in them: Light Forcing, arXiv:2602.04789.

    Example:
        >>> scores = torch.tensor([[[0.1, 0.7, 0.4]]])  # one run, one KV head, three pages
        >>> best = select_pages(scores, PageList.of([5, 6, 7], [16, 16, 9]), k=2)
        >>> best.ids.tolist(), best.lens.tolist()
        ([6, 7], [16, 9])
    """
    sizes: dict[str, int] = {}
    device = device_of("scores", scores)
    check_tensor("scores", scores, (torch.float32,), "S H n", sizes, device)
    sizes["len(where)"] = sizes["n"]
    check_page_list("where", where, sizes, device)
    check_optional("keep", keep, (torch.bool,), "n", sizes, device)
    for name, number in (("k", k), ("frames", 1 if frames is None else frames), ("pages_per_frame", pages_per_frame)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if sizes["n"] % pages_per_frame:
        raise ValueError(f"pages_per_frame must divide n={sizes['n']}, got {pages_per_frame}")
    length = sizes["len(out)"] = sizes["S"] * sizes["H"] * k
    if out is None:
        out = PageList(*(torch.empty(length, dtype=torch.int32, device=device) for _ in range(2)))
    check_page_list("out", out, sizes, device)
    options = {"keep": keep, "frames": frames, "pages_per_frame": pages_per_frame}
    call("select_pages", None, backend, device, scores, where, k, **options, out=out)
    return out


@remembered
def _accept_rows(
    x: Tensor,
    dtype: torch.dtype,
    norm: str | None,
    vectors: Sequence[Tensor | None],  # weight, bias
    groups: Sequence[Tensor | None],  # scale, shift
    eps: float,
    activation: str | None,
    out: Quantized | None,
) -> Sizes:
    sizes: dict[str, int] = {}
    check_tensor("x", x, FLOATS, "M K", sizes, device_of("x", x))
    _check_steps(x, norm, vectors, groups, eps, activation, sizes)
    if out is None:
        check_dtype("out.codes", dtype, CODES)
    else:
        check_quantized("out", out, CODES, "M K", sizes, x.device)
    return sizes


def _check_steps(
    x: Tensor,
    norm: str | None,
    vectors: Sequence[Tensor | None],
    groups: Sequence[Tensor | None],
    eps: float,
    activation: str | None,
    sizes: dict[str, int],
) -> None:
    """What quantize_rows and add_norm have in common, once x is checked."""
    device = x.device
    check_word("norm", norm, ("layer", "rms"))
    check_word("activation", activation, ACTIVATIONS)
    check_number("eps", eps)
    for name, vector in zip(("weight", "bias"), vectors, strict=True):
        check_optional(name, vector, FLOATS, "K", sizes, device)
    for name, each in zip(("scale", "shift"), groups, strict=True):
        check_groups(name, each, "K", sizes, device, x.ndim)


@op(writes=["out"])
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
    scales of each row by the rule of int8 keys (reference.encode). All arithmetic before the codes is float32. Weights
    of linear layers are quantized by the same op: a row is an output channel.

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

    Example:
        >>> codes, scales = quantize_rows(torch.randn(8, 64), norm="layer", activation="gelu")
        >>> codes.dtype, list(codes.shape), list(scales.shape)
        (torch.int8, [8, 64], [8])
    """
    accepted = _accept_rows(x, dtype, norm, (weight, bias), (scale, shift), eps, activation, out)
    if out is None:
        M, K = accepted.sizes["M"], accepted.sizes["K"]
        codes = torch.empty(M, K, dtype=dtype, device=x.device)
        out = Quantized(codes, torch.empty(M, dtype=torch.float32, device=x.device))
    call(
        "quantize_rows",
        accepted,
        backend,
        x.device,
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


def _check_add_norm(
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    norm: str | None,
    vectors: Sequence[Tensor | None],  # weight, bias
    groups: Sequence[Tensor | None],  # scale, shift
    eps: float,
    activation: str | None,
    summed: Tensor | None,
    out: Tensor | None,
) -> Sizes:
    """What add_norm asks of its arguments."""
    sizes: dict[str, int] = {}
    device = device_of("x", x)
    if x.ndim == 0:
        raise ValueError("x must be [..., K], got []")
    check_rows("x", x, sizes, device, x.ndim)
    _check_steps(x, norm, vectors, groups, eps, activation, sizes)
    check_groups("gate", gate, "K", sizes, device, x.ndim)
    for name, rows in (("residual", residual), ("summed", summed), ("out", out)):
        if rows is not None:
            check_rows(name, rows, sizes, device, x.ndim)
    return sizes


_accept_add_norm = remembered(_check_add_norm)


@op(writes=["summed", "out"], optional=["summed"])
def add_norm(
    x: Tensor,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    activation: str | None = None,
    summed: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What stands between two linear layers, in one pass: gate and residual of the first, norm, modulation and
    activation before the second.

    h = residual + gate * x;  y = activation((norm(h) * weight + bias) * (1 + scale) + shift), each step only if it is
    given. All arithmetic is float32. Where h is kept, y is computed from it as it was rounded, so that one call and two
    give the same.

    Args:
        x: [..., K] float32, bfloat16 or float16: M rows in all, evenly apart in memory.
        gate: [G, K] of these dtypes, G a divisor of M, as scale; or, beside x [..., n, K], [..., 1, K].
        residual: as x, of these dtypes.
        norm, weight, bias, scale, shift, eps, activation: as in quantize_rows, which gives codes where this gives y.
            scale and shift may be shaped as gate may.
        summed: as x, of these dtypes, to write h to; may be x or residual. None: it is not kept.
        out: as x, of these dtypes, to write y to; may be x or residual. None: a new one in x's dtype.

    Returns:
        y, shaped as x.

    Raises:
        ValueError: also where summed or out share memory with each other, or with x or residual but for what is allowed
            above.

    Source: "Add & Norm" of arXiv:1706.03762; adaLN with gates, arXiv:2212.09748.

    Example:
        >>> x, attended, gate, scale, shift = torch.randn(8, 64), torch.randn(8, 64), *torch.randn(3, 2, 64)
        >>> y = add_norm(x, norm="layer", scale=scale, shift=shift)  # two frames of four tokens, each modulated
        >>> x_after = torch.empty_like(x)
        >>> y = add_norm(attended, gate=gate, residual=x, norm="layer", summed=x_after)
        >>> torch.allclose(x_after, x + attended * gate.repeat_interleave(4, 0), atol=1e-5)
        True
    """
    accepted = _accept_add_norm(x, gate, residual, norm, (weight, bias), (scale, shift), eps, activation, summed, out)
    if not (summed is out is None or torch.compiler.is_compiling()):
        check_overlap({"x": x, "residual": residual}, {"summed": summed, "out": out})
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    call(
        "add_norm",
        accepted,
        backend,
        x.device,
        x,
        gate=gate,
        residual=residual,
        norm=norm,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        eps=eps,
        activation=activation,
        summed=summed,
        out=out,
    )
    return out


@remembered
def _accept_linear(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Sizes:
    sizes: dict[str, int] = {}
    check_is("weight", weight, Quantized)
    check_is("x", x, Quantized)
    device = device_of("x.codes", x.codes)
    check_quantized("x", x, CODES, "M K", sizes, device)
    check_quantized("weight", weight, (x.codes.dtype,), "N K", sizes, device)
    check_word("activation", activation, ACTIVATIONS)
    check_optional("bias", bias, FLOATS, "N", sizes, device)
    check_groups("gate", gate, "N", sizes, device)
    check_optional("residual", residual, FLOATS, "M N", sizes, device)
    if out is None and dtype not in FLOATS:
        raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    check_optional("out", out, FLOATS, "M N", sizes, device)
    return sizes


@op(writes=["out"])
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

    Products of int8 codes are summed exactly. Those of e4m3 codes are summed in float32 or better, but for up to 128
    in a row, of which tensor cores may keep 13 bits of mantissa. Everything after is float32.

    Args:
        x: codes [M, K] and scales [M], or a [M, K] float tensor, which is quantized first (quantize_rows).
        weight: codes [N, K] of the same dtype, scales [N].
        bias: [N] float32, bfloat16 or float16.
        activation: "gelu", "gelu_tanh" or None.
        gate: [G, N] of these dtypes, G a divisor of M, as scale in quantize_rows.
        residual: [M, N] of these dtypes; may be out.
        dtype: float32, bfloat16 or float16, of the result. Not used when out is given.
        out: [M, N], to write to.

    Example:
        >>> x, weight, bias = torch.randn(8, 64), torch.randn(32, 64), torch.randn(32)
        >>> y = linear(x, quantize_rows(weight), bias=bias, dtype=torch.float32)
        >>> error = (y - (x @ weight.T + bias)).norm() / (x @ weight.T + bias).norm()
        >>> bool(error < 0.02)
        True
    """
    if isinstance(x, Tensor):
        check_is("weight", weight, Quantized)
        device_of("weight.codes", weight.codes)
        x = quantize_rows(x, weight.codes.dtype, backend=backend)
    accepted = _accept_linear(x, weight, bias, activation, gate, residual, dtype, out)
    device = x.codes.device
    if out is None:
        out = torch.empty(accepted.sizes["M"], accepted.sizes["N"], dtype=dtype, device=device)
    call(
        "linear",
        accepted,
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
