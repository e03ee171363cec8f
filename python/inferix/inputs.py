"""What a World is given: actions, a prompt, frames. Checked before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decode.contract import RECACHES, Adapter, Model
from .finite import NotFinite

Action = int | str


def actions_of(
    call: str, adapter: Adapter, frames: int, actions: Sequence[Action] | None, action: Action | None
) -> Sequence[Action]:
    """Those of the next block of a world with so many frames: one per frame, or one held for all; none for a model that
    takes none."""
    if adapter.at_once and frames:
        raise ValueError(f"{call}: {adapter.name} has made its video, at once; for another open a World")
    if actions is not None and action is not None:
        raise ValueError(f"{call} needs actions or one action, got both: {actions!r} and {action!r}")
    if actions is not None:
        return actions
    if action is None and adapter.actions:
        raise ValueError(f"{call} needs actions, one per frame, or one action for the whole block; got neither")
    return [] if action is None else [action] * adapter.block_frames


def recache_of(adapter: Adapter, can_recache: bool, recache: bool | str | None) -> str:
    """How the past is to be computed again when the prompt changes, one of RECACHES; "": it is not.

    Args:
        recache: a name of RECACHES; None: as the adapter says; True: so too or, where it says nothing, "block-causal".
    """
    if not isinstance(recache, bool | None) and recache not in RECACHES:
        raise ValueError(f"recache must be True, False or one of {', '.join(RECACHES)}, got {recache!r}")
    if isinstance(recache, str):
        wanted = recache
    elif recache is None:
        wanted = adapter.recache
    else:
        wanted = (adapter.recache or "block-causal") if recache else ""
    if wanted and adapter.actions:
        raise ValueError(
            f"recache must not be asked for: each block of {adapter.name} was made under actions of its own, under "
            "which it would not be computed again"
        )
    if wanted and not can_recache:
        raise ValueError(f"recache must not be asked for: {adapter.name} has several blocks in flight")
    if wanted == "bidirectional" != adapter.recache:
        raise ValueError(
            f"recache must be True, False or block-causal: {adapter.name} is not one that computes its window again in "
            "one forward, got 'bidirectional'"
        )
    return wanted


def conditioning_of(model: Model, actions: Sequence[Action], prompt: str | None) -> Any:
    """The conditioning of one block."""
    if prompt is None and not model.adapter.words:
        prompt = ""
    if prompt is None:
        raise ValueError("prompt must be given with the first block: the world has no look yet")
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be words, got {prompt!r}")
    wanted = model.adapter.block_frames if model.adapter.actions else len(actions)
    if len(actions) != wanted:
        raise ValueError(f"actions must be {wanted}, one per frame, got {len(actions)}")
    return model.conditioning(prompt, actions)


def lasting(adapter: Adapter, prompt: str | None) -> str | None:
    """The prompt of the blocks after the one that this was given with: without what begins a shot."""
    return prompt.removeprefix(adapter.shots.cut) if prompt and adapter.shots else prompt


def latents_of(model: Model, frames: np.ndarray, actions: Sequence[Action]) -> Tensor:
    """Given pictures uint8 [n, height, width, 3], encoded: [frames, *latent_shape].

    Raises:
        ValueError: the model takes no pictures, not so many, or not these actions with them.
        NotFinite: the encoder made NaN or infinity of them.
    """
    adapter, size = model.adapter, model.adapter.block_frames
    if adapter.at_once:
        raise ValueError(f"observe: {adapter.name} makes a video at once, from no past")
    if not len(frames):
        raise ValueError("frames must be at least one picture, got none")
    if adapter.actions and (len(frames) % size or len(frames) != len(actions)):
        raise ValueError(
            f"frames must be a multiple of {size}, one action each, got {len(frames)} and {len(actions)} actions"
        )
    latents = model.encode(np.ascontiguousarray(frames))
    if not torch.isfinite(latents).all():
        raise NotFinite("frames: the encoder made NaN or infinity of them")
    return latents
