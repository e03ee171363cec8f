"""The command line: `inferix generate`, `inferix play`, `inferix convert`, `inferix doctor`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from .stream import MAX_FILES, MAX_GB

USAGE, INTERRUPTED = 2, 130
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))
# Options of play, not for the terminal.
PAGE_ONLY = ("host", "port", "token", "folder", "max_files", "max_gb", "push", "undo", "worlds")
KV_HELP = "fp32, fp16, bf16, int8, i8f8, fp8, int4 (default: int8)"  # written out: --help need not wait for torch

LORA_HELP = "low-rank updates to merge into the weights; may be repeated (default: the *lora* file in the folder)"


def main(argv: list[str] | None = None) -> int:
    """Run a command. Bad input is one line on stderr and exit code 2."""
    args = _parser().parse_args(argv)
    from inferix_kernels._printing import while_read  # brings torch, for which --help need not wait

    return while_read(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        _check_text(args)
        _check_numbers(args)
        return int(args.run(args))
    except ValueError as error:
        print(f"inferix {args.command}: {error}", file=sys.stderr)
        return USAGE
    except ImportError as error:
        from inferix_kernels._install import explained

        print(f"inferix {args.command}: {explained(error)}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"inferix {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _check_text(args: argparse.Namespace) -> None:
    """What holds for the words and names of all commands: no file and no tokenizer takes what is no text."""
    for name, value in vars(args).items():
        option = name if name in getattr(args, "positional", ()) else f"--{name.replace('_', '-')}"
        for text in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(text, str | Path):
                continue
            try:
                text = str(text).encode().decode()
            except UnicodeEncodeError:
                raise ValueError(f"{option} must be text in UTF-8, got {str(text)!r}") from None
            if "\0" in text:
                raise ValueError(f"{option} must have no NUL character, got {text!r}")


def _check_numbers(args: argparse.Namespace) -> None:
    """What holds for the numbers of all commands."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number, got {value:g}")
    if (threads := getattr(args, "threads", None)) is not None and not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"--threads must be from 1 to {MOST_THREADS}, got {threads}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inferix", description="Run and steer block-diffusion video world models.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="make a video of a world")
    generate.add_argument("--model", default="tiny", help="which model (default: tiny)")
    generate.add_argument("--weights", help="checkpoint file or its folder, for models that do not ship one")
    generate.add_argument("--lora", action="append", metavar="FILE[=STRENGTH]", help=LORA_HELP)
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
    prompts.add_argument(
        "--prompt-file", type=Path, help="one SECOND PROMPT a line; a line that begins with # says nothing"
    )
    generate.add_argument("--steps", type=int, help="denoising steps, for models not distilled to their own")
    generate.add_argument("--stages", type=int, help="blocks in flight, for models that run in a pipeline")
    generate.add_argument("--guidance", type=float, help="away from the negative prompt, for models not distilled")
    generate.add_argument("--negative-prompt", help="words to be guided away from (default: none, the empty prompt)")
    generate.add_argument("--kv", default="int8", help=f"format of the KV pages: {KV_HELP}")
    generate.add_argument("--window", type=int, help="frames a block sees, its own included (default: the model's)")
    generate.add_argument("--sink", type=int, help="first frames that are never forgotten (default: the model's)")
    generate.add_argument("--scale", type=int, help="pixels of the video per pixel of the world (default: the model's)")
    generate.add_argument("--size", type=_size, metavar="HxW", help="pixels of a picture (default: the model's)")
    given = generate.add_mutually_exclusive_group()
    given.add_argument(
        "--image",
        type=Path,
        help="picture that the video begins with, for models that take one; white where it is transparent",
    )
    given.add_argument(
        "--video",
        type=Path,
        help="video whose start the video goes on from, as long as makes whole blocks, for models that take one",
    )
    generate.add_argument("--decoder", metavar="MODULE:NAME", help="who makes pictures, for models that bring no VAE")
    generate.add_argument("--fp8", choices=["keep", "dequantize"], help="weights that are in 8 bits (default: keep)")
    generate.add_argument(
        "--special-tokens", type=_words, metavar="A,B", help="rows before the caption, for models that know them"
    )
    generate.add_argument("--resume", action="store_true", help="go on with the video that a kill or Ctrl-C ended")
    generate.add_argument("--prompt-cache", help="folder for prompt embeddings (default: ~/.cache/inferix/prompts)")
    generate.add_argument("--device", help="where the network runs: cpu or cuda (default: a GPU, if there is one)")
    generate.add_argument("--backend", default="auto", help="kernels: auto, compiled, triton or reference")
    generate.add_argument("--threads", type=int, help="CPU threads (default: the model's)")
    generate.set_defaults(run=_generate)
    play = commands.add_parser("play", help="steer a world in the browser, or in this terminal")
    play.add_argument("--model", default="tiny", help="which model (default: tiny)")
    play.add_argument("--weights", help="checkpoint file or its folder, for models that do not ship one")
    play.add_argument("--lora", action="append", metavar="FILE[=STRENGTH]", help=LORA_HELP)
    play.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; others than this machine need the token"
    )
    play.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    play.add_argument("--token", help="what others must know to come in (default: a new one, printed)")
    play.add_argument("--folder", default="inferix-worlds", help="for saved worlds and recordings")
    play.add_argument(
        "--max-files", type=int, default=MAX_FILES, help=f"worlds and recordings there (default: {MAX_FILES})"
    )
    play.add_argument(
        "--max-gb", type=float, default=MAX_GB, help=f"and what they take, in 10^9 bytes (default: {MAX_GB:g})"
    )
    play.add_argument(
        "--push", "--rtmp", action="append", default=[], metavar="URL|FILE", help="also to rtmp://, srt://, .m3u8, .mp4"
    )
    play.add_argument("--terminal", action="store_true", help="play in this terminal instead")
    play.add_argument("--seed", type=int, default=0)
    play.add_argument("--kv", default="int8", help=f"format of the KV pages: {KV_HELP}")
    play.add_argument("--window", type=int, help="frames a block sees, its own included (default: the model's)")
    play.add_argument("--sink", type=int, help="first frames that are never forgotten (default: the model's)")
    play.add_argument("--undo", type=float, help="seconds that can be rewound (default: 15, or 0 if a VAE looks back)")
    play.add_argument("--worlds", type=int, default=2, help="room for a fork beside the world: 1 does without")
    play.add_argument("--size", type=_size, metavar="HxW", help="pixels of a picture (default: the model's)")
    play.add_argument("--device", help="where the network runs: cpu or cuda (default: a GPU, if there is one)")
    play.add_argument("--backend", default="auto", help="kernels: auto, compiled, triton or reference")
    play.add_argument("--threads", type=int, help="CPU threads (default: the model's)")
    play.set_defaults(run=_play, page_only={name: play.get_default(name) for name in PAGE_ONLY})
    convert = commands.add_parser("convert", help="write a Wan checkpoint as one safetensors file that needs no other")
    convert.add_argument("source", help="checkpoint file, or the folder that holds it")
    convert.add_argument("out", type=Path, help=".safetensors to write")
    convert.add_argument("--model", default="self-forcing", help="whose weights to take if the file holds several")
    convert.add_argument("--lora", action="append", metavar="FILE[=STRENGTH]", help=LORA_HELP)
    convert.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the weights (default: fp32)")
    convert.set_defaults(run=_convert, positional=("source", "out"))
    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.add_argument("--prove", action="store_true", help="try every kernel on this GPU; which ones run goes by it")
    doctor.add_argument("--device", help="say which kernels a world would use on it: cuda, sm_90, H200, A100, ...")
    doctor.set_defaults(run=_doctor)
    return parser


def _generate(args: argparse.Namespace) -> int:
    from inferix_kernels import OutOfPages, Unsupported

    from .generate import generate

    if args.resume and args.model == "tiny":
        raise ValueError("--resume: the tiny world is made in real time and keeps no journal to resume from")
    try:
        return generate(args)
    except (Unsupported, OutOfPages) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _size(text: str) -> tuple[int, int]:
    """ "480x832" -> (480, 832)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, got {text!r}")
    return int(height), int(width)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _play(args: argparse.Namespace) -> int:
    for option, least in (("worlds", 1), ("undo", 0), ("seed", 0), ("max_files", 0), ("max_gb", 0)):
        if (value := getattr(args, option)) is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} must be at least {least}, got {value:g}")
    if args.terminal:
        return _play_in_terminal(args)
    try:
        from .stream.play import play
    except ModuleNotFoundError as error:
        from inferix_kernels._install import install

        raise ImportError(f"the page needs {error.name}: {install('stream')}, or play --terminal") from None
    return play(args)


def _play_in_terminal(args: argparse.Namespace) -> int:
    from .stream.worker import open_world
    from .terminal import play

    if given := [
        f"--{name.replace('_', '-')}" for name, default in args.page_only.items() if getattr(args, name) != default
    ]:
        raise ValueError(f"{', '.join(given)}: for the page only, not with --terminal")
    names = ("threads", "kv", "window", "sink", "seed", "backend", "weights", "lora", "size", "device")
    world = open_world(args.model, undo_seconds=0, worlds=1, **{name: getattr(args, name) for name in names})
    play(world, world.model.adapter.example_prompts, world.model.adapter.keys)
    return 0


def _convert(args: argparse.Namespace) -> int:
    import torch

    from .media import require_writable
    from .models import load_model
    from .models.wan import Wan
    from .models.wan.checkpoint import save_network

    if args.out.suffix != ".safetensors":  # which is how a checkpoint's format is told
        raise ValueError(f"out must end in .safetensors, got {str(args.out)!r}")
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
    from inferix_kernels import chosen

    from .doctor import examine

    if args.prove:
        from inferix_kernels.proofs import prove

        return prove.command(args.device or "cuda")
    if args.device:
        print(chosen.table(chosen.target(args.device)))
        return 0
    return examine()


if __name__ == "__main__":
    sys.exit(main())
