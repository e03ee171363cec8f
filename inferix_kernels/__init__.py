"""Kernels for block-diffusion world models: attention over paged, quantized K/V, and what surrounds it.

Needs torch and numpy, and safetensors for snapshots. `python -m inferix_kernels` says what runs on this machine, and
why the rest does not.
"""

from ._dispatch import Unsupported
from .layout import FORMATS, KVPages, PageList, Plan, Quantized, Segment, even_plan, make_plan
from .ops import (
    kv_append,
    kv_commit,
    kv_gather,
    latent_attention,
    linear,
    merge_attention,
    page_scores,
    page_summaries,
    paged_attention,
    qkv_prologue,
    quantize_rows,
    select_pages,
)
from .store import Attention, KVStore, Local, NotResident, OutOfPages, PageTable, Part, Pass, Policy, TopK

__all__ = [
    "FORMATS",
    "Attention",
    "KVPages",
    "KVStore",
    "Local",
    "NotResident",
    "OutOfPages",
    "PageList",
    "PageTable",
    "Part",
    "Pass",
    "Plan",
    "Policy",
    "Quantized",
    "Segment",
    "TopK",
    "Unsupported",
    "even_plan",
    "kv_append",
    "kv_commit",
    "kv_gather",
    "latent_attention",
    "linear",
    "make_plan",
    "merge_attention",
    "page_scores",
    "page_summaries",
    "paged_attention",
    "qkv_prologue",
    "quantize_rows",
    "select_pages",
]
