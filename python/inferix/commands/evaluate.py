"""`inferix evaluate`: how the quality of videos drifts, chunk by chunk, as a table, a JSON and a page of curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from inferix_kernels.files import atomic_write, require_writable

from ..evaluate.judging import chosen, judge, rounds
from ..evaluate.metric import registered
from ..evaluate.report import failures, html, report, tables
from ..evaluate.video import FRAMES
from ..evaluate.weights import WeightsDir
from .configs import EvaluateConfig
from .options import configured


@dataclass(frozen=True)
class Evaluated:
    """What was found.

    Attributes:
        path: the JSON; the page, where there is one, is beside it, with the ending .html.
        report: what the JSON holds; docs/quality.md says what each number is.
    """

    path: Path
    report: Mapping[str, Any]


def evaluate(config: EvaluateConfig | None = None, /, **options: Any) -> Evaluated:
    """Judge videos, and write what was found as a JSON and a page.

    Args:
        config: what to judge, and by what.
        options: fields of EvaluateConfig, in place of those of `config`.

    Raises:
        ValueError: an option is not what it must be, or a file can not be written. A video that can not be judged is
            in the report; the others go on.

    Example:
        >>> video = inferix.generate(seconds=1, out="short.mp4").path
        >>> found = evaluate(videos=[str(video)], chunks=2, metrics=["proxy:exposure"], out="short.json")
        >>> found.report["videos"][0]["frames"], len(found.report["videos"][0]["scores"]["proxy:exposure"])
        (16, 2)
    """
    return _evaluate(configured(EvaluateConfig, config, options))


def _evaluate(config: EvaluateConfig, progress: bool = False) -> Evaluated:
    path = require_writable(Path(config.out), "out")
    drawn = require_writable(path.with_suffix(".html"), "out")
    for video in config.videos:
        if Path(video).exists() and any(each.exists() and each.samefile(video) for each in (path, drawn)):
            raise ValueError(f"out: {video!r} would be written over, which is one of the videos")
    weights = WeightsDir(config.weights_dir)
    metrics, left_out = chosen(config.metrics, weights)
    most = None if config.all else FRAMES
    judged, failed = [], {}
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        steps = config.chunks * len(rounds(metrics))
        task = bar.add_task("chunks", total=len(config.videos) * steps)
        for i, video in enumerate(config.videos):
            bar.update(task, description=Path(video).name, completed=i * steps)
            try:
                judged.append(judge(video, metrics, weights, config.chunks, most, lambda: bar.advance(task)))
            except ValueError as error:
                failed[video] = str(error)
    found = report(judged, metrics, config.chunks, failed=failed, left_out=left_out, weights=weights.read)
    with atomic_write(path, "out") as part:
        part.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    with atomic_write(drawn, "out") as part:
        part.write_text(html(found), encoding="utf-8")
    return Evaluated(path, found)


def run(config: EvaluateConfig) -> int:
    """Print the tables; 1 if a video could not be judged."""
    found = _evaluate(config, progress=True)
    console = Console()
    for each in tables(found.report):
        console.print(each)
    for line in failures(found.report):
        print(line)
    left_out = dict(found.report["left_out"])
    if config.weights_dir is None and (names := [name for name in left_out if registered()[name].needs]):
        print(f"not without --weights-dir: {', '.join(names)} (their files: {found.path})")
        left_out = {name: reason for name, reason in left_out.items() if name not in names}
    for name, reason in left_out.items():
        print(f"not {name}: {reason}")
    print(f"{found.path} and {found.path.with_suffix('.html').name}")
    return 1 if found.report["failed"] else 0
