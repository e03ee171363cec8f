"""What a recording of `inferix_kernels.profile` becomes: traces, summaries, a page with plots, figures for Prometheus.

    from inferix import profile

    with profile.profiling("layer", folder="out"):      # writes out/report.html, summary.json, trace.json
        world.step(action="up")

`span`, `timed`, `profiled`, `count`, `metric`, `on_block` and `record` are those of `inferix_kernels.profile`.

session.py   a recording with its sampler: begun, switched, written
system.py    processor, memory and GPU, a few times a second
snapshot.py  a recording as plain data, and those of several processes on one clock
summary.py   tables: shares, percentiles; compare.py: two of them, with an interval
trace.py     Chrome's and Perfetto's JSON
report.py    one page of HTML that needs no network; plots.py, svg.py: what is drawn on it
kernels.py   some blocks under torch.profiler
rows.py      the same figures for Prometheus
overhead.py  what all of this costs: `python -m inferix.profile --overhead`
"""

from __future__ import annotations

from inferix_kernels.profile import (
    LEVELS,
    Row,
    block,
    clock,
    count,
    level,
    metric,
    on_block,
    profiled,
    record,
    recording,
    set_level,
    span,
    start,
    stop,
    timed,
)

from .compare import Change, compare
from .kernels import kernels
from .report import report
from .session import Profiling, profiling
from .snapshot import merge, read, snapshot
from .summary import summary
from .trace import trace

__all__ = [
    "LEVELS",
    "Change",
    "Profiling",
    "Row",
    "block",
    "clock",
    "compare",
    "count",
    "kernels",
    "level",
    "merge",
    "metric",
    "on_block",
    "profiled",
    "profiling",
    "read",
    "record",
    "recording",
    "report",
    "set_level",
    "snapshot",
    "span",
    "start",
    "stop",
    "summary",
    "timed",
    "trace",
]
