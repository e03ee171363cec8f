"""`python -m benchmarks`: our kernels on this machine, compared with other libraries that can do their work.

list      families, shapes, contenders, and which of them this machine has
peers     other libraries that could do our kernels' work; `peers install NAME ...` brings those for processors
run       check every contender against the reference, then time those that are right, taking turns
compare   two runs, or two source trees measured now: FASTER, SLOWER, SAME or UNSURE, with an interval
sweep     cost against pages, sparsity, worlds and blocks, with the fitted exponent
evidence  which kernel was measured in which format on which architecture, and whether at this source
report    make the tables between the marks of the documents anew, from the records
env       what a figure of this machine would be a figure of
gpu       minutes of a rented GPU: what is most wanted first; goes on where an earlier call ended
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import inferix_kernels
from inferix_kernels._printing import while_read
from inferix_kernels.verdict import MARGIN

from . import commands, families, sweep
from .harness.plan import FIRST
from .harness.timing import TIMERS


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = top.add_subparsers(required=True, metavar="command")

    def command(name: str, call: Callable[[argparse.Namespace], int], help: str) -> Callable[..., object]:
        made = subparsers.add_parser(name, help=help, description=call.__doc__)
        made.set_defaults(call=call)
        return made.add_argument

    add = command("list", commands.listing, "families, shapes and contenders")
    add("--device", choices=list(TIMERS), default=default_device())
    add = command("run", commands.run, "measure on this machine")
    add("families", nargs="*", metavar="family", help=f"of {', '.join(families.FAMILIES)} (default: all)")
    measuring(add)
    results(add)
    add("--markdown", action="store_true", help="print nothing but the tables")
    add("--github", type=Path, metavar="F", help="write what github-action-benchmark reads (customSmallerIsBetter)")
    add("--model", choices=["tiny", "self-forcing"], help="of e2e (default: tiny; self-forcing on a GPU)")
    add("--weights", help="of e2e: its checkpoint (default: its own, or random ones)")
    add("--blocks", type=int, default=12, help="of e2e (default: 12)")
    add("--ops", type=names, default=(), metavar="A,B", help="of the families, only these ops")
    add("--isolate", action="store_true", help="in processes of their own: a fault takes no other's result with it")
    add("--patience", type=float, default=20, metavar="S", help="with --isolate: for a first call (default: 20)")
    add("--resume", action="store_true", help="with --isolate: not what is in --json F.jsonl already")
    add = command("peers", commands.peers, "other libraries: which are here, and how to get them")
    add("action", nargs="?", choices=["install"], help="into folders of their own under build/peers, from PyPI")
    add("names", nargs="*", metavar="name")
    add = command("compare", commands.compare, "two runs, or two source trees")
    add("a", type=Path, help="a file that run wrote, or a source tree with its extension built")
    add("b", type=Path, help="the same: what is judged")
    add("families", nargs="*", metavar="family", help="of two trees (default: all with cases)")
    add("--margin", type=float, default=MARGIN, help=f"ratios closer to 1 are SAME (default: {MARGIN})")
    measuring(add, rounds=200)
    add = command("sweep", commands.sweep, "what grows with what")
    axes = [*sweep.AXES, sweep.BLOCKS]
    add("axes", nargs="*", metavar="axis", help=f"of {', '.join(axes)} (default: all)")
    add("--shape", dest="shapes", type=names, default=("tiny",), metavar="S", help="of one world (default: tiny)")
    measuring(add, shapes=False)
    results(add)
    add = command("evidence", commands.show_evidence, "what was measured, and whether it still holds")
    add("--fail-on-stale", action="store_true", help="exit code 1 unless every line is measured at this source")
    add("--only", type=names, default=(), metavar="A,B", help="kernels by name or part of it: cpu, cuda/attention ...")
    add("--records", type=Path, action="append", metavar="F", help="files in addition to benchmarks/records")
    add = command("report", commands.report, "tables and plots from records")
    add("files", nargs="*", type=Path, help="Markdown files with marks (default: those of docs)")
    add("--records", type=Path, action="append", metavar="F", help="only these, instead of benchmarks/records")
    add("--plot", type=Path, metavar="F", help="draw the newest record's rates")
    add("--plot-sweep", type=Path, metavar="F", help="draw the newest record's sweeps")
    add = command("env", commands.env, "the header of a record")
    add("--device", choices=list(TIMERS), default=default_device())
    add = command("gpu", commands.gpu, "minutes of a rented GPU")
    add("--out", type=Path, required=True, metavar="DIR", help="at most 8 files of at most 16 MiB; goes on with it")
    add("--minutes", type=float, default=FIRST, help=f"stop in time (default: {FIRST})")
    add("--dry-run", action="store_true", help="every stage on the CPU, at shapes for tests")
    return top


def measuring(add: Callable[..., object], rounds: int = 20, shapes: bool = True) -> None:
    """What decides what is measured, and how."""
    if shapes:
        add("--shapes", type=names, default=(), metavar="A,B", help="names or numbers: 468x3276x12x128, 192x1536x8960")
    add("--backends", type=names, default=(), metavar="A,B", help='contenders: "ours", "sdpa", "flash-attn" ...')
    add("--formats", type=names, default=(), metavar="A,B", help="of K and V, or of the weights: int8,bf16 ...")
    add("--device", choices=list(TIMERS), default=default_device())
    add("--timer", choices=[name for timers in TIMERS.values() for name in timers], help="see harness/timing.py")
    add("--cold-l2", dest="cold", action="store_true", default=True, help="nothing is in the caches (default)")
    add("--warm-l2", dest="cold", action="store_false", help="a call finds what the one before it left there")
    add("--rounds", type=int, default=rounds, help=f"at most; 0: check only (default: {rounds})")
    add("--seconds", type=float, default=60, help="at most so long for a case, but for 5 rounds (default: 60)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--isa", default="", metavar="I", help="instructions: amx, or avx512_bf16, with which nobody uses AMX")


def results(add: Callable[..., object]) -> None:
    add("--json", type=Path, metavar="F", help="write all rows and rounds; F.jsonl is added to")
    add("--record", action="store_true", help="add to benchmarks/records: evidence, and what report shows")
    add("--note", default="", help="words for the record: was the machine quiet?")
    add("--plot", type=Path, metavar="F", help="draw it (.png, .svg or .pdf)")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if importlib.util.find_spec("inferix_kernels._C") is None:  # these sources, say, in the place of what is installed
        folder = Path(inferix_kernels.__file__).parent
        print(f"benchmarks: {folder} has no extension: on a CPU the reference is measured for ours", file=sys.stderr)
    try:
        result: int = args.call(args)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return result


def guarded() -> int:
    """main, with an exit code of its own for what nobody foresaw: 1 is "something of ours is wrong"."""
    try:
        return while_read(main)
    except Exception:
        traceback.print_exc()
        return 4


if __name__ == "__main__":
    sys.exit(guarded())
