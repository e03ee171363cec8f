"""How the ranks of a machine should share worlds, and why.

    print(plan_attention(Workload.of("wan14b", ranks=8, kv_format="int8"), "nvlink4").explain())

Of all ways that use all ranks, and fit their memory, the one that costs least (`costs`: a model). Replicas come first
where there are worlds enough, for no other reason than that they send nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TypeVar

from .choice import Choice
from .costs import Costs, Layout, Option, Workload
from .presets import DEVICES, LINKS, Device, Link, check_figure

T = TypeVar("T")


def plan_attention(
    workload: Workload, link: Link | str = "nvlink4", memory: float | None = None, device: Device | str = "h200"
) -> Choice:
    """The fastest way to share a workload that fits the ranks' memory, by the model in `costs`.

    Args:
        link: a name in LINKS, or Link.measured(...).
        memory: bytes on each rank for weights, pages and what is on its way; None: the device's.
        device: a name in DEVICES, or one of your own.

    Raises:
        ValueError: an unknown name, or nothing fits.

    Example:
        >>> from inferix_kernels.distributed import Workload, plan_attention
        >>> one, four = (Workload.of("wan1.3b", ranks=4, worlds=worlds) for worlds in (1, 4))
        >>> [str(plan_attention(work, "nvlink4").best.layout) for work in (one, four)]
        ['G', '4 replicas']
        >>> str(plan_attention(one, "nvlink4", memory=5e9).best.layout)  # not all of the past fits a rank
        'U'
    """
    link, device = named("link", LINKS, link), named("device", DEVICES, device)
    memory = device.memory if memory is None else memory
    check_figure("memory", memory)
    costs = Costs(workload, link, device, memory)
    ways = layouts(workload.ranks, workload.worlds, workload.branches, workload.heads, workload.kv_heads)
    options: list[Option] = []
    for alike in ways:
        options += costs.options(alike)
    fitting = [one for one in options if one.fits]
    if not fitting:
        least = min(options, key=lambda one: one.memory)
        sharded = costs.not_built(least)[1]
        raise ValueError(
            f"memory must be at least {least.memory / 1e9:.3g} GB a rank (as {least.layout}), got {memory / 1e9:.3g}:"
            f" a quantized kv_format, a shorter window or fewer worlds need less; weight sharding would need"
            f" {sharded.memory / 1e9:.3g}, and is not built"
        )
    best = min(fitting, key=lambda one: (one[2] + one[3], one[5]))  # seconds, memory: fields take their time
    return Choice(workload, link, device, memory, tuple(options), best)


def named(argument: str, known: Mapping[str, T], given: T | str) -> T:
    if not isinstance(given, str):
        return given
    if given not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {given!r}")
    return known[given]


@functools.lru_cache(maxsize=256)
def layouts(ranks: int, worlds: int, branches: int, heads: int, kv_heads: int) -> tuple[tuple[Layout, ...], ...]:
    """All that use all ranks, cut the heads evenly, and leave no group without a world or a branch; those together that
    differ in their scheme alone."""
    return tuple(
        schemes(replicas, groups, u, ranks // replicas // groups // u)
        for replicas in divisors(ranks, worlds)
        for groups in divisors(ranks // replicas, branches)
        for u in divisors(ranks // replicas // groups, kv_heads)
        if heads % u == 0 and kv_heads % u == 0
    )


def schemes(replicas: int, groups: int, u: int, g: int) -> tuple[Layout, ...]:
    if g == 1:
        return (Layout("U" if u > 1 else "alone", replicas, groups, u),)
    return (
        Layout("G", replicas, groups, u, copies=g),
        *(Layout(scheme, replicas, groups, u, frames=g) for scheme in ("R", "Q")),
    )


def divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
