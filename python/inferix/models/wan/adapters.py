"""How each published model is sampled: tables, no code per model.

Noise levels lie on the schedule the models were trained with: level = s u / (1 + (s - 1) u), u = 1 - i / 1000,
i = 0 .. 999, in float32, because a checkpoint knows 833.33331 and not 833.33333; the timestep is 1000 times the
level.

The teachers, undistilled, take many steps, guided: Wan's own bidirectional models, a video at once, and the causal ones
that distillation begins with, block by block.

Sources: configs and inference loops of github.com/guandeh17/Self-Forcing (33593df), github.com/tianweiy/CausVid
(ca21150), github.com/NVlabs/LongLive (e52d9ef, branch v1.0; 7860ad9, version 2), github.com/thu-ml/Causal-Forcing
(1fc7bbc), github.com/yesiltepe-hidir/infinity-rope (63d7b84), github.com/krea-ai/realtime-video
(acf4b7b), github.com/TencentARC/RollingForcing (a1477d0), github.com/JaydenLyh/Reward-Forcing (4317f5a) and
github.com/Wan-Video/Wan2.1 (9737cba). What each row was compared with: docs/models.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...decode.contract import Adapter, Presentation, Shots
from .sink import MovingSink


class Latents(NamedTuple):
    """Of a VAE: channels, and pixels of the video per pixel of the latent, in each direction."""

    channels: int
    stride: int


WAN21, WAN22 = Latents(16, 8), Latents(48, 16)
TRAIN_STEPS = 1000
FPS = 16
SIZE = (480, 832)
PRESENTATION = Presentation(
    fps=FPS,
    example_prompts=(
        "A red panda walks along a mossy branch in a misty forest, soft morning light, shallow depth of field.",
    ),
)


def noise_table(shift: float) -> Tensor:
    """[1000] float32 noise levels of the training schedule, from 1 downwards."""
    u = torch.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1]
    return shift * u / (1 + (shift - 1) * u)


def warped(steps: Sequence[int], shift: float) -> dict[str, tuple[float, ...]]:
    """Steps that count through the table: step 750 is its entry 1000 - 750, which is also the timestep."""
    levels = noise_table(shift)[[TRAIN_STEPS - step for step in steps]]
    return {"times": tuple(levels.tolist()), "timesteps": tuple((levels * TRAIN_STEPS).tolist())}


def to_the_end(steps: Sequence[int], shift: float) -> dict[str, tuple[float, ...]]:
    """`warped` steps and one more, told 0, at the last level of the table."""
    last = {"times": noise_table(shift)[-1].item(), "timesteps": 0.0}
    return {field: (*numbers, last[field]) for field, numbers in warped(steps, shift).items()}


def unwarped(steps: Sequence[int], shift: float) -> dict[str, tuple[float, ...]]:
    """Steps that are timesteps as they stand; their noise is that of the nearest one in the table."""
    table = noise_table(shift)
    nearest = [int((table * TRAIN_STEPS - step).abs().argmin()) for step in steps]
    return {"times": tuple(table[nearest].tolist()), "timesteps": tuple(map(float, steps))}


def many(steps: int, shift: float) -> dict[str, tuple[float, ...]]:
    """So many steps, even before the shift, from what 1 - 1 / 1000 is in float32; timesteps are whole numbers."""
    first = torch.tensor(1 - 1 / TRAIN_STEPS).item()
    u = torch.linspace(first, 0.0, steps + 1, dtype=torch.float64)[:-1]
    levels = shift * u / (1 + (shift - 1) * u)
    return {"times": tuple(levels.float().tolist()), "timesteps": tuple((levels * TRAIN_STEPS).floor().tolist())}


SELF_FORCING = Adapter(
    name="self-forcing",
    block_frames=3,
    prediction="flow",
    context_time=0.0,
    # Trained on 21 frames at a time: the first 21 are the published static rollout, after which the window moves.
    window=21,
    size=SIZE,
    **warped((1000, 750, 500, 250), shift=5.0),  # type: ignore[arg-type]
)

# Self Forcing's loop over other weights. With 2 steps or 1 it makes frames one by one, and the first one with 4.
CAUSAL_FORCING = dataclasses.replace(SELF_FORCING, name="causal-forcing")
CAUSAL_FORCING_FRAMEWISE = dataclasses.replace(SELF_FORCING, name="causal-forcing-framewise", block_frames=1)

CAUSVID = Adapter(
    name="causvid",
    block_frames=3,
    prediction="flow",
    context_time=0.0,
    window=21,
    rollout=21,
    overlap=3,
    size=SIZE,
    **unwarped((1000, 757, 522), shift=8.0),  # type: ignore[arg-type]
)


def customised(
    adapter: Adapter,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    overlap: int | None = None,
) -> Adapter:
    """An adapter with what a user wants otherwise; None is as it was.

    Raises:
        ValueError: steps or guidance of a model that was distilled to steps of its own and to no guidance; an overlap
            of one that begins no new rollouts, or of no whole blocks.
    """
    wanted: dict[str, Any] = {"size": size, "guidance": guidance, "negative_prompt": negative_prompt}
    if overlap is not None and adapter.rollout is None:
        raise ValueError(f"overlap must not be given: {adapter.name} is one rollout without end, got {overlap}")
    wanted["overlap"] = overlap
    if adapter.name not in SHIFTS:
        for option, value in (("steps", steps), ("guidance", guidance), ("negative_prompt", negative_prompt)):
            if value is not None:
                raise ValueError(f"{option}: {adapter.name} was distilled, to {len(adapter.times)} steps unguided")
    elif steps is not None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        wanted |= many(steps, SHIFTS[adapter.name])
    return dataclasses.replace(adapter, **{field: value for field, value in wanted.items() if value is not None})


def first_block(steps: Sequence[int], shift: float) -> dict[str, tuple[float, ...]]:
    """`warped` steps of a block without a past."""
    return {f"first_{field}": numbers for field, numbers in warped(steps, shift).items()}


def variant(base: Adapter, name: str, **changes: object) -> Adapter:
    return dataclasses.replace(base, name=name, **changes)  # type: ignore[arg-type]


# Of the teachers' schedules, by name.
SHIFTS = {"wan-t2v": 5.0, "wan-i2v-480p": 3.0, "wan-i2v-720p": 5.0, "wan-causal": 5.0}
TEACHER = Adapter(
    name="wan-t2v",
    block_frames=21,
    window=21,
    prediction="flow",
    sampler="unipc",
    guidance=5.0,
    size=SIZE,
    **many(50, SHIFTS["wan-t2v"]),  # type: ignore[arg-type]
)

# Of Wan2.2-TI2V-5B: 4 steps of UniPC. Its cache of 32 frames counts its sink of 8 and what is pinned; our window does
# not count the sink.
LONGLIVE_2 = Adapter(
    name="longlive-2",
    block_frames=8,
    prediction="flow",
    sampler="unipc",
    context_time=0.0,
    window=24,
    sink=8,
    shots=Shots(cut="The scene transitions. ", offset=8),
    size=(704, 1280),
    **many(4, shift=5.0),  # type: ignore[arg-type]
)

ADAPTERS = {
    adapter.name: adapter
    for adapter in (
        SELF_FORCING,
        variant(SELF_FORCING, "self-forcing-framewise", block_frames=1),
        # A first block of one frame, which may be a given picture (image to video).
        variant(SELF_FORCING, "self-forcing-first-frame", first_block_frames=1),
        CAUSVID,
        # LongLive's cache of 12 frames counts its sink of 3; our window does not.
        variant(SELF_FORCING, "longlive", window=9, sink=3, recache="bidirectional"),
        # With time counted anew for each block, LongLive's videos have no end.
        variant(SELF_FORCING, "longlive-infinity", window=9, sink=3, recache="bidirectional", time="relative"),
        # The same of Self Forcing's weights; its cache of 6 frames counts its sink of 1.
        variant(SELF_FORCING, "infinity-rope", window=5, sink=1, time="relative"),
        # A rollout of one block: what lies before it is computed anew each time. Its last step is told 0, where the
        # table still has a little noise.
        *(
            variant(
                SELF_FORCING,
                name,
                window=6,
                rollout=6,
                overlap=3,
                rollout_begins=begins,
                **to_the_end((1000, 750, 500, 250), shift=5.0),
            )
            for name, begins in (("krea-realtime", "encoded"), ("krea-realtime-first-frame", "kept"))
        ),
        # Five blocks in flight, which see each other: inferix.decode.rolling. The sink moves along.
        variant(
            SELF_FORCING,
            "rolling-forcing",
            sink=3,
            stages=5,
            time="relative",
            **warped((1000, 800, 600, 400, 200), shift=5.0),
        ),
        # Its cache of 9 frames counts its sink of 3, into which what leaves is merged before the next block is begun.
        # The clean pass of the block before sees the sink as it was: so it is a forward of its own.
        variant(
            SELF_FORCING,
            "reward-forcing",
            window=6,
            sink=3,
            time="relative",
            on_evict=MovingSink(0.999),
            moving_sink=True,
            fused=False,
        ),
        CAUSAL_FORCING,
        CAUSAL_FORCING_FRAMEWISE,
        *(
            variant(
                CAUSAL_FORCING_FRAMEWISE,
                f"causal-forcing-framewise-{len(steps)}step",
                **warped(steps, shift=5.0),
                **first_block((1000, 750, 500, 250), shift=5.0),
            )
            for steps in ((1000, 500), (1000,))
        ),
        LONGLIVE_2,
        # Its first latent is a given picture, clean in every step of the first block.
        variant(LONGLIVE_2, "longlive-2-i2v", picture=True),
        TEACHER,
        variant(TEACHER, "wan-i2v-480p", **many(40, SHIFTS["wan-i2v-480p"])),
        variant(TEACHER, "wan-i2v-720p", size=(720, 1280), **many(40, SHIFTS["wan-i2v-720p"])),
        # Block by block, as Self Forcing's multi-step inference runs what it distills from.
        variant(TEACHER, "wan-causal", block_frames=3, guidance=3.0),
    )
}

# Rows over another VAE than Wan2.1's.
LATENTS = {"longlive-2": WAN22, "longlive-2-i2v": WAN22}


def latents_of(adapter: Adapter) -> Latents:
    return LATENTS.get(adapter.name, WAN21)


def presentation_of(adapter: Adapter) -> Presentation:
    """Wan2.2's 5B model makes 24 pictures a second, Wan2.1's make 16."""
    return dataclasses.replace(PRESENTATION, fps=24) if latents_of(adapter) == WAN22 else PRESENTATION


# Which weights of a checkpoint that holds several; the first that is there.
PARTS = {name: ("generator_ema", "generator") for name in ADAPTERS}
PARTS |= {
    name: ("generator", "generator_ema")
    for name in ("causvid", "longlive", "longlive-infinity", "longlive-2", "longlive-2-i2v", "causal-forcing")
}
