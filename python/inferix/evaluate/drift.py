"""From the scores m_1 ... m_N of a video's N chunks to what they say of its drift.

`vde` is the published measure, with its quirks: it weighs the second chunk most and the last one least, it loses the
sign, and it grows with N. `late_drift` and `slope` say what one would rather know of a long video: how far off its end
is, and in which direction it goes. `anchored` sees what neither does from a score within a chunk: a subject that is
swapped where two chunks meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch


@dataclass(frozen=True)
class Drift:
    """All measures of one sequence of scores; infinite where the first chunk's score is 0.

    Attributes:
        linear, log: `vde` with these weights.
        late: `late_drift`.
        slope: `slope`.
    """

    linear: float
    log: float
    late: float
    slope: float


def drift(scores: Sequence[float]) -> Drift:
    """Every measure of the scores of at least two chunks.

    Example:
        >>> drift([50.0, 50.0, 25.0])
        Drift(linear=0.5, log=0.0, late=0.333..., slope=-0.5...)
    """
    return Drift(vde(scores), vde(scores, "log"), late_drift(scores), slope(scores))


def vde(scores: Sequence[float], weights: Literal["linear", "log"] = "linear") -> float:
    """Video Drift Error as published: sum over i = 2 ... N of w_i |m_i - m_1| / m_1.

    w_i = N - i + 1 (linear) or ln(N - i + 1) (log), so that the last chunk counts 1, or not at all. In float32, as the
    published code computes it (github.com/alibaba-damo-academy/Inferix, LV-Bench/vde.py): also 0 for fewer than two
    chunks, and infinite if m_1 is 0. BlockVid, arXiv 2511.22973.

    Raises:
        ValueError: there are no such weights.

    Example:
        >>> round(vde([50.0, 49.0, 48.0]), 6)  # 2 * 0.02 + 1 * 0.04
        0.08
        >>> round(vde([50.0, 49.0, 48.0], "log"), 6)  # ln 2 * 0.02
        0.013863
    """
    if weights not in ("linear", "log"):
        raise ValueError(f"weights must be one of linear, log, got {weights!r}")
    count = len(scores)
    if count < 2:
        return 0.0
    m = torch.tensor(list(scores), dtype=torch.float32)
    if m[0] == 0:
        return math.inf
    w = count - torch.arange(2, count + 1, dtype=torch.float32) + 1
    return float(torch.sum((w if weights == "linear" else w.log()) * ((m[1:] - m[0]).abs() / m[0])))


def late_drift(scores: Sequence[float]) -> float:
    """Late-weighted drift: sum over i = 2 ... N of (i - 1) |m_i - m_1| / (|m_1| sum of (i - 1)).

    The weighted mean of the relative changes, so that it hardly depends on N; the last chunk weighs most. 0.1: late in
    the video scores are 10 % off those of its beginning.

    Raises:
        ValueError: there are fewer than two scores.

    Example:
        >>> late_drift([50.0, 50.0, 45.0])  # (1 * 0 + 2 * 0.1) / 3
        0.066...
    """
    m = _at_least_two(scores)
    if m[0] == 0:
        return math.inf
    return float(np.average(np.abs(m[1:] / m[0] - 1), weights=np.arange(1, len(m))))


def slope(scores: Sequence[float]) -> float:
    """Signed slope: of the line through m_i / |m_1| at (i - 1) / (N - 1), by least squares.

    The relative change from the first chunk to the last, if it were even: -0.1: scores fall by 10 % of the first one.

    Raises:
        ValueError: there are fewer than two scores.

    Example:
        >>> round(slope([50.0, 49.0, 48.0]), 6)
        -0.04
    """
    m = _at_least_two(scores)
    if m[0] == 0:
        return math.inf
    return float(np.polyfit(np.linspace(0, 1, len(m)), m / abs(m[0]), 1)[0])


def consistency(embeddings: np.ndarray) -> float:
    """How alike the frames of a clip are: mean over t >= 2 of (max(0, cos(f_t, f_t-1)) + max(0, cos(f_t, f_1))) / 2.

    VBench's subject and background consistency (arXiv 2311.17982), from float [T, D], T >= 2, a row for each frame.

    Example:
        >>> consistency(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        0.5
    """
    rows = _unit(embeddings)
    before, first = (rows[1:] * rows[:-1]).sum(1), rows[1:] @ rows[0]
    return float(np.mean((np.maximum(before, 0) + np.maximum(first, 0)) / 2))


def anchored(chunks: Sequence[np.ndarray]) -> list[float]:
    """How like the first chunk each one is: a_i = cos(e_i, e_1), with e_i the mean of chunk i's embeddings at length 1.

    a_1 = 1; of these scores drift is measured as of any others. `consistency` is within a chunk, and blind to a
    subject that is another one from the next chunk on; this sees it. Chunks are float [T, D] each.

    Example:
        >>> anchored([np.array([[1.0, 0.0]]), np.array([[3.0, 4.0]])])
        [1.0, 0.6...]
    """
    means = _unit(np.stack([_unit(chunk).mean(0) for chunk in chunks]))
    return [float(cosine) for cosine in means @ means[0]]


def _unit(rows: np.ndarray) -> np.ndarray:
    """At length 1; a row of zeros stays one."""
    rows = np.asarray(rows, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _at_least_two(scores: Sequence[float]) -> np.ndarray:
    if len(scores) < 2:
        raise ValueError(f"scores must be of at least 2 chunks, got {len(scores)}")
    return np.asarray(scores, np.float64)
