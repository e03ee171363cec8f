"""A snapshot as Chrome's trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One track per thread, and one per GPU stream; metrics, counts and the machine are counter tracks. Spans that may overlap
are asynchronous events, as slices of one track must lie within each other.

Format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from .snapshot import Snapshot


def trace(taken: Snapshot) -> str:
    """The JSON of a snapshot.

    Example:
        >>> import json
        >>> from inferix import profile
        >>> recording = profile.start("layer")
        >>> with profile.span("layer", layer=3):
        ...     pass
        >>> _ = profile.stop()
        >>> events = json.loads(profile.trace(profile.snapshot(recording)))["traceEvents"]
        >>> [event["args"] for event in events if event["name"] == "layer"]
        [{'layer': 3}]
    """
    zero = min((process["unix"] for process in taken["processes"]), default=0.0)
    events = itertools.chain.from_iterable(
        _process(pid, process, process["unix"] - zero) for pid, process in enumerate(taken["processes"], 1)
    )
    return '{"displayTimeUnit":"ms","traceEvents":[\n' + ",\n".join(events) + "\n]}\n"


def _process(pid: int, process: dict[str, Any], away: float) -> Iterator[str]:
    yield json.dumps({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": process["name"]}})
    ids = itertools.count(1)
    for tid, track in enumerate(process["tracks"], 1):
        yield json.dumps({"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": track["name"]}})
        names: dict[str, str] = {}
        where = f'"pid":{pid},"tid":{tid}'
        for name, start, end, _, args in track["spans"]:
            shown = names.get(name) or names.setdefault(name, json.dumps(name))
            more = f',"args":{_arguments(args)}' if args else ""
            ts = 1e6 * (start + away)
            if track["overlapping"]:
                id = next(ids)
                head = f'{{"name":{shown},"cat":{shown},{where},"id":{id}'
                yield f'{head},"ph":"b","ts":{ts:.3f}{more}}}'
                yield f'{head},"ph":"e","ts":{1e6 * (end + away):.3f}}}'
            else:
                yield f'{{"name":{shown},"ph":"X",{where},"ts":{ts:.3f},"dur":{1e6 * (end - start):.3f}{more}}}'
    yield from _counters(pid, process, away)


def _arguments(args: Mapping[str, Any]) -> str:
    try:
        return json.dumps(args, allow_nan=False)
    except ValueError:  # JSON has no NaN and no infinity: they are shown as text
        return json.dumps(
            {name: x if x is None or isinstance(x, str) or x - x == 0 else str(x) for name, x in args.items()}
        )


def _counters(pid: int, process: dict[str, Any], away: float) -> Iterator[str]:
    def counter(name: str, at: float, value: float) -> str:
        return json.dumps(
            {"name": name, "ph": "C", "pid": pid, "ts": round(1e6 * (at + away), 3), "args": {"value": value}}
        )

    for row in process["blocks"]["rows"]:
        for name, value in (*row["values"].items(), *row["counts"].items()):
            yield counter(name, row["end"], value)
    for at, values in process["system"]:
        for name, value in values.items():
            yield counter(name, at, value)
