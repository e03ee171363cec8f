"""A snapshot as one page of HTML: no script, no font, no picture from elsewhere, so that it opens without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from . import plots
from .snapshot import Snapshot, rows
from .summary import ELSEWHERE, summary

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --quiet: #6a7283; --paper: #fbfbfc; --card: #fff; --line: #e4e7ec; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9ebf1; --quiet: #929bad; --paper: #0f1218; --card: #171b23; --line: #2a303b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.6rem; max-width: 88rem; background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; }
.quiet, p { color: var(--quiet); margin: .2rem 0 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.cards div, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem; }
.cards b { display: block; font-size: 1.4rem; white-space: nowrap; font-weight: 650; }
.cards span { color: var(--quiet); font-size: .8rem; }
.grid2 { display: grid; gap: .8rem; grid-auto-flow: dense;
  grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); }
section.wide { grid-column: 1 / -1; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--quiet); font-size: 10.5px; }
svg text.on { fill: #14171d; } svg .label { font-size: 10px; } svg .grid { stroke: var(--line); }
svg .ink { stroke: var(--ink); stroke-width: 1.3; } svg .dot { fill: var(--ink); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .4rem 0 0; padding: 0;
  font-size: .8rem; color: var(--quiet); }
.legend i { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .4em; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th { text-align: right; font-weight: 500; color: var(--quiet); }
td { text-align: right; border-top: 1px solid var(--line); }
th, td { padding: .25rem .5rem; } th:first-child, td:first-child { text-align: left; }
.lost { border-color: #d9604f; } .lost ul { margin: 0; padding-left: 1.2rem; }
@media print { body { padding: 0; } section { break-inside: avoid; } }
"""


def report(taken: Snapshot, title: str = "A profiled run") -> str:
    """The page.

    Example:
        >>> from inferix import profile
        >>> recording = profile.start("block")
        >>> with profile.block() as made:
        ...     made.frames = 3
        >>> _ = profile.stop()
        >>> page = profile.report(profile.snapshot(recording))
        >>> "http" in page.replace("http-equiv", "")  # nothing is fetched
        False
    """
    numbers = summary(taken)
    parts = [_cards(numbers)]
    if rows(taken):
        drawn = [
            ("One block", "the one of the median time; hold the pointer over a span to read it", plots.timeline, True),
            ("Where the time goes", "each span without those within it", plots.shares, False),
            ("Pace", "frames per second as the video grows", plots.pace, False),
            ("How long it takes", "each span without those within it", plots.times, False),
            ("Memory", "", plots.memory, False),
            ("The machine", "", plots.machine, False),
        ]
        parts.append(f'<div class="grid2">{"".join(_section(taken, *each) for each in drawn)}{_tables(numbers)}</div>')
    else:
        parts.append("<p>No block was recorded.</p>")
    parts.append(_lost(numbers["lost"]))
    return page(title, parts)


def page(title: str, parts: Iterable[str]) -> str:
    """A page in this style: its head, the title, and parts that are HTML."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · Inferix</title><style>{STYLE}</style></head><body>"
    )
    return f"{head}<h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"


def _section(taken: Snapshot, name: str, more: str, draw: Callable[[Snapshot], str], wide: bool) -> str:
    said = f'<p class="quiet">{more}</p>' if more else ""
    return f'<section class="{"wide" if wide else ""}"><h2>{name}</h2>{said}{draw(taken)}</section>'


def _cards(numbers: dict[str, Any]) -> str:
    block = numbers["block"]
    cards = [
        (f"{numbers['fps']:.1f}", "frames per second"),
        (f"{numbers['frames']:,}", "frames"),
        (f"{numbers['blocks']:,}", "blocks"),
        (f"{numbers['seconds']:.1f} s", "in all"),
    ]
    cards += [(f"{1e3 * value:.1f} ms", f"block {name}") for name, value in block.items()]
    return f'<div class="cards">{"".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in cards)}</div>'


def _tables(numbers: dict[str, Any]) -> str:
    spans = [
        (
            name,
            f"{each['share']:.1%}",
            f"{each['own_seconds']:.3f}",
            f"{each['seconds']:.3f}",
            f"{each['number']:,}" if name != ELSEWHERE else "",
            *(f"{1e3 * each[p]:.3f}" for p in ("p50", "p95", "p99")),
        )
        for name, each in numbers["spans"].items()
    ]
    others = [
        (name, "", f"{each['own_seconds']:.3f}", f"{each['seconds']:.3f}", f"{each['number']:,}", "", "", "")
        for name, each in numbers["others"].items()
    ]
    heads = ("span", "share", "own s", "with those within, s", "times", "p50 ms", "p95 ms", "p99 ms")
    blocks = max(1, numbers["blocks"])
    counts = [(name, f"{n:,.0f}", f"{n / blocks:,.1f}") for name, n in sorted(numbers["counts"].items())]
    metrics = [(name, f"{value:,.6g}") for name, value in sorted(numbers["metrics"].items())]
    made = f'<section class="wide"><h2>Spans</h2>{table(heads, spans + others)}</section>'
    if counts:
        made += f"<section><h2>Counted</h2>{table(('what', 'in all', 'per block'), counts)}</section>"
    if metrics:
        made += f"<section><h2>Metrics</h2>{table(('what', 'at the end'), metrics)}</section>"
    return made


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Of texts; what is in a line may be anything, heads are HTML."""
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _lost(lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section class="lost"><h2>Not recorded</h2><ul>{items}</ul></section>'
