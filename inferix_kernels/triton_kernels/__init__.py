"""The portable GPU backend: the ops in Triton, under the names and parameters that ops.py has.

An op that is missing here has no Triton kernel yet; _dispatch says so by name.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error}): pip install 'triton>=3.5'") from error

from .attention import paged_attention
from .kv_pages import kv_append, kv_commit, kv_gather
from .latent import latent_attention
from .linear import linear, quantize_rows
from .merge import merge_attention
from .qkv import qkv_prologue
from .select import page_scores, page_summaries, select_pages

__all__ = [
    "kv_append",
    "kv_commit",
    "kv_gather",
    "latent_attention",
    "linear",
    "merge_attention",
    "page_scores",
    "page_summaries",
    "paged_attention",
    "qkv_prologue",
    "quantize_rows",
    "select_pages",
]
