"""Kernels for block-diffusion world models: attention over paged, quantized K/V, and what surrounds it.

Needs torch and numpy, and safetensors for snapshots. `python -m inferix_kernels` says what runs on this machine, and
why the rest does not.
"""

from ._dispatch import Unsupported
from .layout import FORMATS, KVPages, PageList, Plan, Quantized, Segment, make_plan
from .ops import (
    kv_append,
    kv_commit,
    kv_gather,
    linear,
    merge_attention,
    paged_attention,
    qkv_prologue,
    quantize_rows,
)
from .page_table import PageTable
from .paged_kv import KVStore, NotResident, OutOfPages
from .passes import Pass
from .policy import Policy

__all__ = [
    "FORMATS",
    "KVPages",
    "KVStore",
    "NotResident",
    "OutOfPages",
    "PageList",
    "PageTable",
    "Pass",
    "Plan",
    "Policy",
    "Quantized",
    "Segment",
    "Unsupported",
    "kv_append",
    "kv_commit",
    "kv_gather",
    "linear",
    "make_plan",
    "merge_attention",
    "paged_attention",
    "qkv_prologue",
    "quantize_rows",
]
