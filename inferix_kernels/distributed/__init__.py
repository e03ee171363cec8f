"""One world, or several, on many GPUs. Which ways there are to share the work, and when each is best: planner.py.

Importing this package imports nothing of torch.distributed.
"""

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
