"""A line of a sweep: cost along an axis, and the exponent that is fitted through it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .rows import Row

BYTES = "KV bytes"  # a row's metric
RESAMPLES = 500


class Series(NamedTuple):
    """One line of an axis' plot."""

    axis: str
    name: str
    x: list[float]
    rows: list[Row]

    @property
    def medians(self) -> list[float]:
        return [row.median for row in self.rows]

    def exponent(self) -> tuple[float, float, float]:
        """e of cost ~ x^e with a 95 % interval, a bootstrap over rounds.

        Fitted over the upper half of the axis, as it is drawn: at its lower end a call's fixed cost is what is seen.
        """
        rounds, start = min(len(row.seconds) for row in self.rows), (self.x[0] * self.x[-1]) ** 0.5
        kept = [(x, row.seconds[:rounds]) for x, row in zip(self.x, self.rows) if x >= start]
        x, seconds = np.log([x for x, _ in kept]), np.array([s for _, s in kept])

        def fit(samples: np.ndarray) -> float:
            return float(np.polyfit(x, np.log(np.median(samples, axis=1)), 1)[0])

        draws = np.random.default_rng(0).integers(rounds, size=(RESAMPLES, rounds))
        low, high = np.quantile([fit(seconds[:, draw]) for draw in draws], (0.025, 0.975))
        return fit(seconds), float(low), float(high)
