"""What the report draws: one block in time, shares, pace, memory, percentiles, the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .snapshot import Snapshot, rows
from .summary import ELSEWHERE, elsewhere, percentiles, spans
from .svg import BOTTOM, COLOURS, TOP, WIDE, Plot, bars, legend, number

MOST_POINTS = 120  # along an x axis
MOST_PARTS = 9  # with a colour of their own
MOST_BOXES = 1500
REST = "#c7ccd6"
MIB = 2**20
ROW = 19  # pixels of one span in the timeline


def colours(kept: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By name, the largest shares first; what has none is grey."""
    names = [name for name in spans(kept) if name != ELSEWHERE]
    return dict(zip(names[:MOST_PARTS], COLOURS))


def groups(kept: Sequence[Any]) -> list[Sequence[Any]]:
    """So many neighbours together that there are at most MOST_POINTS."""
    size = -(-len(kept) // MOST_POINTS)
    return [kept[i : i + size] for i in range(0, len(kept), size)]


def timeline(taken: Snapshot) -> str:
    """The block of which most spans are kept and that took the median time, with all that ran beside it."""
    chosen = _chosen(taken)
    if chosen is None:
        return "<p>No block has all of its spans in the ring any more.</p>"
    process, block = chosen
    palette = colours(rows(taken))
    start, end = block["start"], block["end"]
    zero = process["unix"] + start
    lanes: list[tuple[str, list[tuple[str, float, float, int, Any]]]] = []
    for other in taken["processes"]:
        for track in other["tracks"]:
            away = other["unix"] - zero
            inside = [
                (name, a + away, b + away, depth, args)
                for name, a, b, depth, args in track["spans"]
                if b + away > 0 and a + away < end - start
            ]
            if inside:
                lanes.append((f"{other['name']}: {track['name']}", inside[-MOST_BOXES:]))
    deep = [max(span[3] for span in inside) + 1 for _, inside in lanes]
    height = sum((ROW + 1) * depth + 20 for depth in deep) + TOP + BOTTOM
    plot = Plot((0.0, 1e3 * (end - start)), 0.0, "ms", "", height, WIDE)
    y = TOP - 8
    for (name, inside), depth in zip(lanes, deep):
        plot.parts.append(f'<text class="label" x="2" y="{y + 8}">{_text(name)}</text>')
        for each, a, b, level, args in inside:
            a, b = max(a, 0.0), min(b, end - start)
            more = "".join(f" {key} {value}" for key, value in args.items())
            title = f"{each}{more}: {1e3 * (b - a):.3f} ms"
            top = y + 13 + (ROW + 1) * level
            plot.box(1e3 * a, 1e3 * (b - a), top, ROW, palette.get(each, REST), title, each)
        y += (ROW + 1) * depth + 20
    return str(plot)


def _text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _chosen(taken: Snapshot) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(process, row) of the block of the median time among the last ones whose spans are all kept."""
    found: list[tuple[float, dict[str, Any], dict[str, Any]]] = []
    for process in taken["processes"]:
        since = {
            track["name"]: (track["spans"][0][1] if track["dropped"] else -1.0)
            for track in process["tracks"]
            if track["spans"]
        }
        whole = [row for row in process["blocks"]["rows"] if since.get(row["track"], row["end"]) < row["start"]]
        detailed = max((len(row["spans"]) for row in whole), default=0)
        whole = [row for row in whole if len(row["spans"]) > detailed // 2][-100:]
        found += [(row["end"] - row["start"], process, row) for row in whole]
    found.sort(key=lambda each: each[0])
    return found[len(found) // 2][1:] if found else None


def shares(taken: Snapshot) -> str:
    """Of the wall time, block by block."""
    kept = rows(taken)
    palette = colours(kept)
    together = groups(kept)
    xs = _middles(together)
    walls = [sum(row["wall"] for row in group) or 1.0 for group in together]

    def part(name: str) -> list[float]:
        return [100 * sum(row["spans"].get(name, (0.0,))[0] for row in group) / w for group, w in zip(together, walls)]

    series = [(name, part(name), colour) for name, colour in palette.items()]
    other = [name for name in spans(kept) if name not in palette and name != ELSEWHERE]
    if other:
        series.append(("other spans", [sum(each) for each in zip(*map(part, other))], "#9aa1b0"))
    idle = [100 * sum(map(elsewhere, group)) / w for group, w in zip(together, walls)]
    series.append((ELSEWHERE, idle, REST))
    plot = Plot((xs[0], xs[-1]), 100.0, "block", "% of the time")
    plot.stack(xs, series)
    return str(plot) + legend((name, colour) for name, _, colour in series)


def _middles(together: Sequence[Sequence[dict[str, Any]]]) -> list[float]:
    return [sum(row["number"] for row in group) / len(group) for group in together]


def pace(taken: Snapshot) -> str:
    """Frames per second against how many there are."""
    kept = rows(taken)
    stride = max(process["blocks"]["stride"] for process in taken["processes"])
    made, xs, ys = 0, [], []
    for group in groups(kept):
        frames = sum(row["frames"] for row in group)
        made += frames * stride
        xs.append(float(made))
        ys.append(frames / (sum(row["wall"] for row in group) or 1.0))
    plot = Plot((0.0, xs[-1]), 1.1 * max(ys), "frames made", "FPS")
    plot.line(xs, ys, COLOURS[1], "frames per second")
    return str(plot)


def times(taken: Snapshot) -> str:
    """Percentiles per block, of the block and of its parts."""
    kept = rows(taken)
    palette, found = colours(kept), spans(kept)
    spent = sorted(row["end"] - row["start"] for row in kept)
    parts = [("whole block", percentiles(spent), "#8d96a8"), *((name, found[name], palette[name]) for name in palette)]
    lines = [(name, 1e3 * at["p50"], 1e3 * at["p95"], 1e3 * at["p99"], colour) for name, at, colour in parts]
    return bars(lines, "ms")


def memory(taken: Snapshot) -> str:
    """Bytes that are held: by the store, by the process, on the GPU."""
    series: list[tuple[str, list[float], list[float]]] = []
    for process in taken["processes"]:
        away = process["unix"] - min(other["unix"] for other in taken["processes"])
        kept = process["blocks"]["rows"]
        for name in dict.fromkeys(name for row in kept for name in row["values"] if "bytes" in name):
            at = [(row["end"] + away, row["values"][name] / MIB) for row in kept if name in row["values"]]
            series.append((name.replace(" bytes", ""), [x for x, _ in at], [y for _, y in at]))
        sampled = process["system"]
        for name in dict.fromkeys(name for _, values in sampled for name in values if "bytes" in name):
            at = [(t + away, values[name] / MIB) for t, values in sampled if name in values]
            shown = f"{process['name']}: {name.replace(' bytes', '')}"
            series.append((shown, [x for x, _ in at], [y for _, y in at]))
    return _lines(series, "seconds", "MiB")


def machine(taken: Snapshot) -> str:
    """How busy processor and GPU were."""
    series = []
    for process in taken["processes"]:
        away = process["unix"] - min(other["unix"] for other in taken["processes"])
        sampled = process["system"]
        for name in dict.fromkeys(name for _, values in sampled for name in values if "%" in name):
            at = [(t + away, values[name]) for t, values in sampled if name in values]
            shown = f"{process['name']}: {name.replace(' %', '')}"
            series.append((shown, [x for x, _ in at], [y for _, y in at]))
    return _lines(series, "seconds", "%")


def _lines(
    series: Sequence[tuple[str, list[float], list[float]]],
    x_label: str,
    unit: str,
) -> str:
    if not series:
        return "<p>Nothing was measured.</p>"
    series = series[: len(COLOURS)]
    plot = Plot((0.0, max(xs[-1] for _, xs, _ in series)), 1.1 * max(max(ys) for *_, ys in series), x_label, unit)
    for (name, xs, ys), colour in zip(series, COLOURS):
        step = -(-len(xs) // (4 * MOST_POINTS))
        plot.line(xs[::step], ys[::step], colour, name)
    entries = [(f"{name} {number(ys[-1])} {unit}", colour) for (name, _, ys), colour in zip(series, COLOURS)]
    return str(plot) + legend(entries)
