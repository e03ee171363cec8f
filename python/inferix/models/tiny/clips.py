"""Training data of the tiny world: clips simulated on the fly, and streams of the model's own making."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from .model import patchify
from .simulator import PLACES, SPRITE, TILE, TIMES, Simulator

OWN_CONTEXT = 2  # blocks of its own that a stream attends to
PLAYER_WEIGHT = 3.0  # the player, who must be steered, is learned later than the boats


@dataclasses.dataclass
class Clip:
    """B clips of n blocks.

    tokens [B, n, L, patch], actions [B, n, frames], themes [B, n, 2]; touched [B, n, L] float: PLAYER_WEIGHT where the
    player is, or was one frame ago; else 1 where a boat is or was; else 0.
    """

    tokens: Tensor
    actions: Tensor
    themes: Tensor
    touched: Tensor


def simulate(world: Simulator, blocks: int, frames: int, switch: float = 0.1, first_switch: float = 0.0) -> Clip:
    """Play `blocks` blocks under a wandering player; the theme changes at a block boundary with chance `switch`."""
    images, actions, themes, touched = [], [], [], []
    before = _sprite_tokens(world)
    for block in range(blocks):
        new = world.rng.random(world.batch) < (switch if block else first_switch)
        theme = np.stack([world.rng.integers(0, n, world.batch) for n in (len(PLACES), len(TIMES))], 1)
        world.theme = np.where(new[:, None], theme, world.theme)
        themes.append(world.theme.copy())
        for _ in range(frames):
            actions.append(world.wander())
            world.step(actions[-1])
            images.append(world.render())
            now = _sprite_tokens(world)
            touched.append(np.maximum(now, before))
            before = now
    tokens = patchify(torch.from_numpy(np.stack(images, 1)).float() / 127.5 - 1)
    return Clip(
        tokens.unflatten(1, (blocks, -1)),
        torch.from_numpy(np.stack(actions, 1)).unflatten(1, (blocks, -1)),
        torch.from_numpy(np.stack(themes, 1)),
        torch.from_numpy(np.stack(touched, 1)).flatten(2).unflatten(1, (blocks, -1)).flatten(2),
    )


def _sprite_tokens(world: Simulator) -> np.ndarray:
    """[B, 8, 8] float32: weight of the sprite that covers a tile in part."""
    covered = np.zeros(world.kinds.shape, np.float32)
    corners = world.sprite_corners()
    rooms = np.arange(world.batch)
    for sprite, weight in ((1, 1.0), (2, 1.0), (0, PLAYER_WEIGHT)):
        for dy in (0, SPRITE - 1):
            for dx in (0, SPRITE - 1):
                covered[rooms, (corners[:, sprite, 0] + dy) // TILE, (corners[:, sprite, 1] + dx) // TILE] = weight
    return covered


class Stream:
    """One video of the model's own making, beside the simulator that says what it should have been.

    Attributes:
        tokens [2, L, patch], actions [2, frames], themes [2, 2]: the last blocks, as the model sees them.
        age: blocks since it began from true ones; error: of its last block's sprites.
    """

    HISTORY = ("tokens", "actions", "themes")
    LONGEST = 80

    def __init__(self, block_frames: int, rng: np.random.Generator):
        self.block_frames, self.rng, self.age, self.error = block_frames, rng, 0, float("inf")

    def restart_if_astray(self, sound: float) -> None:
        """Begin again from true blocks if the last error passed `sound`, or if it has run long enough."""
        if self.error <= sound and self.age < self.LONGEST:
            return
        self.world = Simulator(1, self.rng)
        clip = simulate(self.world, OWN_CONTEXT, self.block_frames)
        self.tokens, self.actions, self.themes = clip.tokens[0], clip.actions[0], clip.themes[0]
        self.age, self.error = 0, 0.0

    def advance(self, world: Simulator, tokens: Tensor, actions: Tensor, themes: Tensor, error: float) -> None:
        """Take the block [1, L, patch] just made as the newest one; `world` is the simulator after it."""
        self.world = world
        for name, new in zip(self.HISTORY, (tokens, actions, themes)):
            setattr(self, name, torch.cat([getattr(self, name)[1:], new]))
        self.age, self.error = self.age + 1, error
