"""`inferix evaluate pair`: how a video differs from one that it ought to be like, as a table and a JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from inferix_kernels.files import atomic_write, require_writable

from ..evaluate.pair import Compared, chosen_pair_metrics, compare, remarks, report, table
from ..evaluate.video import FRAMES
from .configs import EvaluatePairConfig
from .evaluate import Evaluated
from .options import configured


def evaluate_pair(config: EvaluatePairConfig | None = None, /, **options: Any) -> Evaluated:
    """Compare a video with its reference, and write what was found as a JSON.

    Args:
        config: what to compare, and by what.
        options: fields of EvaluatePairConfig, in place of those of `config`.

    Raises:
        ValueError: an option is not what it must be, a video can not be read, or the two are not of one length, size
            and rate; ImportError: a metric that was named needs a package that is absent.

    Example:
        >>> found = evaluate_pair(video="demo.mp4", reference="demo.mp4", metrics=["psnr"], out="pair.json")
        >>> found.report["pair"]["mean"], found.report["pair"]["parted"]
        ({'psnr': 100.0}, None)
    """
    return _evaluate_pair(configured(EvaluatePairConfig, config, options))


def _evaluate_pair(config: EvaluatePairConfig, progress: bool = False) -> Evaluated:
    path = require_writable(Path(config.out), "out")
    given = [config.video, config.reference, *(config.floor or ())]
    for video in given:
        if Path(video).exists() and path.exists() and path.samefile(video):
            raise ValueError(f"out: {str(video)!r} would be written over, which is one of the videos")
    metrics, left_out = chosen_pair_metrics(config.metrics)
    most = None if config.all else FRAMES
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("chunks", total=config.chunks * len(given) // 2)

        def compared(videos: Sequence[str | Path], argument: str) -> Compared:
            return compare(videos[0], videos[1], metrics, config.chunks, most, lambda: bar.advance(task), argument)

        found = compared((config.video, config.reference), "video")
        floor = compared(config.floor, "floor") if config.floor else None
    written = report(found, metrics, floor, left_out)
    with atomic_write(path, "out") as part:
        part.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n")
    return Evaluated(path, written)


def run(config: EvaluatePairConfig) -> int:
    """Print the table, and where the two videos part."""
    found = _evaluate_pair(config, progress=True)
    Console().print(table(found.report))
    for line in remarks(found.report):
        print(line)
    print(found.path)
    return 0
