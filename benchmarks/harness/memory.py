"""How much more memory a call holds at its peak than there was before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_of(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """(bytes, the call's result). On the CPU from the kernel's books, where it keeps them (Linux); else 0."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
        before = _status("VmRSS")
        result = call()
        return max(0, _status("VmHWM") - before), result
    except OSError:
        return 0, call()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"no {field} in /proc/self/status")
