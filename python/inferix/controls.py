"""Where actions and prompts come from when nobody is at the keys: files, chance, or a fixed tour."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .models import Adapter


def actions_from(source: str, adapter: Adapter, seed: int) -> Iterator[str]:
    """One action name per frame, without end.

    Args:
        source: "random" (holds an action and changes it now and then), "scripted" (laps in both directions), or the
            path of a file with one `ACTION [FRAMES]` per line, repeated from the start when it ends.
    """
    if source == "random":
        return _wander(adapter.actions, np.random.default_rng(seed))
    if source == "scripted":
        lap = adapter.actions[1:]
        return itertools.chain.from_iterable(
            itertools.repeat(action, 9) for action in itertools.cycle((*lap, *lap[::-1], adapter.actions[0]))
        )
    return itertools.cycle(_read_actions(Path(source), adapter))


def _wander(actions: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    held = actions[0]
    while True:
        if rng.random() < 0.2:
            held = actions[int(rng.integers(len(actions)))]
        yield held


def _read_lines(path: Path, option: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, words) of the lines that say something; '#' starts a comment."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: cannot read {str(path)!r} ({error})") from None
    for number, line in enumerate(lines, 1):
        if words := line.split("#")[0].split():
            yield number, words


def _read_actions(path: Path, adapter: Adapter) -> list[str]:
    actions: list[str] = []
    for number, (name, *count) in _read_lines(path, "--actions"):
        if name not in adapter.actions:
            raise ValueError(
                f"--actions: {path}:{number}: action must be one of {', '.join(adapter.actions)}, got {name!r}"
            )
        if len(count) > 1 or (count and not (count[0].isdigit() and int(count[0]) > 0)):
            raise ValueError(f"--actions: {path}:{number}: frames must be one positive number, got {' '.join(count)!r}")
        actions += [name] * (int(count[0]) if count else 1)
    if not actions:
        raise ValueError(f"--actions: {str(path)!r} holds no action")
    return actions


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts by the second they begin: `at(t)` is the one that holds then."""

    starts: tuple[tuple[float, str], ...]

    def at(self, seconds: float) -> str:
        return [prompt for start, prompt in self.starts if start <= seconds][-1]

    @staticmethod
    def read(path: Path) -> Prompts:
        """From a file with one `SECOND PROMPT` per line, ascending, the first at 0."""
        starts: list[tuple[float, str]] = []
        for number, (second, *words) in _read_lines(path, "--prompt-file"):
            try:
                start = float(second)
            except ValueError:
                start = -1.0
            if not words or not math.isfinite(start) or (start <= starts[-1][0] if starts else start != 0):
                raise ValueError(
                    f"--prompt-file: {path}:{number}: each line must be SECOND PROMPT, from 0 upwards, got "
                    f"{' '.join([second, *words])!r}"
                )
            starts.append((start, " ".join(words)))
        if not starts:
            raise ValueError(f"--prompt-file: {str(path)!r} holds no prompt")
        return Prompts(tuple(starts))
