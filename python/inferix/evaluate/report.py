"""What was found of videos: as JSON, as tables for a terminal, and as a page with the curves of their chunks.

Real metrics and proxies never share a table: a proxy's number is not to be held against a published one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from inferix_kernels import __version__

from ..profile.report import page, table
from ..profile.svg import COLOURS, Plot, legend, number
from .judging import ANCHORED, Judged
from .metric import PROXY, Metric, registered

MEASURES = ("linear", "log", "late", "slope")  # of Drift
HEADS = ("metric", "whole", "VDE", "VDE log", "late", "slope", "chunks")
PUBLISHED_VDE = ("subject", "background", "motion", "aesthetic", "clarity")
# VDE, linear, N = 10, of minute-long videos of InterVBench, once LV-Bench: WorldAttention, arXiv 2609.34606, Table 12.
PUBLISHED = {
    "Self Forcing": (0.3716, 1.6108, 0.1549, 3.468, 3.080),
    "MAGI-1": (0.309, 0.5, 0.0243, 3.829, 2.723),
    "LongLive": (0.0825, 0.3016, 0.0104, 1.145, 0.853),
    "WorldAttention": (0.0792, 0.285, 0.0095, 0.946, 0.739),
}
SOURCE = "WorldAttention, arXiv 2609.34606, Table 12: other videos, of other prompts"
BARS = "▁▂▃▄▅▆▇█"
LEAST_SPAN = 0.02  # of a curve's axis, as a share of what it shows: less is not drawn as if it were much
Report = Mapping[str, Any]


def report(
    judged: Sequence[Judged],
    metrics: Sequence[Metric],
    chunks: int,
    *,
    failed: Mapping[str, str] | None = None,
    left_out: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
) -> Report:
    """Everything that was found, as JSON's types; a number that is not finite is null.

    Args:
        metrics: by which they were judged.
        chunks: N.
        failed: videos that could not be judged, by path, and why.
        left_out: metrics that were not asked, by name, and why.
        weights: SHA-256 of each weight file, by name.
    """
    return {
        "inferix": __version__,
        "chunks": chunks,
        "metrics": {
            each.name: {"kind": each.kind, "better": each.better, "needs": list(each.needs), "about": each.about}
            for each in metrics
        },
        "weights": dict(weights or {}),
        "left_out": dict(left_out or {}),
        "videos": [_video(each) for each in judged],
        "failed": dict(failed or {}),
        "published": {
            "source": SOURCE,
            "vde": {name: dict(zip(PUBLISHED_VDE, row)) for name, row in PUBLISHED.items()},
        },
    }


def _video(judged: Judged) -> Report:
    video = judged.video
    return {
        "path": str(video.path),
        "frames": video.frames,
        "fps": video.fps,
        "size": list(video.size),
        "chunk_frames": judged.chunk_frames,
        "looked_at": judged.looked_at,
        "scores": judged.scores,
        "drift": {
            name: {measure: _finite(getattr(each, measure)) for measure in MEASURES}
            for name, each in judged.drift.items()
        },
        "whole": judged.whole,
        "failed": judged.failed,
        "seconds": {name: round(seconds, 3) for name, seconds in judged.seconds.items()},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def means(found: Report) -> dict[str, dict[str, float | None]]:
    """By name of scores, the mean over the videos that have it of `whole` and of each measure of drift."""
    names = dict.fromkeys(name for each in found["videos"] for name in (*each["scores"], *each["whole"]))
    return {
        name: {"whole": _mean(each["whole"].get(name) for each in found["videos"])}
        | {measure: _mean(each["drift"].get(name, {}).get(measure) for each in found["videos"]) for measure in MEASURES}
        for name in names
    }


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def rows(found: Report, proxies: bool) -> list[tuple[str, ...]]:
    """The lines of the table of real metrics, or of that of proxies: texts under HEADS."""
    curves: dict[str, list[float]] = {}
    if len(found["videos"]) == 1:
        curves = found["videos"][0]["scores"]
    return [
        (name, *(_text(of[each], each) for each in ("whole", *MEASURES)), sparkline(curves.get(name, [])))
        for name, of in means(found).items()
        if name.startswith(PROXY) == proxies
    ]


def _text(value: float | None, measure: str = "") -> str:
    """Relative changes in per cent, with their sign if they have one."""
    if value is None:
        return "–"
    return {"late": f"{value:.2%}", "slope": f"{value:+.2%}"}.get(measure, f"{value:.4g}")


def sparkline(scores: Sequence[float]) -> str:
    """The scores of chunks, one character each, from their lowest to their highest.

    Example:
        >>> sparkline([0.0, 0.5, 1.0])
        '▁▅█'
    """
    if not scores:
        return ""
    low, span = _axis(scores)
    return "".join(BARS[min(int((score - low) / span * len(BARS)), len(BARS) - 1)] for score in scores)


def _axis(scores: Sequence[float]) -> tuple[float, float]:
    """Where the axis of a curve begins, and how much it spans."""
    low, high = min(scores), max(scores)
    span = max(high - low, LEAST_SPAN * max(abs(low), abs(high)), 1e-9)
    return (low + high - span) / 2, span


def published_rows(found: Report) -> list[tuple[str, ...]]:
    """The published VDE of other models above ours; none unless one of the published five was computed."""
    of = means(found)
    if not any(name in of for name in PUBLISHED_VDE):
        return []
    ours = tuple(_text(of.get(name, {}).get("linear")) for name in PUBLISHED_VDE)
    return [*((name, *map(_text, row)) for name, row in PUBLISHED.items()), ("these videos", *ours)]


def tables(found: Report) -> list[Table]:
    """For a terminal: real metrics, what is published beside them, proxies."""
    many = f", mean of {len(found['videos'])} videos" if len(found["videos"]) > 1 else ""
    made = []
    for title, heads, lines in (
        (f"Real metrics, {found['chunks']} chunks{many}", HEADS, rows(found, proxies=False)),
        (f"VDE, published: {SOURCE}", ("model", *PUBLISHED_VDE), published_rows(found)),
        (f"Proxies without weights, {found['chunks']} chunks{many}", HEADS, rows(found, proxies=True)),
    ):
        if lines:
            drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for i, head in enumerate(heads):
                drawn.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
            for line in lines:
                drawn.add_row(*line)
            made.append(drawn)
    return made


def failures(found: Report) -> list[str]:
    """One line for each video, metric of a video, and drift that could not be had."""
    lines = list(found["failed"].values())
    for video in found["videos"]:
        lines += [f"{video['path']}: {name}: {reason}" for name, reason in video["failed"].items()]
        lines += [
            f"{video['path']}: {name}: its first chunk scores 0, to which no drift is relative"
            for name, drift in video["drift"].items()
            if drift["linear"] is None
        ]
    return lines


def html(found: Report) -> str:
    """One page that needs no network: tables, the curve of every metric over time, remarks."""
    videos, sections = found["videos"], []
    for title, proxies in (("Real metrics", False), ("Proxies without weights", True)):
        if lines := rows(found, proxies):
            drawn = table(HEADS[:-1], [line[:-1] for line in lines])
            sections.append(f'<section class="wide"><h2>{title}</h2>{drawn}</section>')
            sections += [_curve(found, line[0]) for line in lines]
    if lines := published_rows(found):
        drawn = table(("model", *PUBLISHED_VDE), lines)
        sections.append(f'<section class="wide"><h2>VDE, published</h2><p>{escape(SOURCE)}</p>{drawn}</section>')
    if said := failures(found) + [f"{name}: {reason}" for name, reason in found["left_out"].items()]:
        items = "".join(f"<li>{escape(line)}</li>" for line in said)
        sections.append(f'<section class="wide"><h2>Not in the tables</h2><ul class="quiet">{items}</ul></section>')
    shown = legend((each["path"], COLOURS[i % len(COLOURS)]) for i, each in enumerate(videos))
    top = f"<p>{found['chunks']} chunks. What the numbers are: docs/quality.md.</p>{shown}"
    return page("Quality of videos", [top, f'<div class="grid2">{"".join(sections)}</div>'])


def _curve(found: Report, name: str) -> str:
    """A section with the scores of every video's chunks over its time; nothing for one number a video."""
    videos = [(i, each) for i, each in enumerate(found["videos"]) if name in each["scores"]]
    if not videos:
        return ""
    low, span = _axis([score for _, each in videos for score in each["scores"][name]])
    seconds = [each["chunk_frames"] / (each["fps"] or 1.0) for _, each in videos]
    most = max(a * len(each["scores"][name]) for a, (_, each) in zip(seconds, videos))
    plot = Plot((0.0, most), low + 1.05 * span, "s", "", low=low - 0.05 * span)
    for length, (i, each) in zip(seconds, videos):
        scores = each["scores"][name]
        colour = COLOURS[i % len(COLOURS)]
        middles = [(j + 0.5) * length for j in range(len(scores))]
        plot.line(middles, scores, colour, each["path"])
        plot.parts += [
            f'<circle cx="{plot.at_x(x):.1f}" cy="{plot.at_y(y):.1f}" r="2.4" fill="{colour}">'
            f"<title>{number(x)} s: {y:.5g}</title></circle>"
            for x, y in zip(middles, scores)
        ]
    known = registered().get(name.removesuffix(ANCHORED))
    about = "how like the first chunk each one is" if name.endswith(ANCHORED) else known.about if known else ""
    return f'<section><h2>{escape(name)}</h2><p class="quiet">{escape(about)}</p>{plot}</section>'
