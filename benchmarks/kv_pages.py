"""The KV store: bandwidth of the page ops, cost of the bookkeeping, bytes and error of every format."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from rich.table import Table

from inferix_kernels import (
    KVPages,
    KVStore,
    PageList,
    Policy,
    kv_append,
    kv_commit,
    kv_gather,
    make_plan,
    paged_attention,
    reference,
)
from inferix_kernels.layout import FORMATS, KV_FORMATS
from inferix_kernels.memory import page_bytes
from inferix_kernels.testing import clustered_keys_and_values

from .timing import copying, measure, quartiles

# One block of Wan 1.3B at 480 x 832: 3 frames of 1560 tokens, 12 heads of 128.
HEADS, HEAD_DIM, PAGE, PAGES = 12, 128, 64, 75
SIDES = [("fp32", format) for format in ("fp32", "bf16", "int8", "i8f8", "fp8", "int4")]
SIDES += [("bf16", format) for format in ("bf16", "int8", "i8f8", "int4")]
SIDES += [("int8", "int8"), ("int8", "int4"), ("int4", "int8")]


def tables(rounds: int) -> Iterator[Table]:
    yield _bandwidth(rounds)
    yield _bookkeeping(rounds)
    yield _formats()


def _bandwidth(rounds: int) -> Table:
    """Bytes read and written per second, beside a plain copy in the same rounds."""
    title = f"page ops, {PAGES} pages x {HEADS} heads x {PAGE} x {HEAD_DIM}"
    table = Table(title=title, title_justify="left")
    for column in ("op", "codes", "median ms", "p20", "p80", "GB/s", "of memcpy"):
        table.add_column(column, justify="left" if column == "op" else "right", no_wrap=True)
    everything = PageList.of(range(PAGES), [PAGE] * PAGES)
    pools = {format: KVPages.empty(format, PAGES, HEADS, PAGE, HEAD_DIM) for format in KV_FORMATS}
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(PAGES * PAGE, HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    for pool in pools.values():
        kv_append(k, v, pool, everything)
    twins = {format: KVPages(*(None if x is None else x.clone() for x in pool)) for format, pool in pools.items()}
    calls: dict[str, tuple[Callable[[], object], int, bool]] = {}
    for source, target in SIDES:
        right = _same_codes(pools[source], target)

        def commit(source: KVPages = pools[source], target: KVPages = twins[target]) -> None:
            kv_commit(source, everything, target, everything)

        calls[f"commit {source} -> {target}"] = commit, pools[source].nbytes + pools[target].nbytes, right
    out = torch.empty_like(k), torch.empty_like(v)
    for format in ("int8", "int4"):

        def gather(pages: KVPages = pools[format]) -> None:
            kv_gather([pages], everything, out=out)

        calls[f"gather {format} -> fp32"] = gather, pools[format].nbytes + 2 * out[0].nbytes, True
    copied = 64 << 20
    times = measure([copying(copied), *(call for call, _, _ in calls.values())], rounds)
    peak = 2 * copied / statistics.median(times[0])
    table.add_row("memcpy", "", *quartiles(times[0]), f"{peak / 1e9:.1f}", "")
    for (name, (_, nbytes, right)), seconds in zip(calls.items(), times[1:]):
        speed = nbytes / statistics.median(seconds)
        verdict = "same" if right else "WRONG"
        table.add_row(name, verdict, *quartiles(seconds), f"{speed / 1e9:.1f}", f"{speed / peak:.0%}")
    return table


def _same_codes(source: KVPages, format: str, pages: int = 3) -> bool:
    """Does the op write the very bits that the reference writes?"""
    where = PageList.of(range(pages), [PAGE] * (pages - 1) + [PAGE // 3])
    ours, theirs = (KVPages.empty(format, pages, HEADS, PAGE, HEAD_DIM) for _ in range(2))
    kv_commit(source, where, ours, where)
    reference.kv_commit(source, where, theirs, where)
    return all(a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs))


def _bookkeeping(rounds: int) -> Table:
    """Host time per block of a 21-frame window over 30 layers. The pools' sizes don't matter: nothing is computed."""
    store = KVStore(
        layers=30, heads=1, head_dim=16, frame_tokens=1560, block_frames=3, pools={"int8": 42}, scratch_format="bf16"
    )
    table = store.open(Policy(window=18, sink=3))
    for _ in range(8):
        block = table.open_block(3)
        table.plan([block], commit=block)
        table.seal(block)

    def block_work() -> None:
        """Evict, allocate, and the page lists of a noisy and a clean pass."""
        block = table.open_block(3)
        table.plan([block])
        table.plan([block], commit=block)
        table.seal(block)

    forks = []
    calls = {
        "one block: evict, allocate, two plans": block_work,
        "fork": lambda: forks.append(table.fork()),
        "release of a fork": lambda: forks.pop().release(),
        "page list of the window": lambda: table.window(18, 3),
    }
    report = Table(title="bookkeeping, 21 frames of 25 pages x 30 layers", title_justify="left")
    for column in ("work", "median us", "p80 us"):
        report.add_column(column, justify="left" if column == "work" else "right", no_wrap=True)
    for name, seconds in zip(calls, measure(list(calls.values()), 20 * rounds)):
        p80 = statistics.quantiles(seconds, n=5)[3]
        report.add_row(name, f"{1e6 * statistics.median(seconds):.0f}", f"{1e6 * p80:.0f}")
    return report


def _formats() -> Table:
    """Bytes, and the error of attention over keys with outlier channels, with and without the frozen mean."""
    table = Table(title=f"formats, D = {HEAD_DIM}, pages of {PAGE}", title_justify="left")
    for column in ("format", "bytes per token-head", "of bf16", "error with frozen mean", "without"):
        table.add_column(column, justify="left" if column == "format" else "right", no_wrap=True)
    tokens, queries = 4096, 256
    q, k, v = clustered_keys_and_values(tokens, queries, 2, HEAD_DIM)
    where = PageList.of(range(tokens // PAGE), [PAGE] * (tokens // PAGE))
    plan = make_plan([(queries, where.ids.tolist(), where.lens.tolist())])

    def attend(format: str, mean: torch.Tensor) -> torch.Tensor:
        pages = KVPages.empty(format, tokens // PAGE, 2, PAGE, HEAD_DIM)
        kv_append(k - mean, v, pages, where)
        return paged_attention(q, [pages], plan)[0]

    none, mean = torch.zeros(2, HEAD_DIM), k[: 3 * PAGE].mean(0)
    exact = attend("fp32", none)
    for format in KV_FORMATS:
        errors = [float((attend(format, m) - exact).norm() / exact.norm()) for m in (mean, none)]
        size = page_bytes(format, 1, PAGE, HEAD_DIM) / PAGE
        shown = [f"{error:.2%}" for error in errors] if FORMATS[format].quantized else ["", f"{errors[1]:.2%}"]
        table.add_row(format, f"{size:.0f}", f"{512 / size:.2f}x", *shown)
    return table
