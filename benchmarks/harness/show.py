"""Rows as tables for people: one table per case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from inferix_kernels import verdict

from .measure import best_peer
from .rows import Row
from .table import bytes_of, markdown, time_of

COLUMNS = ("contender", "format", "right", "rel. error", "max. error")
TIMES = ("median", "p20", "p80", "rate", "of peak", "x peer", "memory")
MARKS = {"ok": "✓", "wrong": "✗ WRONG", "failed": "✗ failed", "unsupported": "refused", "absent": "absent"}


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """A title and a table of every case, ours first, then the fastest peers; below it who could not take part."""
    for case, group in groupby(rows, key=lambda row: row.case):
        members = list(group)
        if any(row.metrics for row in members) and not any(row.flops or row.nbytes for row in members):
            yield f"### {case}\n\n{metrics_table(members)}\n"
        else:
            yield f"### {case}\n\n{case_table(members)}\n"


def case_table(rows: Sequence[Row]) -> str:
    peer = best_peer(rows)
    shown = sorted(
        (row for row in rows if not row.peak and row.status in ("ok", "wrong", "failed")),
        key=lambda row: (not row.ours, row.median if row.seconds else float("inf")),
    )
    lines = [markdown([*COLUMNS, *TIMES], [cells(row, peer) for row in shown], left=3)] if shown else []
    lines += [f"{row.contender}, {row.format}: {row.note}" for row in shown if row.status != "ok"]
    for status, words in (("unsupported", "refused"), ("absent", "not on this machine")):
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row.status == status:
                reasons.setdefault((row.contender, row.note), []).append(row.format)
        lines += [f"{words}: {name} {', '.join(formats)} ({note})" for (name, note), formats in reasons.items()]
    if peer:
        lines.append(f"best peer: {peer.contender}, {peer.format}")
    peaks = [
        f"{row.contender.removeprefix('peak-')} {row.format} {rate(row)}".replace("  ", " ") for row in rows if row.peak
    ]
    if peaks:
        lines.append(f"peaks in the same rounds: {', '.join(peaks)}")
    return "\n\n".join(lines)


def line(row: Row) -> str:
    """A row as it comes."""
    words = [row.case, row.contender, row.format, MARKS[row.status]]
    words += [f"error {row.error['relative']:.1e}"] if row.error else []
    words += [time_of(row.median), rate(row)] if row.seconds else []
    words += [f"{name} {value:.4g}" for name, value in row.metrics.items()]
    return "  ".join(filter(None, [*words, row.note]))


def cells(row: Row, peer: Row | None) -> list[str]:
    named = [row.contender, row.format, MARKS[row.status]]
    errors = [f"{row.error[name]:.1e}" if row.error else "" for name in ("relative", "max")]
    if not row.seconds:
        return [*named, *errors, *("" for _ in TIMES)]
    times = [time_of(value) for value in (row.median, row.quantile(20), row.quantile(80))]
    ratio = f"{peer.median / row.median:.2f}" if peer else ""
    return [*named, *errors, *times, rate(row), f"{row.share:.0%}" if row.share else "", ratio, bytes_of(row.memory)]


def against(row: Row, peer: Row | None) -> str:
    """How many times faster than a peer: the median of the rounds' ratios, with its interval, and the peer's name."""
    if peer is None or row is peer:
        return "1.00" if peer else ""
    paired = len(row.seconds) == len(peer.seconds)
    interval = verdict.paired(row.seconds, peer.seconds) if paired else verdict.unpaired(row.seconds, peer.seconds)
    return f"{interval.ratio:.2f} ({interval.low:.2f} .. {interval.high:.2f}) {peer.contender} {peer.format}"


def rate(row: Row) -> str:
    """Arithmetic per second if there is any, else bytes."""
    if not row.seconds:
        return ""
    if row.flops:
        per_second = row.flops / row.median
        return f"{per_second / 1e12:.3g} TFLOP/s" if per_second >= 1e12 else f"{per_second / 1e9:.3g} GFLOP/s"
    return f"{row.nbytes / row.median / 1e9:.3g} GB/s"


def metrics_table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    body = [
        [
            row.contender,
            row.format,
            MARKS[row.status],
            *(f"{row.metrics[n]:.4g}" if n in row.metrics else "" for n in names),
        ]
        for row in rows
    ]
    notes = [f"{row.contender}, {row.format}: {row.note}" for row in rows if row.note]
    return "\n\n".join([markdown(["contender", "format", "right", *names], body, left=3), *notes])
