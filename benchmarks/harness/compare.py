"""Two runs against each other: recorded ones, or two source trees measured now, taking turns."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from inferix_kernels import verdict
from inferix_kernels.verdict import MARGIN, Interval

from .ledger import ROOT
from .measure import Settings, bounding_peak
from .rows import Document, Row
from .table import markdown, time_of

LOOK_EVERY = 5  # rounds
BROKEN = "BROKEN"  # it ran right in A, and in B it does not


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of both sides; no interval where B did not come so far."""

    row: Row
    a: float  # median, seconds
    b: float
    interval: Interval | None
    margin: float
    note: str = ""

    @property
    def verdict(self) -> str:
        return self.interval.verdict(self.margin) if self.interval else BROKEN


def compare_recorded(a: Document, b: Document, margin: float = MARGIN) -> list[Line]:
    """Every row that was timed in A and is in B.

    Raises:
        ValueError: nothing in common, or other devices: their times say nothing about the code.
    """
    for name in ("device", "settings"):
        if a.header.get(name) != b.header.get(name):
            raise ValueError(f"A and B must be of one {name}, got {a.header.get(name)} and {b.header.get(name)}")
    theirs = {row.key: row for row in b.rows}
    lines = []
    for row in a.rows:
        other = theirs.get(row.key)
        if not row.seconds or row.peak or other is None:
            continue
        if other.seconds:
            interval = verdict.recorded(row.seconds, other.seconds, _drift(row, a.rows, theirs), margin)
            lines.append(Line(row, row.median, other.median, interval, margin))
        else:
            lines.append(Line(row, row.median, 0.0, None, margin, f"{other.status}: {other.note}"))
    if not lines:
        raise ValueError("A and B must have rows in common, got none")
    return lines


def _drift(row: Row, rows: Sequence[Row], theirs: Mapping[tuple[str, ...], Row]) -> float:
    """How much slower the machine was in B at the peak that bounds a row; 1 for a family that measures none."""
    peaks = [peak for peak in rows if peak.peak and peak.case == row.case and peak.seconds]
    bound = bounding_peak(row, peaks)
    other = theirs.get(bound.key) if bound else None
    return other.median / bound.median if bound and other and other.seconds else 1.0


class Worker:
    """A process that measures with our harness and the kernels of one source tree, a round at a time."""

    def __init__(self, tree: Path, settings: Settings, threads: int):
        path = os.pathsep.join([str(tree / "python"), str(tree)])
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "worker.py"), str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.tree = tree
        self.ask(settings=dataclasses.asdict(settings), threads=threads, tree=str(tree.resolve()))

    def ask(self, **request: Any) -> Any:
        """Send a request, wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ValueError(f"{self.tree} can't be measured: its process ended, see above")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare_trees(
    trees: Sequence[Path], cases: Sequence[tuple[str, str, int]], settings: Settings, threads: int, margin: float
) -> Iterator[list[Line]]:
    """Measure two trees' kernels, case by case, until every row is decided or the case's seconds are used up.

    Args:
        cases: (family, shape, number of the case within both).
    """
    workers = [Worker(tree, settings, threads) for tree in trees]
    try:
        for case in cases:
            yield _duel(workers, case, settings, margin)
    finally:
        for worker in workers:
            worker.close()


def _duel(workers: Sequence[Worker], case: tuple[str, str, int], settings: Settings, margin: float) -> list[Line]:
    sides = [{row.key: (i, row) for i, row in enumerate(_begin(worker, case))} for worker in workers]
    pairs = [(mine, sides[1][key]) for key, mine in sides[0].items() if key in sides[1]]
    undecided = [pair for pair in pairs if all(row.status == "ok" and not row.peak for _, row in pair)]
    started = time.monotonic()
    for number in range(settings.rounds):
        for turn, pair in enumerate(undecided):
            for side in ((0, 1), (1, 0))[(number + turn) % 2]:
                i, row = pair[side]
                row.seconds.append(workers[side].ask(sample=i))
        if number + 1 >= verdict.ENOUGH and (number + 1) % LOOK_EVERY == 0:
            undecided = [(a, b) for a, b in undecided if _line(a[1], b[1], margin).verdict == "UNSURE"]
            if not undecided or time.monotonic() - started > settings.seconds:
                break
    return [_line(a, b, margin) for (_, a), (_, b) in pairs if a.status == "ok" and not a.peak]


def _begin(worker: Worker, case: tuple[str, str, int]) -> list[Row]:
    return [Row(**row) for row in worker.ask(begin=case)]


def _line(a: Row, b: Row, margin: float) -> Line:
    if not b.seconds:
        return Line(a, 0.0, 0.0, None, margin, f"{b.status}: {b.note}")
    return Line(a, a.median, b.median, verdict.paired(a.seconds, b.seconds), margin)


def table(lines: Sequence[Line]) -> str:
    body = []
    for line in lines:
        times = [time_of(seconds) if seconds else "-" for seconds in (line.a, line.b)]
        interval = line.interval
        shown = (
            [f"{interval.ratio:.3f}", f"{interval.low:.3f} .. {interval.high:.3f}"] if interval else ["-", line.note]
        )
        rounds = str(len(line.row.seconds))
        body.append([line.row.case, line.row.contender, line.row.format, line.verdict, *times, *shown, rounds])
    columns = ["case", "contender", "format", "verdict", "A", "B", "B / A", "95 %", "rounds"]
    return markdown(columns, body, left=4)


def failed(lines: Sequence[Line]) -> bool:
    return any(line.verdict in ("SLOWER", BROKEN) for line in lines)
