"""Clocks. Each takes the calls of one contender and gives a sampler: one measurement of one call per call of it.

| timer | device | what it measures |
|---|---|---|
| wall | cpu | time that passes |
| cpu | cpu | time on the processors: with one thread on a busy machine, what wall would say on a quiet one |
| event | cuda | events around one call in the stream: with what the host adds if it is slower than the kernel |
| graph | cuda | calls captured in one CUDA graph, divided by their number: what a captured model pays |
| cupti | cuda | kernels' own time as the profiler reports it: without the gaps between them |

Caches are cold unless asked otherwise: `event`, `wall` and `cpu` by writing more than the last cache holds before each
call, `graph` and `cupti` by going around copies of the operands that no cache holds together.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]


class Sample(NamedTuple):
    seconds: float
    disturbed: bool = False  # the scheduler took a processor away meanwhile


Sampler = Callable[[], Sample]
GRAPH_CALLS = 10  # at least, per replay, so that its launch is a small part


def wall(calls: Sequence[Call]) -> Sampler:
    return lambda: _on_host(calls[0], time.perf_counter)


def cpu(calls: Sequence[Call]) -> Sampler:
    return lambda: _on_host(calls[0], time.process_time)


def _on_host(call: Call, clock: Callable[[], float]) -> Sample:
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    started = clock()
    call()
    seconds = clock() - started
    return Sample(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > switches)


def event(calls: Sequence[Call]) -> Sampler:
    def sample() -> Sample:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        calls[0]()
        after.record()
        after.synchronize()
        return Sample(before.elapsed_time(after) / 1e3)

    return sample


def graph(calls: Sequence[Call]) -> Sampler:
    calls = list(calls) * -(-GRAPH_CALLS // len(calls))
    captured = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture needs what a first call sets up
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    replay = event([captured.replay])
    replay()
    return lambda: Sample(replay().seconds / len(calls))


def cupti(calls: Sequence[Call]) -> Sampler:
    from torch.profiler import ProfilerActivity, profile

    def sample() -> Sample:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for call in calls:
                call()
            torch.cuda.synchronize()
        microseconds = sum(kernel.self_device_time_total for kernel in profiler.key_averages())
        return Sample(microseconds / len(calls) / 1e6)

    return sample


TIMERS: dict[str, dict[str, Callable[[Sequence[Call]], Sampler]]] = {
    "cpu": {"wall": wall, "cpu": cpu},
    "cuda": {"graph": graph, "event": event, "cupti": cupti},
}
ROTATE = ("graph", "cupti")  # these need copies of the operands to be cold
MAX_COPIES = 32


def copies_needed(timer: str, cold: bool, nbytes: int, cache: int) -> int:
    """How many copies of operands of nbytes to rotate so that each has left the cache when its turn comes again."""
    if timer not in ROTATE or not cold:
        return 1
    return min(MAX_COPIES, max(1, -(-3 * cache // max(nbytes, 1))))


def cache_bytes(device: torch.device) -> int:
    """Of the last cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)
