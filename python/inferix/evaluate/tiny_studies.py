"""Open questions, answered on the tiny world: `python -m inferix.evaluate.tiny_studies --help`.

Its simulator knows the truth, so that one sees what a metric without it sees. Each stream of each variant is one result
in a folder, beside its video; run again, what is there is not made again. Prints tables in Markdown.

Exit code: 0, 1 if a stream could not be made, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from inferix_kernels._printing import while_read
from inferix_kernels.files import atomic_write, require_writable

from ..commands.options import MOST_THREADS
from .judging import chosen
from .pair import chosen_pair_metrics
from .processes import each_done
from .tiny_world import TRUTH, Variant, make
from .video import CHUNKS
from .weights import WeightsDir

FIFTHS = 5
NAMES = dict(zip(TRUTH, ("player once", "boats once", "action followed", "within 2 px", "tiles right", "theme right")))
NAMES["psnr"] = "PSNR"
PROXIES = ("clarity", "motion", "dynamic", "colourfulness", "contrast", "exposure")
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """A question.

    Attributes:
        about: what is asked.
        variants: of the tiny world; the others are compared with the first one, stream by stream, if `pairs`.
        frames: of a stream, unless others are asked for.
        pairs: is each to be like the first one?
    """

    about: str
    variants: tuple[Variant, ...]
    frames: int
    pairs: bool = False


SIMULATOR = Variant("simulator", simulator=True)
STUDIES = {
    "quantization": Study(
        "what formats of pages and layers cost, beside fp32; `other noise` is fp32 again, by another seed: the floor",
        (
            Variant("fp32"),
            Variant("other noise", noise=1),
            Variant("bf16", kv="bf16"),
            Variant("int8", kv="int8"),
            Variant("i8f8", kv="i8f8"),
            Variant("fp8", kv="fp8"),
            Variant("int4", kv="int4"),
            Variant("int8, old int4", kv="int8", older=(6, "int4")),
            Variant("int8, int8 layers", kv="int8", linear="int8"),
            Variant("int8, fp8 layers", kv="int8", linear="fp8"),
        ),
        frames=480,
        pairs=True,
    ),
    "blocks": Study(
        "blocks of 1, 2, 3 and 6 frames after the same past; trained for 3 alone",
        (SIMULATOR, *(Variant(f"blocks of {n}", kv="int8", block=n) for n in (3, 1, 2, 6))),
        frames=1000,
    ),
    "lists": Study(
        "all six frames of the past, the best of them for each frame and head, or the newest; trained for all",
        (
            SIMULATOR,
            Variant("dense", kv="int8"),
            Variant("best 4", kv="int8", pages=4),
            Variant("best 2", kv="int8", pages=2),
            Variant("best 1", kv="int8", pages=1),
            Variant("newest 3", kv="int8", past=3),
        ),
        frames=1000,
    ),
}


@dataclass(frozen=True)
class Task:
    """One stream of one variant, and where it goes."""

    variant: Variant
    number: int
    frames: int
    folder: Path
    reference: Variant | None = None

    def path(self, variant: Variant | None = None) -> Path:
        """Of the result; with the ending .mp4, of the video."""
        name = (variant or self.variant).name.replace(",", "").replace(" ", "-")
        return self.folder / f"{name}-{self.number}-{self.frames}.json"

    def result(self) -> Result | None:
        """What is there of it; None: nothing, or what another variant of this name made."""
        try:
            found = json.loads(self.path().read_text())
            same = Variant(**found["variant"]) == self.variant
            return found if same and self.path().with_suffix(".mp4").exists() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def tasks_of(study: Study, frames: int, streams: int, folder: Path) -> list[Task]:
    """Every stream of every variant; those of the reference first."""
    first, *_ = study.variants
    return [
        Task(variant, number, frames, folder, first if study.pairs and variant is not first else None)
        for variant in study.variants
        for number in range(streams)
    ]


def do(tick: Callable[[int], object], task: Task) -> str:
    """Make a stream, and write what is found of it."""
    nothing = WeightsDir(None)
    proxies = [f"proxy:{name}" for name in PROXIES]
    path = task.path()
    found = make(
        task.variant,
        task.number,
        task.frames,
        path.with_suffix(".mp4"),
        chosen(proxies, nothing)[0],
        chosen_pair_metrics(None)[0],
        task.path(task.reference).with_suffix(".mp4") if task.reference else None,
        tick,
    )
    with atomic_write(path, "--folder") as part:
        part.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return ""


def _no_tick(frames: int) -> None:
    """In another process nobody sees a bar."""


def run(study: Study, tasks: Sequence[Task], jobs: int) -> list[Result]:
    """Do what is not there yet, with progress, and give all results in the order of their tasks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("frames,"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=Console(stderr=True)) as bar:
        total = sum(task.frames for task in tasks)
        missing = [task for task in tasks if task.result() is None]
        shown = bar.add_task("tiny world", total=total, completed=total - sum(task.frames for task in missing))
        tick = partial(bar.advance, shown) if jobs == 1 else _no_tick
        # What others are compared with is made before them.
        for stage in ([t for t in missing if not t.reference], [t for t in missing if t.reference]):
            for task, error in each_done(partial(do, tick), stage, jobs):
                if error:
                    bar.console.print(f"{task.path().stem}: {error}", markup=False)
                elif jobs > 1:
                    bar.advance(shown, task.frames)
    return [found for task in tasks if (found := task.result()) is not None]


# Tables


def of_variants(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results of each variant, by its name; that of one that was not trained for says so."""
    found: dict[str, list[Result]] = {}
    for result in results:
        variant = Variant(**result["variant"])
        found.setdefault(variant.name + ("" if variant.trained else " (untrained)"), []).append(result)
    return found


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _truth(name: str, value: float | None) -> str:
    return _number(value, 1) if name == "psnr" else _share(value)


def truth_table(results: Sequence[Result]) -> list[list[str]]:
    """What the simulator says: shares of frames in per cent, and dB; the mean over chunks and streams."""
    lines = [["variant", *(f"{NAMES[name]} {'dB' if name == 'psnr' else '%'}" for name in TRUTH)]]
    for variant, found in of_variants(results).items():
        said = (mean(score for each in found for score in each["truth"][name]) for name in TRUTH)
        lines.append([variant, *(_truth(name, value) for name, value in zip(TRUTH, said))])
    return lines


def fifths_table(results: Sequence[Result], names: Sequence[str] = ("near", "tiles_right", "psnr")) -> list[list[str]]:
    """Some of the same by fifths of the video, two chunks each."""
    lines = [["variant", "", *(f"{i + 1}/{FIFTHS}" for i in range(FIFTHS))]]
    size = CHUNKS // FIFTHS
    for variant, found in of_variants(results).items():
        for name in names:
            fifths = [
                mean(score for each in found for score in each["truth"][name][size * i : size * (i + 1)])
                for i in range(FIFTHS)
            ]
            lines.append([variant, NAMES[name], *(_truth(name, value) for value in fifths)])
    return lines


def drift_table(results: Sequence[Result], measure: str) -> list[list[str]]:
    """A measure of drift, of the simulator's PSNR and tiles, and of the proxies."""
    truth = ("psnr", "tiles_right")
    lines = [["variant", *(f"truth: {NAMES[name]}" for name in truth), *(f"proxy:{name}" for name in PROXIES)]]
    for variant, found in of_variants(results).items():
        said = [mean(each["truth_drift"].get(name, {}).get(measure) for each in found) for name in truth]
        said += [mean(each["drift"].get(f"proxy:{name}", {}).get(measure) for each in found) for name in PROXIES]
        lines.append([variant, *(_number(value, 3) for value in said)])
    return lines


def pair_table(results: Sequence[Result]) -> list[list[str]]:
    """Beside the first variant: mean of chunks, the worst chunk of all streams, and how many streams part."""
    pairs = {name: found for name, found in of_variants(results).items() if found[0]["pair"]}
    names = list(dict.fromkeys(name for found in pairs.values() for each in found for name in each["pair"]["scores"]))
    lines = [["variant", *(f"{name} {part}" for name in names for part in ("mean", "worst", "first 2 s")), "part"]]
    for variant, found in pairs.items():
        line = [variant]
        for name in names:
            scores = [each["pair"]["scores"].get(name, []) for each in found]
            values = [score for each in scores for score in each]
            line += [_number(mean(values)), _number(min(values, default=None))]
            line.append(_number(mean(each["pair"]["opening"].get(name) for each in found)))
        lines.append([*line, f"{sum(each['pair']['parted'] is not None for each in found)} of {len(found)}"])
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; its first line is the head."""
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"|{'---|' * len(lines[0])}", *rest])


def tables(study: Study, results: Sequence[Result]) -> str:
    """All tables of a study."""
    sections = [
        ("By the simulator", truth_table(results)),
        ("By fifths", fifths_table(results)),
        ("VDE, linear, 10 chunks", drift_table(results, "linear")),
        ("Slope", drift_table(results, "slope")),
    ]
    if study.pairs:
        sections.insert(1, (f"Beside {study.variants[0].name}", pair_table(results)))
    return "\n\n".join(f"{title}\n\n{markdown(lines)}" for title, lines in sections)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m inferix.evaluate.tiny_studies", description=__doc__.split("\n")[0])
    listed = "; ".join(f"{name}: {study.about}" for name, study in STUDIES.items())
    parser.add_argument("study", choices=tuple(STUDIES), help=listed)
    parser.add_argument("--frames", type=int, help="of a stream (default: the study's)")
    parser.add_argument("--streams", type=int, default=2, help="held-out rooms (default: 2)")
    parser.add_argument("--jobs", type=int, default=1, help="streams at a time, each in a process (default: 1)")
    parser.add_argument("--variants", metavar="A;B", help="only these, by their names, and the first one")
    parser.add_argument("--folder", type=Path, default=Path("tiny-studies"), help="of results (default: tiny-studies)")
    args = parser.parse_args(argv)
    study = STUDIES[args.study]
    frames = study.frames if args.frames is None else args.frames
    try:
        for name, value, least in (
            ("frames", frames, 6 * CHUNKS),
            ("streams", args.streams, 1),
            ("jobs", args.jobs, 1),
        ):
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if args.jobs > MOST_THREADS:
            raise ValueError(f"--jobs must be at most {MOST_THREADS}, got {args.jobs}")
        tasks = _only(tasks_of(study, frames, args.streams, args.folder / args.study), args.variants, study)
        try:
            tasks[0].folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--folder must be a folder, got {str(args.folder)!r} ({error.strerror})") from None
        require_writable(tasks[0].path(), "--folder")
        torch.set_num_threads(args.jobs)
        results = run(study, tasks, args.jobs)
    except ValueError as error:
        print(f"tiny_studies: {error}", file=sys.stderr)
        return 2
    print(tables(study, results))
    if len(results) < len(tasks):
        print(f"\n{len(tasks) - len(results)} of {len(tasks)} failed: the same command makes them", file=sys.stderr)
        return 1
    print(f"\n{args.streams} held-out rooms x {frames} frames; {tasks[0].folder}")
    return 0


def _only(tasks: list[Task], names: str | None, study: Study) -> list[Task]:
    if names is None:
        return tasks
    wanted, known = names.split(";"), [variant.name for variant in study.variants]
    if other := next((name for name in wanted if name not in known), None):
        raise ValueError(f"--variants must be of {'; '.join(known)}, got {other!r}")
    return [task for task in tasks if task.variant.name in (known[0], *wanted)]


if __name__ == "__main__":
    sys.exit(while_read(main))
