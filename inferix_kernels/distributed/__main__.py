"""`python -m inferix_kernels.distributed plan`: how many GPUs should share worlds, modelled, for a machine to buy.

python -m inferix_kernels.distributed plan --model wan14b --ranks 8 --link nvlink4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .._printing import while_read
from .costs import Workload
from .planner import plan_attention
from .presets import DEVICES, LINKS, MODELS, Link
from .wire import FORMATS

_COUNTS = {
    "worlds": "worlds that are to run at once; 1 by default",
    "branches": "forwards of a step, as the model is guided; 2 with a negative prompt",
    "tokens": "tokens of a block, in place of the model's",
    "keys": "tokens that a block attends to, its own included, in place of the model's",
}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m inferix_kernels.distributed", description=__doc__.splitlines()[0])
    plan = parser.add_subparsers(dest="command", required=True).add_parser("plan", help="the table, and the reason")
    plan.add_argument("--model", required=True, choices=MODELS)
    plan.add_argument("--ranks", required=True, type=int, help="GPUs that share the work")
    plan.add_argument("--link", default="nvlink4", choices=LINKS, help="what joins them (default: nvlink4)")
    plan.add_argument(
        "--bandwidth", type=float, metavar="GB/s", help="as measured, in place of --link's; with --latency"
    )
    plan.add_argument("--latency", type=float, metavar="US", help="of a collective, as measured; with --bandwidth")
    plan.add_argument("--device", default="h200", choices=DEVICES, help="(default: h200)")
    plan.add_argument("--memory", type=float, metavar="GB", help="of each rank, in place of the device's")
    plan.add_argument("--kv", default="bf16", choices=FORMATS, help="format of committed pages (default: bf16)")
    for name, said in _COUNTS.items():
        plan.add_argument(f"--{name}", type=int, help=said)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = options().parse_args(arguments)
    changes = {name: getattr(given, name) for name in _COUNTS if getattr(given, name) is not None}
    try:
        link: Link | str = given.link
        if (given.bandwidth is None) != (given.latency is None):
            missing = "bandwidth" if given.bandwidth is None else "latency"
            raise ValueError(f"--{missing} must be given too: a measured link is both figures")
        if given.bandwidth is not None:
            link = Link.measured(given.bandwidth * 1e9, given.latency * 1e-6)
        work = Workload.of(given.model, given.ranks, kv_format=given.kv, **changes)
        memory = None if given.memory is None else given.memory * 1e9
        print(plan_attention(work, link, memory, given.device).explain())
    except ValueError as error:
        print(f"python -m inferix_kernels.distributed plan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(while_read(main))
