"""The profiler's figures for Prometheus: what is measured already, read when somebody asks.

Other parts of the server add rows of their own: `Figures.registry` is a prometheus_client registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)  # seconds
CONTENT_TYPE = CONTENT_TYPE_LATEST
Totals = dict[str, Any]  # Profiling.totals


class Figures:
    """Rows for Prometheus.

    Attributes:
        registry: to which more can be added.
        processes: by name, what gives a process's totals (`Profiling.totals`).

    Example:
        >>> from inferix import profile
        >>> from inferix.profile.rows import Figures
        >>> figures = Figures()
        >>> with profile.Profiling() as run:
        ...     figures.processes["world"] = run.totals
        ...     with profile.block() as made:
        ...         made.frames = 3
        ...     text = figures.text().decode()
        >>> 'inferix_frames_total{process="world"} 3.0' in text
        True
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.processes: dict[str, Callable[[], Totals]] = {}
        self.blocks = Histogram(
            "inferix_block_seconds", "From asking for a block to its pictures", buckets=BUCKETS, registry=self.registry
        )
        self.registry.register(self)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        """The rows, for the registry."""
        totals = {name: read() for name, read in self.processes.items()}
        frames = CounterMetricFamily("inferix_frames", "Frames made", labels=["process"])
        blocks = CounterMetricFamily("inferix_blocks", "Blocks made", labels=["process"])
        seconds = CounterMetricFamily(
            "inferix_span_seconds", "Time in spans, those within apart", labels=["process", "span"]
        )
        spans = CounterMetricFamily("inferix_spans", "Spans that ended", labels=["process", "span"])
        counted = CounterMetricFamily("inferix_counted", "What was counted", labels=["process", "what"])
        metrics = GaugeMetricFamily("inferix_metric", "Metrics as they are now", labels=["process", "what"])
        for process, each in totals.items():
            frames.add_metric([process], each["frames"])
            blocks.add_metric([process], each["blocks"])
            for name, (own, _, number) in each["sums"].items():
                seconds.add_metric([process, name], max(0.0, own))
                spans.add_metric([process, name], number)
            for name, count in each["counts"].items():
                counted.add_metric([process, name], count)
            for name, value in each["values"].items():
                metrics.add_metric([process, name], value)
        yield from (frames, blocks, seconds, spans, counted, metrics)
