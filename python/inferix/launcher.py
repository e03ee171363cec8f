"""What torchrun says to the processes that it starts; without torch, which takes seconds to import."""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import timedelta

PATIENCE = 10.0  # seconds that a rank leaves to rank 0 to say what has ended them
SAID = "inferix/said"  # in torchrun's store


def launched_rank() -> int | None:
    """This process's rank; None: no torchrun has started it.

    Source: torch.distributed.run, "Environment Variables": it tells by these alone.
    """
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def say(program: str, text: str) -> None:
    """The line on stderr that a command ends with. Ranks end for one reason, so one of them says it: rank 0, which
    hears what has ended another one; else the first that has waited for that in vain."""
    rank = launched_rank()
    if not rank:
        print(f"{program}: {text}", file=sys.stderr, flush=True)
    if rank is None:
        return
    said = 0
    with contextlib.suppress(RuntimeError):  # the store has gone, with the process that it was in
        import torch.distributed as dist

        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=PATIENCE))
        if rank:
            with contextlib.suppress(RuntimeError):
                store.wait([SAID], timedelta(seconds=PATIENCE))
        said = store.add(SAID, 1) - 1
    if rank and not said:
        print(f"{program}: rank {rank}: {text}", file=sys.stderr, flush=True)
