"""The making of a video: the loop over its blocks, and what is written next to it.

A block is made while the pictures of the one before are decoded and those of the one before that are written, each in a
thread of its own.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from inferix_kernels import profile
from inferix_kernels.files import atomic_write

from ..beside import Beside
from ..media import LatentWriter, VideoWriter, contact_sheet
from ..media.journal import Journal
from ..media.output_file import delayed_interrupts
from ..world import World
from .controls import Prompts

SHEET_COLUMNS, SHEET_ROWS = 8, 4


class Maker:
    """Makes and writes `total` frames; Ctrl-C ends the video at the last whole block. A second one ends it where it is,
    with the pictures that are on their way, a third one without them.

    What is kept in memory does not grow with the video, but for a number per step and a live world's frames, which are
    small and measured.

    Attributes:
        made: frames written.
        begun: frames written or on their way.
    """

    def __init__(
        self,
        world: World,
        actions: Iterator[str] | None,
        prompts: Prompts,
        total: int,
        video: VideoWriter | LatentWriter,
        journal: Journal | None,
    ):
        self.world, self.actions, self.prompts, self.total = world, actions, prompts, total
        self.video, self.journal = video, journal
        self.all: list[np.ndarray] = []
        self.seconds: list[float] = []  # that each step took
        self.wanted = np.linspace(0, total - 1, min(total, SHEET_COLUMNS * SHEET_ROWS)).astype(int).tolist()
        self.shown: dict[int, np.ndarray] = {}  # frames for the contact sheet
        self.begun = 0
        self._said: str | None = None  # the prompt that holds
        self._beside = Beside("inferix-writer")
        self._writing: Future[None] | None = None  # the last block's pictures
        self._turn, self._given_up = threading.Lock(), False  # to write; nothing is written any more

    @property
    def made(self) -> int:
        return self.video.frames

    def run(self, given: np.ndarray | None, progress: bool) -> None:
        adapter = self.world.model.adapter
        made_before = iter(self.journal.blocks if self.journal else [])
        memory = sum(self.world.kv_bytes().values()) / 2**20
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[fps]:.1f} FPS · KV {task.fields[memory]:.1f} MiB ·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=_Bar(),
            disable=not progress,
        )
        with bar, _Interrupt() as interrupt:
            task = bar.add_task(f"{adapter.name} world", total=self.total, fps=0.0, memory=memory)
            started = time.perf_counter()
            try:
                if given is not None:
                    pictures = self.world.observe(given, prompt=self._new_prompt(0.0))
                    self._write(lambda: pictures)
                while self.begun < self.total and not interrupt.asked:
                    self._make(next(made_before, None))
                    bar.update(task, completed=self.made, fps=self.made / (time.perf_counter() - started))
            finally:
                try:
                    self._written()
                except KeyboardInterrupt:
                    with delayed_interrupts(), self._turn:
                        self._given_up = True
                    raise
                bar.update(task, completed=self.made)

    def _make(self, latents: Tensor | None) -> None:
        """The next block, or these latents of an earlier run in its place; its pictures are written later."""
        world, presentation = self.world, self.world.model.presentation
        chosen = None
        if self.actions is not None:
            chosen = [next(self.actions) for _ in range(world.model.adapter.block_frames)]
        begins = self.begun + world.ahead * presentation.pictures
        coming = world.advance(chosen, prompt=self._new_prompt(begins / presentation.fps), latents=latents)
        self.seconds.append(world.denoising)
        if self.journal is not None and latents is None:
            with profile.timed("journal"):
                self.journal.append(world.latents)
        self._write(coming.result)

    def _new_prompt(self, seconds: float) -> str | None:
        """The prompt from there on; None: the last one holds. If given again, it might begin another shot."""
        before, self._said = self._said, self.prompts.at(seconds)
        return None if self._said == before else self._said

    def _write(self, pictures: Callable[[], np.ndarray]) -> None:
        """Write the pictures of the last block, once they are there, beside what follows."""
        self._written()
        before, self.begun = self.begun, self.world.model.pictures_of(self.world.frames)
        wanted = self.begun - before
        self.begun = min(self.begun, self.total)

        def write() -> None:
            frames = pictures()
            if len(frames) != wanted:
                name = self.world.model.adapter.name
                raise ValueError(f"{name}: its decoder must give {wanted} pictures of this block, got {len(frames)}")
            with self._turn:
                if not self._given_up:
                    self._take(frames)

        self._writing = self._beside.submit(write)

    def _written(self) -> None:
        """Wait until all pictures on their way are written; raises what went wrong with them."""
        if self._writing is not None:
            with profile.timed("wait for the writer"):
                wait([self._writing])
            job, self._writing = self._writing, None
            job.result()

    def _take(self, frames: np.ndarray) -> None:
        frames = frames[: self.total - self.made]
        self.shown |= {i: frames[i - self.made] for i in self.wanted if 0 <= i - self.made < len(frames)}
        if self.world.model.presentation.live:
            self.all.append(frames)
        with profile.timed("encode"):
            self.video.write(frames)

    def summary(self) -> dict[str, Any]:
        adapter, presentation = self.world.model.adapter, self.world.model.presentation
        seconds = np.array(self.seconds)
        blocks = seconds[1:] if len(seconds) > 1 else seconds
        per_block = adapter.block_frames
        asked = [self.prompts.at(i // per_block * per_block / presentation.fps) for i in range(self.made)]
        read = {"kv_read_per_layer_and_step": self.world.kv_read()} if adapter.stages else {}
        times: dict[str, float] = {}
        if len(seconds):  # none if what was given fills the video
            times = {
                "fps": self.made / float(seconds.sum()),
                "first_block_seconds": float(seconds[0]),
                "block_seconds_p50": float(np.percentile(blocks, 50)),
                "block_seconds_p95": float(np.percentile(blocks, 95)),
            }
        return read | {
            "model": adapter.name,
            "frames": self.made,
            "seconds_of_video": self.made / presentation.fps,
            **times,
            "kv_bytes": self.world.kv_bytes(),
            "measures": self.world.model.measures(np.concatenate(self.all)[: self.made], asked)
            if presentation.live
            else {},
        }

    def write_sheet(self, path: Path) -> Path | None:
        """The contact sheet; None if what was made are latents, which can't be seen."""
        fps = self.world.model.presentation.fps
        shown = {i: frame for i, frame in self.shown.items() if i < self.made}  # Ctrl-C may come while one is written
        rows = -(-len(shown) // SHEET_COLUMNS)
        pictures, labels = np.stack(list(shown.values())), [f"{i / fps:.1f} s" for i in shown]
        if pictures.dtype != np.uint8:
            return None
        contact_sheet(pictures, rows, SHEET_COLUMNS, path, labels=labels, scale=2 if self.all else 1)
        return path

    def write_summary(self, path: Path, summary: dict[str, Any]) -> Path:
        with atomic_write(path, "out") as part:
            part.write_text(json.dumps(summary, indent=2) + "\n")
        return path


class _Bar(Console):
    """Where the bar is drawn. That nobody reads it any more is no reason to stop."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class _Interrupt:
    """Ctrl-C as a flag: the block is finished and the file closed. A second one raises KeyboardInterrupt."""

    asked = False

    def __enter__(self) -> _Interrupt:
        self._here = threading.current_thread() is threading.main_thread()  # no other thread is interrupted
        if self._here:
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._here:
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._previous)
