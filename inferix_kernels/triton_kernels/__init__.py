"""The portable GPU backend: the ops in Triton, under the names and parameters that ops.py has.

An op that is missing here has no Triton kernel yet; _dispatch says so by name.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error}): pip install 'triton>=3.5'") from error

from .attention import *
from .kv_pages import *
from .latent import *
from .linear import *
from .linear_rows import *
from .merge import *
from .qkv import *
from .select import *
