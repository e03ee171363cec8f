"""The command line: `inferix generate`, `inferix play`, `inferix doctor`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from .world import World

USAGE, INTERRUPTED = 2, 130
SHEET_COLUMNS, SHEET_ROWS = 8, 4


def main(argv: list[str] | None = None) -> int:
    """Run a command. Bad input is one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, ImportError) as error:
        print(f"inferix {args.command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"inferix {args.command}: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inferix", description="Run and steer block-diffusion video world models.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="make a video of a world")
    generate.add_argument("--model", default="tiny", help="which model (default: tiny)")
    generate.add_argument("--weights", help="checkpoint file, for models that do not ship one")
    generate.add_argument(
        "--out", default="world.mp4", help="MP4 to write; a PNG sheet and a JSON summary go beside it"
    )
    generate.add_argument("--seconds", type=float, default=10.0, help="length of the video (default: 10)")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--actions", default="random", metavar="FILE|random|scripted", help="a file has one ACTION [FRAMES] a line"
    )
    prompts = generate.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help='words for the whole video, for example "desert night"')
    prompts.add_argument("--prompt-file", type=Path, help="one SECOND PROMPT a line")
    generate.add_argument("--kv", default="int8", help="format of the KV pages: fp32, bf16 or int8 (default: int8)")
    generate.add_argument("--window", type=int, help="frames a block sees, its own included (default: the model's)")
    generate.add_argument("--sink", type=int, help="first frames that are never forgotten (default: the model's)")
    generate.add_argument(
        "--scale", type=int, default=4, help="pixels of the video per pixel of the world (default: 4)"
    )
    generate.add_argument("--backend", default="auto", help="kernels: auto, compiled, triton or reference")
    generate.add_argument("--threads", type=int, help="CPU threads (default: the model's)")
    generate.set_defaults(run=_generate)
    play = commands.add_parser("play", help="steer a world in this terminal")
    play.add_argument("--model", default="tiny", help="which model (default: tiny)")
    play.add_argument("--weights", help="checkpoint file, for models that do not ship one")
    play.add_argument("--seed", type=int, default=0)
    play.add_argument("--kv", default="int8", help="format of the KV pages: fp32, bf16 or int8 (default: int8)")
    play.set_defaults(run=_play)
    convert = commands.add_parser("convert", help="write a Wan checkpoint as one safetensors file that needs no other")
    convert.add_argument("source", help="checkpoint file, or the folder that holds it")
    convert.add_argument("out", type=Path, help=".safetensors to write")
    convert.add_argument("--model", default="self-forcing", help="whose weights to take if the file holds several")
    convert.add_argument("--lora", help="low-rank updates to merge (default: the *lora* file in the folder)")
    convert.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the weights (default: fp32)")
    convert.set_defaults(run=_convert)
    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _generate(args: argparse.Namespace) -> int:
    if not 0 < args.seconds < float("inf"):
        raise ValueError(f"--seconds must be a positive number, got {args.seconds:g}")
    for option in ("scale", "threads"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    import torch

    from .controls import Prompts, actions_from
    from .media import VideoWriter
    from .world import World

    world = World(
        args.model,
        kv=args.kv,
        window=args.window,
        sink=args.sink,
        seed=args.seed,
        weights=args.weights,
        backend=args.backend,
    )
    adapter = world.model.adapter
    if threads := args.threads or adapter.threads:
        torch.set_num_threads(threads)
    prompts = Prompts.read(args.prompt_file) if args.prompt_file else None
    prompts = prompts or Prompts(((0.0, args.prompt or adapter.example_prompts[0]),))
    for _, prompt in prompts.starts:  # every word is checked before the first frame is made
        world.model.condition(prompt, [adapter.actions[0]] * adapter.block_frames if adapter.actions else [])
    actions = actions_from(args.actions, adapter, args.seed)
    total = round(args.seconds * adapter.fps)
    if total < 1:
        raise ValueError(f"--seconds must be at least one frame, 1/{adapter.fps}, got {args.seconds:g}")
    with VideoWriter(args.out, adapter.fps, adapter.size, scale=args.scale) as video:
        made, interrupted = _record(world, actions, prompts, total, video)
    if not len(made):
        raise ValueError("interrupted before the first frame: nothing was written")
    summary = _summary(args, world, made, prompts)
    _write_beside(Path(args.out), made, summary)
    return INTERRUPTED if interrupted else 0


def _record(world: World, actions: Iterator[str], prompts: Any, total: int, video: Any) -> tuple[np.ndarray, bool]:
    """Make and write `total` frames; Ctrl-C ends the video at the last whole block. Frames, and whether it did."""
    import numpy as np
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    adapter, made, interrupted = world.model.adapter, 0, False
    kept = [np.empty((0, *adapter.size, 3), np.uint8)]
    memory = sum(world.kv_bytes().values()) / 2**20
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[fps]:.1f} FPS · KV {task.fields[memory]:.1f} MiB ·"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with bar, _Interrupt() as interrupt:
        task = bar.add_task(f"{adapter.name} world", total=total, fps=0.0, memory=memory)
        started = time.perf_counter()
        while made < total and not interrupt.asked:
            chosen = [next(actions) for _ in range(adapter.block_frames)]
            frames = world.step(chosen, prompt=prompts.at(made / adapter.fps))[: total - made]
            video.write(frames)
            kept.append(frames)
            made += len(frames)
            bar.update(task, completed=made, fps=made / (time.perf_counter() - started))
        interrupted = made < total
    return np.concatenate(kept), interrupted


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


def _summary(args: argparse.Namespace, world: World, frames: np.ndarray, prompts: Any) -> dict[str, Any]:
    import numpy as np

    adapter = world.model.adapter
    seconds = np.array(world.decoder.seconds)
    blocks = seconds[1:] if len(seconds) > 1 else seconds
    asked = [prompts.at(i // adapter.block_frames * adapter.block_frames / adapter.fps) for i in range(len(frames))]
    return {
        "model": adapter.name,
        "frames": len(frames),
        "seconds_of_video": len(frames) / adapter.fps,
        "seed": args.seed,
        "kv": args.kv,
        "fps": len(frames) / seconds.sum(),
        "first_block_seconds": seconds[0],
        "block_seconds_p50": float(np.percentile(blocks, 50)),
        "block_seconds_p95": float(np.percentile(blocks, 95)),
        "kv_bytes": world.kv_bytes(),
        "measures": world.model.measures(frames, asked),
    }


def _write_beside(out: Path, frames: np.ndarray, summary: dict[str, Any]) -> None:
    """The contact sheet and the summary, beside the video, and what they say on the terminal."""
    import numpy as np

    from .media import contact_sheet

    shown = np.linspace(0, len(frames) - 1, min(len(frames), SHEET_COLUMNS * SHEET_ROWS)).astype(int)
    sheet, report = out.with_suffix(".png"), out.with_suffix(".json")
    rows = -(-len(shown) // SHEET_COLUMNS)
    fps = summary["frames"] / summary["seconds_of_video"]
    contact_sheet(frames[shown], rows, SHEET_COLUMNS, sheet, labels=[f"{i / fps:.1f} s" for i in shown])
    report.write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"{out}: {summary['frames']} frames ({summary['seconds_of_video']:.1f} s) at {summary['fps']:.1f} FPS, "
        f"block p50 {1e3 * summary['block_seconds_p50']:.0f} ms, p95 {1e3 * summary['block_seconds_p95']:.0f} ms"
    )
    print(f"{sheet}: contact sheet · {report}: summary")
    for name, value in summary["measures"].items():
        print(f"  {name}: {value:.1%}")


def _play(args: argparse.Namespace) -> int:
    import torch

    from .terminal import play
    from .world import World

    world = World(args.model, kv=args.kv, seed=args.seed, weights=args.weights)
    adapter = world.model.adapter
    if adapter.threads:
        torch.set_num_threads(adapter.threads)
    play(world, adapter.example_prompts, adapter.keys)
    return 0


def _convert(args: argparse.Namespace) -> int:
    import torch

    from .media import require_writable
    from .models import load_model
    from .models.wan import Wan
    from .models.wan.checkpoint import save_network

    require_writable(args.out, "out")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = load_model(args.model, args.source, lora=args.lora, dtype=dtype)
    if not isinstance(model, Wan):
        raise ValueError(f"--model must be a Wan model, got {args.model!r}")
    save_network(model.network, args.out)
    config = model.network.config
    print(f"{args.out}: {config.layers} layers of width {config.dim}, {config.heads} heads, {args.dtype}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    return examine()


if __name__ == "__main__":
    sys.exit(main())
