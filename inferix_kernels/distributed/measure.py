"""What joins these ranks, and what they compute with, measured: for the planner, in place of its presets."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .presets import Device, Link
from .transport import Transport

BYTES = 1 << 22  # that a rank sends each other one: enough for the link to be at its pace
ROWS = 1024  # of the product that a device is judged by
TRIES = 5
# Of the rate of one large product, what attention reaches: the share that DEVICES assumes of an H100's.
ATTENTION = 0.9


def measure_link(transport: Transport) -> Link:
    """The link as one rank sees it while all of them send: to be called by all ranks at once.

    Raises:
        ValueError: there is one rank alone. PeerLost: as Ticket.wait.

    Example:
        >>> from inferix_kernels.distributed import in_process_group, measure_link, run_ranks
        >>> link = run_ranks(in_process_group(2), measure_link)[0]
        >>> link.known
        'measured'
    """
    if transport.size < 2:
        raise ValueError(f"transport must be of at least 2 ranks, got {transport.size}")
    transport.at("measuring the link", -1, -1)
    short, long = (_seconds_to_gather(transport, size) for size in (1, BYTES))
    sent = (transport.size - 1) * BYTES
    return Link.measured(bandwidth=sent / max(long - short, 1e-9), latency=short)


def measure_device(device: torch.device | str, dtype: torch.dtype, memory: float) -> Device:
    """A device by its rate of a large matrix product.

    Args:
        dtype: of the network.
        memory: bytes that there are for weights and pages.

    Example:
        >>> from inferix_kernels.distributed import measure_device
        >>> measure_device("cpu", torch.float32, memory=8e9).known
        'measured'
    """
    x = torch.ones(ROWS, ROWS, dtype=dtype, device=device)
    rate = 2 * ROWS**3 / _best(lambda: torch.mm(x, x), torch.device(device))
    said = f"a product of {ROWS} rows; attention is taken to reach {ATTENTION:g} of it"
    return Device(str(device), ATTENTION * rate, rate, memory, source=said, known="measured")


def _seconds_to_gather(transport: Transport, size: int) -> float:
    mine = torch.zeros(size, dtype=torch.uint8, device=transport.device)
    received = [torch.empty_like(mine) for _ in range(transport.size)]
    return _best(lambda: transport.all_gather(mine, received).wait(), transport.device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few times, the first one, which prepares things, apart."""
    taken = []
    for _ in range(1 + TRIES):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
