"""`inferix generate`: a video of a world, written while it is made."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from inferix_kernels._check import check_device
from inferix_kernels.files import atomic_write, destination, open_locked, require_writable

from .controls import Prompts, actions_from
from .journal import Journal, journal_path, refuse_unfinished
from .media import LatentWriter, VideoWriter, contact_sheet, partial_path
from .models import MODELS, Adapter, BlockModel, load_model, whole_start
from .pictures import read_picture, read_video
from .world import World

INTERRUPTED = 130
MOST_SECONDS = 1_000_000
SHEET_COLUMNS, SHEET_ROWS = 8, 4


def generate(args: argparse.Namespace) -> int:
    """Make the video that the command line asks for; 130 if Ctrl-C ended it early."""
    _check(args)
    model = load_model(
        args.model,
        args.weights,
        size=args.size,
        lora=args.lora,
        device=args.device,
        prompt_cache=args.prompt_cache,
        steps=args.steps,
        guidance=args.guidance,
        negative_prompt=args.negative_prompt,
        stages=args.stages,
        fp8=args.fp8,
        decoder=args.decoder,
        special_tokens=args.special_tokens,
    )
    adapter = model.adapter
    total = round(args.seconds * adapter.fps)
    if total < 1:
        raise ValueError(f"--seconds must be at least one frame, 1/{adapter.fps}, got {args.seconds:g}")
    _check_outputs(args, model)
    given = _given(args, model, total)
    digest = None if given is None else hashlib.sha256(given.tobytes()).hexdigest()
    if adapter.at_once:
        model, given = model.for_video(total, None if given is None else given[0]), None
    # A pipeline begins no block that nobody will see.
    blocks = -(-total // (adapter.block_frames * adapter.pictures)) if adapter.stages else None
    world = World(
        model, kv=args.kv, window=args.window, sink=args.sink, seed=args.seed, blocks=blocks, backend=args.backend
    )
    if threads := args.threads or adapter.threads:
        torch.set_num_threads(threads)
    prompts = Prompts.read(args.prompt_file) if args.prompt_file else None
    prompts = prompts or Prompts(((0.0, adapter.example_prompts[0] if args.prompt is None else args.prompt),))
    if adapter.at_once and len(prompts.starts) > 1:
        raise ValueError(f"--prompt-file must hold one prompt for {adapter.name}, which makes a video at once")
    for _, prompt in prompts.starts:  # every word is checked before the first frame is made
        world.model.condition(prompt, [adapter.actions[0]] * adapter.block_frames if adapter.actions else [])
    actions = actions_from(args.actions, adapter, args.seed) if adapter.actions else None
    journal, whole = None if adapter.live else _journal(args, world, prompts, digest), False
    video: VideoWriter | LatentWriter | None = None
    try:
        with _writer(args, model, total) as video:
            maker = Maker(world, actions, prompts, total, video, journal)
            with contextlib.suppress(KeyboardInterrupt):  # the second Ctrl-C: the video ends here
                maker.run(given)
        whole = maker.made == total
    finally:  # once the video is closed: until then the journal is all there is
        if journal is not None:
            journal.close(done=whole or not journal.count)
        if video is not None and video.kept:
            goes_on = "; --resume goes on with it" if journal is not None and journal.count else ""
            said = f"the first {video.kept} frames are in {video.partial}{goes_on}"
            print(f"inferix generate: {said}", file=sys.stderr)
    if not maker.made:
        kept = f"--resume goes on with {journal.path}" if journal and journal.count else "nothing was written"
        print(f"inferix generate: interrupted before the first frame: {kept}", file=sys.stderr)
        return INTERRUPTED
    maker.write_beside(video.path, {"seed": args.seed, "kv": args.kv})
    return 0 if whole else INTERRUPTED


class Maker:
    """Makes and writes `total` frames; Ctrl-C ends the video at the last whole block, a second one at once.

    What is kept in memory does not grow with the video, but for a number per step and a live world's frames, which are
    small and measured.
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

    @property
    def made(self) -> int:
        return self.video.frames

    def run(self, given: np.ndarray | None) -> None:
        adapter = self.world.model.adapter
        known = iter(self.journal.blocks if self.journal else [])
        memory = sum(self.world.kv_bytes().values()) / 2**20
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[fps]:.1f} FPS · KV {task.fields[memory]:.1f} MiB ·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=_Bar(),
        )
        with bar, _Interrupt() as interrupt:
            task = bar.add_task(f"{adapter.name} world", total=self.total, fps=0.0, memory=memory)
            started = time.perf_counter()
            if given is not None:
                self._take(self.world.observe(given, prompt=self.prompts.at(0.0)))
            while self.made < self.total and not interrupt.asked:
                chosen = None if self.actions is None else [next(self.actions) for _ in range(adapter.block_frames)]
                again = next(known, None)
                begins = self.made + self.world.ahead * adapter.pictures
                prompt = self.prompts.at(begins / adapter.fps)
                frames = self.world.step(chosen, prompt=prompt, known=again)
                self.seconds.append(self.world.denoising)
                self._take(frames)
                if self.journal is not None and again is None:
                    self.journal.append(self.world.latents)
                bar.update(task, completed=self.made, fps=self.made / (time.perf_counter() - started))

    def _take(self, frames: np.ndarray) -> None:
        frames = frames[: self.total - self.made]
        self.shown |= {i: frames[i - self.made] for i in self.wanted if 0 <= i - self.made < len(frames)}
        if self.world.model.adapter.live:
            self.all.append(frames)
        self.video.write(frames)

    def summary(self) -> dict[str, Any]:
        adapter = self.world.model.adapter
        seconds = np.array(self.seconds)
        blocks = seconds[1:] if len(seconds) > 1 else seconds
        per_block = adapter.block_frames
        asked = [self.prompts.at(i // per_block * per_block / adapter.fps) for i in range(self.made)]
        read = {"kv_read_per_layer_and_step": self.world.kv_read()} if adapter.stages else {}
        times: dict[str, float] = {}
        if len(seconds):  # none if what was given fills the video
            times = {
                "fps": self.made / seconds.sum(),
                "first_block_seconds": seconds[0],
                "block_seconds_p50": float(np.percentile(blocks, 50)),
                "block_seconds_p95": float(np.percentile(blocks, 95)),
            }
        return read | {
            "model": adapter.name,
            "frames": self.made,
            "seconds_of_video": self.made / adapter.fps,
            **times,
            "kv_bytes": self.world.kv_bytes(),
            "measures": self.world.model.measures(np.concatenate(self.all)[: self.made], asked) if adapter.live else {},
        }

    def write_beside(self, out: Path, extra: dict[str, Any]) -> None:
        """The contact sheet and the summary, beside the video, and what they say on the terminal."""
        summary, fps = self.summary() | extra, self.world.model.adapter.fps
        sheet, report = out.with_suffix(".png"), out.with_suffix(".json")
        shown = {i: frame for i, frame in self.shown.items() if i < self.made}  # Ctrl-C may come while one is written
        rows = -(-len(shown) // SHEET_COLUMNS)
        pictures, labels = np.stack(list(shown.values())), [f"{i / fps:.1f} s" for i in shown]
        drawn = pictures.dtype == np.uint8  # and not latents
        if drawn:
            contact_sheet(pictures, rows, SHEET_COLUMNS, sheet, labels=labels, scale=2 if self.all else 1)
        with atomic_write(report, "--out") as part:
            part.write_text(json.dumps(summary, indent=2) + "\n")
        pace = ", all of them given"
        if "fps" in summary:
            p50, p95 = (1e3 * summary[f"block_seconds_{part}"] for part in ("p50", "p95"))
            pace = f" at {summary['fps']:.1f} FPS, block p50 {p50:.0f} ms, p95 {p95:.0f} ms"
        print(f"{out}: {self.made} {'' if drawn else 'latent '}frames ({summary['seconds_of_video']:.1f} s){pace}")
        print(f"{sheet}: contact sheet · {report}: summary" if drawn else f"{report}: summary")
        if read := summary.get("kv_read_per_layer_and_step"):
            ours, theirs = (f"{size / 2**20:.2f} MiB" for size in read.values())
            print(f"  of the past each layer read {ours} a step; MAGI-1's own code copies all of it: {theirs}")
        for name, value in summary["measures"].items():
            print(f"  {name}: {value:.1%}")


def _check(args: argparse.Namespace) -> None:
    if args.seconds <= 0:
        raise ValueError(f"--seconds must be a positive number, got {args.seconds:g}")
    if args.seconds > MOST_SECONDS:
        raise ValueError(f"--seconds must be at most {MOST_SECONDS}, about 11 days, got {args.seconds:g}")
    if not 0 <= args.seed < 2**64:  # what torch takes, and NumPy
        raise ValueError(f"--seed must be from 0 to 2^64 - 1, got {args.seed}")
    if args.scale is not None and args.scale < 1:
        raise ValueError(f"--scale must be at least 1, got {args.scale}")
    if args.device is not None and check_device("--device", args.device).type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {args.device!r}")


def _outputs(args: argparse.Namespace, model: BlockModel) -> list[Path]:
    """Every file that may be written."""
    out = Path(args.out)
    if not out.name:
        raise ValueError(f"--out must be the name of a file, got {args.out!r}")
    latents = getattr(model, "only_latents", False)
    video = out.with_suffix(".npy") if latents else out
    sheet = [] if latents else [out.with_suffix(".png")]
    journal = [] if model.adapter.live else [journal_path(out)]
    return [video, partial_path(destination(video, "--out")), out.with_suffix(".json"), *sheet, *journal]


def _check_outputs(args: argparse.Namespace, model: BlockModel) -> None:
    """All that is to be written can be, each to a file of its own, and none of it is what the video is made from."""
    written: dict[Path, Path] = {}
    for path in _outputs(args, model):
        place = require_writable(path, "--out").resolve()
        if (other := written.setdefault(place, path)) is not path:
            raise ValueError(f"--out: {str(other)!r} and {str(path)!r} must be two files, got links to one")
        for option in ("weights", "image", "video", "actions", "prompt_file"):
            read = getattr(args, option)
            if read is not None and path.exists() and Path(read).exists() and path.samefile(read):
                name = option.replace("_", "-")
                raise ValueError(f"--out: {str(path)!r} would be written, but --{name} is read from it")
    journal = journal_path(Path(args.out))
    if journal.exists() and not model.adapter.live:
        with open_locked(journal, "--out", args.out):  # no other run is at it
            if not args.resume:
                refuse_unfinished(journal)


def _given(args: argparse.Namespace, model: BlockModel, total: int) -> np.ndarray | None:
    """What the video begins with; of a clip the longest start that makes whole blocks."""
    adapter = model.adapter
    for option in ("image", "video"):
        if getattr(args, option) is not None and adapter.actions:
            raise ValueError(f"--{option} must not be given: {adapter.name} begins with words and actions alone")
    if args.image is not None:
        picture = read_picture(args.image, adapter.size)
        if not adapter.at_once and not whole_start(model, 1):
            raise ValueError(f"--image: {adapter.name} begins with several pictures{_beginning_with_one(args)}")
        return picture
    if args.video is not None:
        if adapter.at_once:
            raise ValueError(f"--video must not be given: {adapter.name} makes a video at once, from no past")
        clip = read_video(args.video, adapter.size, adapter.fps, total)
        if not (most := whole_start(model, len(clip))):
            least = next(n for n in itertools.count(len(clip)) if whole_start(model, n))
            raise ValueError(f"--video: {adapter.name} goes on from at least {least} pictures, got {len(clip)}")
        return clip[:most]
    return None


def _beginning_with_one(args: argparse.Namespace) -> str:
    """Names the models of the same family that take one picture."""
    rows = getattr(importlib.import_module(MODELS[args.model]), "ADAPTERS", {})
    names = [name for name, row in rows.items() if row.frames(first=True) == 1 and not row.at_once]
    return f": {' and '.join(names)} take one picture" if names else ""


def _writer(args: argparse.Namespace, model: BlockModel, total: int) -> VideoWriter | LatentWriter:
    adapter = model.adapter
    if getattr(model, "only_latents", False):
        return LatentWriter(args.out, total, model.latent_shape)
    scale = adapter.scale if args.scale is None else args.scale
    return VideoWriter(args.out, adapter.fps, adapter.size, scale=scale)


def _journal(args: argparse.Namespace, world: World, prompts: Prompts, digest: str | None) -> Journal:
    adapter: Adapter = world.model.adapter
    weights = Path(args.weights).resolve()
    settings = {
        "model": adapter.name,
        "weights": str(weights),
        "lora": args.lora,
        "size": adapter.size,
        "seed": args.seed,
        "kv": args.kv,
        "window": args.window,
        "sink": args.sink,
        "backend": args.backend,
        "steps": args.steps,
        "guidance": args.guidance,
        "negative_prompt": args.negative_prompt,
        "image": args.image and str(args.image.resolve()),
        "video": args.video and str(args.video.resolve()),
        "what --image or --video shows (its SHA-256)": digest,
        "seconds": args.seconds if adapter.stages else None,
        "stages": args.stages,
        "fp8": args.fp8,
        "decoder": args.decoder,
        "special_tokens": args.special_tokens,
        "prompts": prompts.starts,
    }
    return Journal(journal_path(Path(args.out)), world.model.latent_shape, settings, args.resume)


class _Bar(Console):
    """Where the bar is drawn. That nobody reads it any more is no reason to stop."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class _Interrupt:
    """Ctrl-C as a flag: the block in the making is finished and the file closed. A second Ctrl-C ends at once."""

    asked = False

    def __enter__(self) -> _Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._previous)
