"""What replaces parts of a WanTransformer3DModel, and how it is put in and taken out. Imports diffusers."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import diffusers
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor, nn

from ..._dispatch import Unsupported
from .rope import OffsetRotaryPosEmbed

HOOK = "inferix_block_cache"


class Layer(Protocol):
    def attend(self, qkv: Tensor, norm_q: Tensor, norm_k: Tensor, eps: float) -> Tensor: ...


class Cache(Protocol):
    def get(self, layer: int) -> Layer: ...
    def begin(self, branch: str | None, hidden_states: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> None: ...
    def end(self) -> None: ...


class BlockAttnProcessor:
    """Self-attention of one layer over its past and the open block, in place of WanAttnProcessor.

    It has no `_attention_backend`, so set_attention_backend is about cross-attention alone. `stock` is what was there.
    """

    def __init__(self, layer: Layer, stock: WanAttnProcessor):
        self.layer, self.stock = layer, stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, tokens, dim] -> the same. rotary_emb is what the pass has as its rope: see `patch`."""
        if encoder_hidden_states is not None or attention_mask is not None:
            name = "attention_mask" if encoder_hidden_states is None else "encoder_hidden_states"
            raise Unsupported(f"{name} must be None in self-attention over blocks")
        if attn.fused_projections:
            qkv = attn.to_qkv(hidden_states)
        else:
            qkv = torch.cat([attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)], -1)
        out = self.layer.attend(qkv, attn.norm_q.weight, attn.norm_k.weight, attn.norm_q.eps)
        projected: Tensor = attn.to_out[1](attn.to_out[0](out))
        return projected


class BlockCacheHook(ModelHook):
    """Tells the cache of every call of the transformer, and in which cache_context it is."""

    _is_stateful = True  # so that cache_context looks for the StateManager here

    def __init__(self, cache: Cache):
        super().__init__()
        self.cache, self._contexts = cache, StateManager(BaseState)

    @property
    def context(self) -> str | None:
        try:
            return self._contexts.context.name
        except ValueError:  # there is none
            return None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = dict(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)
        if module.is_cache_enabled:
            raise Unsupported("enable_cache: caches that skip layers leave a block without keys and values")
        if getattr(module, "_parallel_config", None) is not None:
            raise Unsupported("enable_parallelism: a block's tokens must be on one device")
        for name in ("self", "return_dict"):
            inputs.pop(name, None)
        self.cache.begin(self.context, inputs.pop("hidden_states"), inputs.pop("timestep"), inputs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.cache.end()
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module  # pipelines ask for it at the end of every call: the past is to outlive that


def check(transformer: object) -> WanTransformer3DModel:
    """Raises unless this is a stock Wan transformer, as it was loaded."""
    if not isinstance(transformer, WanTransformer3DModel):
        raise ValueError(f"transformer must be diffusers' WanTransformer3DModel, got {type(transformer).__name__}")
    if not hasattr(StateManager, "context"):
        raise Unsupported(f"diffusers must tell hooks of a cache_context as 0.42.1 does, got {diffusers.__version__}")
    registry = getattr(transformer, "_diffusers_hook", None)
    if registry is not None and registry.get_hook(HOOK) is not None:
        raise ValueError("transformer must have no block cache yet, got one with: call its cache's disable() first")
    others = [type(block.attn1.processor) for block in transformer.blocks] + [type(transformer.rope)]
    if changed := [kind for kind in others if kind not in (WanAttnProcessor, WanRotaryPosEmbed)]:
        raise ValueError(f"transformer must have its stock attention processors and rope, got {changed[0].__name__}")
    if transformer.config.patch_size[0] != 1:
        raise Unsupported(f"patch_size must be 1 in time, got {tuple(transformer.config.patch_size)}")
    return transformer


def patch(transformer: WanTransformer3DModel, cache: Cache) -> tuple[OffsetRotaryPosEmbed, BlockCacheHook]:
    """All of it or, whatever is raised, nothing."""
    rope, hook = OffsetRotaryPosEmbed(transformer.rope), BlockCacheHook(cache)
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, HOOK)
    transformer.rope = rope
    for i, block in enumerate(transformer.blocks):
        block.attn1.set_processor(BlockAttnProcessor(cache.get(i), block.attn1.processor))
    return rope, hook


def unpatch(transformer: WanTransformer3DModel) -> None:
    """The stock rope and processors again.

    Raises:
        RuntimeError: somebody else has replaced one since; nothing was changed.
    """
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    parts = {"rope": transformer.rope, f"hook {HOOK}": registry.get_hook(HOOK)}
    parts |= {f"blocks.{i}.attn1.processor": block.attn1.processor for i, block in enumerate(transformer.blocks)}
    ours = (OffsetRotaryPosEmbed, BlockCacheHook, BlockAttnProcessor)
    if changed := [name for name, part in parts.items() if not isinstance(part, ours)]:
        raise RuntimeError(f"disable: {changed[0]} was replaced since by another tool: undo that first")
    registry.remove_hook(HOOK, recurse=False)
    transformer.rope = transformer.rope.stock
    for block in transformer.blocks:
        block.attn1.set_processor(block.attn1.processor.stock)
