"""What torchrun says to the processes that it starts; without torch, which takes seconds to import."""

from __future__ import annotations

import os


def launched_rank() -> int | None:
    """This process's rank; None: no torchrun has started it.

    Source: torch.distributed.run, "Environment Variables": it tells by these alone.
    """
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None
