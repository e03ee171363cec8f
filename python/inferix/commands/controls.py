"""Where actions, prompts and a first picture come from when nobody is at the keys: files, chance, or a fixed tour.

Files are UTF-8 text, with or without a byte order mark.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..media import read_picture
from ..models import Adapter, Model

MOST_TEXT = 1 << 24  # characters of a file
READ = ("weights", "vae", "image", "video", "actions", "prompt_file")  # options that name files


def refuse_inputs(path: Path, config: object) -> None:
    """Raise ValueError, naming `out`, if `path`, which is to be written, is a file that a config has read."""
    for option in READ:
        read = getattr(config, option, None)
        if read is not None and path.exists() and Path(read).exists() and path.samefile(read):
            raise ValueError(f"out: {str(path)!r} would be written, but `{option}` is read from it")


def actions_from(actions: str | Path, adapter: Adapter, seed: int) -> Iterator[str]:
    """One action name per frame, without end.

    Args:
        actions: "random" (holds an action and changes it now and then), "scripted" (laps in both directions), or the
            path of a file with one `ACTION [FRAMES]` per line, repeated from the start when it ends; '#' begins a
            comment.
    """
    if actions == "random":
        return _wander(adapter.actions, np.random.default_rng(seed))
    if actions == "scripted":
        lap = adapter.actions[1:]
        return itertools.chain.from_iterable(
            itertools.repeat(action, 9) for action in itertools.cycle((*lap, *lap[::-1], adapter.actions[0]))
        )
    held = _read_actions(Path(actions), adapter)
    return itertools.chain.from_iterable(itertools.repeat(*action) for action in itertools.cycle(held))


def begun_with(model: Model, image: str | Path | None) -> Model:
    """The model, for worlds that begin with the picture in this file; itself, if there is none and it takes none."""
    if not model.adapter.picture:
        if image is not None:
            raise ValueError(f"image: {model.adapter.name} is conditioned on no picture")
        return model
    return model.with_picture(None if image is None else read_picture(image, model.adapter.size, "image")[0])


def _wander(actions: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    held = actions[0]
    while True:
        if rng.random() < 0.2:
            held = actions[int(rng.integers(len(actions)))]
        yield held


def _read_lines(path: Path, argument: str) -> Iterator[tuple[int, str]]:
    """The lines that say something, numbered from 1; one that begins with '#' is a comment."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MOST_TEXT + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: cannot read {str(path)!r} ({error})") from None
    if len(text) > MOST_TEXT:
        raise ValueError(f"{argument}: {str(path)!r} must be at most {MOST_TEXT:,} characters long")
    if "\0" in text:
        raise ValueError(f"{argument}: {str(path)!r} must be text, and holds a NUL character")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _read_actions(path: Path, adapter: Adapter) -> list[tuple[str, int]]:
    """(action, how many frames), in turn."""
    actions: list[tuple[str, int]] = []
    for number, line in _read_lines(path, "actions"):
        name, *count = line.partition("#")[0].split()
        try:
            adapter.done(name)
        except ValueError as error:
            raise ValueError(f"actions: {path}:{number}: {error}") from None
        if len(count) > 1 or (count and not re.fullmatch("0*[1-9][0-9]{0,8}", count[0], re.ASCII)):
            said = " ".join(count)[:40]
            raise ValueError(
                f"actions: {path}:{number}: frames must be one positive number of at most 9 digits, got {said!r}"
            )
        actions.append((name, int(count[0]) if count else 1))
    if not actions:
        raise ValueError(f"actions: {str(path)!r} holds no action")
    return actions


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts by the second they begin: `at(t)` is the one that holds then."""

    starts: tuple[tuple[float, str], ...]

    def at(self, seconds: float) -> str:
        return [prompt for start, prompt in self.starts if start <= seconds][-1]

    @staticmethod
    def read(path: str | Path, argument: str = "path") -> Prompts:
        """From a file with one `SECOND PROMPT` per line, ascending, the first at 0. A '#' is part of a prompt, but for
        one that begins a line: that is a comment."""
        starts: list[tuple[float, str]] = []
        for number, line in _read_lines(Path(path), argument):
            second, *words = line.split()
            try:
                start = float(second)
            except ValueError:
                start = -1.0
            if not words or not math.isfinite(start) or (start <= starts[-1][0] if starts else start != 0):
                raise ValueError(
                    f"{argument}: {path}:{number}: each line must be SECOND PROMPT, from 0 upwards, got "
                    f"{' '.join([second, *words])!r}"
                )
            starts.append((start, " ".join(words)))
        if not starts:
            raise ValueError(f"{argument}: {str(path)!r} holds no prompt")
        return Prompts(tuple(starts))
