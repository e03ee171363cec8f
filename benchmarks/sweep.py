"""What grows with what: cost against pages attended to, pages listed, worlds in one call, and blocks made.

Every point is checked against the reference and takes part in the same rounds as all others of its axis, so that the
exponent of cost ~ x^e, fitted through the medians, holds on a machine that drifts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from inferix_kernels import KVStore, Policy
from inferix_kernels.store.memory import page_bytes
from inferix_kernels.testing import rope_table

from . import attention, peers
from .harness.case import LIMITS, Case, Contender, Prepared, Result
from .harness.measure import Machine, Settings, measure_case
from .harness.ours import BACKENDS, kernel_of
from .harness.rows import Row
from .harness.series import BYTES, Series
from .harness.table import markdown, time_of
from .shapes import Shape

FORMATS = ("fp32", "bf16", "int8")


class Point(NamedTuple):
    x: float
    shape: Shape
    listed: float = 1.0  # share of the pages
    worlds: int = 1


def growing(shape: Shape) -> list[Point]:
    """Keys in powers of two, from a block to sixteen."""
    return [Point(-(-n * shape.keys // shape.page_size), shape._replace(keys=n * shape.keys)) for n in (1, 2, 4, 8, 16)]


def sparse(shape: Shape) -> list[Point]:
    """Of 16 times the pages, those that a list names."""
    long = shape._replace(keys=16 * shape.keys)
    pages = -(-long.keys // shape.page_size)
    return [Point(round(share * pages), long, share) for share in (0.05, 0.1, 0.25, 0.5, 1.0)]


def crowded(shape: Shape) -> list[Point]:
    return [Point(n, shape, worlds=n) for n in (1, 2, 4, 8)]


AXES: dict[str, tuple[str, Callable[[Shape], list[Point]]]] = {
    "kv": ("pages attended to", growing),
    "sparsity": ("pages listed", sparse),
    "worlds": ("worlds in one call", crowded),
}
BLOCKS = "blocks"  # the fourth: a loop, not a call
LABELS = {name: label for name, (label, _) in AXES.items()} | {BLOCKS: "block"}


def case_of(axis: str, shape: Shape, device: str) -> Case:
    """All points of an axis as contenders of one case: ours and, where it can do the work, torch's SDPA."""
    points = [_at(point, axis, device) for point in AXES[axis][1](shape)]
    contenders = [contender for each in points for contender in each]
    return Case("sweep", axis, shape.name, lambda device: None, lambda _: torch.empty(0), contenders)


def _at(point: Point, axis: str, device: str) -> list[Contender]:
    """The contenders at one point. Each makes inputs of its own: the case's are those of all points."""
    x, shape, listed, worlds = point
    work = listed * worlds

    def here(prepare: Callable[..., Result | Prepared]) -> Callable[[Any], Any]:
        return lambda _: prepare(attention.make_inputs(shape, torch.device(device), listed, worlds))

    rivals: list[tuple[str, str, Callable[..., Prepared], str]] = [
        (f"ours-{backend}", format, partial(attention.ours, format=format, backend=backend), backend)
        for backend in BACKENDS[device]
        for format in FORMATS
    ]
    if axis == "kv":
        theirs = peers.contenders("attention", device, work, lambda _: 0, op="paged_attention")
        rivals += [(c.name, c.format, c.prepare, "") for c in theirs if not c.absent and c.name.startswith("sdpa")]
    return [
        Contender(
            name,
            format,
            here(prepare),
            work * attention.flops_of(shape),
            int(work * attention.bytes_of(shape, format)),
            LIMITS[format],
            kernel_of(backend, device, "attention") if backend else "",
            reference=here(attention.expected),
            metrics={"x": x},
        )
        for name, format, prepare, backend in rivals
    ]


def run_axis(axis: str, shape: Shape, settings: Settings, machine: Machine) -> list[Row]:
    if axis == BLOCKS:
        return list(run_blocks(shape, settings))
    return measure_case(case_of(axis, shape, settings.device), settings, machine)


def run_blocks(shape: Shape, settings: Settings, blocks: int = 24, window: int = 9, layers: int = 2) -> Iterator[Row]:
    """Blocks of 3 frames through the store, with a window and without: time and bytes of K and V after each."""
    frame = shape.queries // 3
    for name, policy in (("window", Policy(window, format="int8")), ("everything", Policy(None, format="int8"))):
        rows = [
            Row("sweep", BLOCKS, shape.name, f"ours, {name}", "int8", settings.device, "ok", metrics={"x": n + 1})
            for n in range(blocks)
        ]
        for _ in range(max(3, settings.rounds // 2)):
            for row, (seconds, held) in zip(rows, _loop(shape, frame, policy, blocks, layers, settings)):
                row.seconds.append(seconds)
                row.metrics[BYTES] = held
        yield from rows


def _loop(
    shape: Shape, frame: int, policy: Policy, blocks: int, layers: int, settings: Settings
) -> Iterator[tuple[float, int]]:
    """(seconds, KV bytes held at its end) of every block."""
    device, clock = settings.device, time.process_time if settings.timer == "cpu" else time.perf_counter
    store = KVStore(
        layers=layers,
        heads=shape.kv_heads,
        head_dim=shape.head_dim,
        frame_tokens=frame,
        block_frames=3,
        page_size=shape.page_size,
        pools=policy.capacity(3 * blocks),
        device=device,
    )
    table = store.open(policy)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = torch.randn(3 * frame, width, generator=torch.Generator().manual_seed(0)).to(device)
    rope = rope_table(3 * frame, shape.head_dim).to(device)
    per_frame = layers * page_bytes("int8", shape.kv_heads, shape.page_size, shape.head_dim) * store.pages_per_frame
    for _ in range(blocks):
        _wait(device)
        started = clock()
        block = table.open_block(3)
        noisy = table.plan([block], rope)
        clean = table.plan([block], rope, commit=block)
        for one in (noisy, clean):
            for layer in range(layers):
                one.attend(layer, qkv, None, None)
        table.seal(block)
        _wait(device)
        yield clock() - started, len(table.held) * per_frame


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(rows: Sequence[Row]) -> str:
    """Of every line of an axis: cost at both ends, and the exponent. What was not right is named below."""
    body = []
    for line in series(rows):
        e, low, high = line.exponent()
        ends = [f"{x:g}: {time_of(y)}" for x, y in ((line.x[0], line.medians[0]), (line.x[-1], line.medians[-1]))]
        body.append([LABELS[line.axis], line.name, *ends, f"{e:.2f}", f"{low:.2f} .. {high:.2f}"])
    wrong = [f"{row.contender}, {row.format}, {row.metrics['x']:g}: {row.note}" for row in rows if row.status != "ok"]
    return "\n\n".join([markdown(["axis", "line", "from", "to", "exponent", "95 %"], body, left=4), *wrong])


def series(rows: Sequence[Row]) -> list[Series]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.family == "sweep" and row.seconds and not row.peak:
            name = row.contender if row.op == BLOCKS else f"{row.contender}, {row.format}"
            groups.setdefault((row.op, name), []).append(row)
    return [Series(axis, name, [row.metrics["x"] for row in group], group) for (axis, name), group in groups.items()]
