"""Is B slower than A? An interval for the ratio of their times, and what may be said of it.

The interval is a bootstrap over rounds (95 %). With a margin m, ratios from 1 / (1 + m) to 1 + m are of no interest:

SAME     the whole interval lies within the margin
FASTER   the whole interval lies below it
SLOWER   the whole interval lies above it
UNSURE   it reaches over an edge, or rests on too few rounds: measure longer, or on a quieter machine

Rounds of one interleaved run are paired: what disturbs a round disturbs both sides, and the ratio is formed within it.
Runs made at different times are not. There the machine itself, which every run measures in every round, says whether
it stayed the same: if the copy or the matmul that bounds a row is as fast as before, times are compared as they stand.
If not, nobody can say how much of that the kernel felt, and the interval covers the comparison as it stands and the one
in units of that copy or matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MARGIN = 0.05
RESAMPLES = 2000
ENOUGH = 10  # rounds; over fewer a bootstrap's interval is too narrow


class Interval(NamedTuple):
    """Of time B over time A."""

    ratio: float
    low: float
    high: float
    rounds: int

    def verdict(self, margin: float = MARGIN) -> str:
        if self.rounds < ENOUGH:
            return "UNSURE"
        if 1 / (1 + margin) <= self.low and self.high <= 1 + margin:
            return "SAME"
        if self.high < 1 / (1 + margin):
            return "FASTER"
        return "SLOWER" if self.low > 1 + margin else "UNSURE"


def paired(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The median of the rounds' ratios; a[i] and b[i] were measured one right after the other."""
    ratios = np.array(b) / np.array(a)
    draws = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    return _interval(float(np.median(ratios)), np.median(ratios[draws], axis=1), len(ratios))


def unpaired(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The ratio of the medians."""
    generator = np.random.default_rng(0)
    medians = [
        np.median(x[generator.integers(len(x), size=(RESAMPLES, len(x)))], axis=1) for x in (np.array(a), np.array(b))
    ]
    return _interval(float(np.median(b) / np.median(a)), medians[1] / medians[0], min(len(a), len(b)))


def _interval(ratio: float, draws: np.ndarray, rounds: int) -> Interval:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(ratio, float(low), float(high), rounds)


def recorded(a: Sequence[float], b: Sequence[float], drift: float, margin: float = MARGIN) -> Interval:
    """Times of two runs, between which the machine became slower by this factor at what bounds them."""
    plain = unpaired(a, b)
    if 1 / (1 + margin / 2) <= drift <= 1 + margin / 2:
        return plain
    return Interval(plain.ratio, plain.low / max(1.0, drift), plain.high / min(1.0, drift), plain.rounds)
