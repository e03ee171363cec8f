"""What an attention processor sees of the cache: one layer."""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

from ..._library import opaque
from ...layout import PageList
from ...store import Pass
from .branch import Branch


class Cache(Protocol):
    def running(self) -> Branch:
        """The branch that the transformer runs for. Raises RuntimeError: it does not run."""

    def wrote(self, layer: int) -> None:
        """This layer has its keys and values."""


class CacheLayer:
    """One layer's keys and values, while the transformer runs: for an attention processor. BlockCache.get gives it.

    A processor calls either `attend`, or `update` and then `get`.

    Example:
        >>> from diffusers import WanTransformer3DModel
        >>> from inferix_kernels.integrations.diffusers import enable_block_cache
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "ffn_dim": 32, "text_dim": 8}
        >>> transformer = WanTransformer3DModel(**sizes)
        >>> cache = enable_block_cache(transformer, Policy(window=6, format="int8"))
        >>> def processor(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb):
        ...     cache.get(0).update(torch.randn(1, 12, 2, 16), torch.randn(1, 12, 2, 16))  # of attn
        ...     key, value = cache.get(0).get()
        ...     print(list(key.shape))
        ...     return hidden_states  # attention to these
        >>> transformer.blocks[0].attn1.set_processor(processor)
        >>> for _ in range(2):
        ...     with cache.block(frames=3):
        ...         cache.commit(torch.randn(1, 16, 3, 4, 4), encoder_hidden_states=torch.randn(1, 5, 8))
        [1, 12, 2, 16]
        [1, 24, 2, 16]
    """

    def __init__(self, cache: Cache, layer: int):
        self._cache, self._layer, key = cache, layer, next(_KEYS)
        _LAYERS[key], self._key = self, torch.tensor(key)

    def _pass(self) -> tuple[Branch, Pass]:
        branch = self._cache.running()
        assert branch.running is not None
        return branch, branch.running

    def attend(self, qkv: Tensor, norm_q: Tensor, norm_k: Tensor, eps: float) -> Tensor:
        """Normalise over all heads, rotate, write, commit in a clean pass, and attend to the past and the block.

        Args:
            qkv: [B, tokens, 3 * dim], packed q | k | v before norm and rotation.
            norm_q, norm_k: [dim].

        Returns:
            [B, tokens, dim].
        """
        attended: Tensor = _block_attention(qkv, norm_q, norm_k, eps, self._key)
        return attended

    def _attend(self, qkv: Tensor, norm_q: Tensor, norm_k: Tensor, eps: float) -> Tensor:
        """What a graph does not look into."""
        _, running = self._pass()
        out = running.attend(self._layer, qkv.flatten(0, 1), norm_q, norm_k, eps)
        assert out is not None  # as no pass here leaves out its prediction
        self._cache.wrote(self._layer)
        return out.unflatten(0, qkv.shape[:2])

    def update(self, key: Tensor, value: Tensor) -> None:
        """Write the block's keys and values, normalised and rotated; commit them in a clean pass.

        Args:
            key, value: [B, tokens, heads, D].
        """
        _, running = self._pass()
        running.append(self._layer, key.flatten(0, 1), value.flatten(0, 1))
        self._cache.wrote(self._layer)

    def get(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """What the block attends to, dequantized: the past that it sees and, last, itself as `update` wrote it.

        Returns:
            key, value [B, tokens of past and block, heads, D].
        """
        branch, running = self._pass()
        store, plan = branch.store, running.plan
        pair = store.gather(store.layers[self._layer], PageList(plan.page_ids, plan.page_lens), dtype)
        key, value = (x.unflatten(0, (len(branch.tables), -1)) for x in pair)
        means = [mean for mean in (means[self._layer] for means in branch.means) if mean is not None]
        if means:  # of each world, taken off its keys before they are quantized
            key = key + torch.stack(means)[:, None].to(dtype)
        return key, value


# What torch.compile records of a layer is one op, which finds the layer by its key: pages and passes are no part of a
# graph. So one graph serves all layers and passes: a key is a tensor on the CPU, as a graph is made anew for each other
# number. A CUDA graph, which would keep the page lists of one pass, is not made.
_LAYERS: weakref.WeakValueDictionary[int, CacheLayer] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # older torch has no word for it
_block_attention = opaque(
    "block_attention(Tensor qkv, Tensor norm_q, Tensor norm_k, float eps, Tensor key) -> Tensor",
    lambda qkv, norm_q, norm_k, eps, key: _LAYERS[int(key)]._attend(qkv, norm_q, norm_k, eps),
    lambda qkv, *others: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
    tags=(_UNSAFE,) if _UNSAFE else (),
)
