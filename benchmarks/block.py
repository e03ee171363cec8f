"""One block of Self Forcing's network at a full window, and which kernels its time goes to: the figure that counts.

Random weights, the published 1.3B at 480 x 832 on a GPU and a hundredth of it on a CPU; no VAE. The past lies in int8
pages, the block's own keys and values in scratch as a world keeps it (bf16 on a GPU), and every op runs on the backend
named. Never run on a GPU.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from inferix_kernels import Unsupported
from inferix_kernels.layout import scratch_format

from . import e2e
from .harness import clocks
from .harness.case import error_of
from .harness.measure import Settings
from .harness.ours import BACKENDS
from .harness.rows import Row
from .harness.table import markdown

TIMED = 5  # blocks
SHOWN = 25  # kernels


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    """A row for each backend; prints the kernels of a block by time. `shapes` are not used."""
    settings = dataclasses.replace(settings, model="self-forcing")
    wanted = [backend for backend in BACKENDS[settings.device] if settings.wants_name(f"ours-{backend}")]
    if not wanted:
        return
    model, condition = e2e.load(settings)
    for backend in wanted:
        formats = f"{e2e.KV}+{scratch_format(settings.device, model.dtype)}"
        row = Row("block", "full window", settings.model, f"ours-{backend}", formats, settings.device, "ok")
        try:
            measure(row, model, condition, settings, backend)
        except Unsupported as reason:
            row.status, row.note = "unsupported", str(reason)
        yield row


def measure(row: Row, model: Any, condition: Any, settings: Settings, backend: str) -> None:
    """Fill in the row: the first blocks against gather + SDPA, then blocks at a full window.

    A loop that leaves the other's latents is called wrong, and its time is told in the metrics all the same: in bf16
    two right loops may drift apart.
    """
    names = ("gather-sdpa", row.contender)
    baseline, loop = (e2e.open_loop(name, model, condition, settings, backend) for name in names)
    for _ in range(e2e.CHECKED):
        baseline.step()
        loop.step()
    error = error_of(torch.cat(loop.latents), torch.cat(baseline.latents))
    limit = e2e.LIMIT[torch.float32 if settings.device == "cpu" else torch.bfloat16]
    row.error = {**error._asdict(), "limit": limit}
    if not error.relative <= limit:
        row.status, row.note = "wrong", f"latents differ from gather + SDPA's by {error.relative:.1e}"
    if not settings.rounds:
        return
    for _ in range(model.adapter.window // model.adapter.block_frames - e2e.CHECKED + TIMED):
        loop.step()
    row.metrics = {"block ms": 1e3 * statistics.median(loop.made[-TIMED:]), **clocks.now(settings.device)}
    row.metrics |= {"gather-sdpa block 3 ms": 1e3 * baseline.made[-1], "block 3 ms": 1e3 * loop.made[e2e.CHECKED - 1]}
    if row.status == "ok":
        row.seconds = loop.made[-TIMED:]
    row.metrics["kernels ms"] = print_kernels(f"{row.contender}, {row.format}", loop)


def print_kernels(title: str, loop: e2e.Loop) -> float:
    """A table of one block's kernels by time; on a CPU, of torch's ops. Returns the milliseconds of all."""
    cuda = loop.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        loop.step()
    found: list[tuple[float, int, str]] = []
    for x in profiler.key_averages():
        microseconds = x.self_device_time_total if cuda else x.self_cpu_time_total
        if microseconds:  # else a call of the host
            found.append((microseconds / 1e3, x.count, x.key))
    total = sum(milliseconds for milliseconds, _, _ in found)
    body = [
        [name[:90], f"{ms:.3f}", f"{ms / total:.1%}", str(n)] for ms, n, name in sorted(found, reverse=True)[:SHOWN]
    ]
    print(f"{title}: one block, {total:.1f} ms in {sum(n for _, n, _ in found)} calls\n")
    print(markdown(["kernel", "ms", "share", "calls"], body), flush=True)
    return total
