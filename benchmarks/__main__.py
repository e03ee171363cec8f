"""`python -m benchmarks run [attention] [kv_pages]`: our kernels beside what else could do their work.

Each contender's output is compared with the reference first; a wrong one is shown as wrong, and not timed.
"""

from __future__ import annotations

import argparse
import importlib

import torch
from rich.console import Console

FAMILIES = ("attention", "kv_pages")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure on this machine")
    run.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)} (default: all)")
    run.add_argument("--device", choices=["cpu"], default="cpu")
    run.add_argument("--rounds", type=int, default=10)
    run.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    unknown = [family for family in args.families if family not in FAMILIES]
    if unknown:
        parser.error(f"family must be one of {', '.join(FAMILIES)}, got {unknown[0]!r}")
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    torch.set_num_threads(args.threads)
    console = Console()
    for family in args.families or FAMILIES:
        module = importlib.import_module(f".{family}", __package__)
        for table in module.tables(args.rounds):
            table.title = f"{table.title}, {args.threads} threads"
            console.print(table)


if __name__ == "__main__":
    main()
