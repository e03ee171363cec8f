"""Kernels for block-diffusion world models: attention over paged, quantized K/V, and what surrounds it.

Needs torch and numpy, and safetensors for snapshots. `python -m inferix_kernels` says what runs on this machine, and
why the rest does not. Every public name has an example; those of the ops assume

    import torch
    from inferix_kernels import *
"""

from . import ops
from ._dispatch import Unsupported
from .arrivals import Counters, NotArrived
from .layout import FORMATS, KVPages, PageList, Quantized
from .ops import *
from .plans import Plan, Segment, even_plan, make_plan
from .store import (
    Attention,
    KVStore,
    Local,
    NotResident,
    OutOfPages,
    PageTable,
    Part,
    Pass,
    PassBuffers,
    Policy,
    Shard,
    TopK,
)

__version__ = "0.1.0"  # of the distribution: pyproject.toml and inferix read it here

__all__ = [
    "FORMATS",
    "Attention",
    "Counters",
    "KVPages",
    "KVStore",
    "Local",
    "NotArrived",
    "NotResident",
    "OutOfPages",
    "PageList",
    "PageTable",
    "Part",
    "Pass",
    "PassBuffers",
    "Plan",
    "Policy",
    "Quantized",
    "Segment",
    "Shard",
    "TopK",
    "Unsupported",
    "__version__",
    "even_plan",
    "make_plan",
]
__all__ += ops.__all__
