"""`python -m benchmarks`: what our kernels do on this machine beside what else could do their work.

list      families, shapes, contenders, and which of them this machine has
run       check every contender against the reference, time those that are right, taking turns
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import families, shapes
from .harness import show
from .harness.measure import Machine, Settings
from .harness.rows import Document
from .harness.timing import TIMERS


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    listing = commands.add_parser("list", help="families, shapes and contenders")
    listing.add_argument("--device", choices=list(TIMERS), default=default_device())
    run = commands.add_parser("run", help="measure on this machine")
    measuring(run)
    run.add_argument("--json", type=Path, metavar="F", help="write all rows and rounds (.jsonl: a line each)")
    run.add_argument("--markdown", action="store_true", help="print nothing but the tables")
    run.add_argument("--plot", type=Path, metavar="F", help="draw the rates (.png, .svg or .pdf)")
    return top


def measuring(command: argparse.ArgumentParser) -> None:
    """What decides what is measured, and how."""
    add = command.add_argument
    add("families", nargs="*", metavar="family", help=f"of {', '.join(families.FAMILIES)} (default: all)")
    add("--shapes", type=names, metavar="A,B", help="by name (see list) or numbers, as 468x3276x12x128")
    add("--backends", type=names, default=(), metavar="A,B", help='contenders: "ours", "sdpa", "flash-attn" ...')
    add("--formats", type=names, default=(), metavar="A,B", help="of K and V, or of the weights: int8,bf16 ...")
    add("--device", choices=list(TIMERS), default=default_device())
    add("--timer", choices=[name for timers in TIMERS.values() for name in timers], help="see harness/timing.py")
    add("--cold-l2", dest="cold", action="store_true", default=True, help="nothing is in the caches (default)")
    add("--warm-l2", dest="cold", action="store_false", help="a call finds what the one before it left there")
    add("--rounds", type=int, default=20, help="0: check only (default: 20)")
    add("--seconds", type=float, default=60, help="at most so long for a case, but for 5 rounds (default: 60)")
    add("--threads", type=int, default=torch.get_num_threads())


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises ValueError for what can't be measured so."""
    for name in args.families:
        families.family(name)
    for shape in args.shapes or ():
        shapes.find_shape(shape)
    timer = args.timer or next(iter(TIMERS[args.device]))
    if timer not in TIMERS[args.device]:
        raise ValueError(f"--timer must be one of {', '.join(TIMERS[args.device])} on {args.device}, got {timer}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if args.rounds < 0 or args.threads < 1 or args.seconds < 0:
        raise ValueError("--rounds and --seconds must not be negative, and --threads at least 1")
    torch.set_num_threads(args.threads)
    return Settings(args.device, timer, args.cold, args.rounds, args.seconds, args.backends, args.formats)


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    machine = Machine(torch.device(settings.device))
    wanted = args.families or families.FAMILIES
    document = Document({}, [])
    for rows in families.run(wanted, args.shapes or shapes.DEFAULT[settings.device], settings, machine):
        document.rows += rows
        print(*show.tables(rows), sep="\n", flush=True)
        if args.json:
            document.save(args.json)  # after every case: a long run may be stopped
    return any(row.status in ("wrong", "failed") for row in document.rows if row.ours)


def listing(args: argparse.Namespace) -> int:
    print("\n".join(f"{shape.name:24} {shape.numbers}" for shape in shapes.SHAPES.values()))
    for name in families.FAMILIES:
        contenders = {}
        for case in families.cases(name, ["smoke"], args.device):
            for contender in case.contenders:
                contenders.setdefault((contender.name, contender.absent), {})[contender.format] = None
        print(f"\n{name}: {(families.family(name).__doc__ or '').splitlines()[0]}")
        for (contender, absent), formats in contenders.items():
            print(f"  {contender:24} {', '.join(formats)}" + (f"   absent: {absent}" if absent else ""))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return {"run": run, "list": listing}[args.command](args)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
