"""What a run leaves behind: rows, and the document that holds them. Its schema is the dataclass `Row`.

A document is {"schema": 1, "header": {...}, "rows": [...]}; as .jsonl, its header is the first line and every row one
more, so that a run can be appended to and read after a crash.

Files are written by inferix_kernels.files, imported where they are: `compare` reads rows next to the kernels of another
tree, which may not have it.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

SCHEMA = 1
# ok: right and timed. wrong: not timed. absent: not installed. unsupported: refused. failed: raised.
STATUSES = ("ok", "wrong", "absent", "unsupported", "failed")


@dataclasses.dataclass
class Row:
    """One contender on one case; with contender "peak-...", what the machine itself did in the same rounds.

    seconds are of one call in every round, in the order of the rounds. share is of the machine's measured peak: the
    time that flops and nbytes would take at the peaks of matmul and copy, over the median. metrics are further numbers
    by name, with their unit in it, of families whose result is not the time of one call.
    """

    family: str
    op: str
    shape: str
    contender: str
    format: str
    device: str
    status: str
    note: str = ""
    kernel: str = ""
    error: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)
    disturbed: int = 0  # rounds in which the scheduler took the processor away
    flops: float = 0.0
    nbytes: int = 0
    memory: int = 0  # bytes that a call held at its peak beyond what was there before
    share: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def case(self) -> str:
        return f"{self.family}/{self.op}/{self.shape}"

    @property
    def key(self) -> tuple[str, ...]:
        """What no two rows of a run have in common; points of a sweep differ in x."""
        return (self.case, self.contender, self.format, self.device, str(self.metrics.get("x", "")))

    @property
    def ours(self) -> bool:
        return self.contender.startswith("ours")

    @property
    def peak(self) -> bool:
        return self.contender.startswith("peak-")

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, percent: int) -> float:
        if len(self.seconds) < 2:
            return self.median
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


_HINTS = get_type_hints(Row)
_REQUIRED = [field.name for field in dataclasses.fields(Row) if field.default is dataclasses.MISSING][:7]


class BadRecord(ValueError):
    """A file is not what it should be; the message names the file, the row and the field."""


@dataclasses.dataclass
class Document:
    header: dict[str, Any]
    rows: list[Row]

    def save(self, path: Path) -> None:
        """As JSON, or as JSON lines if the name ends so. Raises ValueError: it can't be written; names the path."""
        from inferix_kernels.files import atomic_write

        head = {"schema": SCHEMA, "header": self.header}
        rows = [compact(row) for row in self.rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            text = "".join(json.dumps(line) + "\n" for line in (head, *rows))
        else:
            lines = ",\n".join(map(json.dumps, rows))
            text = json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n'
        with atomic_write(path, "--json") as part:
            part.write_text(text)

    @classmethod
    def load(cls, path: Path) -> Document:
        """Raises BadRecord."""
        try:
            text = path.read_text()
            if path.suffix == ".jsonl":
                # A line without its end is what a crash left of it.
                head, *rows = (json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line)
            else:
                head = json.loads(text)
                rows = head.get("rows")
        except (OSError, ValueError, AttributeError) as error:
            raise BadRecord(f"{path} must hold a run of the benchmarks: {error}") from error
        if not isinstance(head, dict) or head.get("schema") != SCHEMA or not isinstance(head.get("header"), dict):
            raise BadRecord(f"{path} must begin with schema {SCHEMA} and a header")
        if not isinstance(rows, list):
            raise BadRecord(f"{path} must hold a list of rows")
        checked = [_row(f"{path}, row {i}", row) for i, row in enumerate(rows)]
        # What was measured again after a run was cut off stands for what it had before.
        return cls(head["header"], list({row.key: row for row in checked}.values()))


def append(path: Path, header: dict[str, Any], rows: Iterable[Row]) -> None:
    """Add rows to a .jsonl document, whole and on disk when this returns; begin it if there is none.

    Raises:
        ValueError: it can't be written, or the disk is full; what it held before is whole.
    """
    from inferix_kernels.files import append_lines, unwritable

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.exists() and "\n" in path.read_text()
    except OSError as error:
        raise unwritable(path, error, "--json") from None
    lines = [] if begun else [json.dumps({"schema": SCHEMA, "header": header})]
    lines += [json.dumps(compact(row)) for row in rows]
    append_lines(path, "".join(f"{line}\n" for line in lines), "--json")


def compact(row: Row) -> dict[str, Any]:
    """A row without what it leaves at its default, and the median for readers that don't compute; 5 digits."""
    given = {
        field.name: _digits(value)
        for field in dataclasses.fields(row)
        if (value := getattr(row, field.name)) or field.name in _REQUIRED
    }
    return {**given, "median": _digits(row.median)} if row.seconds else given


def _digits(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_digits(x) for x in value]
    if isinstance(value, dict):
        return {key: _digits(x) for key, x in value.items()}
    return value


def _row(place: str, given: Any) -> Row:
    """A row as it was written, checked against the dataclass."""
    if not isinstance(given, dict):
        raise BadRecord(f"{place} must be an object, got {given!r}")
    given = {name: value for name, value in given.items() if name != "median"}
    for name in _REQUIRED:
        if name not in given:
            raise BadRecord(f"{place}: {name} is missing")
    for name, value in given.items():
        if name not in _HINTS:
            raise BadRecord(f"{place}: {name} is no field of a row")
        wanted = getattr(_HINTS[name], "__origin__", _HINTS[name])
        if not isinstance(value, (int, float) if wanted is float else wanted):
            raise BadRecord(f"{place}: {name} must be {wanted.__name__}, got {value!r}")
    if given["status"] not in STATUSES:
        raise BadRecord(f"{place}: status must be one of {', '.join(STATUSES)}, got {given['status']!r}")
    numbers: Sequence[Any] = [
        *given.get("seconds", []),
        *given.get("error", {}).values(),
        *given.get("metrics", {}).values(),
    ]
    if not all(isinstance(x, (int, float)) for x in numbers):
        raise BadRecord(f"{place}: seconds, error and metrics must hold numbers")
    return Row(**given)
