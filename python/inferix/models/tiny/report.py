"""An evaluation as a table on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from .measures import FIFTHS, HORIZON, NEAR, Gate, Summary, verdict

HEADER = ("measure", "all", *(f"{i + 1}/{FIFTHS}" for i in range(FIFTHS)), "must be", "met")
WIDTH = 118  # characters of a table on the terminal
ROWS = (  # measure, what it is called, unit
    ("player_once", "player exactly once", "%"),
    ("boats_once", "both boats exactly once", "%"),
    ("boats_moving", "both boats moving", "%"),
    ("follows_moving", "action followed, moving", "%"),
    ("follows_blocked", "action followed, blocked or none", "%"),
    ("inside_wall", "player inside a wall", "%"),
    ("near", f"within {NEAR} px of the simulator", "%"),
    ("near_at_horizon", f"the same at frame {HORIZON}", "%"),
    ("tiles_right", "scenery tiles right", "%"),
    ("theme_right", "theme right, a block after change", "%"),
    ("start_player", "from nothing: player once", "%"),
    ("start_boats", "from nothing: both boats once", "%"),
    ("start_tiles", "from nothing: tiles of the theme", "%"),
    ("start_theme", "from nothing: theme right", "%"),
    ("fps", "frames per second", ""),
    ("first_frame", "first frame, from the command", "s"),
    ("distance", "distance from the simulator", "px"),
    ("psnr", "PSNR", "dB"),
    ("drift", "drift of PSNR", "%"),
)


@dataclass(frozen=True)
class Report:
    """What was run, what came out, and the gates it was held to."""

    setting: dict[str, Any]
    summary: dict[str, Summary]
    gates: Sequence[Gate]

    @property
    def failed(self) -> list[Gate]:
        return verdict(self.summary, self.gates)

    def rows(self) -> list[tuple[str, ...]]:
        """Cells in the order of HEADER."""
        rows = []
        for measure, label, unit in ROWS:
            summary = self.summary[measure]
            fifths = [_number(value, unit) for value in summary.fifths] or [""] * FIFTHS
            gates = [gate for gate in self.gates if gate.measure == measure]
            bounds = ", ".join(_bound(gate, unit) for gate in gates)
            passed = all(gate.passes(self.summary) for gate in gates)
            mark = ("yes" if passed else "NO") if gates else ""
            rows.append((label, f"{_number(summary.overall, unit)} {unit}".strip(), *fifths, bounds, mark))
        return rows

    def table(self) -> Table:
        table = Table(caption=self.title(), box=SIMPLE, padding=(0, 1, 0, 0), width=WIDTH)
        for name in HEADER:
            table.add_column(name, no_wrap=True, justify="left" if name in ("measure", "must be") else "right")
        for row in self.rows():
            table.add_row(*row, style="red" if row[-1] == "NO" else None)
        return table

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return f"| {' | '.join(cells)} |"

        return "\n".join([line(HEADER), line(["---"] * len(HEADER)), *map(line, self.rows()), "", self.title()])

    def title(self) -> str:
        setting = self.setting
        stored = f"{setting['kv']} pages" + (f", {setting['linear']} layers" if setting.get("linear") else "")
        return (
            f"{setting['seeds']} held-out seeds x {setting['frames']} frames, {setting['context_frames']} true frames "
            f"to start from, {stored}; 1/5 to 5/5 are fifths of the video, drop is how far a later one "
            f"lies under the first; {setting['machine']}"
        )

    def json(self) -> dict[str, Any]:
        """Shares lie in [0, 1]; null is a measure that no frame had a say in."""
        return {
            **self.setting,
            "passed": not self.failed,
            "gates": [
                {
                    "name": gate.name,
                    "measure": gate.measure,
                    "compare": gate.compare,
                    "bound": gate.bound,
                    "value": _json(gate.value(self.summary)),
                    "passes": bool(gate.passes(self.summary)),
                }
                for gate in self.gates
            ],
            "measures": {
                name: {"all": _json(summary.overall), "fifths": [_json(value) for value in summary.fifths]}
                for name, summary in self.summary.items()
            },
        }


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float, unit: str) -> str:
    """Two decimals for shares, so that hardly anything that misses a bound rounds up to it."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if unit == "%" else f"{value:.1f}"


def _bound(gate: Gate, unit: str) -> str:
    if gate.compare == "drop at most":
        return f"drop <= {100 * gate.bound:g}"
    scale = 100 if unit == "%" else 1
    return f"{'>=' if gate.compare == 'at least' else '<='} {scale * gate.bound:g} {unit}".strip()
