"""A recording as plain data, which JSON can hold, and those of several processes on one clock."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inferix_kernels._recording import Recording, Row

SCHEMA = 1
Snapshot = dict[str, Any]


def snapshot(
    recording: Recording, name: str = "world", system: Sequence[tuple[float, dict[str, float]]] = ()
) -> Snapshot:
    """All that a recording holds now; it may go on.

    Args:
        name: of the process, in traces.
        system: (perf_counter, {name: value}) samples of the machine.

    Returns:
        {"schema", "processes": [one]}; times are seconds since the process's "unix", which is seconds since 1970.

    Example:
        >>> from inferix import profile
        >>> recording = profile.start("block")
        >>> with profile.block() as made:
        ...     made.frames = 3
        >>> _ = profile.stop()
        >>> taken = profile.snapshot(recording)
        >>> taken["processes"][0]["frames"]
        3
    """
    recording.collect()
    zero = recording.perf
    blocks, tracks = recording.blocks, []
    for track in list(recording.tracks):
        away = track.shift - zero
        spans = [[name, start + away, end + away, depth, args] for name, start, end, depth, args in track.kept()]
        tracks.append({"name": track.name, "overlapping": track.overlapping, "dropped": track.dropped, "spans": spans})
    process = {
        "name": name,
        "unix": recording.unix,
        "seconds": time.perf_counter() - zero,
        "frames": recording.frames,
        "tracks": tracks,
        "blocks": {"seen": blocks.seen, "stride": blocks.stride, "rows": [_row(row, zero) for row in blocks.kept]},
        "sums": {name: list(each) for name, each in recording.sums.items()},
        "counts": recording.counts(),
        "values": recording.values(),
        "system": [[at - zero, values] for at, values in system],
        "lost": recording.problems(),
    }
    return {"schema": SCHEMA, "processes": [process]}


def _row(row: Row, zero: float) -> dict[str, Any]:
    return {
        "track": row.track,
        "number": row.number,
        "start": row.start - zero,
        "end": row.end - zero,
        "wall": row.wall,
        "frames": row.frames,
        "spans": {name: list(each) for name, each in row.spans.items()},
        "counts": row.counts,
        "values": row.values,
    }


def merge(snapshots: Sequence[Snapshot], names: Sequence[str] = (), align: str | None = None) -> Snapshot:
    """Snapshots of several processes, or of the ranks of one run, as one.

    Args:
        names: of their processes; by default those that they have.
        align: the name of a span that ends in all of them at the same moment, such as a barrier: clocks are moved until
            it does, by the median. None: their clocks are taken as they are, which is right on one machine.

    Raises:
        ValueError: a snapshot has no span of this name.
    """
    processes = [dict(process) for each in snapshots for process in each["processes"]]
    for process, name in zip(processes, names):
        process["name"] = name
    if align is not None and processes:
        ends = [_ends(process, align) for process in processes]
        for process, other in zip(processes[1:], ends[1:]):
            process["unix"] -= statistics.median(b - a for a, b in zip(ends[0], other))
    return {"schema": SCHEMA, "processes": processes}


def _ends(process: Mapping[str, Any], name: str) -> list[float]:
    spans = [span for track in process["tracks"] for span in track["spans"] if span[0] == name]
    if not spans:
        raise ValueError(f"align must be a span of every process, got {name!r}, which {process['name']} has not")
    return sorted(process["unix"] + end for _, _, end, _, _ in spans)


def rows(taken: Snapshot) -> list[dict[str, Any]]:
    """The rows of all blocks that are kept."""
    return [row for process in taken["processes"] for row in process["blocks"]["rows"]]


def read(path: str | Path) -> Snapshot:
    """What `Profiling.write` left as recording.json: of a folder, or the file.

    Raises:
        ValueError: there is none, or it is not one.
    """
    path = Path(path)
    path = path / "recording.json" if path.is_dir() else path
    try:
        taken: Snapshot = json.loads(path.read_text())
        if taken["schema"] != SCHEMA or not taken["processes"]:
            raise ValueError(f"schema {SCHEMA} is read")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path must be that of a recording, or of its folder, got {str(path)!r} ({error})") from None
    return taken


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, the one below which this share lies."""
    if not values:
        return math.nan
    at = share * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])
