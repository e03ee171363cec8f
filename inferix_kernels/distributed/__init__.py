"""One world on many devices: how ranks share a pass, how their bytes move, and what happens when one is lost.

Importing this package imports no torch.distributed; a name does when it is first used. No launcher is here: processes
are torchrun's, or whoever's made the process group.

| module | holds |
|---|---|
| transport | what a schedule asks of whatever moves its bytes |
| in_process | ranks that are threads of one process, over one device |
| process_group | ranks that are processes, over a process group of torch.distributed |
| faults | which rank is lost, and how the others learn of it |
| agreement | do all ranks make the same pass? |
| exchange | what all schedules have in common |
| gather | Ulysses, gather, and both in groups |
| frame_shards, ring, pass_q | each group of ranks holds other frames: pages go round, or queries go to them |
| sharding | who holds what, by the name of a schedule; bytes sent, as formulas |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .faults import PeerLost
    from .gather import Gather
    from .in_process import in_process_group, run_ranks
    from .pass_q import PassQ
    from .process_group import ProcessGroupTransport
    from .ring import Ring
    from .sharding import shard_for
    from .transport import Message, Ticket, Transport

__all__ = [
    "Gather",
    "Message",
    "PassQ",
    "PeerLost",
    "ProcessGroupTransport",
    "Ring",
    "Ticket",
    "Transport",
    "in_process_group",
    "run_ranks",
    "shard_for",
]

_MODULES = {
    "faults": ("PeerLost",),
    "gather": ("Gather",),
    "in_process": ("in_process_group", "run_ranks"),
    "pass_q": ("PassQ",),
    "process_group": ("ProcessGroupTransport",),
    "ring": ("Ring",),
    "sharding": ("shard_for",),
    "transport": ("Message", "Ticket", "Transport"),
}
_MODULE_OF = {name: f".{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
