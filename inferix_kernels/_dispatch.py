"""Which implementation of an op runs. The two tables below are the whole answer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

BACKENDS = {
    "compiled": "inferix_kernels.compiled",  # C++ on CPU tensors, CUDA on CUDA tensors
    "triton": "inferix_kernels.triton_kernels",
    "reference": "inferix_kernels.reference",
}
# What "auto" tries, fastest first. On a GPU the reference must be asked for by name: slow is never a surprise. Neither
# Triton's nor our own CUDA kernels have run on a GPU yet; until benchmarks/bringup_sm90.py has passed on one, the
# kernels whose instructions a compiler chose go before those that we wrote ourselves.
AUTO = {"cpu": ("compiled", "reference"), "cuda": ("triton", "compiled")}


class Unsupported(RuntimeError):
    """Raised by a backend, before it writes anything: it cannot take these arguments, and why."""


def run(op: str, backend: str, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    if device.type not in AUTO and backend != "reference":  # an address means nothing to a kernel of another device
        raise Unsupported(f"{op}: no backend runs on {device.type} tensors, only on {' and '.join(AUTO)}")
    if backend != "auto":
        return implementation(op, backend)(*args, **kwargs)
    reasons = []
    for name in AUTO[device.type]:
        try:
            return implementation(op, name)(*args, **kwargs)
        except Unsupported as error:
            reasons.append(f"{name}: {error}")
    raise Unsupported(f"{op} cannot run here. " + "; ".join(reasons))


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function of this name in a backend's module, or Unsupported with the reason."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
    try:
        module = importlib.import_module(BACKENDS[backend])
    except ImportError as error:
        raise Unsupported(str(error)) from error
    function: Callable[..., Any] | None = getattr(module, op, None)
    if function is None:
        raise Unsupported(f"{op}: no {backend.title()} kernel yet")
    return function
