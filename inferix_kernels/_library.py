"""The ops as torch.library sees them: flat tensors in, outputs passed in and mutated, the backend's name last.

torch.compile and opcheck need this form; `call` takes it only there, since outside a graph a call through torch.library
costs microseconds that buy nothing. A pool has empty tensors where it has no scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import run
from .layout import KVPages, PageList, Plan, Quantized

# A pool is the list of its six tensors; several pools are one list after the other.
_WIDTH = len(KVPages._fields)


def flatten(*pools: KVPages) -> list[Tensor]:
    # A new tensor for each None: a mutated argument must not alias another.
    return [pages.k.new_empty(0, dtype=torch.float32) if x is None else x for pages in pools for x in pages]


def unflatten(tensors: list[Tensor]) -> list[KVPages]:
    optional = [x if x.ndim > 1 else None for x in tensors]
    return [KVPages(*optional[i : i + _WIDTH]) for i in range(0, len(tensors), _WIDTH)]  # type: ignore[arg-type]


def define(op: str, schema: str) -> Callable[[Callable[..., None]], Any]:
    """Register inferix_kernels::<op> with the decorated function as its body; returns the op."""

    def register(body: Callable[..., None]) -> Any:
        name = f"inferix_kernels::{op}"
        torch.library.define(name, f"({schema}, str backend) -> ()")
        torch.library.impl(name, "CompositeExplicitAutograd", body)
        torch.library.register_fake(name, lambda *args: None)  # every output is an argument
        return getattr(torch.ops.inferix_kernels, op).default

    return register


@define("kv_append", "Tensor k, Tensor v, Tensor(a!)[] pages, Tensor ids, Tensor lens")
def _kv_append(k: Tensor, v: Tensor, pages: list[Tensor], ids: Tensor, lens: Tensor, backend: str) -> None:
    run("kv_append", backend, k.device, k, v, *unflatten(pages), PageList(ids, lens))


def kv_append(k: Tensor, v: Tensor, pages: KVPages, where: PageList, *, backend: str) -> None:
    _kv_append(k, v, flatten(pages), *where, backend)


@define(
    "kv_commit",
    "Tensor[] source, Tensor source_ids, Tensor source_lens, "
    "Tensor(a!)[] target, Tensor target_ids, Tensor target_lens, Tensor? k_mean",
)
def _kv_commit(
    source: list[Tensor],
    source_ids: Tensor,
    source_lens: Tensor,
    target: list[Tensor],
    target_ids: Tensor,
    target_lens: Tensor,
    k_mean: Tensor | None,
    backend: str,
) -> None:
    reads, writes = PageList(source_ids, source_lens), PageList(target_ids, target_lens)
    run("kv_commit", backend, source_ids.device, *unflatten(source), reads, *unflatten(target), writes, k_mean)


def kv_commit(
    source: KVPages,
    source_list: PageList,
    target: KVPages,
    target_list: PageList,
    k_mean: Tensor | None,
    *,
    backend: str,
) -> None:
    _kv_commit(flatten(source), *source_list, flatten(target), *target_list, k_mean, backend)


@define("kv_gather", "Tensor[] pools, Tensor ids, Tensor lens, Tensor(a!) k, Tensor(b!) v")
def _kv_gather(pools: list[Tensor], ids: Tensor, lens: Tensor, k: Tensor, v: Tensor, backend: str) -> None:
    run("kv_gather", backend, k.device, unflatten(pools), PageList(ids, lens), k.dtype, out=(k, v))


def kv_gather(
    pools: Sequence[KVPages], where: PageList, dtype: torch.dtype, *, out: tuple[Tensor, Tensor], backend: str
) -> None:
    _kv_gather(flatten(*pools), *where, *out, backend)


@define(
    "paged_attention",
    "Tensor q, Tensor[] pools, Tensor q_indptr, Tensor page_indptr, Tensor page_ids, "
    "Tensor page_lens, Tensor? page_bias, Tensor? page_variants, float scale, Tensor(a!) out, Tensor(b!) lse, "
    "bool accumulate",
)
def _paged_attention(
    q: Tensor,
    pools: list[Tensor],
    q_indptr: Tensor,
    page_indptr: Tensor,
    page_ids: Tensor,
    page_lens: Tensor,
    page_bias: Tensor | None,
    page_variants: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    run(
        "paged_attention",
        backend,
        q.device,
        q,
        unflatten(pools),
        Plan(q_indptr, page_indptr, page_ids, page_lens, page_bias, page_variants),
        scale=scale,
        out=out,
        lse=lse,
        accumulate=accumulate,
    )


def paged_attention(
    q: Tensor,
    pools: Sequence[KVPages],
    plan: Plan,
    *,
    scale: float,
    out: Tensor,
    lse: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    _paged_attention(q, flatten(*pools), *plan, scale, out, lse, accumulate, backend)


@define("merge_attention", "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor(a!) out, Tensor(b!) lse")
def _merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor, backend: str
) -> None:
    run("merge_attention", backend, out_a.device, out_a, lse_a, out_b, lse_b, out=out, lse=lse)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor, lse: Tensor, backend: str
) -> None:
    _merge_attention(out_a, lse_a, out_b, lse_b, out, lse, backend)


@define(
    "qkv_prologue",
    "Tensor qkv, Tensor? norm_q, Tensor? norm_k, Tensor? rope, Tensor(a!)[] pages, "
    "Tensor ids, Tensor lens, Tensor? norm_q_bias, Tensor? norm_k_bias, Tensor? bias, Tensor? k_mean, float eps, "
    "bool interleaved, Tensor(b!) out",
)
def _qkv_prologue(
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    rope: Tensor | None,
    pages: list[Tensor],
    ids: Tensor,
    lens: Tensor,
    norm_q_bias: Tensor | None,
    norm_k_bias: Tensor | None,
    bias: Tensor | None,
    k_mean: Tensor | None,
    eps: float,
    interleaved: bool,
    out: Tensor,
    backend: str,
) -> None:
    run(
        "qkv_prologue",
        backend,
        qkv.device,
        qkv,
        norm_q,
        norm_k,
        rope,
        *unflatten(pages),
        PageList(ids, lens),
        norm_q_bias=norm_q_bias,
        norm_k_bias=norm_k_bias,
        bias=bias,
        k_mean=k_mean,
        eps=eps,
        interleaved=interleaved,
        out=out,
    )


def qkv_prologue(
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    rope: Tensor | None,
    pages: KVPages,
    where: PageList,
    *,
    norm_q_bias: Tensor | None,
    norm_k_bias: Tensor | None,
    bias: Tensor | None,
    k_mean: Tensor | None,
    eps: float,
    interleaved: bool,
    out: Tensor,
    backend: str,
) -> None:
    norms = norm_q_bias, norm_k_bias
    _qkv_prologue(
        qkv, norm_q, norm_k, rope, flatten(pages), *where, *norms, bias, k_mean, eps, interleaved, out, backend
    )


@define(
    "quantize_rows",
    "Tensor x, str norm, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, str activation, "
    "Tensor(a!) codes, Tensor(b!) scales",
)
def _quantize_rows(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str,
    codes: Tensor,
    scales: Tensor,
    backend: str,
) -> None:
    run(
        "quantize_rows",
        backend,
        x.device,
        x,
        codes.dtype,
        norm=norm or None,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        eps=eps,
        activation=activation or None,
        out=Quantized(codes, scales),
    )


def quantize_rows(
    x: Tensor,
    dtype: torch.dtype,
    *,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: str | None,
    out: Quantized,
    backend: str,
) -> None:
    _quantize_rows(x, norm or "", weight, bias, scale, shift, eps, activation or "", *out, backend)


@define(
    "linear",
    "Tensor x, Tensor x_scales, Tensor weight, Tensor weight_scales, Tensor? bias, str activation, Tensor? gate, "
    "Tensor? residual, Tensor(a!) out",
)
def _linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    activation: str,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    backend: str,
) -> None:
    run(
        "linear",
        backend,
        x.device,
        Quantized(x, x_scales),
        Quantized(weight, weight_scales),
        bias=bias,
        activation=activation or None,
        gate=gate,
        residual=residual,
        dtype=out.dtype,
        out=out,
    )


def linear(
    x: Quantized,
    weight: Quantized,
    *,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    out: Tensor,
    backend: str,
) -> None:
    _linear(*x, *weight, bias, activation or "", gate, residual, out, backend)


TRACED = {
    f.__name__: f
    for f in (
        kv_append,
        kv_commit,
        kv_gather,
        paged_attention,
        merge_attention,
        qkv_prologue,
        quantize_rows,
        linear,
    )
}


def call(op: str, backend: str, device: torch.device, *args: Any, **kwargs: Any) -> None:
    """Run an op now, or record it when torch.compile is tracing."""
    if torch.compiler.is_compiling():
        TRACED[op](*args, **kwargs, backend=backend)
    else:
        run(op, backend, device, *args, **kwargs)
