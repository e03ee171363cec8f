"""Is the tiny world any good? `python -m inferix.models.tiny.evaluate --help`.

Streams of held-out rooms are generated under the simulator's own actions and prompts and compared with it, frame by
frame; see `measures.py` for what is measured and `checker.py` for how a frame is read. Each stream starts from six
true frames, for a world takes its past in whole blocks of three. Worlds are also started from nothing, and timed in a
process of their own.

Exit code: 0 if every gate passes, 1 if not, 2 for bad input.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from inferix.commands.options import MOST_THREADS
from inferix.media import contact_sheet
from inferix_kernels._printing import while_read
from inferix_kernels.files import atomic_write, require_writable

from ..linears import CHOICES
from . import PRESENTATION
from .checker import COVERED, KINDS, look
from .measures import (
    BLOCK,
    CHANGE_EVERY,
    CONTEXT,
    FIFTHS,
    GATES,
    HELD_OUT,
    Gate,
    Measures,
    Summary,
    measure,
    summarise,
    true_video,
)
from .report import WIDTH, Report
from .simulator import ACTIONS, THEMES, TIMES

STARTS = 4  # worlds started from nothing in each theme
WARM_UP, TIMED = 10, 40  # blocks; the window is full long before the first ends
SHEET_STREAMS, SHEET_COLUMNS = 3, 8

START_GATES = (
    Gate("from nothing: player exactly once", "start_player", "at least", 0.95),
    Gate("from nothing: both boats exactly once", "start_boats", "at least", 0.95),
    Gate("from nothing: tiles of the theme", "start_tiles", "at least", 0.98),
    Gate("from nothing: theme right", "start_theme", "at least", 0.99),
)
SPEED_GATES = (
    Gate("frames per second", "fps", "at least", 16),
    Gate("seconds to the first frame", "first_frame", "at most", 5),
)


class SteppedWorld(Protocol):
    """What is evaluated: `inferix.world.World`, or anything that can stand in for it."""

    def observe(self, frames: np.ndarray, actions: Sequence[int | str], prompt: str | None = None) -> object: ...

    def step(self, actions: Sequence[int | str] | None = None, prompt: str | None = None) -> np.ndarray: ...


OpenWorld = Callable[[int], SteppedWorld]  # seed -> a new world


def open_world(seed: int, *, kv: str, weights: str | None, linear: str | None) -> SteppedWorld:
    from inferix.world import World

    return World("tiny", kv=kv, seed=seed, weights=weights, linear=linear)


@dataclass(frozen=True)
class Stream:
    """One seed: its measures, and what the contact sheet shows of it."""

    seed: int
    measures: Measures
    pictures: np.ndarray  # [2, SHEET_COLUMNS, 96, 96, 3] uint8: truth, model
    labels: tuple[str, ...]  # of each column


def run_stream(opened: OpenWorld, seed: int, frames: int, tick: Callable[[int], None] = lambda done: None) -> Stream:
    """Generate `frames` frames after CONTEXT true ones and measure them. `tick` gets the number of new frames."""
    whole = -(-frames // BLOCK) * BLOCK
    video = true_video(seed, CONTEXT + whole, change_every=CHANGE_EVERY, start=CONTEXT)
    past, truth = video.part(0, CONTEXT), video.part(CONTEXT, CONTEXT + whole)
    prompts = [THEMES[theme] for theme in truth.themes @ [len(TIMES), 1]]
    world = opened(seed)
    world.observe(past.frames, past.actions.tolist(), prompt=prompts[0])
    made = []
    for start in range(0, whole, BLOCK):
        made.append(world.step(truth.actions[start : start + BLOCK].tolist(), prompt=prompts[start]))
        tick(min(BLOCK, frames - start))
    generated, truth = np.concatenate(made)[:frames], truth.part(0, frames)
    shown = np.linspace(0, frames - 1, SHEET_COLUMNS).astype(int)
    pictures = np.stack([truth.frames[shown], generated[shown]])
    labels = tuple(f"frame {i + 1}: {prompts[i]}" for i in shown)
    return Stream(seed, measure(generated, truth), pictures, labels)


def run_streams(opened: OpenWorld, seeds: Sequence[int], frames: int, jobs: int) -> list[Stream]:
    """All streams in the order of their seeds, `jobs` at a time, each in a process of its own if there are several."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("frames,"))
    bar = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=Console(stderr=True))
    with bar:
        task = bar.add_task("tiny world", total=frames * len(seeds))
        if jobs == 1:
            return [run_stream(opened, seed, frames, lambda done: bar.advance(task, done)) for seed in seeds]
        streams = []
        with _processes(jobs) as pool:
            for future in as_completed([pool.submit(run_stream, opened, seed, frames) for seed in seeds]):
                streams.append(future.result())
                bar.advance(task, frames)
    return sorted(streams, key=lambda stream: stream.seed)


def _processes(jobs: int) -> ProcessPoolExecutor:
    """Fresh processes that share the threads; a forked one would inherit torch's own in an unknown state."""
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,))


def start_from_nothing(opened: OpenWorld, starts: int = STARTS) -> dict[str, Summary]:
    """First blocks from noise and prompt alone, so many in every theme: what can be measured without a truth."""
    frames = [opened(seed).step(["none"] * BLOCK, prompt=theme) for theme in THEMES for seed in range(starts)]
    seen = look(np.concatenate(frames))
    asked = np.repeat(np.arange(len(THEMES)), starts * BLOCK)
    shown = seen.tiles != COVERED
    right = (seen.tiles // KINDS == asked[:, None, None]) & shown  # floor division keeps UNKNOWN negative
    values = {
        "start_player": seen.once[:, 0],
        "start_boats": seen.once[:, 1:].all(1),
        "start_tiles": right.sum((1, 2)) / np.maximum(shown.sum((1, 2)), 1),
        "start_theme": seen.theme == asked,
    }
    return {name: Summary(float(value.mean()), ()) for name, value in values.items()}


def measure_speed(opened: OpenWorld) -> dict[str, Summary]:
    """Time a world in a fresh process; the first frame counts from its start, imports and weights included."""
    started = time.monotonic()
    with _processes(1) as pool:
        first, blocks = pool.submit(_timed_run, opened).result()
    values = {"first_frame": first - started, "fps": BLOCK * len(blocks) / sum(blocks)}
    for percent in (50, 95):
        values[f"block_seconds_p{percent}"] = float(np.percentile(blocks, percent))
    return {name: Summary(value, ()) for name, value in values.items()}


def _timed_run(opened: OpenWorld) -> tuple[float, list[float]]:
    """When the first block was there (time.monotonic, which processes share), and seconds of TIMED later blocks."""
    world = opened(0)
    world.step(["none"] * BLOCK, prompt=THEMES[0])
    first, blocks = time.monotonic(), []
    for block in range(WARM_UP + TIMED):
        started = time.monotonic()
        world.step([ACTIONS[1 + block % 4]] * BLOCK)
        blocks.append(time.monotonic() - started)
    return first, blocks[WARM_UP:]


def write_sheet(streams: Sequence[Stream], path: Path) -> None:
    """The first streams, truth above and model below, time to the right."""
    streams = streams[:SHEET_STREAMS]
    pictures = np.concatenate([stream.pictures.reshape(-1, *stream.pictures.shape[2:]) for stream in streams])
    labels = [f"{who} {label}" for stream in streams for who in ("truth,", "model,") for label in stream.labels]
    contact_sheet(pictures, 2 * len(streams), SHEET_COLUMNS, path, labels)


def main(argv: Sequence[str] | None = None, factory: Callable[..., SteppedWorld] = open_world) -> int:
    """Run the command; `factory` opens what is evaluated."""
    parser = argparse.ArgumentParser(prog="python -m inferix.models.tiny.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="contact sheet: truth above, model below")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--frames", type=int, default=1000, help="length of each stream (default: 1000)")
    parser.add_argument("--seeds", type=int, default=8, help="held-out streams (default: 8)")
    parser.add_argument("--starts", type=int, default=STARTS, help=f"worlds from nothing per theme (default: {STARTS})")
    parser.add_argument("--kv", default="int8", help="format of the KV pages (default: int8)")
    parser.add_argument("--linear", choices=CHOICES, help="what the inner linear layers are in (default: float32)")
    parser.add_argument("--weights", help="checkpoint (default: the one that ships)")
    parser.add_argument("--threads", type=int, default=PRESENTATION.threads, help="CPU threads (default: the world's)")
    parser.add_argument("--jobs", type=int, default=1, help="streams at a time, which share the threads (default: 1)")
    args = parser.parse_args(argv)
    try:
        for name, least in (("frames", FIFTHS * BLOCK), ("seeds", 1), ("starts", 1), ("threads", 1), ("jobs", 1)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
        for name in ("json", "sheet"):
            if getattr(args, name):
                require_writable(getattr(args, name), f"--{name}")
        if args.threads > MOST_THREADS:
            raise ValueError(f"--threads must be at most {MOST_THREADS}, got {args.threads}")
        torch.set_num_threads(args.threads)
        opened = functools.partial(factory, kv=args.kv, weights=args.weights, linear=args.linear)
        opened(0)  # a missing checkpoint or an unknown format is said before any work
        return _run(args, opened)
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, opened: OpenWorld) -> int:
    seeds = range(HELD_OUT, HELD_OUT + args.seeds)
    summary = {**measure_speed(opened), **start_from_nothing(opened, args.starts)}
    streams = run_streams(opened, seeds, args.frames, args.jobs)
    summary |= summarise([stream.measures for stream in streams])
    setting = {
        "model": "tiny",
        "seeds": args.seeds,
        "first_seed": HELD_OUT,
        "frames": args.frames,
        "context_frames": CONTEXT,
        "starts": args.starts,
        "kv": args.kv,
        "linear": args.linear,
        "machine": _machine(),
    }
    report = Report(setting, summary, (*GATES, *START_GATES, *SPEED_GATES))
    if args.sheet:
        write_sheet(streams, args.sheet)
    if args.json:
        with atomic_write(args.json, "--json") as part:
            part.write_text(json.dumps(report.json(), indent=2) + "\n")
    if args.markdown:
        print(report.markdown())
    else:
        console = Console(width=max(WIDTH, Console().width))
        with console.capture() as table:  # by itself it would end the program if nobody reads it
            console.print(report.table())
        print(table.get(), end="")
    for gate in report.failed:
        print(f"missed: {gate.name}", file=sys.stderr)
    return 1 if report.failed else 0


def _machine() -> str:
    """The processor, the threads that torch uses, and torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(while_read(main))
