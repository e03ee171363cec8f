"""The ledger: which kernel was measured, in which format, on which architecture, and whether it is still that kernel.

Records name the hash of every kernel's sources. Held against today's sources, a measurement is either of this source
or of an older one; what no record speaks of was never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .environment import slug
from .ledger import ROOT, fingerprint, kernels
from .rows import Document
from .table import markdown

RECORDS = ROOT / "benchmarks" / "records"
NOW, OLDER, WRONG = "measured at this source", "measured at an older source", "WRONG"
REFUSED, NEVER = "refused at this source", "never"
RANK = (NEVER, OLDER, REFUSED, NOW, WRONG)  # what is said first, if records say several things


class Evidence(NamedTuple):
    kernel: str
    format: str
    architecture: str  # "" if never run
    state: str
    date: str = ""
    device: str = ""
    commit: str = ""

    @property
    def words(self) -> str:
        if self.state != NEVER:
            return self.state
        return "never measured" if self.kernel.startswith("cpu/") else "never run on a GPU"


def load_records(folder: Path = RECORDS) -> list[Document]:
    """All records, oldest first. Raises rows.BadRecord."""
    return sorted((Document.load(path) for path in folder.glob("*/*.jsonl")), key=lambda record: record.header["date"])


def setting_of(head: dict[str, Any]) -> str:
    """How a run measured, in words of which a record's name is made: rows of two settings are not of one table."""
    settings = head["settings"]
    threads = f"{settings['threads']}-thread" + ("s" if settings["threads"] != 1 else "")
    words = [head.get("isa", ""), threads, settings["timer"], "" if settings["cold"] else "warm"]
    return "-".join(filter(None, words))


def record_path(head: dict[str, Any]) -> Path:
    """Where a record with this header belongs."""
    return RECORDS / slug(head["device"]) / f"{head['date'][:10]}-{head['commit']}-{setting_of(head)}.jsonl"


def evidence(records: Sequence[Document]) -> list[Evidence]:
    """One line per kernel, format and architecture. What holds at today's source comes first, then what is newer."""
    found: dict[tuple[str, str, str], Evidence] = {}
    for record in records:
        for entry in _told_by(record):
            key = entry[:3]
            if key not in found or RANK.index(entry.state) >= RANK.index(found[key].state):
                found[key] = entry
    lines = []
    for name, formats in kernels().items():
        for format in formats:
            seen = [entry for key, entry in sorted(found.items()) if key[:2] == (name, format)]
            lines += seen or [Evidence(name, format, "", NEVER)]
    return lines


def _told_by(record: Document) -> Iterator[Evidence]:
    """What a record says of kernels that there still are. A wrong result outweighs the right ones of the same run."""
    head, known = record.header, kernels()
    states: dict[tuple[str, str], str] = {}
    for row in record.rows:
        if row.kernel not in known or not (row.seconds or row.status in ("wrong", "unsupported")):
            continue
        state = NOW if row.seconds else WRONG if row.status == "wrong" else REFUSED
        if head.get("kernels", {}).get(row.kernel) != fingerprint(row.kernel):
            state = OLDER if state != REFUSED else NEVER
        before = states.get((row.kernel, row.format), NEVER)
        states[row.kernel, row.format] = max(before, state, key=RANK.index)
    for (kernel, format), state in states.items():
        if state != NEVER:
            where = head.get("architecture", "?")
            yield Evidence(kernel, format, where, state, head["date"][:10], head["device"], head["commit"])


def stale(lines: Sequence[Evidence]) -> list[Evidence]:
    return [line for line in lines if line.state not in (NOW, REFUSED)]


def table(lines: Sequence[Evidence]) -> str:
    """Formats that share their fate share a line."""
    merged: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        fate = (line.kernel, line.architecture or "-", line.words, line.date, line.device, line.commit)
        merged.setdefault(fate, []).append(line.format)
    body = [[kernel, ", ".join(formats), *rest] for (kernel, *rest), formats in merged.items()]
    return markdown(["kernel", "formats", "architecture", "evidence", "date", "device", "commit"], body, left=7)
