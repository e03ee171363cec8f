"""`inferix generate`: a video of a world, written while it is made."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferix_kernels import OutOfPages, Unsupported

from ..ranks import join
from .configs import GenerateConfig
from .generation import Generation
from .options import configured

INTERRUPTED = 130


@dataclass(frozen=True)
class GeneratedVideo:
    """A video that was made, and what lies next to it.

    Attributes:
        path: of the MP4, or of the .npy of latents if the model has no decoder.
        frames: in it.
        seconds: that it lasts.
        contact_sheet: the PNG; None for latents.
        summary_path: the JSON.
        summary: what that holds: frames, rates, bytes of the KV store, measures.
    """

    path: Path
    frames: int
    seconds: float
    contact_sheet: Path | None
    summary_path: Path
    summary: Mapping[str, Any]

    @property
    def measures(self) -> Mapping[str, float]:
        """What can be read off the frames of a live world, shares in [0, 1]; empty for any other."""
        measures: Mapping[str, float] = self.summary["measures"]
        return measures


def generate(config: GenerateConfig | None = None, /, **options: Any) -> GeneratedVideo:
    """Make a video of a world.

    Ctrl-C ends it at the last whole block, a second one at once: it is closed, the summary is written, and
    KeyboardInterrupt raised. After any other error the frames until then are in `.NAME.part` next to `out`. What a
    model that is not live has made is taken up again by `resume=True`.

    Of processes that torchrun has started each makes this call. They make the video together: rank 0 writes it, and
    all return the same.

    Args:
        config: what to make; without one, the defaults.
        options: fields of GenerateConfig, in place of those of `config`.

    Raises:
        ValueError: an option is not what it must be, or a file can not be read or written.
        Unsupported, OutOfPages: the kernels can not run this world.

    Example:
        >>> video = inferix.generate(model="tiny", prompt="desert night", seconds=1, out="desert.mp4")
        >>> print(video.path, video.frames, video.seconds)
        desert.mp4 16 1.0
        >>> config = inferix.GenerateConfig(seconds=0.5, kv="int4")
        >>> inferix.generate(config, seed=1, out="1.mp4").frames
        8
    """
    config = configured(GenerateConfig, config, options)
    with join(config.device, config.parallel) or contextlib.nullcontext() as ranks:
        generation = Generation(config, ranks)
        if ranks is not None and not ranks.leads:
            made: GeneratedVideo = ranks.follow()
            return made
        complete = generation.run()
        video = _write_beside(generation) if generation.frames else None
        if ranks is not None:
            ranks.end(video)
    if video is None or not complete:
        raise KeyboardInterrupt
    return video


def run(config: GenerateConfig) -> int:
    """The same on the command line: a bar, a few lines, and 130 if Ctrl-C ended it early."""
    try:
        with join(config.device, config.parallel) or contextlib.nullcontext() as ranks:
            generation = Generation(config, ranks)
            if ranks is not None and not ranks.leads:
                ranks.follow()
                return 0
            return _run(generation)
    except (Unsupported, OutOfPages) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _run(generation: Generation) -> int:
    try:
        complete = generation.run(progress=True)
    finally:
        journal, video = generation.journal, generation.video
        resumable = journal is not None and journal.count
        if video is not None and video.kept:
            goes_on = "; --resume goes on with it" if resumable else ""
            _say(f"the first {video.kept} frames are in {video.partial}{goes_on}")
    if not generation.frames:
        kept = f"--resume goes on with {journal.path}" if journal and resumable else "nothing was written"
        _say(f"interrupted before the first frame: {kept}")
        return INTERRUPTED
    _print(_write_beside(generation))
    return 0 if complete else INTERRUPTED


def _say(text: str) -> None:
    print(f"inferix generate: {text}", file=sys.stderr)


def _write_beside(generation: Generation) -> GeneratedVideo:
    """The contact sheet and the summary, next to the video."""
    assert generation.video is not None
    path, maker, config = generation.video.path, generation.maker, generation.config
    summary = maker.summary() | {"seed": config.seed, "kv": config.kv, "linear": config.linear}
    sheet = maker.write_sheet(path.with_suffix(".png"))
    report = maker.write_summary(path.with_suffix(".json"), summary)
    return GeneratedVideo(path, maker.made, summary["seconds_of_video"], sheet, report, summary)


def _print(video: GeneratedVideo) -> None:
    summary, sheet = video.summary, video.contact_sheet
    pace = ", all of them given"
    if "fps" in summary:
        p50, p95 = (1e3 * summary[f"block_seconds_{part}"] for part in ("p50", "p95"))
        pace = f" at {summary['fps']:.1f} FPS, block p50 {p50:.0f} ms, p95 {p95:.0f} ms"
    print(f"{video.path}: {video.frames} {'latent ' if sheet is None else ''}frames ({video.seconds:.1f} s){pace}")
    print(f"{'' if sheet is None else f'{sheet}: contact sheet · '}{video.summary_path}: summary")
    if read := summary.get("kv_read_per_layer_and_step"):
        ours, theirs = (f"{size / 2**20:.2f} MiB" for size in read.values())
        print(f"  of the past each layer read {ours} a step; all of it since the beginning, in bf16: {theirs}")
    for name, value in video.measures.items():
        print(f"  {name}: {value:.1%}")
