"""`python -m inferix.profile A B`: what became slower. `python -m inferix.profile --overhead`: what profiling costs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .compare import compare, table
from .overhead import overhead, span_cost


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m inferix.profile", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="two that were given to --profile: A, and B to be judged")
    parser.add_argument("--overhead", action="store_true", help="measure the tiny world with and without the profiler")
    parser.add_argument(
        "--width", type=float, default=0.1, help="%% plus or minus that is narrow enough (default: 0.1)"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="at most so long (default: 600)")
    given = parser.parse_args(argv)
    if given.overhead:
        return _overhead(given.width / 100, given.seconds)
    if len(given.folders) != 2:
        parser.error("give two folders, or --overhead")
    try:
        print(table(compare(*given.folders)))
    except ValueError as error:
        print(f"inferix.profile: {error}", file=sys.stderr)
        return 2
    return 0


def _overhead(width: float, seconds: float) -> int:
    import torch

    from ..world import World

    torch.set_num_threads(1)
    for name, cost in span_cost().items():
        print(f"{name}: {cost:.3f} us")
    world = World("tiny")
    costs = overhead(lambda: world.step(action="up", prompt="desert day"), width=width, seconds=seconds)
    print(*costs, sep="\n")
    wide = [cost.level for cost in costs if cost.width > width]
    if wide:
        print(f"not narrow enough after {seconds:g} s: {', '.join(wide)}")
    return int(bool(wide))


if __name__ == "__main__":
    sys.exit(main())
