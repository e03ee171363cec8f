"""What runs in the place of CausalWanSelfAttention.forward and CausalWanModel._forward_inference."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..._dispatch import Unsupported
from .caches import ENDS, PINS, Cache, CacheView, adopt, ends_of, pins_of, set_ends
from .contract import ROPE, Contract
from .slots import Rules
from .world import Options


def model_forward(original: Callable[..., Any], contract: Contract, options: Options) -> Callable[..., Any]:
    """_forward_inference that sees to it that its dicts hold pages."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        caches = signature.bind(self, *args, **kwargs).arguments.get("kv_cache")
        if caches is not None:
            adopt(caches, contract, options)
        return original(self, *args, **kwargs)

    return forward


def attention_forward(original: Callable[..., Any], contract: Contract, module: ModuleType) -> Callable[..., Any]:
    """The attention's forward over pages. Without a cache, the original runs: training is as it was."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        cache = given["kv_cache"]
        if cache is None:
            return original(self, *args, **kwargs)
        for name, value in contract.only.items():
            if given[name] != value:
                raise Unsupported(f"{name} must be {value}, got {given[name]!r}")
        if not isinstance(cache["k"], CacheView):
            raise ValueError("kv_cache must have come through the patched model, got a dict of dense tensors")
        if contract.mask_fills and given["block_mask"] is not None:
            return _filled(self, original, call, contract)
        return _attended(self, given, contract, module)

    return forward


def _attended(self: Any, given: Mapping[str, Any], contract: Contract, module: ModuleType) -> Any:
    x, cache, start, grid_sizes = (given[name] for name in ("x", "kv_cache", "current_start", "grid_sizes"))
    q, k, v = _projected(self, x)
    if torch.is_grad_enabled() and (q.requires_grad or v.requires_grad):
        raise Unsupported("x must not require gradients where there is a kv_cache: run under torch.no_grad()")
    frame_tokens = _frame_tokens(self, given, contract)
    rotate, options = getattr(module, ROPE), {name: given[name] for name in contract.rope}
    q, k = (
        rotate(each, grid_sizes, given["freqs"], start_frame=start // frame_tokens, **options).type_as(v)
        for each in (q, k)
    )
    tokens, view = x.shape[1], cache["k"]
    if given.get("current_end", start + tokens) != start + tokens:
        raise ValueError(f"current_end must be {start + tokens}, got {given['current_end']}")
    wanted = (len(x), self.num_heads, self.head_dim)
    if (view.shape[0], *view.shape[2:]) != wanted:
        raise ValueError(f"kv_cache must be [B, S, H, D] with B, H, D = {wanted}, got {list(view.shape)}")
    made, held = ends_of(cache, contract, start)
    if view.layer == 0:
        rules = _rules(self, given, contract, frame_tokens)
        view.world.begin(made, held, start, tokens, frame_tokens, rules)
    span = view.world.span
    if span is None or (span.start, span.frames) != (start // frame_tokens, tokens // frame_tokens):
        raise ValueError(f"kv_cache[{view.layer}] must follow kv_cache[0] in each pass, got another pass's tokens")
    out = self.o(view.world.attend(view.layer, q, k, v).flatten(2))
    ends = start + tokens, span.end * frame_tokens
    if view.world.rolled:
        cache[PINS[0]].sub_(view.world.rolled * frame_tokens)
    if contract.model_writes:  # its update moves the ends, and writes nothing for an action that it does not know
        again = bool(contract.sink_unless) and ends[0] <= made and start > 0
        return out, (*ends, {"action": "in pages", "is_recompute": again})
    set_ends(cache, contract, ends)
    return out


def _filled(self: Any, original: Callable[..., Any], call: inspect.BoundArguments, contract: Contract) -> Tensor:
    """The original attends, by its mask, over a cache of its own; what it wrote there is kept."""
    given, x = call.arguments, call.arguments["x"]
    cache: Cache = given["kv_cache"]
    view, tokens = cache["k"], x.shape[1]
    if view.layer == 0:
        view.world.begin(0, 0, 0, tokens, _frame_tokens(self, given, contract), None)
    batch, _, heads, width = view.shape
    k, v = (torch.empty(batch, tokens, heads, width, dtype=view.dtype, device=view.device) for _ in "kv")
    given["kv_cache"] = own = {"k": k, "v": v, **dict.fromkeys(ENDS, 0)}
    out = original(*call.args, **call.kwargs)
    view.world.keep(view.layer, k, v)
    cache.update({name: own[name] for name in ENDS})
    return out


def _projected(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, normalised over all heads, and v: [B, tokens, H, D]."""
    q, k, v = self.to_qkv(x).chunk(3, -1) if getattr(self, "fused_projections", False) else _apart(self, x)
    return tuple(each.unflatten(-1, (self.num_heads, self.head_dim)) for each in (self.norm_q(q), self.norm_k(k), v))


def _apart(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return self.q(x), self.k(x), self.v(x)


def _frame_tokens(self: Any, given: Mapping[str, Any], contract: Contract) -> int:
    if contract.frame_tokens is not None:
        return int(getattr(self, contract.frame_tokens))
    return math.prod(int(side) for side in given["grid_sizes"][0][1:])


def _rules(self: Any, given: Mapping[str, Any], contract: Contract, frame_tokens: int) -> Rules:
    most, capacity = getattr(self, "max_attention_size", None), given["kv_cache"]["k"].shape[1] // frame_tokens
    limit, rest = (capacity, 0) if most is None else divmod(most, frame_tokens)
    if rest and limit < capacity:
        raise Unsupported(f"max_attention_size must be whole frames of {frame_tokens} tokens, got {most}")
    bias = given.get(contract.past_bias or "", 1.0)
    if not bias > 0:
        raise ValueError(f"{contract.past_bias} must be more than 0, got {bias}")
    sink, first = getattr(self, "sink_size", 0), getattr(self, "global_sink_size", 0)
    at, count = pins_of(given["kv_cache"], contract)
    if at % frame_tokens or count % frame_tokens:
        raise Unsupported(f"{' and '.join(PINS)} must be whole frames of {frame_tokens} tokens, got {at} and {count}")
    at, count = at // frame_tokens, count // frame_tokens
    behind = at == first  # the first frames and what is pinned are one sink
    return Rules(
        sink=max(sink, first) if not count else first + count if behind else first,
        pinned=(0, 0) if behind else (at, count),
        rolls=getattr(self, "local_attn_size", -1) != -1,
        keeps_sink=contract.sink_unless is not None and not given[contract.sink_unless],
        limit=limit,
        sink_first=contract.sink_first,
        bias=math.log(bias),
        unbiased=self.num_frame_per_block if bias != 1.0 else 0,
    )
