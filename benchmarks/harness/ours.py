"""Our own backends as contenders, and the names of their kernels in the ledger."""

from __future__ import annotations

from inferix_kernels._dispatch import AUTO

# The reference is what all are compared with, not a contender.
BACKENDS = {device: tuple(name for name in names if name != "reference") for device, names in AUTO.items()}


def kernel_of(backend: str, device: str, family: str) -> str:
    """ "cpu/attention", "cuda/attention" or "triton/attention": a key of harness.ledger.KERNELS."""
    return f"{device if backend == 'compiled' else backend}/{family}"
