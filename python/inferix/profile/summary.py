"""A snapshot in numbers: where the time went, how long blocks took, what was counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .snapshot import Snapshot, quantile, rows

ELSEWHERE = "elsewhere"  # between spans
SHARES = (0.5, 0.95, 0.99)


def summary(taken: Snapshot) -> dict[str, Any]:
    """Numbers of a run. Times are in seconds.

    Returns:
        "blocks", "frames", "seconds" (from the first span to the end of the last block), "fps", "block": percentiles;
        "spans": of each name its share of the wall time (those within apart; with "elsewhere" they sum to 1), its
        seconds, its percentiles per block and how often it came; "others": seconds of spans on other threads and
        tracks; "counts", "metrics", "system": the last and the largest value; "lost".

    Example:
        >>> from inferix import profile
        >>> recording = profile.start("block")
        >>> with profile.block() as made:
        ...     made.frames = 3
        >>> _ = profile.stop()
        >>> made = profile.summary(profile.snapshot(recording))
        >>> made["blocks"], made["frames"], list(made["spans"])
        (1, 3, ['block', 'elsewhere'])
    """
    kept, processes = rows(taken), taken["processes"]
    wall = sum(row["wall"] for row in kept)
    spent = sorted(row["end"] - row["start"] for row in kept)
    counts: dict[str, float] = {}
    for process in processes:
        for name, count in process["counts"].items():
            counts[name] = counts.get(name, 0) + count
    frames = sum(row["frames"] for row in kept)
    return {
        "blocks": sum(process["blocks"]["seen"] for process in processes),
        "frames": sum(process["frames"] for process in processes),
        "seconds": wall,
        "fps": frames / wall if wall else 0.0,
        "block": percentiles(spent),
        "spans": spans(kept),
        "others": _others(taken),
        "counts": counts,
        "metrics": {name: value for process in processes for name, value in process["values"].items()},
        "system": {process["name"]: _system(process["system"]) for process in processes if process["system"]},
        "lost": [line for process in processes for line in process["lost"]],
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of sorted values, {"p50": ...}."""
    return {f"p{100 * share:g}": quantile(values, share) for share in SHARES} if values else {}


def samples(kept: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """By name, seconds in each of these rows, those of the spans within apart; 0 where a row has none."""
    names = dict.fromkeys(name for row in kept for name in row["spans"])
    found = {name: [row["spans"].get(name, (0.0,))[0] for row in kept] for name in names}
    return found | {ELSEWHERE: [elsewhere(row) for row in kept]} if kept else {}


def elsewhere(row: dict[str, Any]) -> float:
    """Seconds of a row's wall time that no span has."""
    return max(0.0, float(row["wall"]) - sum(own for own, _, _ in row["spans"].values()))


def spans(kept: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By name, the largest share first."""
    wall = sum(row["wall"] for row in kept) or 1.0
    found = {}
    for name, own in samples(kept).items():
        sums = [row["spans"][name] for row in kept if name in row["spans"]]
        found[name] = {
            "share": sum(own) / wall,
            "own_seconds": sum(own),
            "seconds": sum(each[1] for each in sums) if sums else sum(own),
            "number": sum(each[2] for each in sums),
            **percentiles(sorted(own)),
        }
    return dict(sorted(found.items(), key=lambda item: (item[0] == ELSEWHERE, -item[1]["share"])))


def _others(taken: Snapshot) -> dict[str, dict[str, float]]:
    """Of names that no block's thread has."""
    own = {name for row in rows(taken) for name in row["spans"]}
    found: dict[str, dict[str, float]] = {}
    for process in taken["processes"]:
        for name, (mine, seconds, number) in process["sums"].items():
            if name not in own:
                old = found.get(name, {"own_seconds": 0.0, "seconds": 0.0, "number": 0})
                new = {"own_seconds": mine, "seconds": seconds, "number": number}
                found[name] = {key: old[key] + new[key] for key in old}
    return found


def _system(sampled: Sequence[tuple[float, dict[str, float]]]) -> dict[str, dict[str, float]]:
    names = dict.fromkeys(name for _, values in sampled for name in values)
    series = {name: [values[name] for _, values in sampled if name in values] for name in names}
    return {name: {"last": values[-1], "largest": max(values)} for name, values in series.items()}
