"""What every op means, in plain torch. This is the specification: written to be read, and every backend is held to it.

Same names and parameters as in ops.py, which fills in every optional one; a module for each family of ops.
"""

from .attention import merge_attention, paged_attention
from .codecs import AMAX_FLOOR, HALF_MAX, LARGEST, STEP_FLOOR, decode, encode
from .kv_pages import kv_append, kv_commit, kv_gather, read_page, read_side, spans, write_page
from .linear import linear, quantize_rows
from .qkv import qkv_prologue, rotate

__all__ = [
    "AMAX_FLOOR",
    "HALF_MAX",
    "LARGEST",
    "STEP_FLOOR",
    "decode",
    "encode",
    "kv_append",
    "kv_commit",
    "kv_gather",
    "linear",
    "merge_attention",
    "paged_attention",
    "qkv_prologue",
    "quantize_rows",
    "read_page",
    "read_side",
    "rotate",
    "spans",
    "write_page",
]
