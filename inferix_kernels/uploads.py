"""From host memory to a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str, into: Tensor | None = None) -> Tensor:
    """x, made on the host, on this device: in new memory, or written to a tensor that is there.

    To a GPU it goes through page-locked memory: a copy from memory that the system may move makes the host wait until
    the GPU has done all that was launched before. torch keeps that memory until the copy is done.
    """
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True) if into is None else into.copy_(x, non_blocking=True)
