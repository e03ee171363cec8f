"""Two videos that ought to be alike, such as one with a quantized cache and one without, compared chunk by chunk.

A mean hides the chunk that people see, so the worst one is shown beside it. Two runs of a world that differ by rounding
part sooner or later: from that frame on a metric compares two different stories. So it is said where they part, the
first two seconds are judged by themselves, and the same numbers of two other videos, such as two seeds in fp32, can
stand below them: what different stories come to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from inferix_kernels import __version__

from .metric import lacking
from .perceptual import PAIR_METRICS, PairMetric
from .video import CHUNKS, FRAMES, Video, beginning, chunks, open_video

OPENING = 2.0  # seconds that are judged by themselves
GRID = (18, 32)  # cells of a frame, rows and columns, whose mean colours are compared: noise is averaged away
PARTED = 20.0  # of 255: more is something else. On the tiny world cache formats stay at 2, other stories at 40 and more
FOR_GOOD = 0.5  # seconds for which some cell must do so


@dataclass(frozen=True)
class Compared:
    """What was found of two videos.

    Attributes:
        video, reference: the files.
        chunk_frames: frames of each chunk; those left over at the end were not compared.
        looked_at: of them, consecutive from the middle, by the metrics.
        scores: by metric, one for each chunk.
        opening: by metric, of all frames of the first two seconds: the mean of parts of at most 12 frames.
        apart: of each frame, how far the mean colours of the most different of 18 x 32 cells lie apart: the root mean
            square of red, green and blue, 0 to 255.
        parted: the first frame from which on they show different things, see `parting`; None: there is none.
        seconds_per_frame: by metric, wall-clock.
        failed: by metric, why there is no number.
    """

    video: Video
    reference: Video
    chunk_frames: int
    looked_at: int
    scores: dict[str, list[float]]
    opening: dict[str, float]
    apart: list[float]
    parted: int | None
    seconds_per_frame: dict[str, float]
    failed: dict[str, str]


def chosen_pair_metrics(names: Sequence[str] | None) -> tuple[list[PairMetric], dict[str, str]]:
    """The metrics of two videos of these names; of no names, all that can be had.

    Returns:
        Them, and by name why others were left out.

    Raises:
        ValueError: there is none of a name that was given; ImportError: a package that it needs is missing.

    Example:
        >>> [metric.name for metric in chosen_pair_metrics(["psnr"])[0]]
        ['psnr']
    """
    if names is not None:
        for name in names:
            if name not in PAIR_METRICS:
                raise ValueError(f"metrics must be of {', '.join(PAIR_METRICS)}, got {name!r}")
            if reason := lacking(PAIR_METRICS[name].packages):
                raise ImportError(f"{name} {reason}")
        return [PAIR_METRICS[name] for name in dict.fromkeys(names)], {}
    left_out = {name: reason for name, each in PAIR_METRICS.items() if (reason := lacking(each.packages))}
    return [each for name, each in PAIR_METRICS.items() if name not in left_out], left_out


def apart(frames: np.ndarray, reference: np.ndarray) -> list[float]:
    """Of each of two frames [T, rows, columns, 3], uint8, how far their most different pixels lie apart, 0 to 255.

    Example:
        >>> frame = np.zeros((1, 18, 32, 3), np.uint8)
        >>> apart(frame + np.uint8(7), frame)
        [7.0]
    """
    off = np.square(frames.astype(np.float32) - reference).mean(-1)
    return [float(value) for value in np.sqrt(off.max((1, 2)))]


def parting(apart: Sequence[float], fps: float) -> int | None:
    """The first frame of the first half second in which every frame is more than 20 apart; None: there is none.

    A figure that arrives a moment later is no other story; a figure that goes elsewhere is, however small.

    Example:
        >>> parting([1.0, 2.0, 25.0, 3.0, 40.0, 41.0, 44.0], fps=4.0), parting([1.0, 90.0, 2.0], fps=4.0)
        (4, None)
    """
    needed = max(2, math.ceil(FOR_GOOD * fps))
    run = 0
    for i, value in enumerate(apart):
        run = run + 1 if value > PARTED else 0
        if run == needed:
            return i + 1 - needed
    return None


def compare(
    path: str | Path,
    reference: str | Path,
    metrics: Sequence[PairMetric],
    number: int = CHUNKS,
    most: int | None = FRAMES,
    on_chunk: Callable[[], object] = lambda: None,
    argument: str = "video",
) -> Compared:
    """Compare a video with its reference.

    Args:
        number: of chunks.
        most: frames of each that are looked at; None: all.
        on_chunk: called after each.
        argument: of the caller, that errors name for `path`; "reference" is named for the other.

    Raises:
        ValueError: one can not be read or is too short, or they differ in frames, size or rate. What only one metric
            can not do is in `failed`.

    Example:
        >>> found = compare("demo.mp4", "demo.mp4", chosen_pair_metrics(["psnr"])[0], number=2)
        >>> found.scores["psnr"], found.parted
        ([100.0, 100.0], None)
    """
    video, other = open_video(path, argument), open_video(reference, "reference")
    for what in ("size", "frames", "fps"):
        if getattr(video, what) != getattr(other, what):
            raise ValueError(
                f"{argument}: {str(video.path)!r} must have the {what} of its reference {str(other.path)!r}, "
                f"{getattr(other, what)}, got {getattr(video, what)}"
            )
    if not video.fps:
        raise ValueError(f"{argument}: {str(video.path)!r} must say how many frames a second it has, got 0")
    asked = {metric.name: _Asked(metric, video.fps) for metric in metrics}
    differences: list[float] = []
    pairs = zip(
        chunks(video, number, most, (GRID,), argument), chunks(other, number, most, (GRID,), "reference"), strict=True
    )
    for ours, theirs in pairs:
        for each in asked.values():
            each.chunks.append(each.score(ours.frames, theirs.frames))
        differences += apart(ours.small[GRID], theirs.small[GRID])
        on_chunk()
    wanted = max(1, round(OPENING * video.fps))
    for parts in zip(beginning(video, wanted, argument), beginning(other, wanted, "reference"), strict=True):
        for each in asked.values():
            each.opening.append(each.score(*parts))
    failed = {name: each.failed for name, each in asked.items() if each.failed}
    length = video.frames // number
    return Compared(
        video,
        other,
        length,
        length if most is None else min(most, length),
        {name: each.chunks for name, each in asked.items() if name not in failed},
        {name: float(np.mean(each.opening)) for name, each in asked.items() if name not in failed},
        differences,
        parting(differences, video.fps),
        {name: each.seconds / each.frames for name, each in asked.items() if name not in failed},
        failed,
    )


class _Asked:
    """A metric, what it said of the chunks and of the parts of the beginning, and how long it took."""

    def __init__(self, metric: PairMetric, fps: float) -> None:
        self.metric, self.fps = metric, fps
        self.chunks: list[float] = []
        self.opening: list[float] = []
        self.seconds, self.frames, self.failed = 0.0, 0, ""

    def score(self, frames: np.ndarray, reference: np.ndarray) -> float:
        """What it says of these frames; not a number once it refused any."""
        if self.failed:
            return math.nan
        begun = time.perf_counter()
        try:
            value = self.metric.score(frames, reference, self.fps)
            if not math.isfinite(value):
                raise ValueError(f"it must give a finite number, got {value}")
        except (ValueError, RuntimeError) as error:  # cvvdp and VMAF let torch say that frames are too small
            self.failed = " ".join(str(error).split())
            return math.nan
        self.seconds += time.perf_counter() - begun
        self.frames += len(frames)
        return value


Report = Mapping[str, Any]


def report(
    found: Compared,
    metrics: Sequence[PairMetric],
    floor: Compared | None = None,
    left_out: dict[str, str] | None = None,
) -> Report:
    """Everything that was found, as JSON's types.

    Args:
        floor: of two other videos, whose stories differ.
        left_out: metrics that were not asked, by name, and why.
    """
    return {
        "inferix": __version__,
        "metrics": {each.name: {"unit": each.unit, "about": each.about} for each in metrics},
        "pair": _facts(found),
        "floor": None if floor is None else _facts(floor),
        "left_out": dict(left_out or {}),
    }


def _facts(found: Compared) -> Report:
    return {
        "video": str(found.video.path),
        "reference": str(found.reference.path),
        "frames": found.video.frames,
        "fps": found.video.fps,
        "size": list(found.video.size),
        "chunk_frames": found.chunk_frames,
        "looked_at": found.looked_at,
        "scores": found.scores,
        "mean": {name: float(np.mean(scores)) for name, scores in found.scores.items()},
        "worst": {name: {"chunk": int(np.argmin(s)), "score": min(s)} for name, s in found.scores.items()},
        "opening": found.opening,
        "parted": found.parted,
        "apart": [round(value, 2) for value in found.apart],
        "seconds_per_frame": {name: round(value, 4) for name, value in found.seconds_per_frame.items()},
        "failed": found.failed,
    }


def table(found: Report) -> Table:
    """For a terminal: a line for each metric, and below it that of the floor, if there is one."""
    pair = found["pair"]
    title = f"{Path(pair['video']).name} beside {Path(pair['reference']).name}, {pair['looked_at']} frames a chunk"
    drawn = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, head in enumerate(("metric", "mean", "worst chunk", "at", "first 2 s", "s/frame")):
        drawn.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    for name, facts in found["metrics"].items():
        for each, shown in ((pair, f"{name}, {facts['unit']}"), (found["floor"], "  floor")):
            if each is not None and name in each["scores"]:
                drawn.add_row(shown, *_line(each, name))
    return drawn


def _line(each: Report, name: str) -> list[str]:
    worst, second = each["worst"][name], each["chunk_frames"] / each["fps"]
    values = (each["mean"][name], worst["score"], each["opening"][name])
    mean, least, opening = (f"{value:.2f}" for value in values)
    return [mean, least, f"{worst['chunk'] * second:.1f} s", opening, f"{each['seconds_per_frame'][name]:.2g}"]


def remarks(found: Report) -> list[str]:
    """Where the trajectories part, and one line for every number that could not be had."""
    lines = []
    for name in ("pair", "floor"):
        if (each := found[name]) is None:
            continue
        which = f"{Path(each['video']).name} and {Path(each['reference']).name}"
        parted = each["parted"]
        lines.append(
            f"{which} do not part"
            if parted is None
            else f"{which} part at frame {parted}, {parted / each['fps']:.2f} s"
        )
        lines += [f"{which}: {metric}: {reason}" for metric, reason in each["failed"].items()]
    return lines + [f"not {name}: {reason}" for name, reason in found["left_out"].items()]
