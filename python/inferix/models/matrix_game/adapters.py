"""How each published Matrix-Game 2 is sampled and steered: tables, no code per model.

Source: configs/, pipeline/causal_inference.py and utils/conditions.py of Matrix-Game-2 in
github.com/SkyworkAI/Matrix-Game (6146d7a).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inferix_kernels._check import is_whole

from ...decode.contract import Adapter, Presentation
from ..wan.adapters import warped

BLOCK, SHIFT = 3, 5.0
TURN = 0.1  # of the camera in one picture
CAMERA = {"camera_up": (TURN, 0.0), "camera_down": (-TURN, 0.0), "camera_l": (0.0, -TURN), "camera_r": (0.0, TURN)}
NOTHING = "nomove"
OPPOSITES = (("forward", "back"), ("left", "right"))


@dataclasses.dataclass(frozen=True)
class Controls:
    """What a network is told for each action.

    Attributes:
        keyboard: names of its keys, in the order of its channels.
        camera: name -> the mouse's movement (up, right) in each picture; empty: it has no mouse.
    """

    keyboard: tuple[str, ...]
    camera: Mapping[str, tuple[float, float]]

    def told(self, actions: Sequence[tuple[str, ...]]) -> tuple[Tensor, Tensor | None]:
        """What is done in each frame as the network takes it: [frames, keys], and [frames, 2] or None.

        Opposites done at once are nothing.
        """
        keyboard, mouse = torch.zeros(len(actions), len(self.keyboard)), torch.zeros(len(actions), 2)
        for frame, names in enumerate(actions):
            undone = {name for pair in OPPOSITES if set(pair) <= set(names) for name in pair}
            for name in set(names) - undone:
                if name in self.keyboard:
                    keyboard[frame, self.keyboard.index(name)] = 1
                elif name in self.camera:
                    mouse[frame] += torch.tensor(self.camera[name])
        return keyboard, mouse if self.camera else None


def _adapter(name: str, controls: Controls, steps: Sequence[int], window: int) -> Adapter:
    others = [action for action in controls.keyboard if action != NOTHING]
    return Adapter(
        name=name,
        block_frames=BLOCK,
        prediction="flow",
        context_time=0.0,
        window=window,
        size=(352, 640),
        actions=(NOTHING, *others, *controls.camera),
        together=bool(controls.camera),
        words=False,
        picture=True,
        **warped(steps, SHIFT),  # type: ignore[arg-type]
    )


UNIVERSAL = Controls(("forward", "back", "left", "right"), CAMERA)
DRIVE = Controls(("forward", "back"), {name: CAMERA[name] for name in ("camera_l", "camera_r")})
RUN = Controls((NOTHING, "jump", "slide", "turnleft", "turnright", "leftside", "rightside"), {})
CONTROLS = {"matrix-game-2": UNIVERSAL, "matrix-game-2-gta": DRIVE, "matrix-game-2-templerun": RUN}
ADAPTERS = {
    adapter.name: adapter
    for adapter in (
        _adapter("matrix-game-2", UNIVERSAL, (1000, 666, 333), window=6),
        _adapter("matrix-game-2-gta", DRIVE, (1000, 666, 333), window=4),
        _adapter("matrix-game-2-templerun", RUN, (1000, 750, 500, 250), window=6),
    )
}
# Where each lies in the folder that is published, beside the VAE and CLIP.
FOLDERS = {
    "matrix-game-2": "base_distilled_model",
    "matrix-game-2-gta": "gta_distilled_model",
    "matrix-game-2-templerun": "templerun_distilled_model",
}
# The keys of the published interactive script; arrows turn the camera too.
MOVES = {"w": "forward", "s": "back", "a": "left", "d": "right"}
LOOKS = {"i": "camera_up", "k": "camera_down", "j": "camera_l", "l": "camera_r"}
ARROWS = {"arrowup": "camera_up", "arrowdown": "camera_down", "arrowleft": "camera_l", "arrowright": "camera_r"}
KEYS = {
    "matrix-game-2": MOVES | LOOKS | ARROWS,
    "matrix-game-2-gta": {"w": "forward", "s": "back", "a": "camera_l", "d": "camera_r"},
    "matrix-game-2-templerun": {
        "w": "jump",
        "s": "slide",
        "a": "leftside",
        "d": "rightside",
        "z": "turnleft",
        "c": "turnright",
    },
}
FPS = 12  # of the videos that the published script writes
PRESENTATIONS = {name: Presentation(fps=FPS, keys={" ": NOTHING} | keys) for name, keys in KEYS.items()}


def named(adapter: Adapter, action: int | str) -> tuple[str, ...]:
    """The actions that one given in a call stands for: a name, several joined with +, or an index."""
    if is_whole(action) and 0 <= action < len(adapter.actions):
        return (adapter.actions[action],)
    if not isinstance(action, str):
        raise ValueError(f"action must be a name or an index below {len(adapter.actions)}, got {action!r}")
    return adapter.done(action)
