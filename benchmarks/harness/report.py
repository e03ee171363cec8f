"""Writes tables made from records between the marks of a Markdown file.

<!-- made by: python -m benchmarks report attention --device cpu --shapes tiny -->
... replaced ...
<!-- end -->

What the mark says is what the table holds: families, or `evidence`, and filters. Figures come from records alone: of
each case, device and setting the newest, with its origin below the table.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from inferix_kernels.files import atomic_write

from . import evidence
from .measure import best_peer
from .rows import Document, Row
from .show import against, rate
from .table import markdown, time_of

MARK = re.compile(r"(<!-- made by: python -m benchmarks report (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


class Filter(argparse.Namespace):
    """What a mark asks for."""

    families: list[str]
    device: str
    shapes: list[str]
    ops: list[str]
    formats: list[str]
    setting: str


def parse(words: str) -> Filter:
    """Raises ValueError for a mark that says something else."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("families", nargs="+")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name in ("--shapes", "--ops", "--formats"):
        parser.add_argument(name, type=lambda text: text.split(","), default=[])
    parser.add_argument("--setting", default="", help="as in a record's name, or a part of it: amx-1-thread")
    try:
        given, unknown = parser.parse_known_args(shlex.split(words), Filter())
    except argparse.ArgumentError as error:
        raise ValueError(f"report {words}: {error}") from error
    if unknown:
        raise ValueError(f"report {words}: {unknown[0]} is not known")
    return given


def rewrite(text: str, records: Sequence[Document]) -> str:
    """A file's text with every marked table made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{content(parse(match[2]), records)}\n\n{match[4]}"

    return MARK.sub(fill, text)


def update(paths: Sequence[Path], records: Sequence[Document]) -> list[Path]:
    """Rewrite files in place; those that changed."""
    changed = []
    for path in paths:
        before = path.read_text()
        after = rewrite(before, records)
        if after != before:
            with atomic_write(path, "files") as part:
                part.write_text(after)
            changed.append(path)
    return changed


def content(wanted: Filter, records: Sequence[Document]) -> str:
    if wanted.families == ["evidence"]:
        return evidence.table(evidence.evidence(records))
    newest: dict[tuple[str, str, str], tuple[Document, list[Row]]] = {}  # (case, machine, setting) -> the last record's
    for record in records:
        machine, setting = record.header["device"], evidence.setting_of(record.header)
        cases: dict[tuple[str, str, str], list[Row]] = {}
        for row in record.rows:
            if wanted.setting in setting and _asked(row, wanted):
                cases.setdefault((row.case, machine, setting), []).append(row)
        newest |= {key: (record, rows) for key, rows in cases.items()}
    if not newest:
        return "*No record yet.*"
    lines = [line for _, rows in newest.values() for line in _case_lines(rows)]
    columns = ["op", "shape", "contender", "format", "rel. error", "median", "rate", "of peak"]
    columns += ["x best peer", "x best peer of its format"]
    notes = dict.fromkeys(_origin(record) for record, _ in newest.values())
    return "\n\n".join([markdown(columns, lines, left=4), *notes])


def _asked(row: Row, wanted: Filter) -> bool:
    return (
        row.family in wanted.families
        and row.device == wanted.device
        and (not wanted.shapes or row.shape in wanted.shapes)
        and (not wanted.ops or row.op in wanted.ops)
        and (not wanted.formats or row.format in wanted.formats)
    )


def _case_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Ours, the best peer of all, and the best of every format of ours."""
    ours = [row for row in rows if row.seconds and row.ours]
    best = {format: best_peer([row for row in rows if row.format == format]) for format in {row.format for row in ours}}
    peer = best_peer(rows)
    peers = {id(row): row for row in (peer, *best.values()) if row}.values()
    lines = []
    for row in [*sorted(ours, key=lambda row: row.median), *sorted(peers, key=lambda row: row.median)]:
        ratios = [against(row, peer), against(row, best.get(row.format))]
        error = f"{row.error['relative']:.1e}" if row.error else ""
        share = f"{row.share:.0%}" if row.share else ""
        lines.append(
            [row.op, row.shape, row.contender, row.format, error, time_of(row.median), rate(row), share, *ratios]
        )
    return lines


def _origin(record: Document) -> str:
    head = record.header
    words = [head["device"], head["architecture"], f"{head['settings']['threads']} threads"]
    words += [f"ours in {head['isa']}"] if head.get("isa") else []
    words += [f"torch {head['software']['torch']}", head["date"][:10], f"commit {head['commit']}"]
    words += ["uncommitted changes"] if head["dirty"] else []
    words += [head["note"]] if head["note"] else []
    return "*" + ", ".join(words) + "*"
