"""Timing that a busy machine does not tilt: contenders take turns, and the machine's own copy is one of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def measure(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each call in every round, after one to warm up; contenders alternate."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(rounds + 1):
        for call, seconds in zip(calls, times):
            started = time.perf_counter()
            call()
            if round_:
                seconds.append(time.perf_counter() - started)
    return times


def quartiles(seconds: Sequence[float]) -> list[str]:
    """Median, p20 and p80 in ms."""
    p20, _, _, p80 = statistics.quantiles(seconds, n=5)
    return [f"{1e3 * value:.2f}" for value in (statistics.median(seconds), p20, p80)]


def copying(nbytes: int) -> Callable[[], object]:
    """A call that copies nbytes of memory with torch's threads: what the machine can do at best."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    return lambda: target.copy_(source)
