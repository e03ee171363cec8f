"""The bookkeeping of a world: host time per block of evicting, allocating and planning, of a fork, of a page list."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

from inferix_kernels import KVPages, KVStore, PageTable, Policy

from .harness.measure import Settings
from .harness.rows import Row

LAYERS, FRAMES, TOKENS = 30, 21, 1560  # Wan 1.3B at 480p; a page's width doesn't matter: nothing is computed
HEADS, WIDTH = 12, 128  # of its pages, for their bytes
FORKS = (4, 8)


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    store = KVStore(
        layers=LAYERS,
        heads=1,
        head_dim=16,
        frame_tokens=TOKENS,
        block_frames=3,
        pools={"int8": FRAMES + 3 * (2 + max(FORKS))},
        scratch_format="bf16",
        device=settings.device,
    )
    table = store.open(Policy(window=FRAMES - 3, sink=3))

    for _ in range(FRAMES // 3 + 1):
        block(table)
    forks = []
    calls = {
        "a block us": lambda: block(table),
        "fork us": lambda: forks.append(table.fork()),
        "release us": lambda: forks.pop().release(),
        "page list us": lambda: table.select(table.held),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    times = 10 * max(1, settings.rounds)
    for _ in range(times):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    row = Row("page_table", "host time", f"{FRAMES} frames x {LAYERS} layers", "ours", "int8", settings.device, "ok")
    row.metrics = {name: 1e6 * statistics.median(taken) for name, taken in seconds.items()}
    if len(table.held) != FRAMES:
        row.status, row.note = "wrong", f"the window must hold {FRAMES} frames, got {len(table.held)}"
    yield row
    for count in FORKS:
        row = Row(
            "page_table", f"{count} forks", f"{FRAMES} frames x {LAYERS} layers", "ours", "int8", settings.device, "ok"
        )
        row.metrics = fan_out(table, count, times)
        yield row


def block(table: PageTable) -> None:
    """Evict, allocate, and the page lists of a noisy and a clean pass."""
    opened = table.open_block(3)
    table.plan([opened])
    table.plan([opened], commit=opened)
    table.seal(opened)


def fan_out(table: PageTable, count: int, times: int) -> dict[str, float]:
    """So many futures of one past, each a block long, which then all go back to where they began.

    A rollback to a commit is to drop what came after it and to fork again what was kept there.
    """
    pool = table.store.pools["int8"]
    page = KVPages.empty("int8", 1, HEADS, table.store.page_size, WIDTH).nbytes
    mib = LAYERS * pool.pages_per_frame * page / 2**20  # of a slot, in all layers
    seconds: dict[str, list[float]] = {"all forks us": [], "all back us": []}
    taken = {"forks MiB": 0.0, "a block each MiB": 0.0, "back MiB": 0.0}
    for _ in range(times):
        free = len(pool.free)
        started = time.perf_counter()
        forks = [table.fork() for _ in range(count)]
        seconds["all forks us"].append(time.perf_counter() - started)
        taken["forks MiB"] = mib * (free - len(pool.free))
        for fork in forks:
            block(fork)
        taken["a block each MiB"] = mib * (free - len(pool.free))
        started = time.perf_counter()
        for i in range(count):
            forks[i].release()
            forks[i] = table.fork()
        seconds["all back us"].append(time.perf_counter() - started)
        taken["back MiB"] = mib * (free - len(pool.free))
    times_us = {name: 1e6 * statistics.median(each) for name, each in seconds.items()}
    return times_us | taken | {"the past MiB": mib * len(table.held)}
