"""What the server knows of where the time goes: its own spans and those of the worlds' process, for Prometheus too."""

from __future__ import annotations

import asyncio
from typing import Any

from inferix_kernels import profile

from ..profile import Profiling, merge
from ..profile.rows import Figures
from ..profile.session import written_or_said
from ..profile.snapshot import Snapshot
from .remote import Broken, Refused, Remote

PATIENCE = 5.0  # seconds that the worlds' process has to tell what it recorded, when the server closes


class Measured:
    """The profiler of a server and of its worlds.

    Args:
        folder: for the report that is written at the end; None: none is.

    Attributes:
        level: "block", or "layer", at which it begins if there is a folder.
        figures: its registry takes rows of other parts as well.
    """

    def __init__(self, folder: str | None = None):
        self.folder, self.level = folder, "block" if folder is None else "layer"
        self.figures = Figures()
        self._run: Profiling | None = None
        self._worlds: dict[str, Any] | None = None  # totals, as of the last block
        self._reporting = asyncio.Lock()

    def start(self) -> None:
        self._run = Profiling(self.level, "server")
        self.figures.processes["server"] = self._run.totals

    def stop(self) -> None:
        if self._run is not None:
            self._run.stop()

    async def opened(self, remote: Remote) -> None:
        """Worlds have been opened, whose process records at level "block"."""
        self._worlds = None
        if self.level != "block":
            await remote.call("set_level", level=self.level)

    async def set_level(self, level: str, remote: Remote | None) -> None:
        """Record this much from now on, here and in the worlds' process."""
        if remote is not None:
            await remote.call("set_level", level=level)
        self.level = level
        if profile.recording() is not None:
            profile.set_level(level)

    def block(self, made: dict[str, Any], seconds: float, waiting: int, late: int) -> dict[str, float]:
        """A block has come.

        Args:
            made: what `Stage.step` gave.
            seconds: from asking to having it.
            waiting, late: pictures in the queue, and those that were shown late so far.

        Returns:
            Seconds by span of the worlds' thread, those within apart.
        """
        profile.metric("pictures waiting", waiting)
        profile.metric("late pictures", late)
        self.figures.blocks.observe(seconds)
        self._worlds = made["profile"]["totals"]
        self.figures.processes["worlds"] = lambda: self._worlds or {}
        spans: dict[str, float] = made["profile"]["spans"]
        return spans

    async def snapshot(self, remote: Remote | None) -> Snapshot:
        """Both processes', or what is left of them."""
        assert self._run is not None
        taken = [self._run.snapshot()]
        if remote is not None:
            try:
                taken.insert(0, await asyncio.wait_for(remote.call("snapshot"), PATIENCE))
            except (Broken, Refused, TimeoutError, asyncio.TimeoutError) as error:
                why = str(error).strip().splitlines()[-1:] or ["they do not answer"]
                taken[0]["processes"][0]["lost"].append(f"what the worlds' process recorded: {why[0]}")
        return merge(taken)

    async def report(self, remote: Remote | None) -> str:
        """The page of the report, as of now; one at a time is made."""
        from ..profile import report

        async with self._reporting:
            return await asyncio.to_thread(report, await self.snapshot(remote), "This world")

    async def write(self, remote: Remote | None) -> None:
        """Write the folder, if there is one; a line says what can't be written."""
        if self.folder is not None and self._run is not None:
            taken = await self.snapshot(remote)
            await asyncio.to_thread(written_or_said, taken, self.folder, "A world that was played")
