"""OpenVINO's models of one op, and its tensors over ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..harness import folders

# The device's own threads would be two more at work beside ours.
ONE_STREAM = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
PRECISION = {"fp32": "f32", "bf16": "bf16"}  # Inference precision, by our format's name


def library() -> Any:
    return folders.load("openvino")


def opset() -> Any:
    return folders.load("openvino", "openvino.opset15")


def type_of(dtype: torch.dtype) -> Any:
    types = library().Type
    return {torch.float32: types.f32, torch.bfloat16: types.bf16, torch.int32: types.i32}[dtype]


def tensor(x: Tensor) -> Any:
    """In the memory of x, which must be contiguous and live on. numpy has no bfloat16: its bits go by another name."""
    if x.dtype == torch.bfloat16:
        return library().Tensor(x.view(torch.uint16).numpy(), list(x.shape), type_of(x.dtype))
    return library().Tensor(x.numpy(), shared_memory=True)


def request(results: Sequence[Any], parameters: Sequence[Any], precision: str, **properties: Any) -> Any:
    """An inference request of a model made of nodes, on as many threads as torch has."""
    model = library().Model(list(results), list(parameters))
    settings = {**ONE_STREAM, "INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    return library().Core().compile_model(model, "CPU", {**settings, **properties}).create_infer_request()


def bind(request: Any, inputs: Mapping[int, Tensor], out: Tensor) -> Callable[[], Tensor]:
    """A call that infers from these tensors, by the number of the model's parameter, into `out`."""
    held = {place: tensor(x) for place, x in inputs.items()}
    for place, x in held.items():
        request.set_input_tensor(place, x)
    request.set_output_tensor(0, tensor(out))

    def run() -> Tensor:
        assert inputs  # the request has their addresses alone
        request.infer(share_outputs=True)  # else it copies them
        return out

    return run
