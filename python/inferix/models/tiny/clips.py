"""Training data of the tiny world: clips simulated on the fly, and streams of the model's own making."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from .model import patchify, unpatchify
from .simulator import BOAT_SPRITES, PLACES, PLAYER_SPRITES, SPRITE, TILE, TIMES, UNIT, UNITS, Simulator

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
    """One video of the model's own making, beside a simulator that goes on from whatever the last frame shows.

    Attributes:
        tokens [2, L, patch], actions [2, frames], themes [2, 2]: the last blocks, as the model sees them.
        age: blocks since it began from true ones.
        doubt: mean squared error of its last frame to the world it was read as.
    """

    HISTORY = ("tokens", "actions", "themes")
    LONGEST = 80

    def __init__(self, block_frames: int, rng: np.random.Generator):
        self.block_frames, self.rng, self.age, self.doubt = block_frames, rng, 0, float("inf")

    def restart_if_lost(self, sound: float) -> None:
        """Begin again from true blocks if the last frame was unlike any world, or if the stream has run long enough."""
        if self.doubt <= sound and self.age < self.LONGEST:
            return
        self.world = Simulator(1, self.rng)
        clip = simulate(self.world, OWN_CONTEXT, self.block_frames)
        self.tokens, self.actions, self.themes = clip.tokens[0], clip.actions[0], clip.themes[0]
        self.age, self.doubt = 0, 0.0

    def advance(self, world: Simulator, tokens: Tensor, actions: Tensor, themes: Tensor) -> bool:
        """Take the block [1, L, patch] just made as the newest one; `world` is what it should have come to.

        Returns whether a sprite was elsewhere than it should be.
        """
        for name, new in zip(self.HISTORY, (tokens, actions, themes)):
            setattr(self, name, torch.cat([getattr(self, name)[1:], new]))
        frame = unpatchify(tokens[0])[-1].clamp(-1, 1).numpy()
        expected = world.sprite_corners()
        settle(world, (frame + 1) * 127.5)
        self.doubt = float(np.square(world.render()[0] / 127.5 - 1 - frame).mean())
        self.world, self.age = world, self.age + 1
        return bool((world.sprite_corners() != expected).any())


def settle(world: Simulator, image: np.ndarray) -> None:
    """Put the sprites of one room where `image` [96, 96, 3], 0 .. 255, shows them best.

    What a smeared or doubled sprite should become next must follow from the picture alone, or it cannot be learned:
    it becomes one sprite again, at the place that looks most like it.
    """
    windows = np.lib.stride_tricks.sliding_window_view(image.astype(np.float32), (SPRITE, SPRITE), (0, 1))
    places = np.argwhere(np.ones((UNITS, UNITS), bool))
    error = _template_errors(windows[::UNIT, ::UNIT].reshape(len(places), -1), PLAYER_SPRITES)
    error[world.repeat(len(places)).blocked(places)] = np.inf
    place, facing = np.unravel_index(error.argmin(), error.shape)
    world.player[0], world.facing[0] = places[place], facing + 1
    for boat, (row, column, length) in enumerate(world.canals[0]):
        path = np.repeat([[3 * row, 3 * column]], 3 * length - 1, 0)
        path[:, 1 - boat] += np.arange(len(path))  # the first boat sails along a row
        pixels = path * UNIT
        pixels[:, boat] += (TILE - SPRITE) // 2
        error = _template_errors(windows[pixels[:, 0], pixels[:, 1]].reshape(len(path), -1), BOAT_SPRITES[boat])
        place, heading = np.unravel_index(error.argmin(), error.shape)
        world.boats[0, boat], world.heading[0, boat] = path[place], 2 * heading - 1


def _template_errors(windows: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Windows [N, 3 * 8 * 8], channels first, and templates [K, 8, 8, 3] -> mean squared errors [N, K]."""
    flat = templates.transpose(0, 3, 1, 2).reshape(len(templates), -1).astype(np.float32)
    return np.square(windows[:, None] - flat).mean(-1)
