"""The ledger: which kernel was measured, in which format, on which architecture, and whether it is still that kernel.

Records name the hash of every kernel's sources. Held against today's sources, a measurement is either of this source
or of an older one; what no record speaks of was never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .ledger import KERNELS, ROOT, fingerprint
from .rows import Document
from .table import markdown

RECORDS = ROOT / "benchmarks" / "records"
NOW, OLDER, WRONG, NEVER = "measured at this source", "measured at an older source", "WRONG", "never"


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


def evidence(records: Sequence[Document]) -> list[Evidence]:
    """One line per kernel, format and architecture; the newest record of each speaks, one at this source first."""
    found: dict[tuple[str, str, str], Evidence] = {}
    for record in records:
        for entry in _told_by(record):
            key = entry[:3]
            if key not in found or entry.state == NOW or found[key].state == OLDER:
                found[key] = entry
    lines = []
    for name, kernel in KERNELS.items():
        for format in kernel.formats:
            seen = [entry for key, entry in sorted(found.items()) if key[:2] == (name, format)]
            lines += seen or [Evidence(name, format, "", NEVER)]
    return lines


def _told_by(record: Document) -> Iterator[Evidence]:
    """What a record says of kernels that there still are. A wrong result outweighs the right ones of the same run."""
    head = record.header
    hashes = head.get("kernels", {})
    wrong = {(row.kernel, row.format) for row in record.rows if row.status == "wrong"}
    for kernel, format in dict.fromkeys((row.kernel, row.format) for row in record.rows if row.kernel in KERNELS):
        timed = any(r.seconds for r in record.rows if (r.kernel, r.format) == (kernel, format))
        if not timed and (kernel, format) not in wrong:
            continue
        current = hashes.get(kernel) == fingerprint(kernel)
        state = OLDER if not current else WRONG if (kernel, format) in wrong else NOW
        yield Evidence(
            kernel, format, head.get("architecture", "?"), state, head["date"][:10], head["device"], head["commit"]
        )


def stale(lines: Sequence[Evidence]) -> list[Evidence]:
    return [line for line in lines if line.state != NOW]


def table(lines: Sequence[Evidence]) -> str:
    """Formats that share their fate share a line."""
    merged: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        fate = (line.kernel, line.architecture or "-", line.words, line.date, line.device, line.commit)
        merged.setdefault(fate, []).append(line.format)
    body = [[kernel, ", ".join(formats), *rest] for (kernel, *rest), formats in merged.items()]
    return markdown(["kernel", "formats", "architecture", "evidence", "date", "device", "commit"], body, left=7)
