"""How much more memory something holds at its peak than was held before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Peak:
    """with Peak(device) as peak: ...; then peak.bytes. On a CPU from Linux's books; 0 where there are none."""

    def __init__(self, device: str):
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self.bytes = max(0, _status("VmHWM") - self.before)


def peak_of(call: Callable[[], Any], device: str) -> tuple[int, Any]:
    """(bytes, the call's result)."""
    with Peak(device) as peak:
        result = call()
    return peak.bytes, result


def _status(field: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in text.splitlines() if line.startswith(field + ":")]
    return int(sizes[0]) << 10 if sizes else 0
