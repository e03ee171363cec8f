"""ONNX models of a few nodes, and ONNX Runtime's sessions over tensors of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..harness import folders

OPSET = {"": 23, "com.microsoft": 1}
IR_VERSION = 10
KINDS = {torch.float32: "FLOAT", torch.int8: "INT8", torch.int32: "INT32"}


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> Any:
    made: Any = folders.load("onnxruntime", "onnx").helper.make_node(kind, inputs, outputs, domain=domain, **attributes)
    return made


def bind(
    nodes: Sequence[Any],
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor] | None = None,
) -> Callable[[], None]:
    """A call that runs the nodes on these tensors, by name, and writes the outputs; on as many threads as torch has.

    The same tensor may be an input and an output: a cache that is written in place.
    """
    onnx, runtime = folders.load("onnxruntime", "onnx"), folders.load("onnxruntime")
    kinds = {dtype: getattr(onnx.TensorProto, name) for dtype, name in KINDS.items()}

    def described(tensors: Mapping[str, Tensor]) -> list[Any]:
        return [onnx.helper.make_tensor_value_info(n, kinds[x.dtype], list(x.shape)) for n, x in tensors.items()]

    fixed = [onnx.numpy_helper.from_array(x.numpy(), name) for name, x in (constants or {}).items()]
    graph = onnx.helper.make_graph(list(nodes), "peer", described(inputs), described(outputs), fixed)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in OPSET.items()]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for place, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, x in tensors.items():
            place(name, "cpu", 0, x.numpy().dtype.type, list(x.shape), x.data_ptr())
    held = {**inputs, **outputs}  # the session has their addresses alone

    def run() -> None:
        assert held
        session.run_with_iobinding(binding)

    return run
