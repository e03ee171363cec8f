"""A video through its metrics: the scores of its chunks, and what they say of its drift."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .drift import Drift, anchored, consistency, drift
from .metric import Metric, lacking, registered
from .video import CHUNKS, FRAMES, Chunk, Video, chunks, open_video
from .weights import WeightsDir

ANCHORED = ":anchored"  # ends the name of the scores that compare a chunk with the first one


@dataclass(frozen=True)
class Judged:
    """What was found of one video.

    Attributes:
        video: the file.
        chunk_frames: frames of each chunk; those left over at the video's end were not judged.
        looked_at: of them, consecutive from the middle, by the metrics that see chunks; the others see every frame.
        scores: by metric, one for each chunk.
        drift: of these scores.
        whole: by metric, one number for the whole video: the mean over its chunks; of embeddings, the consistency of
            all that were looked at.
        failed: by metric, why there is no number.
        seconds: by metric, wall-clock.
    """

    video: Video
    chunk_frames: int
    looked_at: int
    scores: dict[str, list[float]] = field(default_factory=dict)
    drift: dict[str, Drift] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def chosen(names: Collection[str] | None, weights: WeightsDir) -> tuple[list[Metric], dict[str, str]]:
    """The metrics of these names; of no names, all that can be had and are not off by default.

    Returns:
        Them, and by name why others were left out.

    Raises:
        ValueError: there is none of a name that was given, or a file that it needs is missing; ImportError: a package.

    Example:
        >>> [metric.name for metric in chosen(["proxy:clarity"], weights)[0]]
        ['proxy:clarity']
    """
    known = registered()
    for name in names or ():
        if name not in known:
            raise ValueError(f"metrics must be of {', '.join(known)}, got {name!r}")
    if names is not None:
        wanted = [known[name] for name in dict.fromkeys(names)]
        for metric in wanted:
            if reason := lacking(metric.packages):
                raise ImportError(f"{metric.name} {reason}")
            for file in metric.needs:
                weights.path(file)
        return wanted, {}
    found, left_out = [], {}
    for metric in known.values():
        if not metric.default:
            left_out[metric.name] = "off unless it is named"
        elif reason := lacking(metric.packages) or _missing(metric, weights):
            left_out[metric.name] = reason
        else:
            found.append(metric)
    return found, left_out


def _missing(metric: Metric, weights: WeightsDir) -> str:
    try:
        for file in metric.needs:
            weights.path(file)
    except ValueError as error:
        return str(error)
    return ""


def rounds(metrics: Sequence[Metric]) -> list[list[Metric]]:
    """The metrics that a video is decoded for at a time: those that load weight files one by one, so that never more
    than one's networks are in memory; all others together, in the first round.

    Example:
        >>> [[metric.name for metric in each] for each in rounds(chosen(["proxy:exposure", "proxy:cuts"], weights)[0])]
        [['proxy:exposure', 'proxy:cuts']]
    """
    light = [metric for metric in metrics if not metric.needs]
    return [*([light] if light else []), *([metric] for metric in metrics if metric.needs)]


def judge(
    path: str | Path,
    metrics: Sequence[Metric],
    weights: WeightsDir,
    number: int = CHUNKS,
    most: int | None = FRAMES,
    on_chunk: Callable[[], object] = lambda: None,
    argument: str = "videos",
) -> Judged:
    """Judge a video by these metrics, decoding it once for each of their `rounds`.

    Args:
        number: of chunks, at least 2.
        most: frames of each that are looked at; None: all.
        on_chunk: called after each, in each round.
        argument: of the caller, that errors name for `path`.

    Raises:
        ValueError: the video can not be read, or is too short. What only one metric can not do is in `failed`.

    Example:
        >>> found = judge("clip.mp4", *chosen(["proxy:exposure"], weights)[:1], weights)
        >>> len(found.scores["proxy:exposure"]), found.failed
        (10, {})
    """
    video = open_video(path, argument)
    length = video.frames // number
    judged = Judged(video, length, length if most is None else min(most, length))
    for metric in metrics:
        have = judged.looked_at if metric.sees == "chunk" else video.frames
        if have < metric.least:
            where = "in a chunk" if metric.sees == "chunk" else "in the video"
            judged.failed[metric.name] = f"needs at least {metric.least} frames {where}, got {have}"
    for together in rounds(metrics):
        sizes = dict.fromkeys(metric.size for metric in together if metric.size)
        try:
            _judge(judged, together, weights, chunks(video, number, most, tuple(sizes), argument), on_chunk)
        finally:
            weights.release()
    return judged


def _judge(
    judged: Judged,
    metrics: Sequence[Metric],
    weights: WeightsDir,
    decoded: Iterable[Chunk],
    on_chunk: Callable[[], object],
) -> None:
    """One round."""
    by_chunk = {metric: list[float | np.ndarray]() for metric in metrics if metric.sees == "chunk"}
    of_video = {metric: list[np.ndarray]() for metric in metrics if metric.sees == "video"}
    for chunk in decoded:
        for metric, found in by_chunk.items():
            if metric.name not in judged.failed:
                found.append(_score(judged, metric, chunk.frames, weights))
        for metric, kept in of_video.items():
            assert metric.size is not None
            kept.append(chunk.small[metric.size])
        on_chunk()
    for metric, found in by_chunk.items():
        if metric.name not in judged.failed:
            _conclude(judged, metric, found)
    for metric, kept in of_video.items():
        if metric.name not in judged.failed:
            number_of_it = _score(judged, metric, np.concatenate(kept), weights)
            if metric.name not in judged.failed:
                judged.whole[metric.name] = float(number_of_it)


def _score(judged: Judged, metric: Metric, frames: np.ndarray, weights: WeightsDir) -> float | np.ndarray:
    """What a metric says of frames; if it refuses them, or what it says is no number, that is noted in `failed`."""
    begun = time.perf_counter()
    try:
        found = metric.score(frames, weights)
        if not np.isfinite(found).all():
            raise ValueError(f"it must give finite numbers, got {np.asarray(found).ravel()[:3]} ...")
    except (ValueError, RuntimeError, MemoryError) as error:  # torch says so of frames that are too small or too many
        judged.failed[metric.name] = " ".join(str(error).split()) or type(error).__name__
        found = math.nan
    judged.seconds[metric.name] = judged.seconds.get(metric.name, 0.0) + time.perf_counter() - begun
    return found


def _conclude(judged: Judged, metric: Metric, found: Sequence[float | np.ndarray]) -> None:
    """From what a metric said of every chunk to scores, drift, and one number for the video."""
    if metric.embeds:
        embeddings = [np.asarray(each) for each in found]
        scores = {
            metric.name: [consistency(each) for each in embeddings],
            metric.name + ANCHORED: anchored(embeddings),
        }
        judged.whole[metric.name] = consistency(np.concatenate(embeddings))
    else:
        scores = {metric.name: [float(each) for each in found]}
        judged.whole[metric.name] = float(np.mean(scores[metric.name]))
    judged.scores.update(scores)
    judged.drift.update({name: drift(each) for name, each in scores.items()})
