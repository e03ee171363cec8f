"""One world, or several, on many devices: how they share the work, and which way is best.

Importing this package imports no torch.distributed; a name does when it is first used.

| module | holds |
|---|---|
| planner | which way is chosen, for a workload, a link and a memory |
| choice | what was chosen, and why, as text |
| costs | what each way costs: a model |
| presets | links, devices and models by name |
| wire | how many bytes a rank sends: formulas that are exact |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .choice import Choice
    from .costs import Layout, Option, Workload
    from .planner import plan_attention
    from .presets import DEVICES, LINKS, MODELS, Device, Link

__all__ = [
    "DEVICES",
    "LINKS",
    "MODELS",
    "Choice",
    "Device",
    "Layout",
    "Link",
    "Option",
    "Workload",
    "plan_attention",
]

_MODULES = {
    "choice": ("Choice",),
    "costs": ("Layout", "Option", "Workload"),
    "planner": ("plan_attention",),
    "presets": ("DEVICES", "LINKS", "MODELS", "Device", "Link"),
}
_MODULE_OF = {name: f".{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
