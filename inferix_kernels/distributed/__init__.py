"""One world, or several, on many devices: which way to share the work, how ranks exchange keys, values and outputs, and
what happens when one is lost.

Importing this package imports no torch.distributed; a name does when it is first used. No launcher is here: processes
are torchrun's, or whoever's made the process group.

| module | holds |
|---|---|
| planner | which way is chosen, for a workload, a link and a memory |
| choice, costs, presets, wire | what was chosen and why; what each way costs: a model; links and devices; bytes sent |
| transport | what a schedule asks of whatever moves its bytes |
| in_process | ranks that are threads of one process, over one device |
| process_group | ranks that are processes, over a process group of torch.distributed |
| faults | which rank is lost, and how the others learn of it |
| subgroup | some ranks of a group as a group of their own |
| tokens | a network's work on its own tokens of every frame |
| measure | the link and the device, measured for the planner |
| agreement | do all ranks make the same pass? |
| exchange | what all schedules have in common |
| gather | Ulysses, gather, and both in groups |
| frame_shards, ring, pass_q | each group of ranks holds other frames: pages go round, or queries go to them |
| arriving | one call of attention in a layer, which waits for pages on their way |
| sharding | who holds what, by the name of a schedule; bytes sent, as formulas |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .choice import Choice
    from .costs import Layout, Option, Workload
    from .faults import PeerLost
    from .gather import Gather
    from .in_process import in_process_group, run_ranks
    from .measure import measure_device, measure_link
    from .pass_q import PassQ
    from .planner import plan_attention
    from .presets import DEVICES, LINKS, MODELS, Device, Link
    from .process_group import ProcessGroupTransport
    from .ring import Ring
    from .sharding import shard_for
    from .subgroup import Subgroup
    from .tokens import TokenShard, WholeFrames
    from .transport import Message, Ticket, Transport

__all__ = [
    "DEVICES",
    "LINKS",
    "MODELS",
    "Choice",
    "Device",
    "Gather",
    "Layout",
    "Link",
    "Message",
    "Option",
    "PassQ",
    "PeerLost",
    "ProcessGroupTransport",
    "Ring",
    "Subgroup",
    "Ticket",
    "TokenShard",
    "Transport",
    "WholeFrames",
    "Workload",
    "in_process_group",
    "measure_device",
    "measure_link",
    "plan_attention",
    "run_ranks",
    "shard_for",
]

_MODULES = {
    "choice": ("Choice",),
    "costs": ("Layout", "Option", "Workload"),
    "faults": ("PeerLost",),
    "gather": ("Gather",),
    "in_process": ("in_process_group", "run_ranks"),
    "measure": ("measure_device", "measure_link"),
    "pass_q": ("PassQ",),
    "planner": ("plan_attention",),
    "presets": ("DEVICES", "LINKS", "MODELS", "Device", "Link"),
    "process_group": ("ProcessGroupTransport",),
    "ring": ("Ring",),
    "sharding": ("shard_for",),
    "subgroup": ("Subgroup",),
    "tokens": ("TokenShard", "WholeFrames"),
    "transport": ("Message", "Ticket", "Transport"),
}
_MODULE_OF = {name: f".{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
