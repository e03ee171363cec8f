"""Block by block with the stock Wan transformer of diffusers: `enable_block_cache`.

Read against diffusers 0.42.1, which is imported when a function here first needs it.
"""

from .cache import BlockCache, CacheLayer, enable_block_cache

__all__ = ["BlockCache", "CacheLayer", "enable_block_cache"]
