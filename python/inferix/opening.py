"""What a World is made of: its policy, store and decode loop, from a model and the arguments that a user gives."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch

from inferix_kernels import KVStore, PageTable, Policy
from inferix_kernels._check import is_whole
from inferix_kernels.layout import KV_FORMATS, scratch_format
from inferix_kernels.proofs import stored
from inferix_kernels.store import Shard

from .decode.contract import Adapter, Model
from .decode.decoder import Decoder
from .decode.graphs import CudaRecorder, Recorder
from .decode.pipeline import PipelineDecoder
from .decode.sequential import SequentialDecoder


def check_format(kv: str) -> None:
    if kv not in KV_FORMATS:
        raise ValueError(f"kv must be one of {', '.join(KV_FORMATS)}, got {kv!r}")


def check_seed(seed: int) -> None:
    if not is_whole(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number from 0 to 2^64 - 1, got {seed!r}")


def check_counts(adapter: Adapter, blocks: int | None, worlds: int) -> None:
    if not is_whole(worlds) or worlds < 1:
        raise ValueError(f"worlds must be at least 1, got {worlds!r}")
    if blocks is not None and (not adapter.stages or not is_whole(blocks) or blocks < 1):
        raise ValueError(
            f"blocks must be at least 1, and given only for a model that runs in a pipeline, got {blocks} for "
            f"{adapter.name}"
        )


def recorder_for(model: Model, graphs: bool) -> Recorder | None:
    """What captures the forwards of a model on a GPU; None: nothing does.

    Raises:
        ValueError: they can not be captured.
    """
    if type(graphs) is not bool:
        raise ValueError(f"graphs must be True or False, got {graphs!r}")
    if not graphs:
        return None
    device = torch.device(model.device)
    if device.type != "cuda":
        raise ValueError(f"graphs must be False on {device.type}: forwards are captured on a GPU alone, got True")
    reasons = {
        "has several blocks in flight": model.schedule is not None,
        "has no network whose weights are known": model.network is None,
        # A graph's conditionings are copies: what a forward leaves in one is not there for the next block.
        "keeps what its blocks leave in their conditionings": type(model).placed is not Model.placed,
    }
    if why := next((why for why, holds in reasons.items() if holds), None):
        raise ValueError(f"graphs must be False for {model.adapter.name}, which {why}, got True")
    return CudaRecorder(device)


def policy_for(
    adapter: Adapter,
    kv: str,
    window: int | None,
    sink: int | None,
    undo: int,
    past_bias: float | None = None,
    time: str | None = None,
    on_evict: Callable[[PageTable, int], None] | None = None,
    working: str | None = None,
) -> Policy:
    """What a world keeps of its past, and how it reads it; None: as the model was trained.

    Args:
        working: the format of a sink that moves; None: as of other frames.

    Raises:
        ValueError: a block would not see all of itself, a model without a past is asked to keep one, or one that merges
            what leaves its window is asked to take it back.
    """
    given = {"window": window, "sink": sink, "past_bias": past_bias, "time": time, "on_evict": on_evict}
    if adapter.at_once and (names := [name for name, value in given.items() if value is not None]):
        raise ValueError(f"{names[0]} must not be given: {adapter.name} makes a video at once, from no past")
    window, sink = adapter.window if window is None else window, adapter.sink if sink is None else sink
    policy, largest = Policy(window, sink, format=kv, undo=undo), _largest_block(adapter)
    policy = dataclasses.replace(
        policy,
        past_bias=adapter.past_bias if past_bias is None else past_bias,
        time=adapter.time if time is None else time,
        on_evict=adapter.on_evict if on_evict is None else on_evict,
        pins_in_window=adapter.shots is not None,
    )
    if adapter.shots is not None and policy.time != "absolute":
        raise ValueError(f"time must be absolute: {adapter.name} counts it through the shots of a video, got {time!r}")
    pinned = 0 if adapter.shots is None else min(policy.sink, largest)
    if policy.window is None or policy.window < largest + pinned:
        shots = f" and the first {pinned} of a shot" if pinned else ""
        raise ValueError(
            f"window must be at least the {largest} frames of one block{shots}, which it counts, got {window}"
        )
    if adapter.moving_sink and undo:
        raise ValueError(f"undo must be 0: {adapter.name} merges what leaves its window into its sink, got {undo}")
    return dataclasses.replace(policy, sink_format=working) if adapter.moving_sink and policy.sink else policy


def working_format(model: Model) -> str:
    """Of scratch, and of what else is not to be rounded."""
    return scratch_format(model.device, torch.bfloat16 if model.linear else model.dtype)  # 8 bits give no more


def say_unusual(adapter: Adapter, policy: Policy) -> None:
    """Log, as a warning of one line, how a world reads its past otherwise than its model was made for."""
    fields = {
        "window": (adapter.window, policy.window),
        "sink": (adapter.sink, policy.sink),
        "past_bias": (adapter.past_bias, policy.past_bias),
        "time": (adapter.time, policy.time),
    }
    if other := {name: pair for name, pair in fields.items() if pair[0] != pair[1]}:
        made, run = (", ".join(f"{name}={pair[i]}" for name, pair in other.items()) for i in range(2))
        logging.getLogger("inferix").warning(f"{adapter.name} was made for {made}, and is run with {run}")


def open_store(
    model: Model, policy: Policy, worlds: int, backend: str, precision: str, shard: Shard = Shard()
) -> KVStore:
    """A store with room for so many worlds under this policy, on the model's device; of one rank, what that holds."""
    adapter, device = model.adapter, torch.device(model.device)
    # A guided world has two pasts; where nothing sees a past, nothing is ever committed.
    pasts = 0 if adapter.at_once else worlds * (1 if adapter.guidance == 1 or model.branch is not None else 2)
    block = _largest_block(adapter)
    # The clean block, the one in the making, and in a pipeline the others in flight and a copy of one. Or all that a
    # model computes again as one block.
    scratch_blocks = 2 + adapter.stages
    if adapter.recache == "bidirectional" and policy.window is not None:
        scratch_blocks = max(scratch_blocks, -(-(policy.window + policy.sink) // block))
    pools = {format: max(1, pasts * frames) for format, frames in policy.capacity().items()}
    if adapter.moving_sink and policy.sink:
        # A block leaves at once. Until all of it is merged, what the sink was stays too; and a frame of the sink into
        # which a second one is merged stays until that is done.
        pools[policy.format_of(0, block_end=0)] += min(policy.sink, block) + (policy.sink < block)
    store = KVStore(
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        frame_tokens=model.frame_tokens,
        block_frames=block,
        scratch_blocks=scratch_blocks,
        scratch_format=working_format(model),
        pools=pools,
        device=device,
        backend=backend,
        precision=precision,
        turn_back=model.turn_back,
        shard=shard,
    )
    if backend == "auto" and (unproved := stored.notice(device)):
        logging.getLogger("inferix").warning(unproved)
    return store


def open_decoder(
    model: Model,
    table: PageTable,
    seed: int,
    negative_conditioning: Any = None,
    blocks: int | None = None,
    recorder: Recorder | None = None,
) -> Decoder:
    """The decode loop that a model asks for, over an empty table.

    Args:
        seed: of all noise.
        negative_conditioning: of a guided model; see SequentialDecoder.
        blocks: that the world is to have, of a model with several in flight; None: no end.
        recorder: captures the forwards of a model with one block at a time; see `recorder_for`.
    """
    generator = torch.Generator().manual_seed(int(seed))
    if model.schedule is None:
        return SequentialDecoder(model, table, generator, negative_conditioning, recorder)
    return PipelineDecoder(model, table, generator, blocks)


def _largest_block(adapter: Adapter) -> int:
    return max(adapter.block_frames, adapter.first_block_frames)
