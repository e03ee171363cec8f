"""The true world keeps its own rules: it is the oracle that every generated frame is judged by."""

from __future__ import annotations

import numpy as np
import pytest

from inferix.models.tiny.simulator import (
    ACTIONS,
    BOAT_SPRITES,
    BOATS,
    CANAL,
    FLOOR,
    GRID,
    KEYS,
    MOVES,
    PLAYER_SPRITES,
    SIZE,
    SPRITE,
    THEMES,
    TILE,
    TILES,
    TIMES,
    UNIT,
    UNITS,
    WALL,
    Simulator,
    parse_theme,
    play,
)

ROOMS, STEPS = 48, 120


@pytest.fixture
def world() -> Simulator:
    return Simulator(ROOMS, np.random.default_rng(17))


def kinds_under(world: Simulator, sprite: int) -> np.ndarray:
    """[B, 8, 8] int: the kind of the tile under each pixel of a sprite."""
    corners = world.sprite_corners()[:, sprite]
    y = corners[:, :1] + np.arange(SPRITE)
    x = corners[:, 1:] + np.arange(SPRITE)
    return world.kinds[np.arange(world.batch)[:, None, None], y[:, :, None] // TILE, x[:, None] // TILE]


def one_room(kinds: np.ndarray, player: tuple[int, int]) -> Simulator:
    """A room of these kinds [8, 8] with the player at `player` units."""
    world = Simulator(1, np.random.default_rng(0))
    world.kinds[0], world.player[0] = kinds, player
    return world


def test_rooms_are_well_formed(world: Simulator) -> None:
    for kinds, canals in zip(world.kinds, world.canals):
        (row, column, length), (row2, column2, length2) = canals
        water = np.zeros((GRID, GRID), bool)
        water[row, column : column + length] = True
        water[row2 : row2 + length2, column2] = True
        assert ((kinds == CANAL) == water).all() and water.sum() == length + length2, "canals do not cross"
        assert 4 <= length <= 6 and 4 <= length2 <= 6
        sideways = (water[1:] & water[:-1]).sum() + (water[:, 1:] & water[:, :-1]).sum()
        assert sideways == length + length2 - 2, "canals do not touch"


def test_every_sprite_stays_on_its_ground(world: Simulator) -> None:
    for _ in range(STEPS):
        world.step(world.wander())
        assert (kinds_under(world, 0) == FLOOR).all()
        for boat in range(BOATS):
            assert (kinds_under(world, 1 + boat) == CANAL).all()


def test_sprites_never_overlap(world: Simulator) -> None:
    for _ in range(STEPS):
        world.step(world.wander())
        corners = world.sprite_corners()
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert (np.abs(corners[:, a] - corners[:, b]).max(-1) >= SPRITE).all()


def test_positions_lie_on_the_lattice_and_moves_are_one_unit(world: Simulator) -> None:
    for _ in range(STEPS):
        before, actions = world.sprite_corners(), world.wander()
        world.step(actions)
        after = world.sprite_corners()
        assert (after[:, 0] % UNIT == 0).all() and (after >= 0).all() and (after <= SIZE - SPRITE).all()
        assert ((after[:, 0] - before[:, 0] == MOVES[actions] * UNIT) | (after[:, 0] == before[:, 0])).all()
        for boat in range(BOATS):
            along = 1 - boat
            moved = after[:, 1 + boat] - before[:, 1 + boat]
            assert (np.abs(moved[:, along]) == UNIT).all() and (moved[:, 1 - along] == 0).all()
            assert (after[:, 1 + boat, along] % UNIT == 0).all()
            assert (after[:, 1 + boat, 1 - along] % TILE == (TILE - SPRITE) // 2).all(), "in mid-canal"


@pytest.mark.parametrize(
    ("action", "start", "stop"),
    [("up", (10, 9), (9, 9)), ("left", (6, 13), (6, 12)), ("down", (3, 9), (4, 9)), ("right", (6, 6), (6, 7))],
)
@pytest.mark.parametrize("kind", [WALL, CANAL])
def test_walls_and_canals_block_and_floor_does_not(
    action: str, start: tuple[int, int], stop: tuple[int, int], kind: int
) -> None:
    """One unit of floor, then the tile of units 6 .. 8 x 9 .. 11: of three steps one is made."""
    kinds = np.full((GRID, GRID), FLOOR)
    kinds[2, 3] = kind
    world = one_room(kinds, start)
    for _ in range(3):
        world.step(np.array([ACTIONS.index(action)]))
    assert tuple(world.player[0]) == stop
    assert ACTIONS[world.facing[0]] == action, "a blocked player still turns"


def test_a_wall_that_is_touched_by_a_corner_alone_blocks() -> None:
    kinds = np.full((GRID, GRID), FLOOR)
    kinds[2, 3] = WALL
    world = one_room(kinds, (8, 7))  # its upper half is level with the wall's last unit
    world.step(np.array([ACTIONS.index("right")]))
    assert tuple(world.player[0]) == (8, 7)


@pytest.mark.parametrize("action", range(1, len(ACTIONS)))
def test_the_edge_blocks(action: int) -> None:
    world = one_room(np.zeros((GRID, GRID), int), (11, 11))
    for _ in range(30):
        world.step(np.array([action]))
    reached = np.array([11, 11]) + MOVES[action] * UNITS
    assert (world.player[0] == reached.clip(0, UNITS - 1)).all()


def test_boats_turn_at_the_ends_of_their_canals_and_nowhere_else(world: Simulator) -> None:
    for boat in range(BOATS):
        axis = 1 - boat
        first = 3 * world.canals[:, boat, axis]
        last = first + 3 * world.canals[:, boat, 2] - 2
        seen: list[np.ndarray] = []
        for _ in range(2 * 3 * 6):  # once forth and back along the longest canal
            before, heading = world.boats[:, boat, axis].copy(), world.heading[:, boat].copy()
            world.step(np.zeros(ROOMS, int))
            turned = world.heading[:, boat] != heading
            assert (turned == ((before + heading < first) | (before + heading > last))).all()
            seen.append(world.boats[:, boat, axis].copy())
        assert (np.min(seen, 0) == first).all() and (np.max(seen, 0) == last).all()


def test_the_picture_shows_what_the_state_says(world: Simulator) -> None:
    world.step(world.wander())
    image, corners = world.render(), world.sprite_corners()
    assert image.shape == (ROOMS, SIZE, SIZE, 3) and image.dtype == np.uint8
    for b in range(ROOMS):
        expected = TILES[tuple(world.theme[b])][world.kinds[b]].transpose(0, 2, 1, 3, 4).reshape(SIZE, SIZE, 3)
        sprites = [PLAYER_SPRITES[world.facing[b] - 1]]
        sprites += [BOAT_SPRITES[boat, int(world.heading[b, boat] > 0)] for boat in range(BOATS)]
        for (y, x), sprite in zip(corners[b], sprites):
            expected[y : y + SPRITE, x : x + SPRITE] = sprite
        assert (image[b] == expected).all()


def test_one_frame_holds_the_whole_state() -> None:
    """Facing and heading are visible: no two of a sprite's ways look alike."""
    for sprites in (PLAYER_SPRITES, *BOAT_SPRITES):
        assert len({sprite.tobytes() for sprite in sprites}) == len(sprites)
    assert len({tile.tobytes() for tile in TILES.reshape(-1, TILE, TILE, 3)}) == len(THEMES) * 3


def test_a_theme_repaints_everything_but_the_sprites(world: Simulator) -> None:
    world.theme[:] = 0
    meadow, corners = world.render(), world.sprite_corners()
    world.theme[:] = 1, 1
    desert = world.render()
    same = (meadow == desert).all(-1)
    assert (world.sprite_corners() == corners).all()
    for b in range(ROOMS):
        for y, x in corners[b]:
            assert same[b, y : y + SPRITE, x : x + SPRITE].all()
            same[b, y : y + SPRITE, x : x + SPRITE] = False
    assert not same.any()


def test_the_same_seed_gives_the_same_world() -> None:
    def video(seed: int) -> np.ndarray:
        world = Simulator(2, np.random.default_rng(seed))
        return play(world, [world.wander() for _ in range(30)])

    assert video(4).shape == (2, 30, SIZE, SIZE, 3)
    assert (video(4) == video(4)).all() and (video(4) != video(5)).any()


def test_reset_changes_the_rooms_it_is_given_alone(world: Simulator) -> None:
    before = world.render()
    world.reset(np.arange(ROOMS) % 2 == 0)
    changed = (world.render() != before).any((1, 2, 3))
    assert changed[::2].all() and not changed[1::2].any()


def test_a_wandering_player_uses_every_action_and_holds_them(world: Simulator) -> None:
    actions = np.stack([world.wander() for _ in range(300)])
    assert set(np.unique(actions)) == set(range(len(ACTIONS)))
    assert 0.75 < (actions[1:] == actions[:-1]).mean() < 0.9
    assert [ACTIONS[KEYS[key]] for key in "wasd"] == ["up", "left", "down", "right"]


@pytest.mark.parametrize(
    ("prompt", "theme"),
    [
        ("meadow", (0, 0)),
        ("desert night", (1, 1)),
        ("Night, glacier", (2, 1)),
        ("a volcano by day", (3, 0)),
        *((name, (i // len(TIMES), i % len(TIMES))) for i, name in enumerate(THEMES)),
    ],
)
def test_prompts_name_themes(prompt: str, theme: tuple[int, int]) -> None:
    assert parse_theme(prompt) == theme


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("moon", r"prompt: unknown word 'moon' in 'moon'; places: meadow, desert, glacier, volcano; times: day, night"),
        ("", r"prompt must name one place \(meadow, desert, glacier, volcano\) and at most one time, got ''"),
        ("night", "prompt must name one place .* got 'night'"),
        ("desert glacier", "prompt must name one place .* got 'desert glacier'"),
        ("desert day night", "at most one time, got 'desert day night'"),
    ],
)
def test_bad_prompts_are_named(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_theme(prompt)
