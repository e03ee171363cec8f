"""Wan-family research repositories (Self-Forcing, CausVid, LongLive, Causal-Forcing, Krea in scope) over our pages.

    from inferix_kernels.integrations import self_forcing
    import wan.modules.causal_model
    print(self_forcing.patch(wan.modules.causal_model, "int8"))

From there their pipelines run as they are: the dense k and v in their dicts are freed as the model is first called, and
pages take their place (world.py). What differs between repositories is data (contract.py).
"""

from .caches import CacheView, fork
from .contract import CONTRACTS, Contract
from .functions import attention, flash_attention
from .patching import Patched, patch, unpatch

__all__ = [
    "CONTRACTS",
    "CacheView",
    "Contract",
    "Patched",
    "attention",
    "flash_attention",
    "fork",
    "patch",
    "unpatch",
]
