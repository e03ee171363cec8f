"""What every op means, in plain torch. This is the specification: written to be read, and every backend is held to it.

Same names and parameters as in ops.py, which fills in every optional one; a module for each family of ops.
"""

from .attention import *
from .codecs import *
from .kv_pages import *
from .linear import *
from .qkv import *
from .select import *
