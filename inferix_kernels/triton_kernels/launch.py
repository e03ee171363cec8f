"""Where a Triton kernel can run, and running it there."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .._dispatch import Unsupported


@triton.jit
def _probe() -> None:
    pass


# TRITON_INTERPRET=1 makes Triton's decorator hand out Python functions in place of kernels. Triton reads the variable
# when it is imported, so what it did is the only trustworthy answer.
INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)


def check_device(op: str, like: Tensor) -> None:
    if not like.is_cuda and not INTERPRETED:
        raise Unsupported(
            f"{op}: Triton takes {like.device.type} tensors only in its interpreter: set TRITON_INTERPRET=1 before "
            "triton is imported"
        )


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, num_warps: int, **kwargs: Any) -> None:
    if programs == 0:
        return  # CUDA refuses an empty grid
    # Triton launches on the current device. Products and sums must round one by one, as in the reference: no fma.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **kwargs, num_warps=num_warps, enable_fp_fusion=False)
