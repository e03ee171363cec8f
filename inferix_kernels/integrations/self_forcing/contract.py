"""How the causal Wan attention of each repository deviates from Self-Forcing's: data, a row for each signature.

All have CausalWanSelfAttention.forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, ...), and
CausalWanModel._forward_inference(..., kv_cache, ..., current_start), which hands a dict to each layer: k and v
[B, S, H, D], how many tokens were made (global_end_index), and how many of S slots hold one (local_end_index).

Sources: guandeh17/Self-Forcing 33593df, tianweiy/CausVid ca21150, NVlabs/LongLive e52d9ef (branch v1.0) and 7860ad9,
thu-ml/Causal-Forcing 1fc7bbc, daydreamlive/scope 68b0f95. Facts were taken from them, no code.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType

from torch import Tensor

ATTENTION, MODEL = "CausalWanSelfAttention", "CausalWanModel"
INFERENCE, ROPE = "_forward_inference", "causal_rope_apply"
COMMON = ("self", "x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start")


@dataclasses.dataclass(frozen=True)
class Contract:
    """What one signature of the attention means.

    Attributes:
        repositories: that have it; for people, nothing asks for a name.
        extra: forward's parameters after current_start.
        methods: that the attention's class has besides __init__ and forward. With others it is another attention.
        ends: the type of global_end_index and local_end_index in a dict; None: there are none, a slot is a position.
        model_writes: the attention returns (out, (current_end, local_end, update)), and the model writes the ends.
        sink_unless: passes over tokens that were made before leave the sink as it is, unless this argument is true.
        sink_first: attention reads the sink and the newest tokens, max_attention_size together, not the newest alone.
        pins: pinned_start and pinned_len in a dict, in tokens, name slots that are the sink behind the first
            global_sink_size frames: if they lie there, or wherever rolling has brought them until then.
        past_bias: the argument whose logarithm is added to the scores of past keys, but for the first frame read.
        mask_fills: a call with a block_mask attends by that mask, and fills the cache from its first slot on.
        frame_tokens: the attention's attribute that says how many tokens a frame has; None: grid_sizes says it.
        rope: arguments that go on to causal_rope_apply.
        only: argument -> the value of it that we have.
        cache_only: key of a dict -> the same, where a dict has it.
    """

    repositories: str
    extra: tuple[str, ...]
    methods: frozenset[str] = frozenset()
    ends: type | None = None
    model_writes: bool = False
    sink_unless: str | None = None
    sink_first: bool = False
    pins: bool = False
    past_bias: str | None = None
    mask_fills: bool = False
    frame_tokens: str | None = None
    rope: tuple[str, ...] = ()
    only: Mapping[str, object] = dataclasses.field(default_factory=dict)
    cache_only: Mapping[str, object] = dataclasses.field(default_factory=dict)


CONTRACTS = (
    Contract("Self-Forcing, Causal-Forcing", ("cache_start",), ends=Tensor),
    Contract("CausVid", ("current_end",)),
    Contract(
        "LongLive 1 (branch v1.0), longlive in scope",
        ("cache_start", "sink_recache_after_switch"),
        ends=Tensor,
        model_writes=True,
        sink_unless="sink_recache_after_switch",
        sink_first=True,
    ),
    Contract(
        "LongLive 2 (branch main)",
        ("cache_start", "t_scale", "use_relative_rope", "method", "original_seq_len", "temporal_offset"),
        ends=Tensor,
        model_writes=True,
        sink_first=True,
        pins=True,
        rope=("t_scale", "method", "original_seq_len", "temporal_offset"),
        only={"use_relative_rope": False},
        cache_only={"quantized": 0},
    ),
    Contract(
        "Krea Realtime in scope",
        ("cache_start", "kv_cache_attention_bias"),
        methods=frozenset({"fuse_projections"}),
        ends=int,
        past_bias="kv_cache_attention_bias",
        mask_fills=True,
        frame_tokens="frame_seq_length",
    ),
)


def contract_of(module: ModuleType) -> Contract:
    """Which of them a module's attention keeps.

    Raises:
        ValueError: none, or what the attention needs is not in the module.
    """
    where = f"module {module.__name__!r}"
    for owner, name in ((ATTENTION, "forward"), (MODEL, INFERENCE)):
        kind = getattr(module, owner, None)
        if not inspect.isclass(kind) or not inspect.isfunction(vars(kind).get(name)):
            raise ValueError(f"module must define {owner}.{name}, got {where} without it")
    if not callable(getattr(module, ROPE, None)):
        raise ValueError(f"module must have {ROPE}, by which its attention rotates, got {where} without it")
    taken, wanted = parameters(getattr(module, MODEL)._forward_inference), {"kv_cache", "current_start"}
    if not wanted <= set(taken):
        raise ValueError(f"{MODEL}.{INFERENCE} must take kv_cache and current_start, got {where} with {taken}")
    attention = getattr(module, ATTENTION)
    taken = parameters(attention.forward)
    methods = {name for name, x in vars(attention).items() if inspect.isfunction(x)} - {"__init__", "forward"}
    for contract in CONTRACTS:
        if (taken, methods) == ((*COMMON, *contract.extra), contract.methods):
            return contract
    known = "; ".join(each.repositories for each in CONTRACTS)
    raise ValueError(
        f"{ATTENTION} must be one that is known ({known}), got {where} whose forward takes {', '.join(taken)}"
        + (f", with methods {', '.join(sorted(methods))}" if methods else "")
    )


def parameters(function: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
