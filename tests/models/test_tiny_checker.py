"""The checker is checked: the true video passes every gate, and each kind of bad video fails the gates it should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from inferix.models.tiny.checker import COVERED, UNKNOWN, look
from inferix.models.tiny.measures import FIFTHS, GATES, Measures, Truth, measure, summarise, true_video, verdict
from inferix.models.tiny.simulator import (
    ACTIONS,
    BOAT_SPRITES,
    MOVES,
    PLAYER_SPRITES,
    SIZE,
    SPRITE,
    THEMES,
    TILE,
    TILES,
    Simulator,
)

SEEDS = (101, 102, 103, 104)
FRAMES = 300


@pytest.fixture(scope="module")
def truths() -> list[Truth]:
    return [true_video(seed, FRAMES) for seed in SEEDS]


@pytest.fixture(scope="module")
def every_theme() -> Simulator:
    """Eight rooms, one per theme."""
    world = Simulator(len(THEMES), np.random.default_rng(5))
    world.theme = np.stack(np.divmod(np.arange(len(THEMES)), 2), 1)
    return world


def failing(videos: list[np.ndarray], truths: list[Truth]) -> set[str]:
    """Measures whose gates fail."""
    summary = summarise([measure(video, truth) for video, truth in zip(videos, truths, strict=True)])
    return {gate.measure for gate in verdict(summary)}


def scenery(world: Simulator) -> np.ndarray:
    """[B, 96, 96, 3] uint8: the rooms without sprites."""
    rooms = np.arange(world.batch)[:, None, None]
    tiles = TILES[world.theme[:, 0], world.theme[:, 1]][rooms, world.kinds]
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(world.batch, SIZE, SIZE, 3)


def without_sprites(truth: Truth) -> np.ndarray:
    """[N, 96, 96, 3] uint8: the true video with the sprites painted over."""
    tiles = TILES[truth.themes[:, 0], truth.themes[:, 1]][:, truth.kinds]
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(truth.frames.shape)


def blend(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """`share` of b over a, as uint8."""
    return (a * (1 - share) + b * share).round().astype(np.uint8)


def noisy(frames: np.ndarray, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, deviation, frames.shape)
    return (frames + noise).round().clip(0, 255).astype(np.uint8)


# Whole videos against the gates


def test_the_true_video_passes_every_gate(truths: list[Truth]) -> None:
    summary = summarise([measure(truth.frames, truth) for truth in truths])
    assert verdict(summary) == []
    for name in ("player_once", "boats_once", "boats_moving", "follows_moving", "follows_blocked", "near"):
        assert summary[name].overall == 1 and len(summary[name].fifths) == FIFTHS, name
    assert summary["inside_wall"].overall == summary["distance"].overall == summary["drift"].overall == 0
    assert summary["tiles_right"].overall == summary["theme_right"].overall == 1


def test_small_pixel_noise_passes_every_gate(truths: list[Truth]) -> None:
    assert failing([noisy(truth.frames, 6) for truth in truths], truths) == set()


def test_a_frozen_video_fails(truths: list[Truth]) -> None:
    videos = [np.repeat(truth.frames[:1], FRAMES, 0) for truth in truths]
    found = failing(videos, truths)
    assert {"boats_moving", "follows_moving", "near_at_horizon", "theme_right"} <= found
    assert not found & {"player_once", "boats_once", "follows_blocked", "inside_wall"}


def test_a_sprite_less_video_fails(truths: list[Truth]) -> None:
    found = failing([without_sprites(truth) for truth in truths], truths)
    assert {"player_once", "boats_once", "boats_moving", "follows_moving", "follows_blocked"} <= found
    assert {"inside_wall", "near_at_horizon"} <= found, "no player, no data: that must not pass"
    assert not found & {"tiles_right", "theme_right"}


def test_a_video_that_repeats_the_last_frame_of_the_block_before_fails(truths: list[Truth]) -> None:
    source = (np.arange(FRAMES) // 3 * 3 - 1).clip(min=0)
    assert failing([truth.frames[source] for truth in truths], truths) >= {"boats_moving", "follows_moving"}


def test_a_video_delayed_by_a_block_fails(truths: list[Truth]) -> None:
    source = (np.arange(FRAMES) - 3).clip(min=0)
    found = failing([truth.frames[source] for truth in truths], truths)
    assert {"follows_moving", "follows_blocked"} <= found, "everything in it moves, but not by this block's actions"
    assert not found & {"player_once", "boats_once", "tiles_right", "theme_right"}


def test_a_video_under_other_actions_fails(truths: list[Truth]) -> None:
    others = [dataclasses.replace(truth, actions=np.roll(truth.actions, 37)) for truth in truths]
    found = failing([truth.frames for truth in truths], others)
    assert {"follows_moving", "follows_blocked"} <= found
    assert not found & {"player_once", "boats_once", "boats_moving", "tiles_right", "theme_right", "inside_wall"}


def test_a_player_that_wanders_off_by_itself_is_not_near(truths: list[Truth]) -> None:
    """The very room under other actions: all is sound but where the player is."""
    rng = np.random.default_rng(9)
    videos = []
    for seed, truth in zip(SEEDS, truths):
        world = Simulator(1, np.random.default_rng(seed))
        frames = []
        for theme in truth.themes:
            world.theme = theme[None]
            world.step(rng.integers(0, len(ACTIONS), 1))
            frames.append(world.render()[0])
        videos.append(np.stack(frames))
    assert failing(videos, truths) == {"follows_moving", "follows_blocked", "near_at_horizon"}


def test_boats_that_tremble_on_the_spot_do_not_move(truths: list[Truth]) -> None:
    source = np.arange(FRAMES) % 2 + 100  # forth and back between two frames
    measured = [measure(truth.frames[source], truth) for truth in truths]
    assert summarise(measured)["boats_moving"].overall < 0.5


def test_sprites_that_fade_with_time_fail_the_drop_gate(truths: list[Truth]) -> None:
    videos = []
    for truth in truths:
        faded = blend(truth.frames, without_sprites(truth), 0.5)
        videos.append(np.concatenate([truth.frames[:285], faded[285:]]))
    summary = summarise([measure(video, truth) for video, truth in zip(videos, truths)])
    assert summary["player_once"].overall >= 0.95 and summary["player_once"].drop == pytest.approx(0.25)
    assert any(gate.compare == "drop at most" and gate.measure == "player_once" for gate in verdict(summary))


def test_a_late_theme_fails_and_one_block_of_grace_does_not(truths: list[Truth]) -> None:
    def late(truth: Truth, frames: int) -> np.ndarray:
        world_theme = truth.themes[(np.arange(FRAMES) - frames).clip(min=0)]
        return without_sprites(dataclasses.replace(truth, themes=world_theme))

    assert "theme_right" not in failing([late(truth, 3) for truth in truths], truths)
    assert "theme_right" in failing([late(truth, 6) for truth in truths], truths)


def test_walking_through_walls_is_seen(truths: list[Truth]) -> None:
    truth = truths[0]
    y, x = np.argwhere(truth.kinds == 1)[0] * TILE
    frames = without_sprites(truth)
    frames[:, y + 2 : y + 2 + SPRITE, x + 2 : x + 2 + SPRITE] = PLAYER_SPRITES[0]
    measured = measure(frames, truth)
    assert measured.inside_wall.min() == 1 and measured.tiles_right.min() == 1


def test_a_wrong_tile_counts(truths: list[Truth]) -> None:
    kinds = truths[0].kinds.copy()
    kinds[kinds == 1] = 0
    measured = measure(truths[0].frames, dataclasses.replace(truths[0], kinds=kinds))
    wrong = (truths[0].kinds == 1).sum() / 64
    assert measured.tiles_right.mean() == pytest.approx(1 - wrong, abs=0.02)


def test_measures_without_a_say_are_nan_and_fail(truths: list[Truth]) -> None:
    measured = measure(truths[0].frames, truths[0])
    assert np.isnan(measured.follows_moving[0]) and np.isnan(measured.boats_moving[0])
    assert (np.isnan(measured.follows_moving) ^ np.isnan(measured.follows_blocked))[1:].all()
    nothing = Measures(**{field.name: np.full(FRAMES, np.nan) for field in dataclasses.fields(Measures)})
    assert verdict(summarise([nothing])) == list(GATES)


def test_the_truth_moves_by_its_own_actions(truths: list[Truth]) -> None:
    truth = truths[0]
    moves = np.diff(truth.corners[:, 0], axis=0)
    expected = MOVES[truth.actions[1:]] * 4
    assert ((moves == expected).all(1) | (moves == 0).all(1)).all() and (moves != 0).any()
    assert truth.part(6, 9).frames.shape == (3, SIZE, SIZE, 3) and len(truth.part(6, 9)) == 3


def test_lengths_must_agree(truths: list[Truth]) -> None:
    with pytest.raises(ValueError, match="frames must be as many as the truth's 300, got 2"):
        measure(truths[0].frames[:2], truths[0])


# Single frames


def test_every_sprite_and_tile_is_read_in_every_theme(every_theme: Simulator) -> None:
    seen = look(every_theme.render())
    assert (seen.corners == every_theme.sprite_corners()).all() and seen.once.all()
    assert (seen.theme == np.arange(len(THEMES))).all()
    codes = seen.theme[:, None, None] * 3 + every_theme.kinds
    assert ((seen.tiles == codes) | (seen.tiles == COVERED)).all()
    assert (seen.tiles == COVERED).sum((1, 2)).min() >= 3


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_sprite_off_the_lattice_is_found_where_it_is(every_theme: Simulator, offset: int) -> None:
    frames = scenery(every_theme)
    y, x = 40 + offset, 50 + offset
    frames[:, y : y + SPRITE, x : x + SPRITE] = PLAYER_SPRITES[2]
    assert (look(frames).corners[:, 0] == [y, x]).all()


def test_a_player_smeared_over_two_positions_is_not_one(every_theme: Simulator) -> None:
    frames = []
    for shift in (0, 4):
        frame = scenery(every_theme)
        frame[:, 40:48, 40 + shift : 48 + shift] = PLAYER_SPRITES[3]
        frames.append(frame)
    for share in (0.4, 0.5, 0.6):
        assert not look(blend(frames[0], frames[1], share)).once[:, 0].any()


def test_a_fat_player_is_not_one(every_theme: Simulator) -> None:
    frames = scenery(every_theme)
    frames[:, 40:48, 44:52] = PLAYER_SPRITES[3]
    frames[:, 40:48, 40:48] = PLAYER_SPRITES[3]
    seen = look(frames)
    assert (seen.count[:, 0] >= 1).all() and not seen.once[:, 0].any()


@pytest.mark.parametrize("sprite", [PLAYER_SPRITES[0], *BOAT_SPRITES[:, 0]], ids=["player", "boat 0", "boat 1"])
def test_a_doubled_sprite_is_two(every_theme: Simulator, sprite: np.ndarray) -> None:
    frames = scenery(every_theme)
    frames[:, 20:28, 20:28] = sprite
    frames[:, 60:68, 28:36] = sprite
    assert (look(frames).count.max(1) == 2).all() and not look(frames).once.any()


def test_a_faded_sprite_is_none(every_theme: Simulator) -> None:
    frames = blend(every_theme.render(), scenery(every_theme), 0.4)
    seen = look(frames)
    assert not seen.once.any() and (seen.count == 0).all()
    assert (seen.tiles == UNKNOWN).any((1, 2)).all(), "what is left of it spoils the tiles"


def test_blobs_and_plain_colour_are_no_sprites() -> None:
    frames = np.empty((3, SIZE, SIZE, 3), np.uint8)
    frames[:] = np.array([(230, 40, 50), (235, 60, 225), (255, 225, 50)])[:, None, None]
    seen = look(frames)
    assert (seen.count == 0).all() and (seen.theme == -1).all() and (seen.tiles == UNKNOWN).all()
    assert (seen.stray.max(1) == SIZE**2).all()


def test_a_patchwork_of_themes_has_no_right_theme(every_theme: Simulator) -> None:
    frame = scenery(every_theme)[:1].copy()
    for row in range(8):
        frame[:, row * TILE : (row + 1) * TILE] = np.tile(TILES[row // 2, row % 2, 0], (1, 8, 1))
    assert look(frame).theme[0] == -1


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (96, 96, 3), (0, 96, 96, 3)])
def test_bad_frames_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"frames must be uint8 \[N, 96, 96, 3\]"):
        look(np.zeros(shape, np.uint8))


def test_frames_that_are_not_bytes_are_named() -> None:
    with pytest.raises(ValueError, match="got float64"):
        look(np.zeros((1, SIZE, SIZE, 3)))
