"""How each published model is sampled: tables, no code per model.

Noise levels lie on the schedule the models were trained with: level = s u / (1 + (s - 1) u), u = 1 - i / 1000,
i = 0 .. 999, in float32, because a checkpoint is told 833.33331 and not 833.33333; the network is told 1000 times it.

Sources: configs and inference loops of github.com/guandeh17/Self-Forcing (33593df), github.com/tianweiy/CausVid
(ca21150) and github.com/NVlabs/LongLive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import Adapter

TRAIN_STEPS = 1000
FPS = 16
SIZE = (480, 832)
PROMPTS = ("A red panda walks along a mossy branch in a misty forest, soft morning light, shallow depth of field.",)


def noise_table(shift: float) -> Tensor:
    """[1000] float32 noise levels of the training schedule, from 1 downwards."""
    u = torch.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1]
    return shift * u / (1 + (shift - 1) * u)


def warped(steps: Sequence[int], shift: float) -> dict[str, tuple[float, ...]]:
    """Steps that count through the table: step 750 is its entry 1000 - 750, and the network is told that entry."""
    levels = noise_table(shift)[[TRAIN_STEPS - step for step in steps]]
    return {"times": tuple(levels.tolist()), "timesteps": tuple((levels * TRAIN_STEPS).tolist())}


def unwarped(steps: Sequence[int], shift: float) -> dict[str, tuple[float, ...]]:
    """Steps that the network is told as they stand; their noise is that of the nearest timestep in the table."""
    table = noise_table(shift)
    nearest = [int((table * TRAIN_STEPS - step).abs().argmin()) for step in steps]
    return {"times": tuple(table[nearest].tolist()), "timesteps": tuple(map(float, steps))}


SELF_FORCING = Adapter(
    name="self-forcing",
    block_frames=3,
    prediction="flow",
    context_time=0.0,
    # Trained on 21 frames at a time: the first 21 are the published static rollout, after which the window moves.
    window=21,
    fps=FPS,
    size=SIZE,
    example_prompts=PROMPTS,
    **warped((1000, 750, 500, 250), shift=5.0),  # type: ignore[arg-type]
)

CAUSVID = Adapter(
    name="causvid",
    block_frames=3,
    prediction="flow",
    context_time=0.0,
    window=21,
    rollout=21,
    overlap=3,
    fps=FPS,
    size=SIZE,
    example_prompts=PROMPTS,
    **unwarped((1000, 757, 522), shift=8.0),  # type: ignore[arg-type]
)


def variant(base: Adapter, name: str, **changes: object) -> Adapter:
    return dataclasses.replace(base, name=name, **changes)  # type: ignore[arg-type]


ADAPTERS = {
    adapter.name: adapter
    for adapter in (
        SELF_FORCING,
        variant(SELF_FORCING, "self-forcing-framewise", block_frames=1),
        # A first block of one frame, which may be a given picture (image to video).
        variant(SELF_FORCING, "self-forcing-first-frame", first_block_frames=1),
        CAUSVID,
        # LongLive's cache of 12 frames counts its sink of 3; our window does not.
        variant(SELF_FORCING, "longlive", window=9, sink=3, recache=True),
    )
}

# Which weights of a checkpoint that holds several; the first that is there.
PARTS = {name: ("generator_ema", "generator") for name in ADAPTERS}
PARTS |= {name: ("generator", "generator_ema") for name in ("causvid", "longlive")}
