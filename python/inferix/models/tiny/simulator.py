"""The true world behind the tiny world model: a small top-down room, exact and fully visible.

A room is an 8 x 8 grid of tiles: floor, wall and two canals. A player walks on floor under WASD; a boat on
each canal sails from end to end by itself. A theme (place x time of day, two words) paints everything but
the sprites. Nothing is ever hidden: sprites never overlap and show the way they face, so one frame holds the
whole state, and this simulator is the oracle for every frame that a model generates.

All positions count *units* of 4 pixels: a tile is 3 x 3 units, a sprite 2 x 2, a move 1 per frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

GRID = 8  # tiles along a side
TILE = 12  # pixels along a tile: also the patch that becomes one token
UNIT = 4  # pixels a sprite moves per frame
SIZE = GRID * TILE  # pixels along a side
SPRITE = 2 * UNIT  # pixels along a sprite
UNITS = SIZE // UNIT - 1  # positions a sprite can take along a side
BOATS = 2  # one on a horizontal canal, one on a vertical canal
FPS = 16  # frames per second of a world played at its own pace

ACTIONS = ("none", "up", "left", "down", "right")
KEYS = {"w": 1, "a": 2, "s": 3, "d": 4}
MOVES = np.array([[0, 0], [-1, 0], [0, -1], [1, 0], [0, 1]])  # (row, column) units

PLACES = ("meadow", "desert", "glacier", "volcano")
TIMES = ("day", "night")
THEMES = tuple(f"{place} {time}" for place in PLACES for time in TIMES)
FLOOR, WALL, CANAL = 0, 1, 2

PLAYER_COLOR = (230, 40, 50)
BOAT_COLORS = ((235, 60, 225), (255, 225, 50))


def _tiles() -> np.ndarray:
    """[place, time, kind, TILE, TILE, 3] uint8: the textures of every theme."""
    y, x = np.mgrid[:TILE, :TILE]
    floor_colors = np.array([[98, 158, 76], [214, 182, 122], [196, 216, 232], [82, 70, 72]])
    wall_colors = np.array([[44, 88, 48], [146, 94, 56], [104, 140, 194], [122, 84, 140]])
    canal_colors = np.array([[62, 128, 206], [40, 158, 168], [36, 78, 150], [216, 96, 28]])
    specks = ((3 * y + 5 * x) % 11 == 0) | ((7 * y + 2 * x) % 13 == 0)
    floors = [specks * 20, ((y + (x > 5)) % 6 == 0) * -16, ((x + y) % 6 == 0) * 16, ((5 * y + 2 * x) % 9 == 0) * 24]
    bricks = ((y % 4 == 3) | ((x + 6 * (y // 4)) % 12 == 11)) * -34
    round_tree = (((y - 5.5) ** 2 + (x - 5.5) ** 2 < 26) * 40) - (((y - 7) ** 2 + (x - 7) ** 2 < 8) * 22)
    ice_block = ((y < 2) | (x < 2)) * 44 - ((y > 9) | (x > 9)) * 30
    crystal = ((np.abs(y - 5.5) + np.abs(x - 5.5)) < 5) * 40 - ((y + x) % 5 == 0) * 18
    waves = ((y + (np.abs(x - 6) // 2)) % 6 == 0) * 30
    tiles = np.zeros((len(PLACES), len(TIMES), 3, TILE, TILE, 3))
    for place, wall in enumerate((round_tree, bricks, ice_block, crystal)):
        painted = (floor_colors[place], floors[place]), (wall_colors[place], wall), (canal_colors[place], waves)
        for kind, (color, pattern) in enumerate(painted):
            day = color + np.asarray(pattern)[..., None]
            tiles[place, 0, kind], tiles[place, 1, kind] = day, day * np.array([0.32, 0.36, 0.60])
    return tiles.clip(0, 255).astype(np.uint8)


def _sprites() -> tuple[np.ndarray, np.ndarray]:
    """Player [facing up/left/down/right, 8, 8, 3] and boats [boat, facing back/forth, 8, 8, 3], uint8."""
    corner = np.zeros((SPRITE, SPRITE), bool)
    corner[0, 0] = corner[0, -1] = corner[-1, 0] = corner[-1, -1] = True
    up = np.full((SPRITE, SPRITE, 3), PLAYER_COLOR)
    up[1:4, 1:3] = up[1:4, 5:7] = 255  # two white eyes with dark pupils look where the player goes
    up[1:2, 1:3] = up[1:2, 5:7] = 20
    up[corner] = 40
    player = np.stack([np.rot90(up, turns) for turns in range(4)])
    boats = []
    for color in BOAT_COLORS:
        left = np.full((SPRITE, SPRITE, 3), color)
        left[3:5, 4:] = 60  # the hull is dark astern and white at the bow
        left[2:6, :2] = 255
        left[corner] = 40
        boats.append(np.stack([left, left[:, ::-1]]))
    stacked = np.stack(boats)
    stacked[1] = stacked[1].transpose(0, 2, 1, 3)  # the second boat sails up and down
    return player.astype(np.uint8), stacked.astype(np.uint8)


TILES = _tiles()
PLAYER_SPRITES, BOAT_SPRITES = _sprites()


def parse_theme(prompt: str) -> tuple[int, int]:
    """(place, time) named by a prompt such as "a desert at night". Time is day unless it says otherwise.

    Raises:
        ValueError: a word is not in the vocabulary, or no place, or two places or times, are named.
    """
    place, time = [], []
    for word in prompt.lower().replace(",", " ").split():
        if word in PLACES:
            place.append(PLACES.index(word))
        elif word in TIMES:
            time.append(TIMES.index(word))
        elif word not in ("a", "an", "the", "at", "in", "by", "on", "of"):
            raise ValueError(
                f"prompt: unknown word {word!r} in {prompt!r}; places: {', '.join(PLACES)}; times: {', '.join(TIMES)}"
            )
    if len(place) != 1 or len(time) > 1:
        raise ValueError(f"prompt must name one place ({', '.join(PLACES)}) and at most one time, got {prompt!r}")
    return place[0], time[0] if time else 0


class Simulator:
    """B rooms advanced together.

    Attributes:
        kinds: [B, 8, 8] int, FLOOR, WALL or CANAL.
        player: [B, 2] int units (row, column); facing: [B] int, index into ACTIONS (never 0).
        boats: [B, 2, 2] int units (row, column); the pixel inset of 2 across a canal is added when drawn.
        heading: [B, 2] int, -1 or +1 along the boat's canal.
        canals: [B, 2, 3] int tiles: (row, column, length).
        theme: [B, 2] int (place, time).
    """

    def __init__(self, batch: int, rng: np.random.Generator, wall_share: float = 0.18):
        self.batch, self.rng, self.wall_share = batch, rng, wall_share
        self.kinds = np.zeros((batch, GRID, GRID), int)
        self.player = np.zeros((batch, 2), int)
        self.facing = np.ones(batch, int)
        self.boats = np.zeros((batch, BOATS, 2), int)
        self.heading = np.ones((batch, BOATS), int)
        self.canals = np.zeros((batch, BOATS, 3), int)
        self.theme = np.zeros((batch, 2), int)
        self.held = np.zeros(batch, int)
        self.reset(np.ones(batch, bool))

    def reset(self, which: np.ndarray) -> None:
        """Give the rooms of a [B] bool mask a new map, theme and sprites."""
        for b in np.flatnonzero(which):
            self._new_room(int(b))

    def _new_room(self, b: int) -> None:
        rng = self.rng
        while True:
            kinds = np.where(rng.random((GRID, GRID)) < self.wall_share, WALL, FLOOR)
            canals = np.array(
                [(rng.integers(GRID), rng.integers(GRID - (n := rng.integers(4, 7)) + 1), n) for _ in range(2)]
            )
            canals[1, :2] = canals[1, 1::-1]
            water = np.zeros((GRID, GRID), int)
            (row, column, length), (row2, column2, length2) = canals
            water[row, column : column + length] += 1
            water[row2 : row2 + length2, column2] += 1
            # Canals that touch would leave a boat's turning point to guesswork.
            wet = water > 0
            neighbours = (wet[1:] & wet[:-1]).sum() + (wet[:, 1:] & wet[:, :-1]).sum()
            apart = wet.sum() == length + length2 and neighbours == length + length2 - 2
            kinds[wet] = CANAL
            floor = np.argwhere(kinds == FLOOR)
            start = floor[rng.integers(len(floor))]
            near = [start + move for move in MOVES[1:] if ((start + move >= 0) & (start + move < GRID)).all()]
            if apart and any(kinds[tuple(tile)] == FLOOR for tile in near):
                break
        self.kinds[b], self.canals[b] = kinds, canals
        self.player[b] = 3 * start + rng.integers(0, 2, 2)
        self.facing[b], self.held[b] = rng.integers(1, 5), rng.integers(5)
        for boat, (row, column, length) in enumerate(canals):
            self.boats[b, boat] = 3 * row, 3 * column
            self.boats[b, boat, 1 - boat] += rng.integers(3 * length - 1)
        self.heading[b] = rng.choice([-1, 1], BOATS)
        self.theme[b] = rng.integers(len(PLACES)), rng.integers(len(TIMES))

    def repeat(self, times: int) -> Simulator:
        """`times` copies of every room, side by side: one past, several futures. They share the random generator."""
        return self._with(lambda rooms: rooms.repeat(times, 0), self.batch * times)

    def pick(self, room: int) -> Simulator:
        """One room by itself."""
        return self._with(lambda rooms: rooms[room : room + 1].copy(), 1)

    def _with(self, change: Callable[[np.ndarray], np.ndarray], batch: int) -> Simulator:
        other = Simulator.__new__(Simulator)
        other.__dict__ = {k: change(v) if isinstance(v, np.ndarray) else v for k, v in self.__dict__.items()}
        other.batch = batch
        return other

    def blocked(self, position: np.ndarray) -> np.ndarray:
        """[B] bool: would a player at [B, 2] units stand outside the room or on a tile that is not floor?"""
        outside = ((position < 0) | (position >= UNITS)).any(-1)
        return outside | (self.solid_corners(position) > 0)

    def solid_corners(self, position: np.ndarray) -> np.ndarray:
        """[B] int: how many corners of a player at [B, 2] units would lie on a tile that is not floor.

        One alone, and the player hangs on a tile with half of itself.
        """
        low = position.clip(0, UNITS - 1)
        rooms = np.arange(len(position))
        corners = [((low[:, 0] + dy) // 3, (low[:, 1] + dx) // 3) for dy in (0, 1) for dx in (0, 1)]
        return np.sum([self.kinds[rooms, y, x] != FLOOR for y, x in corners], 0)

    def step(self, actions: np.ndarray) -> None:
        """Advance one frame under [B] int actions (indices into ACTIONS)."""
        moved = self.player + MOVES[actions]
        self.player = np.where(self.blocked(moved)[:, None], self.player, moved)
        self.facing = np.where(actions > 0, actions, self.facing)
        for boat in range(BOATS):
            axis = 1 - boat
            first = 3 * self.canals[:, boat, axis]
            last = first + 3 * self.canals[:, boat, 2] - 2
            there = self.boats[:, boat, axis] + self.heading[:, boat]
            self.heading[:, boat] *= np.where((there < first) | (there > last), -1, 1)
            self.boats[:, boat, axis] += self.heading[:, boat]

    def sprite_corners(self) -> np.ndarray:
        """[B, 3, 2] int pixels: top-left corners of the player and the two boats."""
        corners = np.concatenate([self.player[:, None], self.boats], 1) * UNIT
        corners[:, 1, 0] += (TILE - SPRITE) // 2
        corners[:, 2, 1] += (TILE - SPRITE) // 2
        return corners

    def scenery(self) -> np.ndarray:
        """[B, 96, 96, 3] uint8: the room without its sprites."""
        rooms = np.arange(self.batch)[:, None, None]
        textures = TILES[self.theme[:, 0], self.theme[:, 1]]
        return textures[rooms, self.kinds].transpose(0, 1, 3, 2, 4, 5).reshape(self.batch, SIZE, SIZE, 3)

    def render(self) -> np.ndarray:
        """[B, 96, 96, 3] uint8."""
        image = self.scenery()
        for b, corners in enumerate(self.sprite_corners()):
            sprites = [PLAYER_SPRITES[self.facing[b] - 1]]
            sprites += [BOAT_SPRITES[boat, (self.heading[b, boat] + 1) // 2] for boat in range(BOATS)]
            for (y, x), sprite in zip(corners, sprites):
                image[b, y : y + SPRITE, x : x + SPRITE] = sprite
        return image

    def wander(self, change: float = 0.2) -> np.ndarray:
        """[B] int: actions of a player that holds a key and changes it now and then."""
        new = self.rng.random(self.batch) < change
        self.held = np.where(new, self.rng.integers(0, len(ACTIONS), self.batch), self.held)
        return self.held.copy()


def play(world: Simulator, actions: Sequence[np.ndarray]) -> np.ndarray:
    """[B, len(actions), 96, 96, 3] uint8: the frame after each action."""
    frames = []
    for action in actions:
        world.step(action)
        frames.append(world.render())
    return np.stack(frames, 1)
