"""Training data of the tiny world: clips simulated on the fly, and streams of the model's own making."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from .model import patchify, unpatchify
from .simulator import ACTIONS, BOAT_SPRITES, MOVES, PLACES, PLAYER_SPRITES, SPRITE, TILE, TIMES, UNIT, UNITS, Simulator

OWN_CONTEXT = 2  # blocks of its own that a stream attends to
EQUALLY = 500.0  # mean squared error, of 255 squared, by which one place must look more like a player than another
CANDIDATES = 16  # futures of which the hardest are learned from
SEEK = 0.4  # chance that one of these runs into a tile with half of itself where it can
PLAYER_WEIGHT = 3.0  # the player, who must be steered, is learned later than the boats


@dataclasses.dataclass
class Clip:
    """B clips of n blocks.

    tokens [B, n, L, patch], actions [B, n, frames], themes [B, n, 2]; touched [B, n, L] float: PLAYER_WEIGHT where the
    player is, was one frame ago, or would be if nothing were in its way; else 1 where a boat is or was; else 0.
    """

    tokens: Tensor
    actions: Tensor
    themes: Tensor
    touched: Tensor


def simulate(
    world: Simulator,
    blocks: int,
    frames: int,
    switch: float = 0.1,
    first_switch: float = 0.0,
    keys: np.ndarray | None = None,
) -> Clip:
    """Play `blocks` blocks under `keys` [B, blocks * frames] or, by default, a player who wanders.

    The theme changes at a block boundary with chance `switch`.
    """
    images, themes, touched = [], [], []
    actions: list[np.ndarray] = []
    before = _sprite_tokens(world)
    for block in range(blocks):
        new = world.rng.random(world.batch) < (switch if block else first_switch)
        theme = np.stack([world.rng.integers(0, n, world.batch) for n in (len(PLACES), len(TIMES))], 1)
        world.theme = np.where(new[:, None], theme, world.theme)
        themes.append(world.theme.copy())
        for _ in range(frames):
            actions.append(world.wander() if keys is None else keys[:, len(actions)])
            wanted = (world.player + MOVES[actions[-1]]).clip(0, UNITS - 1) * UNIT
            world.step(actions[-1])
            images.append(world.render())
            now = _sprite_tokens(world)
            touched.append(np.maximum(now, before))
            _cover(touched[-1], wanted, PLAYER_WEIGHT)
            before = now
    tokens = patchify(torch.from_numpy(np.stack(images, 1)).float() / 127.5 - 1)
    return Clip(
        tokens.unflatten(1, (blocks, -1)),
        torch.from_numpy(np.stack(actions, 1)).unflatten(1, (blocks, -1)),
        torch.from_numpy(np.stack(themes, 1)),
        torch.from_numpy(np.stack(touched, 1)).flatten(2).unflatten(1, (blocks, -1)).flatten(2),
    )


def simulate_doubled(world: Simulator, frames: int, share: float) -> tuple[Clip, Tensor]:
    """First blocks, and the same [B, 1, L, patch] with a second player in a share of them, each more or less solid.

    A model that makes a block from noise may begin two players, and must have learned that the stronger one stays, or
    of equals the one that ends further up. The clips have it so.
    """
    rng, batch = world.rng, world.batch
    twin = world.repeat(1)
    while (bad := twin.blocked(twin.player) | (twin.player == world.player).all(1)).any():
        twin.player[bad] = rng.integers(0, UNITS, (bad.sum(), 2))
    twin.facing = rng.integers(1, len(ACTIONS), batch)
    keys = np.stack([world.wander() for _ in range(frames)], 1)
    one, other = (simulate(rooms, 1, frames, keys=keys) for rooms in (world, twin))
    ours, theirs = one.touched == PLAYER_WEIGHT, other.touched == PLAYER_WEIGHT
    doubled = ~(ours & theirs).flatten(1).any(1).numpy() & (rng.random(batch) < share)  # where paths cross, not
    solid = np.where(rng.random((2, batch)) < 0.5, 1.0, rng.uniform(0.2, 1.0, (2, batch)))
    solid = np.where(doubled, solid, [[1.0], [0.0]])
    further_up = (np.stack([rooms.player for rooms in (world, twin)]) @ [UNITS, 1]).argmin(0)
    other_stays = np.where(solid[0] == solid[1], further_up, solid.argmax(0)) == 1
    fade, appear = torch.from_numpy(np.stack([1 - solid[0], solid[1]])).float()[:, :, None, None, None]
    seen = one.tokens + (other.tokens - one.tokens) * torch.where(ours[..., None], fade, appear)
    tokens = torch.where(torch.from_numpy(other_stays)[:, None, None, None], other.tokens, one.tokens)
    both = torch.where(torch.from_numpy(doubled)[:, None, None], other.touched, 0).maximum(one.touched)
    return dataclasses.replace(one, tokens=tokens, touched=both), seen


def hard_futures(world: Simulator, count: int, frames: int) -> np.ndarray:
    """Keys [count, frames] for one room: of a player who wanders, and then of those who are most in trouble.

    A player who walks on is learned soon. Where a model errs is at walls and turns, late in a block, for all that came
    before must be worked out first, and where half of a player would run into a tile: the other half must hear of it.
    """
    tried = world.repeat(CANDIDATES)
    keys, trouble, rng = [], tried.rng.random(CANDIDATES), tried.rng
    for _ in range(frames):
        before, held = tried.player, tried.held
        wandering = tried.wander(0.5)
        hangs = np.stack([tried.solid_corners(before + move) == 1 for move in MOVES])
        seeks = hangs.any(0) & (rng.random(CANDIDATES) < SEEK)
        seeks[0] = False
        tried.held = np.where(seeks, (hangs * rng.random(hangs.shape)).argmax(0), wandering)
        keys.append(tried.held)
        tried.step(keys[-1])
        stuck = (tried.player == before).all(1) & (keys[-1] > 0)
        trouble += (keys[-1] != held) + 2 * stuck + 3 * hangs[keys[-1], range(CANDIDATES)]
    trouble[0] = np.inf
    return np.stack(keys, 1)[np.argsort(-trouble)[:count]]


def _sprite_tokens(world: Simulator) -> np.ndarray:
    """[B, 8, 8] float32: weight of the sprite that covers a tile in part."""
    covered = np.zeros(world.kinds.shape, np.float32)
    player, *boats = world.sprite_corners().swapaxes(0, 1)
    for boat in boats:
        _cover(covered, boat, 1.0)
    _cover(covered, player, PLAYER_WEIGHT)
    return covered


def _cover(tiles: np.ndarray, corners: np.ndarray, weight: float) -> None:
    """Set the tiles [B, 8, 8] that sprites with corners [B, 2] in pixels cover in part, in place."""
    for dy in (0, SPRITE - 1):
        for dx in (0, SPRITE - 1):
            tiles[np.arange(len(tiles)), (corners[:, 0] + dy) // TILE, (corners[:, 1] + dx) // TILE] = weight


class Stream:
    """One video of the model's own making, and a simulator that goes on from whatever the last frame shows.

    Attributes:
        tokens [2, L, patch], actions [2, frames], themes [2, 2]: the last blocks, as the model sees them.
        age: blocks since it began from true ones.
        doubt: mean squared error of its last frame to the world it was read as.
    """

    HISTORY = ("tokens", "actions", "themes")
    LONGEST = 200

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

    def add_second_player(self) -> None:
        """Put a second player into its last frames, more or less solid, and fade the first one now and then.

        A model that seldom errs seldom sees what its errors look like, and a player once doubled would stay so.
        """
        last = int(self.rng.choice([1, 3, 6]))
        frames = (unpatchify(self.tokens.flatten(0, 1)) + 1).mul(127.5).clamp(0, 255).numpy()
        offset = self._offset()
        ghost, player = (1.0 if self.rng.random() < 0.5 else self.rng.uniform(0.2, 1.0) for _ in range(2))
        other_way = int(self.rng.integers(1, 5)) if self.rng.random() < 0.5 else 0
        room = self.world.pick(0)
        for i in range(len(frames) - last, len(frames)):
            room.theme = self.themes[i // self.block_frames][None].numpy()
            place, facing = find_player(room, _windows(frames[i]))
            appears = place + offset
            if room.blocked(appears[None])[0]:
                continue
            _blend(frames[i], place, room.scenery()[0][_window(place)], 1 - player)
            _blend(frames[i], appears, PLAYER_SPRITES[(other_way or facing) - 1], ghost)
        self.tokens = patchify(torch.from_numpy(frames) / 127.5 - 1).unflatten(0, self.tokens.shape[:2])
        place_sprites(self.world, frames[-1])

    def _offset(self) -> np.ndarray:
        """[2] units from the player to where another could stand now, mostly near."""
        reach = 3 if self.rng.random() < 0.7 else UNITS
        offsets = self.rng.integers(-reach, reach + 1, (64, 2))
        free = ~self.world.repeat(len(offsets)).blocked(self.world.player + offsets) & offsets.any(1)
        return offsets[free.argmax()]

    def advance(self, world: Simulator, tokens: Tensor, actions: Tensor, themes: Tensor) -> bool:
        """Take the block [1, L, patch] just made as the newest one; `world` is what it should have come to.

        Returns whether a sprite was elsewhere than it should be.
        """
        for name, new in zip(self.HISTORY, (tokens, actions, themes)):
            setattr(self, name, torch.cat([getattr(self, name)[1:], new]))
        frame = unpatchify(tokens[0])[-1].clamp(-1, 1).numpy()
        expected = world.sprite_corners()
        place_sprites(world, (frame + 1) * 127.5)
        self.doubt = float(np.square(world.render()[0] / 127.5 - 1 - frame).mean())
        self.world, self.age = world, self.age + 1
        return bool((world.sprite_corners() != expected).any())


def _windows(image: np.ndarray) -> np.ndarray:
    """[96, 96, 3] -> [89, 89, 3, 8, 8] float32: what a sprite at each pixel would cover."""
    return np.lib.stride_tricks.sliding_window_view(image.astype(np.float32), (SPRITE, SPRITE), (0, 1))


def _window(place: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the sprite at a place [2] in units."""
    (y, x) = place * UNIT
    return slice(y, y + SPRITE), slice(x, x + SPRITE)


def _blend(image: np.ndarray, place: np.ndarray, sprite: np.ndarray, share: float) -> None:
    """Draw a sprite [8, 8, 3] at a place [2] in units of `image`, in place, as solid as `share` says."""
    there = _window(place)
    image[there] += share * (sprite - image[there])


def place_sprites(world: Simulator, image: np.ndarray) -> None:
    """Put the sprites of one room where `image` [96, 96, 3], 0 .. 255, shows them best.

    What a smeared or doubled sprite should become next must follow from the picture alone, or it cannot be learned:
    it becomes one sprite again, at the place that looks most like it.
    """
    windows = _windows(image)
    world.player[0], world.facing[0] = find_player(world, windows)
    for boat, (row, column, length) in enumerate(world.canals[0]):
        path = np.repeat([[3 * row, 3 * column]], 3 * length - 1, 0)
        path[:, 1 - boat] += np.arange(len(path))  # the first boat sails along a row
        pixels = path * UNIT
        pixels[:, boat] += (TILE - SPRITE) // 2
        error = _template_errors(windows[pixels[:, 0], pixels[:, 1]].reshape(len(path), -1), BOAT_SPRITES[boat])
        place, heading = np.unravel_index(error.argmin(), error.shape)
        world.boats[0, boat], world.heading[0, boat] = path[place], 2 * heading - 1


def find_player(world: Simulator, windows: np.ndarray) -> tuple[np.ndarray, int]:
    """Place [2] in units and facing of the player in one room, from the 8 x 8 windows [89, 89, 3, 8, 8] of its picture.

    Of two that are equally like a player it is the one further up: a picture decides it, and a model can learn it.
    """
    places = np.argwhere(np.ones((UNITS, UNITS), bool))
    error = _template_errors(windows[::UNIT, ::UNIT].reshape(len(places), -1), PLAYER_SPRITES)
    error += np.linspace(0, EQUALLY, len(places))[:, None]
    error[world.repeat(len(places)).blocked(places)] = np.inf
    place, facing = np.unravel_index(error.argmin(), error.shape)
    return places[place], int(facing) + 1


def _template_errors(windows: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Windows [N, 3 * 8 * 8], channels first, and templates [K, 8, 8, 3] -> mean squared errors [N, K]."""
    flat = templates.transpose(0, 3, 1, 2).reshape(len(templates), -1).astype(np.float32)
    return np.square(windows[:, None] - flat).mean(-1)
