"""What the profiler costs: spans off and on, a world's blocks with and without it, and the writing of a trace.

    python -m benchmarks run profiler --seconds 600 --record

See python/inferix/profile/overhead.py, which `python -m inferix.profile --overhead` runs as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from .harness.ledger import ROOT
from .harness.measure import Settings
from .harness.rows import Row

GOALS = {
    "level block, %": 0.2,
    "level layer, %": 1.0,
    "span off, us": 0.15,
    "span on, us": 0.5,
    "100,000 spans as a trace, s": 1.0,
}
AT_LEAST, AT_MOST = "at least, %", "at most, %"  # 95 %, of a level
SPANS = 100_000


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    """One row for the spans, one for each level; notes name the goals that were missed, or may have been."""
    if settings.rounds == 0 or settings.device != "cpu":
        return
    sys.path.append(str(ROOT / "python"))  # from a plain checkout, where inferix is not installed
    from inferix import World
    from inferix.profile.overhead import overhead, span_cost

    metrics = {f"{name}, us": cost for name, cost in span_cost().items()}
    metrics["100,000 spans as a trace, s"] = trace_seconds()
    yield _judged(Row("profiler", "spans", "-", "ours", "-", settings.device, "ok", metrics=metrics))
    torch.set_num_threads(1)
    world = World("tiny")
    for cost in overhead(lambda: world.step(action="up", prompt="desert day"), seconds=settings.seconds):
        low, ratio, high = (100 * (x - 1) for x in (cost.interval.low, cost.interval.ratio, cost.interval.high))
        metrics = {
            f"level {cost.level}, %": ratio,
            AT_LEAST: low,
            AT_MOST: high,
            "rounds": cost.interval.rounds,
            "block, ms": 1e3 * cost.seconds,
            "spans per block": cost.spans,
        }
        yield _judged(Row("profiler", cost.level, "tiny", "ours", "-", settings.device, "ok", metrics=metrics))


def trace_seconds() -> float:
    """Processor seconds from 100,000 spans in the ring to the text of a trace."""
    from inferix import profile

    with profile.Profiling("layer", capacity=1 << 17) as made, profile.block():
        for layer in range(SPANS):
            with profile.span("layer", layer=layer):
                pass
    began = time.process_time()
    text = profile.trace(made.snapshot())
    spent = time.process_time() - began
    assert sum(event["ph"] == "X" for event in json.loads(text)["traceEvents"]) >= SPANS
    return spent


def _judged(row: Row) -> Row:
    """Of what has an interval, all of it must lie on one side of the goal for a verdict."""
    notes = []
    for name, goal in GOALS.items():
        if name not in row.metrics:
            continue
        cost = row.metrics[name]
        low, high = row.metrics.get(AT_LEAST, cost), row.metrics.get(AT_MOST, cost)
        said = f"{name} {cost:.3g}" + (f" ({low:.3g} to {high:.3g})" if low < high else "") + f", goal {goal:g}"
        notes += [f"missed: {said}"] if low > goal else [f"unsure: {said}"] if high > goal else []
    row.note = "; ".join(notes) or "all goals met"
    return row
