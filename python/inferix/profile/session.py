"""A recording with its sampler of the machine: begun, switched while it runs, written to a folder."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from inferix_kernels import profile
from inferix_kernels.files import atomic_write, unwritable

from .kernels import kernels
from .report import report
from .snapshot import Snapshot, merge, snapshot
from .summary import summary
from .system import Sampler
from .trace import trace

DETAILED = 1 << 17  # spans of a thread that are kept where they are to be looked at


class Profiling:
    """What is recorded until `stop`, the machine included.

    If somebody records already, their recording goes on and is this one's too: its level becomes the higher one of the
    two until `stop`.

    Args:
        level: "block" or "layer".
        name: of this process, in traces.
        capacity: spans that are kept of each thread; None: as many as the level needs.

    Raises:
        ValueError: there is no such level.

    Example:
        >>> from inferix import profile
        >>> run = profile.Profiling("layer")
        >>> with profile.block() as made:
        ...     made.frames = 3
        >>> run.stop()
        >>> profile.summary(run.snapshot())["frames"]
        3
        >>> [path.name for path in run.write("profiled")]
        ['report.html', 'summary.json', 'trace.json', 'recording.json']
    """

    def __init__(self, level: str = "block", name: str = "world", capacity: int | None = None):
        running = profile.recording()
        self.name, self._level, self._own = name, level, running is None
        if running is None:
            running = profile.start(level, capacity or (DETAILED if level == "layer" else profile.CAPACITY))
        else:
            self._before = profile.level()
            profile.set_level(max(level, self._before, key=profile.LEVELS.index))
        self.recording = running
        self.sampler = Sampler()

    def set_level(self, level: str) -> None:
        """Record this much from now on: "off", "block" or "layer"."""
        profile.set_level(level)

    def stop(self) -> None:
        """Nothing more is recorded, unless somebody else's recording goes on."""
        self.sampler.stop()
        if profile.recording() is not self.recording:
            return
        if self._own:
            profile.stop()
        else:
            profile.set_level(self._before)

    def snapshot(self) -> Snapshot:
        """All that is recorded so far."""
        return snapshot(self.recording, self.name, self.sampler.samples.kept)

    def totals(self) -> dict[str, Any]:
        """What a monitor wants to know: sums, counts, metrics, the machine; no spans."""
        self.recording.collect()
        system = self.sampler.samples.kept
        return {
            "sums": dict(self.recording.sums),
            "counts": self.recording.counts(),
            "values": self.recording.values() | (system[-1][1] if system else {}),
            "blocks": self.recording.blocks.seen,
            "frames": self.recording.frames,
        }

    def write(self, folder: str | Path, others: tuple[Snapshot, ...] = (), title: str = "A profiled run") -> list[Path]:
        """Write report.html, summary.json, trace.json and recording.json, each whole or not at all.

        Args:
            others: snapshots of other processes of the same run.

        Raises:
            ValueError: they can't be written.
        """
        return write(merge([self.snapshot(), *others]), folder, title)

    def __enter__(self) -> Profiling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def write(taken: Snapshot, folder: str | Path, title: str = "A profiled run") -> list[Path]:
    """See Profiling.write."""
    folder, written = Path(folder), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error, "profile") from None
    texts = {
        "report.html": lambda: report(taken, title),
        "summary.json": lambda: json.dumps(summary(taken), indent=2) + "\n",
        "trace.json": lambda: trace(taken),
        "recording.json": lambda: json.dumps(taken),
    }
    for name, text in texts.items():
        with atomic_write(folder / name, "profile") as part:
            part.write_text(text())
        written.append(folder / name)
    return written


@contextlib.contextmanager
def profiling(
    level: str = "layer",
    folder: str | Path | None = None,
    name: str = "world",
    title: str = "A profiled run",
    torch_blocks: int = 0,
) -> Iterator[Profiling]:
    """A context that is recorded and, if there is a folder, written to it at the end, whatever ends it. A folder that
    can't be written ends nothing: a line on stderr says what is lost.

    Args:
        level, name: see Profiling.
        folder, title: see Profiling.write.
        torch_blocks: that torch.profiler records as well, see `kernels`.

    Example:
        >>> from inferix import profile
        >>> with profile.profiling("layer", folder="out") as run:
        ...     with profile.block() as made:
        ...         made.frames = 3
        >>> profile.read("out")["processes"][0]["frames"]
        3
    """
    run = Profiling(level, name)
    look = kernels(torch_blocks, folder) if torch_blocks and folder is not None else None
    try:
        yield run
    finally:
        if look is not None:
            look()
        run.stop()
        if folder is not None:
            written_or_said(run.snapshot(), folder, title)


def written_or_said(taken: Snapshot, folder: str | Path, title: str) -> list[Path]:
    """Write a snapshot; if that can't be, say so in a line."""
    try:
        return write(taken, folder, title)
    except ValueError as error:
        print(f"inferix: {error}: the profile of this run is lost", file=sys.stderr)
        return []
