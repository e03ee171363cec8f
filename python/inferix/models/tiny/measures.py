"""What a video of the tiny world must get right: measures against the true simulator, and the gates they must pass.

Every measure is a number per frame, NaN where the frame has no say (a blocked player says nothing about moving).
Shares are 1 or 0 per frame. A summary is the mean over frames and streams, for the whole video and for each fifth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .checker import COVERED, KINDS, look
from .simulator import BOATS, FLOOR, MOVES, SPRITE, THEMES, TILE, TIMES, UNIT, UNITS, Simulator

BLOCK = 3  # frames generated together; a theme has this long to change
HELD_OUT = 10_000  # seed of the first stream; training draws all of its rooms from one generator with another seed
CONTEXT = 2 * BLOCK  # true frames before the first generated one
CHANGE_EVERY = 20 * BLOCK  # frames between changes of theme
FIFTHS = 5
HORIZON = 200  # frame at which the player must still be where the simulator has it
NEAR = 2  # pixels, half a move: as near as that is the same place
SLACK = 1  # pixels by which a move may miss its length
PIXEL_NOISE = 1 / 12  # least mean squared error counted: that of rounding to whole pixel values; caps PSNR at 58.9 dB


@dataclass(frozen=True)
class Truth:
    """What was asked of a video of N frames, and what the simulator makes of it.

    Attributes:
        kinds: [8, 8] int, FLOOR, WALL or CANAL.
        canals: [2, 3] int tiles (row, column, length).
        actions: [N] int; actions[i] leads to frame i.
        themes: [N, 2] int (place, time) asked for in frame i.
        corners: [N, 3, 2] int pixels, top-left corners of the player and the boats.
        frames: [N, 96, 96, 3] uint8.
    """

    kinds: np.ndarray
    canals: np.ndarray
    actions: np.ndarray
    themes: np.ndarray
    corners: np.ndarray
    frames: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)

    def part(self, start: int, stop: int) -> Truth:
        """Frames start .. stop - 1 alone."""
        series = {name: getattr(self, name)[start:stop] for name in ("actions", "themes", "corners", "frames")}
        return dataclasses.replace(self, **series)


def true_video(seed: int, frames: int, change_every: int = 60, start: int = 0) -> Truth:
    """What the simulator does in a room of its own, under a wandering player.

    Args:
        seed: decides the room, the actions and the themes.
        frames: N.
        change_every: frames after which the theme changes to another one, time and again.
        start: frames before the first of these periods begins.
    """
    rng = np.random.default_rng(seed)
    world = Simulator(1, rng)
    series: dict[str, list[np.ndarray]] = {"actions": [], "themes": [], "corners": [], "frames": []}
    for frame in range(frames):
        if frame > start and (frame - start) % change_every == 0:
            theme = world.theme @ [len(TIMES), 1] + rng.integers(1, len(THEMES))
            world.theme = np.stack(np.divmod(theme % len(THEMES), len(TIMES)), 1)
        action = world.wander()
        world.step(action)
        state = (action, world.theme.copy(), world.sprite_corners(), world.render())
        for values, value in zip(series.values(), state):
            values.append(value[0])
    return Truth(world.kinds[0], world.canals[0], **{name: np.stack(values) for name, values in series.items()})


@dataclass(frozen=True)
class Measures:
    """One value per frame, [N] float each; NaN: no say. Those from a move on need two frames, so the first is NaN."""

    player_once: np.ndarray  # the player is there exactly once
    boats_once: np.ndarray  # each boat is there exactly once
    boats_moving: np.ndarray  # each boat moved one unit along its canal and turned only at its end
    follows_moving: np.ndarray  # the action moves the player by a unit, and it moved so
    follows_blocked: np.ndarray  # the action, or none, leaves the player where it is, and it stayed
    inside_wall: np.ndarray  # the player stands on what is not floor
    near: np.ndarray  # the player is within NEAR pixels of the simulator's
    distance: np.ndarray  # pixels between the player and the simulator's
    tiles_right: np.ndarray  # share of the visible tiles that show their true kind in the frame's theme
    theme_right: np.ndarray  # the theme asked for; the first block after a change has no say
    psnr: np.ndarray  # dB against the simulator's frame; reported, never a gate


def measure(frames: np.ndarray, truth: Truth) -> Measures:
    """Compare frames [N, 96, 96, 3] uint8 with the truth of the same length."""
    if len(frames) != len(truth):
        raise ValueError(f"frames must be as many as the truth's {len(truth)}, got {len(frames)}")
    seen = look(frames)
    once = seen.once
    player = np.where(once[:, :1], seen.corners[:, 0], np.nan)
    distance = np.abs(player - truth.corners[:, 0]).max(1)
    moving, blocked = _follows(player, truth)
    asked = truth.themes @ [len(TIMES), 1]
    shown = seen.tiles != COVERED
    right = seen.tiles == (seen.theme * KINDS)[:, None, None] + truth.kinds
    return Measures(
        player_once=once[:, 0].astype(float),
        boats_once=once[:, 1:].all(1).astype(float),
        boats_moving=_boats_moving(seen.corners[:, 1:], once[:, 1:], truth),
        follows_moving=moving,
        follows_blocked=blocked,
        inside_wall=_where(once[:, 0], _solid(player, truth.kinds)),
        near=(distance <= NEAR).astype(float),
        distance=distance,
        tiles_right=(right & shown).sum((1, 2)) / np.maximum(shown.sum((1, 2)), 1),
        theme_right=_where(_settled(asked), seen.theme == asked),
        psnr=_psnr(frames, truth.frames),
    )


def _where(say: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.where(say, value.astype(float), np.nan)


def _units(corners: np.ndarray) -> np.ndarray:
    """Pixels -> the nearest units inside the room; NaN, no position, -> 0."""
    return np.rint(np.nan_to_num(corners) / UNIT).astype(int).clip(0, UNITS - 1)


def _blocked(units: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """[N] bool: the simulator's own rule, for players at [N, 2] units in the room of kinds [8, 8]."""
    rooms = Simulator(1, np.random.default_rng(0))
    rooms.kinds = np.broadcast_to(kinds, (len(units), *kinds.shape))
    return rooms.blocked(units)


def _solid(player: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """[N] bool: does a player at [N, 2] pixels overlap what is not floor by more than SLACK pixels?"""
    corner = np.nan_to_num(player).astype(int)
    solid = np.zeros(len(player), bool)
    for dy in (SLACK, SPRITE - 1 - SLACK):
        for dx in (SLACK, SPRITE - 1 - SLACK):
            solid |= kinds[(corner[:, 0] + dy) // TILE, (corner[:, 1] + dx) // TILE] != FLOOR
    return solid


def _follows(player: np.ndarray, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """Whether the player [N, 2] pixels (NaN: not there once) did as its action says, one simulator step at a time.

    The step starts where the player was *seen* last, so that one slip costs one frame. A player that was not seen
    before has nothing to follow; one that is not seen after has failed.

    Returns:
        moving [N], blocked [N]: NaN in the frames of the other.
    """
    before, after = player[:-1], player[1:]
    start = _units(before)
    wanted = start + MOVES[truth.actions[1:]]
    moves = (wanted != start).any(1) & ~_blocked(wanted, truth.kinds)
    step = np.where(moves[:, None], wanted - start, 0) * UNIT
    followed = (np.abs(after - before - step) <= SLACK).all(1)  # False where NaN
    seen = ~np.isnan(before[:, 0])
    first = np.full(1, np.nan)
    return (
        np.concatenate([first, _where(seen & moves, followed)]),
        np.concatenate([first, _where(seen & ~moves, followed)]),
    )


def _boats_moving(corners: np.ndarray, once: np.ndarray, truth: Truth) -> np.ndarray:
    """[N] float: both boats [N, 2, 2] sailed on by one unit. A boat that is missing does not move.

    Turning in mid-canal fails too, or a boat that trembles on the spot would pass.
    """
    sailed = np.ones(len(corners) - 1, bool)
    for boat in range(BOATS):
        axis = 1 - boat
        along, across = corners[:, boat, axis], corners[:, boat, 1 - axis]
        move = np.diff(along)
        one_unit = (np.abs(np.abs(move) - UNIT) <= SLACK) & (np.abs(across[1:] - across[:-1]) <= SLACK)
        start = TILE * truth.canals[boat, axis]
        end = start + TILE * truth.canals[boat, 2] - SPRITE
        on = np.abs(across[1:] - truth.corners[1:, boat + 1, 1 - axis]) <= SLACK
        on &= (along[1:] >= start - SLACK) & (along[1:] <= end + SLACK)
        at_end = (along[:-1] < start + UNIT - SLACK) | (along[:-1] > end - UNIT + SLACK)
        known = np.concatenate([[False], (once[:-2] & once[1:-1])[:, boat]])  # was the move before this one seen?
        turned = np.concatenate([[False], np.sign(move[1:]) != np.sign(move[:-1])])
        sailed &= once[1:, boat] & once[:-1, boat] & one_unit & on & ~(known & turned & ~at_end)
    return np.concatenate([[np.nan], sailed.astype(float)])


def _settled(asked: np.ndarray) -> np.ndarray:
    """[N] bool: at least BLOCK frames have passed since the theme [N] changed."""
    changes = np.flatnonzero(np.diff(asked)) + 1
    settled = np.ones(len(asked), bool)
    settled[(changes[:, None] + np.arange(BLOCK)).clip(max=len(asked) - 1)] = False
    return settled


def _psnr(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    error = [np.square(a.astype(np.float32) - b).mean() for a, b in zip(frames, truth)]
    return 10 * np.log10(255**2 / np.maximum(error, PIXEL_NOISE))


@dataclass(frozen=True)
class Summary:
    """Mean of one measure over all frames and streams, and over each fifth of the video."""

    overall: float
    fifths: tuple[float, ...]

    @property
    def drop(self) -> float:
        """How far the worst later fifth lies under the first."""
        return self.fifths[0] - float(np.min(self.fifths[1:]))  # NaN if any fifth has no data


def summarise(streams: Sequence[Measures]) -> dict[str, Summary]:
    """Summaries by name: every measure of Measures, `near_at_horizon`, and `drift`.

    `near_at_horizon` is taken at the last frame if a video is shorter. `drift` is how far PSNR in the later fifths
    lies from the first, as a share of it (the Video Drift Error, VDE, of this one metric).
    """
    summary = {}
    for field in dataclasses.fields(Measures):
        values = np.stack([getattr(stream, field.name) for stream in streams])
        summary[field.name] = Summary(_mean(values), tuple(_mean(part) for part in np.array_split(values, FIFTHS, 1)))
    near = np.stack([stream.near for stream in streams])
    summary["near_at_horizon"] = Summary(_mean(near[:, min(HORIZON, near.shape[1]) - 1]), ())
    first, *later = summary["psnr"].fifths
    summary["drift"] = Summary(sum(abs(value - first) for value in later) / first / len(later), ())
    return summary


def _mean(values: np.ndarray) -> float:
    said = values[~np.isnan(values)]
    return float(said.mean()) if said.size else float("nan")


@dataclass(frozen=True)
class Gate:
    """A bound that a measure must keep. `compare`: "at least", "at most", or "drop at most" (Summary.drop)."""

    name: str
    measure: str
    compare: str
    bound: float
    unit: str = "%"

    def value(self, summary: dict[str, Summary]) -> float:
        measured = summary[self.measure]
        return measured.drop if self.compare == "drop at most" else measured.overall

    def passes(self, summary: dict[str, Summary]) -> bool:
        """A measure without data (NaN) keeps no bound."""
        value = self.value(summary)
        return value >= self.bound if self.compare == "at least" else value <= self.bound


GATES = (
    Gate("player exactly once", "player_once", "at least", 0.99),
    Gate("player, later fifths under the first", "player_once", "drop at most", 0.02),
    Gate("both boats exactly once", "boats_once", "at least", 0.95),
    Gate("boats, later fifths under the first", "boats_once", "drop at most", 0.02),
    Gate("both boats moving", "boats_moving", "at least", 0.95),
    Gate("boats moving, later fifths under the first", "boats_moving", "drop at most", 0.02),
    Gate("action followed, moving", "follows_moving", "at least", 0.95),
    Gate("action followed, blocked or none", "follows_blocked", "at least", 0.95),
    Gate("player inside a wall", "inside_wall", "at most", 0.01),
    Gate(f"within {NEAR} px of the simulator at frame {HORIZON}", "near_at_horizon", "at least", 0.90),
    Gate("scenery tiles right", "tiles_right", "at least", 0.98),
    Gate("theme right one block after a change", "theme_right", "at least", 0.99),
)


def verdict(summary: dict[str, Summary], gates: Sequence[Gate] = GATES) -> list[Gate]:
    """The gates that fail, in order; empty when all pass."""
    return [gate for gate in gates if not gate.passes(summary)]
