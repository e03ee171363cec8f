"""The published MAGI-1 models: sizes, schedules and settings as tables.

Source: the configs in github.com/SandAI-org/MAGI-1 (6ff822e), example/4.5B and example/24B.
"""

from __future__ import annotations

import dataclasses

from ...decode.contract import Adapter, Presentation
from .network import MagiConfig
from .schedule import MagiSchedule

CHUNK = 6  # latent frames
PRESENTATION = Presentation(
    fps=24,
    pictures=4,
    example_prompts=(
        "A red panda walks along a mossy branch in a misty forest, soft morning light, shallow depth of field.",
    ),
)

CONFIGS = {
    "4.5b": MagiConfig(dim=3072, layers=34, heads=24, ffn=12288),
    "24b": MagiConfig(dim=6144, layers=48, heads=48, ffn=16384, gated=True, cond_dim=1536, halved=True, x_scale=0.1),
}
SIZES = {"4.5b": (720, 720), "24b": (720, 1280)}
SCHEDULES = {
    "magi-4.5b": MagiSchedule(steps=64),
    "magi-4.5b-distill": MagiSchedule(steps=64, distilled=True),
    "magi-4.5b-distill-quant": MagiSchedule(steps=64, distilled=True),
    "magi-24b": MagiSchedule(steps=32),
    "magi-24b-distill": MagiSchedule(steps=16, distilled=True),
    "magi-24b-distill-quant": MagiSchedule(steps=16, distilled=True),
}


def config_for(name: str) -> MagiConfig:
    return CONFIGS[name.split("-")[1]]


def adapter_for(name: str, schedule: MagiSchedule, size: tuple[int, int] | None = None) -> Adapter:
    """How a model is run under a schedule."""
    return Adapter(
        name=name,
        block_frames=CHUNK,
        times=tuple(1 - t for t in schedule.times[:-1]),
        context_time=schedule.clean_time,
        stages=schedule.stages,
        # What lies further back than the noisiest chunk sees, no chunk sees.
        window=CHUNK * max(*schedule.ranges, schedule.clean_range),
        size=size or SIZES[name.split("-")[1]],
    )


def scheduled(
    name: str, steps: int | None = None, shortcut: str | None = None, stages: int | None = None
) -> MagiSchedule:
    """A model's schedule with what a user wants otherwise; None is as published."""
    wanted = {"steps": steps, "shortcut": shortcut, "stages": stages}
    changes = {field: value for field, value in wanted.items() if value is not None}
    return dataclasses.replace(SCHEDULES[name], **changes)  # type: ignore[arg-type]
