"""Figures of rates and of sweeps, for papers and READMEs. matplotlib comes with the extra `bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferix_kernels._install import install
from inferix_kernels.files import atomic_write

from .rows import Row
from .series import BYTES, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, THEIRS, PEAK, INK = "#c8452b", "#8a9aa8", "#3b3b3b", "#222222"
TONES = ("#c8452b", "#2f6f9f", "#5b8c3a", "#8a5a9e", "#b8892b", "#6b7280")  # of lines
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 160,
    "savefig.bbox": "tight",
    "svg.hashsalt": "inferix",  # the same figure, the same bytes
}


class NoPlot(ValueError):
    """matplotlib is not installed."""


def figure(rows: int, columns: int, heights: Sequence[float], width: float = 3.6) -> tuple[Figure, Any]:
    """A grid of panels; heights in inches."""
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:
        raise NoPlot(f"a plot needs matplotlib: {install('bench')}") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    return pyplot.subplots(
        rows,
        columns,
        figsize=(width * columns, sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )


def draw_rates(rows: Sequence[Row], path: Path, caption: str) -> None:
    """A panel per case: contenders by rate, whiskers from p20 to p80, the machine's own peak as a line.

    Cases of one op lie side by side, shape by shape.
    """
    timed = [row for row in rows if (row.flops or row.nbytes) and row.seconds and row.family != "sweep"]
    if not timed:
        raise ValueError("nothing was timed that could be drawn")
    shapes = list(dict.fromkeys(row.shape for row in timed))
    ops = list(dict.fromkeys((row.family, row.op) for row in timed))
    columns = min(3, len(ops)) if len(shapes) == 1 else len(shapes)
    cases = [(op, shape) for op in ops for shape in shapes]
    panels = [[row for row in timed if ((row.family, row.op), row.shape) == case] for case in cases]
    bars = [sum(not row.peak for row in panel) for panel in panels]
    heights = [0.7 + 0.15 * max(bars[i : i + columns]) for i in range(0, len(panels), columns)]
    canvas, grid = figure(len(heights), columns, heights)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (op, shape), panel in zip(grid.flat, cases, panels):
        if panel:
            _bars(axes, panel)
            axes.set_title(f"{op[1].replace('_', ' ')}  ·  {shape}", loc="left", pad=10)
        else:
            axes.set_axis_off()
    _save(canvas, path, f"{caption}. Red: ours; bars: median; whiskers: p20 to p80; dashed: the machine's own peak")


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    arithmetic = any(row.flops for row in rows if not row.peak)
    bars = sorted((row for row in rows if not row.peak), key=lambda row: _rate(row, row.median))
    rates = [_rate(row, row.median) for row in bars]
    spread = [
        [rate - _rate(row, row.quantile(80)) for row, rate in zip(bars, rates)],
        [_rate(row, row.quantile(20)) - rate for row, rate in zip(bars, rates)],
    ]
    peaks = [row for row in rows if row.peak and bool(row.flops) == arithmetic]
    scale, unit = _unit(max(rates + [_rate(row, row.median) for row in peaks]), "FLOP/s" if arithmetic else "B/s")
    axes.barh(
        range(len(bars)),
        [rate / scale for rate in rates],
        height=0.72,
        color=[OURS if row.ours else THEIRS for row in bars],
        xerr=[[max(0.0, x) / scale for x in side] for side in spread],
        error_kw={"elinewidth": 0.8, "ecolor": INK, "capsize": 1.5},
    )
    axes.set_yticks(range(len(bars)), [f"{row.contender.removeprefix('ours-')}  {row.format}" for row in bars])
    for tick, row in zip(axes.get_yticklabels(), bars):
        tick.set_color(OURS if row.ours else INK)
    right = max(rates) / scale * 1.18
    for i, rate in enumerate(rates):
        reach = max(0.0, spread[1][i]) / scale
        axes.annotate(
            f"{rate / scale:.3g}",
            (rate / scale + reach, i),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=6.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            zorder=4,
        )
    for peak in peaks:
        at = _rate(peak, peak.median) / scale
        axes.axvline(at, color=PEAK, linewidth=0.8, linestyle=(0, (3, 2)), zorder=3)
        words = f"{peak.contender.removeprefix('peak-')} {peak.format}".strip()
        axes.annotate(
            words,
            (at, 1.0),
            (0, 1),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6,
            color=PEAK,
        )
        right = max(right, at * 1.06)
    axes.set_xlim(0, right)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlabel(unit, fontsize=7)
    axes.tick_params(length=2, labelsize=7)


def _rate(row: Row, seconds: float) -> float:
    return (row.flops or row.nbytes) / seconds


def _unit(largest: float, unit: str) -> tuple[float, str]:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if largest >= size:
            return size, prefix + unit
    return 1.0, unit


def draw_sweeps(lines: Sequence[Series], labels: dict[str, str], path: Path, caption: str) -> None:
    """A panel per axis: time of a call against x with the fitted exponent; a panel of bytes where rows have them."""
    if not lines:
        raise ValueError("no sweep was timed that could be drawn")
    panels: list[tuple[str, str, list[Series]]] = []
    for axis in dict.fromkeys(line.axis for line in lines):
        members = [line for line in lines if line.axis == axis]
        panels.append((labels[axis], "ms", members))
        if BYTES in members[0].rows[0].metrics:
            panels.append((labels[axis], "MiB of K and V held", members))
    columns = min(3, len(panels))
    count = -(-len(panels) // columns)
    canvas, grid = figure(count, columns, [2.4] * count, width=3.1)
    for panel, (label, unit, members) in zip(grid.flat, panels):
        _lines(panel, members, label, unit)
    for panel in grid.flat[len(panels) :]:
        panel.set_axis_off()
    _save(canvas, path, caption)


def _lines(axes: Axes, lines: Sequence[Series], label: str, unit: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    logarithmic = not any(BYTES in row.metrics for row in lines[0].rows)
    for line, tone in zip(lines, TONES):
        style = "-" if line.name.startswith("ours") else (0, (4, 2))
        name = line.name.removeprefix("ours-")
        if unit == "ms":
            low, high = ([1e3 * row.quantile(q) for row in line.rows] for q in (20, 80))
            axes.fill_between(line.x, low, high, color=tone, alpha=0.18, linewidth=0)
            e, below, above = line.exponent()
            name = f"{name}: $x^{{{e:.2f}}}$ [{below:.2f}, {above:.2f}]".replace("-0.00", "0.00")
            values = [1e3 * s for s in line.medians]
        else:
            values = [row.metrics[BYTES] / 2**20 for row in line.rows]
        axes.plot(line.x, values, color=tone, linestyle=style, marker="o", markersize=2.5, linewidth=1.2, label=name)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(top=2.5 * axes.get_ylim()[1])  # room for the legend
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for each in (axes.xaxis, axes.yaxis):
            each.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
    axes.grid(True, which="major", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=6.5, handlelength=1.8)


def _save(canvas: Figure, path: Path, caption: str) -> None:
    from matplotlib import pyplot

    canvas.supxlabel(caption, fontsize=6, color="#666666", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "--plot") as part:
        kind = path.suffix.removeprefix(".") or "png"
        canvas.savefig(part, format=kind, metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(canvas)
