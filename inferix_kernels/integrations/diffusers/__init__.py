"""Block by block with the stock Wan transformer of diffusers: `enable_block_cache`.

Read against diffusers 0.42.1, which is imported when a function here first needs it.
"""

from .cache import BlockCache, CacheLayer, enable_block_cache
from .rope import OffsetRotaryPosEmbed

__all__ = ["BlockCache", "CacheLayer", "OffsetRotaryPosEmbed", "enable_block_cache"]
