"""The bookkeeping of a world: host time per block of evicting, allocating and planning, of a fork, of a page list."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

from inferix_kernels import KVStore, Policy

from .harness.measure import Settings
from .harness.rows import Row

LAYERS, FRAMES, TOKENS = 30, 21, 1560  # Wan 1.3B at 480p; a page's width doesn't matter: nothing is computed


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    store = KVStore(
        layers=LAYERS,
        heads=1,
        head_dim=16,
        frame_tokens=TOKENS,
        block_frames=3,
        pools={"int8": 2 * FRAMES},
        scratch_format="bf16",
        device=settings.device,
    )
    table = store.open(Policy(window=FRAMES - 3, sink=3))

    def block() -> None:
        """Evict, allocate, and the page lists of a noisy and a clean pass."""
        opened = table.open_block(3)
        table.plan([opened])
        table.plan([opened], commit=opened)
        table.seal(opened)

    for _ in range(FRAMES // 3 + 1):
        block()
    forks = []
    calls = {
        "a block us": block,
        "fork us": lambda: forks.append(table.fork()),
        "release us": lambda: forks.pop().release(),
        "page list us": lambda: table.select(table.held),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(10 * max(1, settings.rounds)):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    row = Row("page_table", "host time", f"{FRAMES} frames x {LAYERS} layers", "ours", "int8", settings.device, "ok")
    row.metrics = {name: 1e6 * statistics.median(times) for name, times in seconds.items()}
    if len(table.held) != FRAMES:
        row.status, row.note = "wrong", f"the window must hold {FRAMES} frames, got {len(table.held)}"
    yield row
