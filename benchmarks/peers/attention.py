"""Attention by others. Each gets K and V as it likes them best, laid out off the clock.

None of the adapters for GPUs has run on one. They follow their documentation, and tests run them on stand-ins with the
documented layouts.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inferix_kernels import kv_gather

from ..harness.case import DTYPES, Prepared
from . import is_here, peer

if TYPE_CHECKING:
    from ..attention import Halves, Inputs

HALF = ("bf16", "fp16")
E4M3 = torch.float8_e4m3fn


def rows(inputs: Inputs, out: Tensor) -> Tensor:
    """Of out [T, Hq, D], what the reference is compared with."""
    from ..attention import sampled

    return sampled(out, inputs)


def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, H, D] -> [1, H, T, D], contiguous."""
    return x.to(dtype).transpose(0, 1)[None].contiguous()


def dense(inputs: Inputs, format: str, call: Callable[..., Any], heads: bool = False) -> Prepared:
    """A call of q, k and v as [1, T, H, D], or heads first, that returns out so, alone or first of a tuple."""
    lay = heads_first if heads else lambda x, dtype: x.to(dtype)[None].contiguous()
    qkv = [lay(x, DTYPES[format]) for x in (inputs.q, inputs.k, inputs.v)]

    def read(result: Any) -> Tensor:
        out = (result[0] if isinstance(result, tuple) else result)[0]
        return rows(inputs, out.transpose(0, 1) if heads else out)

    return Prepared(lambda: call(*qkv), read)


def grouped(inputs: Inputs) -> bool:
    return inputs.q.shape[1] != inputs.k.shape[1]


@peer("attention", "sdpa", ("fp32", "bf16"), ("cpu",), op="paged_attention")
def sdpa(inputs: Inputs, format: str) -> Prepared:
    gqa = grouped(inputs)
    return dense(inputs, format, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa), heads=True)


def _forced_sdpa(kind: str) -> None:
    @peer("attention", f"sdpa-{kind.split('_')[0].lower()}", HALF, op="paged_attention")
    def forced(inputs: Inputs, format: str) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend, gqa = SDPBackend.__members__[kind], grouped(inputs)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

        return dense(inputs, format, call, heads=True)


# Forced one by one: left to itself, torch takes its FlashAttention 2 where cuDNN is about twice as fast.
for kind in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
    _forced_sdpa(kind)


@peer("attention", "gather-sdpa", ("fp32", "bf16", "int8"), ("cpu", "cuda"), op="paged_attention")
def gather_sdpa(inputs: Inputs, format: str) -> Prepared:
    """From the same pages that ours reads: our gather, then torch's attention."""
    dtype, gqa = (torch.float32 if format == "fp32" else torch.bfloat16), grouped(inputs)
    pool, q = inputs.pool(format), heads_first(inputs.q, dtype)
    kv = [torch.empty(x.shape, dtype=dtype, device=x.device) for x in (inputs.k, inputs.v)]

    def run() -> Tensor:
        k, v = (x.transpose(0, 1)[None] for x in kv_gather([pool], inputs.where, out=(kv[0], kv[1])))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

    return Prepared(run, lambda out: rows(inputs, out[0].transpose(0, 1)))


@cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # once per shape and precision
    return torch.compile(flex_attention, dynamic=False)


@peer("attention", "flex", ("fp32", "bf16"), ("cpu", "cuda"), op="paged_attention")
def flex(inputs: Inputs, format: str) -> Prepared:
    gqa = grouped(inputs)
    return dense(inputs, format, lambda *qkv: compiled_flex()(*qkv, enable_gqa=gqa), heads=True)


@peer("attention", "flash-attn", HALF, module="flash_attn", package="flash-attn", op="paged_attention")
def flash_attn_2(inputs: Inputs, format: str) -> Prepared:
    return dense(inputs, format, importlib.import_module("flash_attn").flash_attn_func)


FA3 = ("fa3_fwd_interface", "flash_attn_interface")  # of the wheel fa3-fwd, and of its sources


def _flash_attn_3(splits: int) -> None:
    name = "flash-attn-3" if splits == 1 else f"flash-attn-3-split{splits}"

    @peer("attention", name, ("bf16",), module=FA3, package="fa3-fwd", op="paged_attention")
    def split(inputs: Inputs, format: str) -> Prepared:
        flash = importlib.import_module(next(filter(is_here, FA3))).flash_attn_func
        return dense(inputs, format, lambda q, k, v: flash(q, k, v, num_splits=splits))


# Left alone it does not split, and loses most of a wave of blocks on 4680 queries: its best split is the one to beat.
for splits in (1, 2, 3, 4):
    _flash_attn_3(splits)


@peer("attention", "flash-attn-4", HALF, module="flash_attn.cute", package="flash-attn-4", op="paged_attention")
def flash_attn_4(inputs: Inputs, format: str) -> Prepared:
    return dense(inputs, format, importlib.import_module("flash_attn.cute").flash_attn_func)


@peer("attention", "sage", ("int8",), module="sageattention", op="paged_attention")
def sage(inputs: Inputs, format: str) -> Prepared:
    """Quantizes Q and K on the clock, as it does when it is called: it keeps no cache."""
    attend = importlib.import_module("sageattention").sageattn
    return dense(inputs, "bf16", lambda q, k, v: attend(q, k, v, tensor_layout="NHD", is_causal=False))


@peer("attention", "xformers", HALF, module="xformers", op="paged_attention")
def xformers(inputs: Inputs, format: str) -> Prepared:
    """Its grouped layout is [1, T, H, group, D], K and V expanded along the group."""
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    heads, group = inputs.k.shape[1], inputs.q.shape[1] // inputs.k.shape[1]
    q, k, v = (x.to(DTYPES[format])[None] for x in (inputs.q, inputs.k, inputs.v))
    q = q.unflatten(2, (heads, group))
    k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))
    return Prepared(lambda: attend(q, k, v), lambda out: rows(inputs, out[0].flatten(1, 2)))


def _flashinfer(backend: str) -> None:
    formats = ("bf16", "fp16", "fp8") if backend == "fa2" else HALF

    @peer(
        "attention",
        f"flashinfer-{backend}",
        formats,
        module="flashinfer",
        package="flashinfer-python",
        op="paged_attention",
    )
    def paged(inputs: Inputs, format: str) -> Prepared:
        """Pages [P, H, page, D], as ours lie; a list's last page may be partly valid, no other. fp8 without scales."""
        library, device = importlib.import_module("flashinfer"), inputs.q.device
        q = inputs.q.to(DTYPES.get(format, torch.bfloat16))
        pool = inputs.pool(format if format in DTYPES else "fp32")
        cache = (pool.k, pool.v) if format in DTYPES else (pool.k.to(E4M3), pool.v.to(E4M3))
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=backend)
        plan = inputs.plan()
        wrapper.plan(
            plan.q_indptr,
            plan.page_indptr,
            plan.page_ids,
            plan.page_lens[-1:],
            q.shape[1],
            inputs.k.shape[1],
            q.shape[2],
            inputs.page_size,
            causal=False,
            q_data_type=q.dtype,
            kv_data_type=cache[0].dtype,
        )
        return Prepared(lambda: wrapper.run(q, cache), lambda out: rows(inputs, out))


for backend in ("fa2", "fa3"):
    _flashinfer(backend)


@peer("attention", "cudnn", HALF, module="cudnn", package="nvidia-cudnn-frontend", op="paged_attention")
def cudnn_paged(inputs: Inputs, format: str) -> Prepared:
    """cuDNN's attention over a container of pages [P, H, page, D] and a table [1, 1, pages, 1]."""
    cudnn = importlib.import_module("cudnn")
    pool, q = inputs.pool(format), heads_first(inputs.q, DTYPES[format])
    out, pages = torch.empty_like(q), len(inputs.where.ids)
    table = inputs.where.ids.view(1, 1, pages, 1)
    lengths = [torch.full((1, 1, 1, 1), len(x), dtype=torch.int32, device=q.device) for x in (inputs.q, inputs.k)]
    kind = cudnn.data_type.BFLOAT16 if format == "bf16" else cudnn.data_type.HALF
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT
    )
    given = [q, pool.k, pool.v, table, table.clone(), *lengths]
    q_, k_, v_, k_table, v_table, q_len, k_len = handles = [graph.tensor_like(x) for x in given]
    result, _ = graph.sdpa(
        q=q_,
        k=k_,
        v=v_,
        attn_scale=q.shape[-1] ** -0.5,
        generate_stats=False,
        use_padding_mask=True,
        seq_len_q=q_len,
        seq_len_kv=k_len,
        paged_attention_k_table=k_table,
        paged_attention_v_table=v_table,
        paged_attention_max_seq_len_kv=pages * inputs.page_size,
    )
    result.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=q.device)
    variants = {**dict(zip(handles, given)), result: out}

    def run() -> Tensor:
        graph.execute(variants, workspace)
        return out

    return Prepared(run, lambda out: rows(inputs, out[0].transpose(0, 1)))


@peer("attention", "flashinfer", HALF, module="flashinfer", package="flashinfer-python", op="merge_attention")
def merge_state(halves: Halves, format: str) -> Prepared:
    """Its LSE is to base 2."""
    merge = importlib.import_module("flashinfer").merge_state
    (out_a, lse_a), (out_b, lse_b) = halves.a, halves.b
    sides = [out_a.to(DTYPES[format]), lse_a / math.log(2), out_b.to(DTYPES[format]), lse_b / math.log(2)]
    return Prepared(lambda: merge(*sides), lambda result: (result[0].float(), result[1] * math.log(2)))
