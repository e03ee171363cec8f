"""summary.md of a run on a GPU: the figures that matter most, next to what was predicted of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..shapes import find_shape
from .evidence import evidence, record_path, table
from .ledger import ROOT
from .rows import BadRecord, Document, Row
from .show import MARKS, rate
from .table import markdown, time_of

if TYPE_CHECKING:
    from .gpu import Run

W = "wan1.3b-480p"
HEAT = ("SM MHz", "power W", "temperature C")


class Target(NamedTuple):
    """A prediction for one row: what a model of the kernel promises, never measured."""

    case: str
    contender: str
    formats: tuple[str, ...]
    least: float = 0.0  # TFLOP/s
    most: float = 0.0  # ms of a block


TARGETS = (
    Target(f"attention/paged_attention/{W}", "ours-compiled", ("bf16",), least=560),
    Target(f"attention/paged_attention/{W}", "ours-compiled-8bit", ("i8f8", "fp8"), least=690),
    Target(f"attention/paged_attention/{W}", "ours-triton", ("bf16",), least=320),
    Target(f"attention/paged_attention/{W}", "ours-triton", ("int8",), least=230),
    Target("block/full window/self-forcing", "ours-compiled", ("int8+bf16",), most=420),
)


def target_of(row: Row) -> str:
    """With whether it was reached, if it is known; empty for a row that nothing was predicted of."""
    for target in TARGETS if row.device == "cuda" else ():
        if (row.case, row.contender) == target[:2] and row.format in target.formats:
            if target.least:
                words, reached = (
                    f">= {target.least:.0f} TFLOP/s",
                    row.seconds and row.flops / row.median >= 1e12 * target.least,
                )
            else:
                got = row.metrics.get("block ms")
                words, reached = f"<= {target.most:.0f} ms", got is not None and got <= target.most
            known = row.seconds or "block ms" in row.metrics
            return words + (
                " (modelled)" if not known else " (modelled): reached" if reached else " (modelled): MISSED"
            )
    return ""


def summary(run: Run) -> str:
    parts = ["# A run on a GPU" if not run.dry else "# A dry run on the CPU: no figure here is of a GPU", ""]
    path = run.out / "run.jsonl"
    try:
        document = Document.load(path) if path.exists() else None
    except BadRecord as error:
        document = None
        parts += [str(error), ""]
    if document is not None:
        parts += [origin(document), "", figures(document.rows), ""]
    parts += ["## What was done", "", run.stage_table(), ""]
    if document is not None and not run.dry:
        parts += ["## What is measured now", "", table([e for e in evidence([document]) if e.state != "never"]), ""]
        parts += ["## To commit it", "", f"    cp {path.name} {record_path(document.header).relative_to(ROOT)}", ""]
    return "\n".join(parts)


def origin(document: Document) -> str:
    head = document.header
    software = ", ".join(f"{name} {version}" for name, version in head["software"].items())
    return f"{head['device']}, {head['architecture']}, {head['date']}, commit {head['commit']}; {software}"


def figures(rows: Sequence[Row]) -> str:
    """A table per case, fastest first: rate, target, clocks. Splits of FlashAttention-3 are one line: its best."""
    parts = []
    for case in dict.fromkeys(row.case for row in rows if row.family in ("attention", "block")):
        members = [row for row in rows if row.case == case and not row.peak and row.status != "absent"]
        timed = best_splits([row for row in members if row.seconds or "block ms" in row.metrics])
        timed.sort(key=lambda row: -row.flops / row.median if row.flops else row.metrics.get("block ms", 0.0))
        body = [cells(row) for row in timed]
        body += [cells(row) for row in members if not (row.seconds or "block ms" in row.metrics)]
        columns = ["contender", "format", "right", "error", "median", "rate", "target", "clock, power, heat; note"]
        parts += [f"## {title(case)}", "", markdown(columns, body, left=8), ""]
        missing = {f"{row.contender} ({row.note})" for row in rows if row.case == case and row.status == "absent"}
        parts += [f"Not here: {', '.join(sorted(missing))}", ""] if missing else []
    return "\n".join(parts)


def title(case: str) -> str:
    family, op, shape = case.split("/", 2)
    try:
        return f"{op}, {shape} ({find_shape(shape).numbers})" if family == "attention" else f"{family}, {op}, {shape}"
    except ValueError:
        return case


def best_splits(rows: Sequence[Row]) -> list[Row]:
    """Of contenders that are one library with other splits, the default and the best."""
    kept, split = [], [row for row in rows if re.search(r"-split\d+$", row.contender)]
    best = min(split, key=lambda row: row.median, default=None)
    for row in rows:
        if row not in split or row is best:
            kept.append(row)
    return kept


def cells(row: Row) -> list[str]:
    heat = ", ".join(f"{row.metrics[name]:.0f} {name}" for name in HEAT if name in row.metrics)
    extra = [f"{name} {value:.0f}" for name, value in row.metrics.items() if name not in HEAT and row.family == "block"]
    error = f"{row.error['relative']:.1e}" if row.error else ""
    median = time_of(row.median) if row.seconds else ""
    note = "; ".join(filter(None, [heat, ", ".join(extra), row.note]))
    rated = rate(row) if row.flops else ""
    return [row.contender, row.format, MARKS[row.status], error, median, rated, target_of(row), note]
