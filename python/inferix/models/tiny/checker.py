"""Reads frames of the tiny world: where the sprites are, how many, and what every tile shows.

It sees pixels alone and knows nothing of what made them. A sprite counts where an 8 x 8 window matches one of its
templates closely; sprite colour that is left over belongs to a ghost, a smear or a fat blob. So a sprite is there
*exactly once* when one window matches and hardly any of its colour lies elsewhere. Small pixel errors pass; a sprite
that fades or smears does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .simulator import BOAT_SPRITES, BOATS, GRID, PLAYER_SPRITES, SIZE, SPRITE, THEMES, TILE, TILES

SPRITES = ("player", *(f"boat {boat}" for boat in range(BOATS)))
KINDS = 3  # floor, wall, canal
UNKNOWN, COVERED = -1, -2  # tiles that match nothing, and tiles that a sprite hides in part

MATCH_LIMIT = 25.0  # mean absolute error per channel of a match: a sprite that faded by 35% fails on every floor
STRAY_LIMIT = 6  # pixels of sprite colour outside the matches; a second sprite 4 px aside leaves at least 8
TILE_LIMIT = 18.0  # RMS error per channel of a tile: the two nearest textures of one theme are 16 apart, most over 40
MOST = 3  # matches looked for per sprite and frame: more than one is already too many
CHUNK = 128  # frames read at once: about 30 MB of working memory

# How far a pixel's colour is of a sprite's kind (see _chroma): the sprites have 180, 165 and 175, the scenery at most
# 13, 38 and 68. A player at 40% over a dark floor is just above; fainter ghosts spoil their tiles, which then match
# nothing.
CHROMA_LIMITS = (60, 65, 85)


@dataclass(frozen=True)
class Sightings:
    """What N frames show. Sprites are in the order of SPRITES.

    Attributes:
        corners: [N, 3, 2] int pixels (row, column), top-left corner of the best match; -1 where there is none.
        count: [N, 3] int, windows that match, up to MOST.
        stray: [N, 3] int, pixels of the sprite's colour outside of its matches, thin lines and lone pixels left out.
        tiles: [N, 8, 8] int, theme * KINDS + kind; UNKNOWN or COVERED.
        theme: [N] int index into THEMES, of most of the tiles; -1 if fewer than half of the visible tiles agree.
    """

    corners: np.ndarray
    count: np.ndarray
    stray: np.ndarray
    tiles: np.ndarray
    theme: np.ndarray

    @property
    def once(self) -> np.ndarray:
        """[N, 3] bool: the sprite is there exactly once and undivided."""
        return (self.count == 1) & (self.stray <= STRAY_LIMIT)


def look(frames: np.ndarray) -> Sightings:
    """Read frames [N, 96, 96, 3] uint8."""
    if frames.ndim != 4 or frames.shape[1:] != (SIZE, SIZE, 3) or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"frames must be uint8 [N, {SIZE}, {SIZE}, 3] with N >= 1, got {frames.dtype} {list(frames.shape)}"
        )
    parts = [_look(frames[start : start + CHUNK]) for start in range(0, len(frames), CHUNK)]
    return Sightings(*(np.concatenate([getattr(p, name) for p in parts]) for name in Sightings.__dataclass_fields__))


def _look(frames: np.ndarray) -> Sightings:
    corners, count, stray, covered = [], [], [], np.zeros((len(frames), GRID, GRID), bool)
    templates = (PLAYER_SPRITES, *BOAT_SPRITES)
    for sprite, chroma in enumerate(_chroma(frames)):
        found, left = _find(frames, chroma > CHROMA_LIMITS[sprite], templates[sprite])
        corners.append(found[:, 0])
        count.append((found[:, :, 0] >= 0).sum(1))
        stray.append(left)
        covered |= _covered(found)
    codes = _classify(frames)
    tiles = np.where(covered, COVERED, codes)
    return Sightings(np.stack(corners, 1), np.stack(count, 1), np.stack(stray, 1), tiles, _main_theme(tiles))


def _chroma(frames: np.ndarray) -> list[np.ndarray]:
    """How red, magenta and yellow each pixel is: three of [N, 96, 96] int16; 180, 165 and 175 on the sprites.

    Each is the least gap between the channels a sprite's colour has and those it lacks; red also discounts
    orange, twice, to stay clear of the volcano's lava under noise.
    """
    red, green, blue = (frames[..., channel].astype(np.int16) for channel in range(3))
    orange = 2 * np.maximum(green - blue, 0)
    return [
        red - np.maximum(green, blue) - orange,
        np.minimum(red, blue) - green,
        np.minimum(red, green) - blue,
    ]


def _find(frames: np.ndarray, mask: np.ndarray, templates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matches of one sprite.

    Args:
        frames: [N, 96, 96, 3] uint8.
        mask: [N, 96, 96] bool, pixels of the sprite's colour.
        templates: [K, 8, 8, 3] uint8, the ways the sprite can face.

    Returns:
        Corners [N, MOST, 2] of the matches, best first, -1 where there are no more; stray pixels outside them [N].
    """
    n = len(frames)
    pixels = int(_template_mask(templates[0]).sum())
    inside = _window_sums(mask)
    # A window has about as many coloured pixels as the template; a wholly coloured one has no eyes, bow or hull.
    frame, y, x = np.nonzero((inside >= 0.7 * pixels) & (inside <= SPRITE * SPRITE - 4))
    side = np.arange(SPRITE)
    patches = frames[frame[:, None, None], (y[:, None] + side)[:, :, None], (x[:, None] + side)[:, None]]
    error: np.ndarray = np.full(inside.shape, np.inf, np.float32)
    error[frame, y, x] = _template_error(patches, templates)

    corners = np.full((n, MOST, 2), -1)
    left = mask.copy()
    for match in range(MOST):
        best = error.reshape(n, -1).argmin(1)
        corner = np.stack(np.divmod(best, error.shape[2]), 1)
        hit = np.flatnonzero(error.reshape(n, -1)[np.arange(n), best] <= MATCH_LIMIT)
        if not len(hit):
            break
        corners[hit, match] = corner[hit]
        _clear(left, hit, corners[hit, match], SPRITE, False)
        _clear(error, hit, corners[hit, match] - SPRITE + 3, 2 * SPRITE - 5, np.inf)  # near-duplicates
    return corners, _opened(left).sum((1, 2))


def _opened(mask: np.ndarray) -> np.ndarray:
    """[N, H, W] bool -> the pixels that lie in a fully set 2 x 2 square: drops noise and edges that bleed one pixel."""
    squares = mask[:, 1:, 1:] & mask[:, 1:, :-1] & mask[:, :-1, 1:] & mask[:, :-1, :-1]
    opened = np.zeros_like(mask)
    for rows in (slice(1, None), slice(-1)):
        for columns in (slice(1, None), slice(-1)):
            opened[:, rows, columns] |= squares
    return opened


def _template_mask(template: np.ndarray) -> np.ndarray:
    """[8, 8] bool: pixels of a template in the sprite's own colour, the commonest one."""
    colors, inverse = np.unique(template.reshape(-1, 3), axis=0, return_inverse=True)
    commonest = np.bincount(inverse.ravel(), minlength=len(colors)).argmax()
    return (inverse.ravel() == commonest).reshape(SPRITE, SPRITE)


def _window_sums(mask: np.ndarray) -> np.ndarray:
    """[N, 96, 96] bool -> [N, 89, 89] int16: how many are set in the 8 x 8 window at each corner."""
    total = np.zeros((len(mask), SIZE + 1, SIZE + 1), np.int16)
    total[:, 1:, 1:] = mask.cumsum(1, np.int16).cumsum(2, np.int16)
    upper, lower = total[:, :-SPRITE], total[:, SPRITE:]
    return lower[:, :, SPRITE:] - lower[:, :, :-SPRITE] - upper[:, :, SPRITE:] + upper[:, :, :-SPRITE]


def _template_error(patches: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Patches [C, 8, 8, 3] uint8 -> [C] float: mean absolute error to the nearest of the templates."""
    error = np.full(len(patches), np.inf, np.float32)
    signed = patches.astype(np.int16)
    for template in templates.astype(np.int16):
        error = np.minimum(error, np.abs(signed - template).mean((1, 2, 3), dtype=np.float32))
    return error


def _clear(maps: np.ndarray, which: np.ndarray, corners: np.ndarray, side: int, value: float) -> None:
    """Set squares of maps [N, H, W] in place: of the maps `which` [M], at `corners` [M, 2], cut at the edges."""
    reach = np.arange(side)
    rows = (corners[:, :1] + reach).clip(0, maps.shape[1] - 1)
    columns = (corners[:, 1:] + reach).clip(0, maps.shape[2] - 1)
    maps[which[:, None, None], rows[:, :, None], columns[:, None]] = value


def _covered(found: np.ndarray) -> np.ndarray:
    """Corners [N, M, 2] (-1: none) -> [N, 8, 8] bool: tiles that these sprites touch."""
    covered = np.zeros((len(found), GRID, GRID), bool)
    frame, match = np.nonzero(found[..., 0] >= 0)
    for dy in (0, SPRITE - 1):
        for dx in (0, SPRITE - 1):
            y, x = found[frame, match].T
            covered[frame, (y + dy) // TILE, (x + dx) // TILE] = True
    return covered


def _classify(frames: np.ndarray) -> np.ndarray:
    """[N, 8, 8] int: theme * KINDS + kind of the nearest texture to each tile, UNKNOWN past TILE_LIMIT."""
    n = len(frames)
    textures = TILES.reshape(len(THEMES) * KINDS, -1).astype(np.float32) - 128
    tiles = frames.reshape(n, GRID, TILE, GRID, TILE, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n * GRID * GRID, -1)
    x = tiles.astype(np.float32) - 128
    # |x - t|^2 expanded: one matrix product for all textures
    distance = (x * x).sum(1, keepdims=True) - 2 * x @ textures.T + (textures * textures).sum(1)
    nearest = distance.argmin(1)
    close = distance.min(1) <= TILE_LIMIT**2 * textures.shape[1]
    return np.where(close, nearest, UNKNOWN).reshape(n, GRID, GRID)


def _main_theme(tiles: np.ndarray) -> np.ndarray:
    """[N, 8, 8] tile codes -> [N] theme of most visible tiles, -1 if fewer than half agree."""
    flat = tiles.reshape(len(tiles), -1)
    themes = np.where(flat >= 0, flat // KINDS, -1)
    votes = (themes[:, :, None] == np.arange(len(THEMES))).sum(1)
    return np.where(2 * votes.max(1) > (flat != COVERED).sum(1), votes.argmax(1), -1)
