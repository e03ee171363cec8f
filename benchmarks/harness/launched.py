"""Benchmarks of several processes, which torchrun has started."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator

import torch

from inferix.launcher import launched_rank as rank
from inferix_kernels.distributed import ProcessGroupTransport, Transport  # which import torch.distributed when used

__all__ = ["group", "now", "rank", "rank_0_writes"]


def rank_0_writes(args: argparse.Namespace) -> None:
    """Of the processes that torchrun has started, rank 0 alone prints and keeps what was measured.

    Raises:
        ValueError: a family is asked for that each of them would measure for itself.
    """
    if rank() is None:
        return
    if tuple(args.families) != ("parallel",):
        raise ValueError(f"family must be parallel under torchrun, got {', '.join(args.families) or 'all'}")
    if rank() != 0:
        args.json = args.plot = args.github = None
        args.record = False
        silence()


def silence() -> None:
    """What this process prints from here on is lost, but for errors."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def group(device: str) -> Iterator[Transport | None]:
    """All processes; None: no torchrun has started this one."""
    if rank() is None:
        yield None
        return
    import torch.distributed as dist

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
