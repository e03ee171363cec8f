"""The ops in inferix_kernels._C: C++ on CPU tensors, CUDA on CUDA tensors.

This file turns tensors into addresses, sizes and strides, and calls the extension with them; on a GPU also with the
current stream and room to work in. Layouts that a kernel does not take are Unsupported.

Long because the fields of every op's struct are filled here, each by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._dispatch import Unsupported
from ._remembered import Place, recording, tensors_of
from .layout import Codec, KVPages, PageList, Quantized, Side, rows_of
from .plans import Plan

try:
    from . import _C
except ImportError as error:
    raise ImportError(f"the extension inferix_kernels._C is not built ({error}): pip install -e .") from error

HAS_CUDA: bool = _C.has_cuda
Isa = _C.Isa
ISA: Any = _C.default_isa()  # the instructions that CPU kernels use; tests set others
CUDA_OPS = frozenset(_C.cuda_ops)
Struct = dict[str, Any]  # one of csrc/'s, with a value for each field
_DTYPES = {torch.float32: _C.DType.float32, torch.bfloat16: _C.DType.bfloat16, torch.float16: _C.DType.float16}
_CODECS = {
    Codec(torch.float32): _C.Codec.float32,
    Codec(torch.bfloat16): _C.Codec.bfloat16,
    Codec(torch.float16): _C.Codec.float16,
    Codec(torch.int8, "token"): _C.Codec.int8_token,
    Codec(torch.int8, "channel"): _C.Codec.int8_channel,
    Codec(torch.float8_e4m3fn, "token"): _C.Codec.e4m3_token,
    Codec(torch.float8_e4m3fn, "channel", transposed=True): _C.Codec.e4m3_channel,
    Codec(torch.uint8, "token"): _C.Codec.u4_token,
    Codec(torch.uint8, "channel"): _C.Codec.u4_channel,
}
_PRECISIONS = {"exact": _C.Precision.exact, "8bit": _C.Precision.eight_bit, "auto": _C.Precision.automatic}
_PLAIN = {"scale": 1.0, "accumulate": False, "softcap": 0.0, "alibi_slopes": 0, "alibi_stride": 0,
          "precision": _C.Precision.exact, "deadline": 0.0}  # fmt: skip
_NORMS = {None: _C.Norm.none, "layer": _C.Norm.layer, "rms": _C.Norm.rms}
_ACTIVATIONS = {
    None: _C.Activation.none,
    "gelu": _C.Activation.gelu,
    "gelu_tanh": _C.Activation.gelu_tanh,
}


def kv_append(k: Tensor, v: Tensor, pages: KVPages, where: PageList) -> None:
    _run(
        "kv_append",
        k,
        k=_rows("k", k),
        v=_rows("v", v),
        pages=_pool(pages),
        where=_page_list(*where),
        shape=_shape(pages),
        T=k.shape[0],
        x_dtype=_DTYPES[k.dtype],
    )


def kv_commit(
    source: KVPages, source_list: PageList, target: KVPages, target_list: PageList, k_mean: Tensor | None = None
) -> None:
    _run(
        "kv_commit",
        source.k,
        source=_pool(source),
        source_list=_page_list(*source_list),
        target=_pool(target),
        target_list=_page_list(*target_list),
        k_mean=_address("k_mean", k_mean),
        shape=_shape(source),
    )


def kv_gather(
    pools: Sequence[KVPages], where: PageList, dtype: torch.dtype = torch.float32, *, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    k, v = out
    _run(
        "kv_gather",
        out[0],
        pools=_pools(pools),
        where=_page_list(*where),
        shape=_shape(pools[0]),
        k=_rows("out[0]", k),
        v=_rows("out[1]", v),
        T=k.shape[0],
        out_dtype=_DTYPES[k.dtype],
    )
    return out


def paged_attention(
    q: Tensor,
    pools: Sequence[KVPages],
    plan: Plan,
    *,
    scale: float,
    out: Tensor,
    lse: Tensor,
    accumulate: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    precision: str = "auto",
    deadline: float = 60.0,
) -> tuple[Tensor, Tensor]:
    _run(
        "paged_attention",
        q,
        **_attention(q, pools, plan, out, lse),
        scale=scale,
        accumulate=accumulate,
        softcap=softcap,
        alibi_slopes=_address("alibi_slopes", alibi_slopes),
        alibi_stride=0 if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes.shape[1],
        precision=_PRECISIONS[precision],
        deadline=deadline,
    )
    return out, lse


def prepare_attention(q: Tensor, pools: Sequence[KVPages], plan: Plan) -> Plan:
    """The plan with what the Hopper kernel makes of it, for all calls that follow it: every layer and step of a block.

    Without it each call makes that anew. Other kernels do not look at it. It is of this plan alone, of pools of the
    same sizes and formats in the same order, and of q's shape: a call with others is refused. It is written on
    torch's current stream, and does not follow the plan: when the numbers in its tensors change, prepare it again
    before it is used. That writes to the memory that plan.prepared already has, if there is room, so that a captured
    graph finds it where it was. Never run on a GPU.

    Args:
        q: [T, Hq, D], or [V, T, Hq, D]; only its shape, dtype and device are of interest.
        pools, plan: as for ops.paged_attention. plan.prepared: of an earlier call, or None.

    Raises:
        Unsupported: the Hopper kernel does not take such arguments, as compiled.paged_attention would say.

    Example:
        >>> pool, q = KVPages.empty("int8", 2, 1, 64, 64), torch.zeros(3, 1, 64)
        >>> prepare_attention(q, [pool], make_plan([(3, [1], [40])]))
        Traceback (most recent call last):
        inferix_kernels...Unsupported: prepare_attention: needs a GPU, got tensors on cpu
    """
    if not q.is_cuda:
        raise Unsupported(f"prepare_attention: needs a GPU, got tensors on {q.device.type}")
    if not HAS_CUDA:
        raise Unsupported("the extension was built without nvcc")
    memory = _Workspace(q.device, plan.prepared)
    arguments = _attention(q, pools, plan._replace(prepared=None), q, q)
    try:
        with torch.cuda.device(q.device):
            stream = torch.cuda.current_stream().cuda_stream
            _C.prepare_attention({**arguments, **_PLAIN}, stream=stream, workspace=memory)
    except _C.Unsupported as error:
        raise Unsupported(str(error)) from error
    _PREPARED[memory.memory] = _prepared_for(q, pools, plan)
    return plan._replace(prepared=memory.memory)


_PREPARED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by plan.prepared: what it was made of


def _prepared_for(q: Tensor, pools: Sequence[KVPages], plan: Plan) -> tuple[object, ...]:
    """All that what is prepared depends on, but for the numbers in the plan's tensors."""
    tensors = [None if x is None else (x.data_ptr(), len(x)) for x in plan[:-1]]
    return (q.shape[:-1], *((pages.format, pages.pages, pages.heads, pages.page_size) for pages in pools), *tensors)


def _prepared(q: Tensor, pools: Sequence[KVPages], plan: Plan) -> int:
    if plan.prepared is None:
        return 0
    if q.is_cuda and _PREPARED.get(plan.prepared) != _prepared_for(q, pools, plan):
        raise ValueError(
            "plan.prepared must be what prepare_attention has made of this plan, for such pools and such a q, "
            "got that of another: prepare it again"
        )
    return _address("plan.prepared", plan.prepared)


def require_attention(q: Tensor, pools: Sequence[KVPages], plan: Plan, precision: str = "auto") -> None:
    """Raise Unsupported unless the CUDA kernel takes such arguments. They may lie anywhere: nothing of them is read."""

    class Taken(Exception):
        pass

    def taken(size: int) -> int:  # asked for once the arguments are checked, before anything is launched
        raise Taken

    if not HAS_CUDA:
        raise Unsupported("the extension was built without nvcc")
    tensors = _attention(q, pools, plan, torch.empty_like(q), q.new_empty(q.shape[:2]))
    try:
        _C.paged_attention({**tensors, **_PLAIN, "precision": _PRECISIONS[precision]}, stream=0, workspace=taken)
    except Taken:
        return
    except _C.Unsupported as error:
        raise Unsupported(str(error)) from error


def _attention(q: Tensor, pools: Sequence[KVPages], plan: Plan, out: Tensor, lse: Tensor) -> Struct:
    """What paged_attention reads and writes, and its sizes."""
    variants = q.shape[0] if q.ndim == 4 else 1
    tokens, query_heads = q.shape[-3:-1]
    segments = len(plan.q_indptr) - 1
    return {
        "q": _rows("q", q),
        "q_variant_stride": q.stride(0) if q.ndim == 4 else 0,
        "out": _rows("out", out),
        "lse": _address("lse", lse),
        "pools": _pools(pools),
        "q_indptr": _address("plan.q_indptr", plan.q_indptr),
        "page_indptr": _address("plan.page_indptr", plan.page_indptr),
        "entries": _page_list(plan.page_ids, plan.page_lens, plan.page_starts),
        "page_bias": _address("plan.page_bias", plan.page_bias),
        "page_variants": _address("plan.page_variants", plan.page_variants),
        "windows": _address("plan.windows", plan.windows),
        "page_positions": _address("plan.page_positions", plan.page_positions),
        "arrivals": _address("plan.arrivals", plan.arrivals),
        "counters": _address("plan.counters", plan.counters),
        "counter_count": 0 if plan.counters is None else len(plan.counters),
        "shape": _shape(pools[0]),
        "variants": variants,
        "T": tokens,
        "query_heads": query_heads,
        "segments": segments,
        "lists_per_segment": (len(plan.page_indptr) - 1) // max(segments, 1),
        "q_dtype": _DTYPES[q.dtype],
        "out_dtype": _DTYPES[out.dtype],
        "prepared": _prepared(q, pools, plan),
    }


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    _run(
        "merge_attention",
        out_a,
        out_a=_address("out_a", out_a),
        lse_a=_address("lse_a", lse_a),
        out_b=_address("out_b", out_b),
        lse_b=_address("lse_b", lse_b),
        out=_address("out", out),
        lse=_address("lse", lse),
        rows=lse.numel(),
        D=out.shape[2],
        in_dtype=_DTYPES[out_a.dtype],
        out_dtype=_DTYPES[out.dtype],
    )
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
    out: Tensor,
) -> Tensor:
    if qkv.stride(1) != 1:
        raise Unsupported(f"qkv must be contiguous in its last dimension, got strides {qkv.stride()}")
    # Held here until the call returns: .float() may make new tensors, and _C sees only their addresses.
    norm_q, norm_k, norm_q_bias, norm_k_bias, bias = (
        _float(x) for x in (norm_q, norm_k, norm_q_bias, norm_k_bias, bias)
    )
    _run(
        "qkv_prologue",
        qkv,
        qkv=_pointer("qkv", qkv),
        qkv_stride=qkv.stride(0),
        q=_address("out", out),
        bias=_address("bias", bias),
        norm_q=_address("norm_q", norm_q),
        norm_q_bias=_address("norm_q_bias", norm_q_bias),
        norm_k_bias=_address("norm_k_bias", norm_k_bias),
        norm_q_size=0 if norm_q is None else len(norm_q),
        norm_k=_address("norm_k", norm_k),
        norm_k_size=0 if norm_k is None else len(norm_k),
        rope=_address("rope", rope),
        rope_pairs=0 if rope is None else rope.shape[1],
        k_mean=_address("k_mean", k_mean),
        interleaved=interleaved,
        eps=eps,
        pages=_pool(pages),
        where=_page_list(*where),
        shape=_shape(pages),
        T=qkv.shape[0],
        query_heads=out.shape[1],
        dtype=_DTYPES[qkv.dtype],
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
    out: Quantized,
) -> Quantized:
    vectors = (weight, bias, scale, shift)
    _run_rows("quantize_rows", x, None, None, norm, vectors, eps, activation, None, out.codes, out.scales)
    return out


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
    out: Tensor,
) -> Tensor:
    vectors = (weight, bias, scale, shift)
    _run_rows("add_norm", x, gate, residual, norm, vectors, eps, activation, summed, out, None)
    return out


def _run_rows(
    op: str,
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    norm: str | None,
    vectors: Sequence[Tensor | None],
    eps: float,
    activation: str | None,
    summed: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
) -> None:
    if x.stride(-1) != 1:
        raise Unsupported(f"x must be contiguous in its last dimension, got strides {x.stride()}")
    rows = rows_of(x)
    gate, weight, bias, scale, shift = (_float(vector) for vector in (gate, *vectors))  # held, as above
    _run(
        op,
        x,
        x=_pointer("x", x),
        x_stride=rows.stride(0),
        gate=_groups("gate", gate),
        residual=_address("residual", residual),
        summed=_address("summed", summed),
        weight=_address("weight", weight),
        bias=_address("bias", bias),
        scale=_groups("scale", scale),
        shift=_groups("shift", shift),
        out=_address("out" if scales is None else "out.codes", out),
        scales=_address("out.scales", scales),
        M=rows.shape[0],
        K=rows.shape[1],
        eps=eps,
        norm=_NORMS[norm],
        activation=_ACTIVATIONS[activation],
        codec=_CODECS[Codec(out.dtype, None if scales is None else "token")],
        x_dtype=_DTYPES[x.dtype],
        residual_dtype=_DTYPES[x.dtype if residual is None else residual.dtype],
        summed_dtype=_DTYPES[x.dtype if summed is None else summed.dtype],
    )


def linear(
    x: Quantized,
    weight: Quantized,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor,
) -> Tensor:
    bias, gate = _float(bias), _float(gate)  # held, as above
    _run(
        "linear",
        out,
        x=_address("x.codes", x.codes),
        weight=_address("weight.codes", weight.codes),
        x_scales=_address("x.scales", x.scales),
        weight_scales=_address("weight.scales", weight.scales),
        bias=_address("bias", bias),
        gate=_groups("gate", gate),
        residual=_address("residual", residual),
        out=_address("out", out),
        M=out.shape[0],
        N=out.shape[1],
        K=x.codes.shape[1],
        activation=_ACTIVATIONS[activation],
        codec=_CODECS[Codec(x.codes.dtype, "token")],
        residual_dtype=_DTYPES[out.dtype if residual is None else residual.dtype],
        out_dtype=_DTYPES[out.dtype],
    )
    return out


def _run(op: str, like: Tensor, /, **arguments: Any) -> None:
    """Call _C's function of this name: the C++ kernel for a CPU tensor, the CUDA kernel on torch's current stream."""
    kernel = getattr(_C, op)
    if not like.is_cuda:
        try:
            kernel(arguments, cpu={"threads": torch.get_num_threads(), "isa": ISA})
            return _record(op, arguments)
        except TypeError as error:  # this file and csrc/ agree on the fields of a struct: not so with another's
            raise RuntimeError(
                f"{op}: inferix_kernels._C was built from other sources than these: build it again "
                f"(make build, or pip install -e .): {str(error).splitlines()[0]}"
            ) from error
    if not HAS_CUDA:
        raise Unsupported("the extension was built without nvcc")
    if op not in CUDA_OPS:
        raise Unsupported(f"{op}: no CUDA kernel yet")
    try:
        with torch.cuda.device(like.device):  # a stream only takes launches while its device is current
            stream = torch.cuda.current_stream().cuda_stream
            kernel(arguments, stream=stream, workspace=_Workspace(like.device))
    except _C.Unsupported as error:
        raise Unsupported(str(error)) from error


def _record(op: str, arguments: Struct) -> None:
    """Keep what makes the call that has just been made again, where one is wanted (_remembered.py)."""
    call, function = recording.call, globals()[op]
    if call is None or call.op != op or function.__module__ != __name__:  # a test has put another there
        return
    call.accepted.wanted = False
    try:
        again = _C.replays[op](arguments, *tensors_of(call.arguments))
    except TypeError:  # a tensor was made on the way, such as a bias in float32: its address is of no argument
        return
    # A call is only made again while it would come here.
    call.accepted.replay = lambda values: globals()[op] is function and again(torch.get_num_threads(), ISA, *values)


class _Workspace:
    """Scratch memory of one call, on its device. Freed when the call has been queued, for what is queued after it.

    memory: taken if it has room.
    """

    def __init__(self, device: torch.device, memory: Tensor | None = None):
        self.device, self.memory = device, memory

    def __call__(self, size: int) -> int:
        if self.memory is None or len(self.memory) < size:
            self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.memory.data_ptr()


def _address(name: str, tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise Unsupported(f"{name} must be contiguous, got strides {tensor.stride()}")
    return _pointer(name, tensor)


def _pointer(name: str, tensor: Tensor) -> int:
    address, size = tensor.data_ptr(), tensor.element_size()
    if address % size:
        raise ValueError(f"{name} must be aligned to its elements of {size} bytes, got address {address:#x}")
    if recording.call is not None:
        address = Place(address)
        address.tensor = tensor
    return address


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _groups(name: str, tensor: Tensor | None) -> Struct:
    return {"data": _address(name, tensor), "groups": 0 if tensor is None else tensor.shape[:-1].numel()}


def _rows(name: str, tensor: Tensor) -> Struct:
    """[..., T, H, D] whose tokens and heads may lie apart, as in a slice of a packed qkv."""
    token_stride, head_stride, stride = tensor.stride()[-3:]
    if stride != 1:
        raise Unsupported(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
    return {"data": _pointer(name, tensor), "token_stride": token_stride, "head_stride": head_stride}


def _page_list(ids: Tensor, lens: Tensor, starts: Tensor | None = None) -> Struct:
    return {
        "ids": _address("page ids", ids),
        "lens": _address("page lens", lens),
        "starts": _address("page starts", starts),
        "n": len(ids),
    }


def _shape(pages: KVPages) -> Struct:
    return {"H": pages.heads, "page_size": pages.page_size}


def _plane(name: str, side: Side, width: int) -> Struct:
    page_stride, head_stride, row_stride, _ = side.codes.stride()
    return {
        "codes": _pointer(name, side.codes),
        "page_stride": page_stride,
        "head_stride": head_stride,
        "row_stride": row_stride,
        "scales": _address(f"{name}_scales", side.scales),
        "offsets": _address(f"{name}_offsets", side.offsets),
        "width": width,
        "codec": _CODECS[side.codec],
    }


def _pool(pages: KVPages) -> Struct:
    k, v = pages.sides
    return {
        "k": _plane("pages.k", k, pages.head_dim),
        "v": _plane("pages.v", v, pages.value_dim),
        "pages": pages.pages,
    }


def _pools(pools: Sequence[KVPages]) -> list[Struct]:
    if len(pools) > _C.max_pools:
        raise Unsupported(f"pools must be at most {_C.max_pools}, got {len(pools)}")
    return [_pool(pages) for pages in pools]
