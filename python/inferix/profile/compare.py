"""Which part of a block became slower: two recordings, span by span, judged as benchmarks are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from inferix_kernels.verdict import MARGIN, Interval, unpaired

from .snapshot import Snapshot, read, rows
from .summary import samples

WHOLE = "whole block"


@dataclasses.dataclass(frozen=True)
class Change:
    """One part of a block in two runs.

    Attributes:
        name: of its spans, those within apart; "whole block", "elsewhere".
        a, b: seconds per block, the medians.
        interval: of the ratio B / A; None: it takes no time in one of them.
        margin: ratios closer to 1 are "SAME".
    """

    name: str
    a: float
    b: float
    interval: Interval | None
    margin: float = MARGIN

    @property
    def verdict(self) -> str:
        """ "SAME", "FASTER", "SLOWER" or "UNSURE"; "NEW" or "GONE" of a part that only one of the runs has."""
        if self.interval is None:
            return "NEW" if self.b else "GONE"
        return self.interval.verdict(self.margin)

    @property
    def more(self) -> float:
        """Seconds per block that B takes beyond A."""
        return self.b - self.a


def compare(a: Snapshot | str | Path, b: Snapshot | str | Path, margin: float = MARGIN) -> list[Change]:
    """Two runs of the same world, that were recorded at the same level.

    Args:
        a, b: snapshots, or folders that they were written to; `b` is what is judged.
        margin: ratios from 1 / (1 + margin) to 1 + margin are of no interest.

    Returns:
        The whole block, then its parts: what became slower by most seconds first.

    Raises:
        ValueError: one of them has no two blocks. The first block of each, which has no past, is not compared.

    Example:
        >>> from inferix import profile
        >>> def run():
        ...     with profile.Profiling() as one:
        ...         for _ in range(4):
        ...             with profile.block(), profile.timed("decode"):
        ...                 pass
        ...     return one.snapshot()
        >>> whole, *parts = profile.compare(run(), run())  # each has seconds before and after, and a verdict
        >>> whole.name, "decode" in [part.name for part in parts]
        ('whole block', True)
    """
    sides = [_samples(name, taken) for name, taken in (("a", a), ("b", b))]
    names = dict.fromkeys([*sides[0], *sides[1]])
    changes = [_change(name, sides[0].get(name, []), sides[1].get(name, []), margin) for name in names]
    changes = [change for change in changes if change.a or change.b]
    return sorted(changes, key=lambda change: (change.name != WHOLE, -change.more))


def _samples(name: str, taken: Snapshot | str | Path) -> dict[str, list[float]]:
    taken = taken if isinstance(taken, dict) else read(taken)
    kept: list[dict[str, Any]] = [row for row in rows(taken) if row["number"]]
    if len(kept) < 2:
        raise ValueError(f"{name} must have two blocks after its first one, got {len(kept)}")
    return {WHOLE: [row["end"] - row["start"] for row in kept], **samples(kept)}


def _change(name: str, a: list[float], b: list[float], margin: float) -> Change:
    before, after = (sorted(side)[len(side) // 2] if side else 0.0 for side in (a, b))
    return Change(name, before, after, unpaired(a, b) if before and after else None, margin)


def table(changes: list[Change]) -> str:
    """For a terminal."""
    lines = [f"{'part':<20} {'A ms':>9} {'B ms':>9} {'B / A':>7}  {'95 %':<17} verdict"]
    for each in changes:
        ratio = (
            f"{each.interval.ratio:>7.3f}  {each.interval.low:.3f} .. {each.interval.high:.3f}  "
            if each.interval
            else ""
        )
        lines.append(f"{each.name:<20} {1e3 * each.a:>9.3f} {1e3 * each.b:>9.3f} {ratio or ' ' * 28}{each.verdict}")
    return "\n".join(lines)
