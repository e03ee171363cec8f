"""Plots as SVG: axes, areas, lines, bars. No library draws them, so that the page is small and needs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

COLOURS = (
    "#e8a33d", "#3fa7a0", "#6c7ae0", "#d9604f", "#7fb24a", "#b06fc4", "#4f9bd9", "#c98a5a", "#8d96a8", "#d07aa6",
)  # fmt: skip
WIDTH, HEIGHT = 640, 230
WIDE = 1300  # of a plot that takes the whole page
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 18, 30


def number(value: float) -> str:
    """Short: 3 digits, and k or M for many."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    step = 10 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Plot:
    """An x axis, a y axis, and what is drawn between them.

    Args:
        x: (lowest, highest).
        y: the highest; as low as `low`: there is no axis.
        x_label, unit: what they are.
        height, width: of the whole, in pixels.
        low: the lowest y, below `y`.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: float,
        x_label: str,
        unit: str,
        height: int = HEIGHT,
        width: int = WIDTH,
        low: float = 0.0,
    ):
        self.x0, self.x1 = x if x[1] > x[0] else (x[0], x[0] + 1.0)
        self.y0, self.y1 = low, y if y > low else low + 1.0
        self.height, self.width, self.parts = height, width, list[str]()
        for value in ticks(low, y) if y > low else ():
            at, label = self.at_y(value), format(value, ".6g") if low else number(value)
            self.parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{label}</text>'
            )
        for value in ticks(self.x0, self.x1, 7):
            at = self.at_x(value)
            self.parts.append(f'<text x="{at:.1f}" y="{height - 14}" text-anchor="middle">{number(value)}</text>')
        self.parts.append(
            f'<text class="label" x="{width - RIGHT}" y="{height - 2}" text-anchor="end">{escape(x_label)}</text>'
            f'<text class="label" x="2" y="9">{escape(unit)}</text>'
        )

    def at_x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        room = self.height - TOP - BOTTOM
        return TOP + room - (value - self.y0) / (self.y1 - self.y0) * room

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, title: str = "") -> None:
        points = " ".join(f"{self.at_x(x):.1f},{self.at_y(y):.1f}" for x, y in zip(xs, ys) if math.isfinite(y))
        self.parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{points}">'
            f"<title>{escape(title)}</title></polyline>"
        )

    def stack(self, xs: Sequence[float], series: Sequence[tuple[str, Sequence[float], str]]) -> None:
        """Areas upon each other: (name, values, colour), the lowest first."""
        below = [0.0] * len(xs)
        for name, values, colour in series:
            above = [a + b for a, b in zip(below, values)]
            there = [(x, y) for x, y in zip(xs, above)] + [(x, y) for x, y in zip(reversed(xs), reversed(below))]
            points = " ".join(f"{self.at_x(x):.1f},{self.at_y(y):.1f}" for x, y in there)
            self.parts.append(f'<polygon fill="{colour}" points="{points}"><title>{escape(name)}</title></polygon>')
            below = above

    def box(self, x: float, width: float, y: float, height: float, colour: str, title: str, text: str = "") -> None:
        """A rectangle: x and width on the axis, y and height in pixels."""
        left, right = self.at_x(x), self.at_x(x + width)
        shown = ""
        if text and right - left > 6.2 * len(text) + 6:
            shown = f'<text class="on" x="{left + 4:.1f}" y="{y + height - 4.5:.1f}">{escape(text)}</text>'
        self.parts.append(
            f'<rect x="{left:.2f}" width="{max(right - left, 0.6):.2f}" y="{y:.1f}" height="{height}" fill="{colour}" '
            f'rx="1.5"><title>{escape(title)}</title></rect>{shown}'
        )

    def __str__(self) -> str:
        return f'<svg viewBox="0 0 {self.width} {self.height}" role="img">{"".join(self.parts)}</svg>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """(name, colour) of each."""
    items = "".join(f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in entries)
    return f'<ul class="legend">{items}</ul>'


def bars(rows: Sequence[tuple[str, float, float, float, str]], unit: str) -> str:
    """(name, p50, p95, p99, colour) of each: a bar to p50, a line to p95, a dot at p99, on one axis."""
    most = max((row[3] for row in rows), default=1.0) or 1.0
    height, left = 22 * len(rows) + 34, 130
    scale = (WIDTH - left - 170) / most
    parts = []
    for i, (name, p50, p95, p99, colour) in enumerate(rows):
        y = 8 + 22 * i
        parts.append(
            f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left}" y="{y}" width="{max(scale * p50, 0.6):.1f}" height="14" fill="{colour}" rx="2"/>'
            f'<line class="ink" x1="{left + scale * p50:.1f}" x2="{left + scale * p95:.1f}" y1="{y + 7}" y2="{y + 7}"/>'
            f'<circle class="dot" cx="{left + scale * p99:.1f}" cy="{y + 7}" r="2.6"/>'
            f'<text x="{left + scale * p99 + 7:.1f}" y="{y + 11}">{number(p50)} · {number(p95)} · {number(p99)}</text>'
        )
    parts.append(f'<text class="label" x="{left}" y="{height - 6}">{escape(unit)}: p50, p95 and p99 per block</text>')
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
