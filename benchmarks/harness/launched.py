"""Benchmarks of several processes, which torchrun has started."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from inferix.launcher import launched_rank as rank
from inferix_kernels.distributed import ProcessGroupTransport, Transport

__all__ = ["group", "now", "rank"]


@contextlib.contextmanager
def group(device: str) -> Iterator[Transport | None]:
    """All processes; None: no torchrun has started this one."""
    if rank() is None:
        yield None
        return
    place = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        with ProcessGroupTransport(device=place) as transport:
            yield transport
            transport.close()
    finally:
        dist.destroy_process_group()


def now(device: torch.device) -> float:
    """Seconds, when all is done that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
