"""Rows of text embedding that MAGI-1 puts before a caption: quality, style, and how many chunks are still to come.

Source: inference/pipeline/prompt_process.py of github.com/SandAI-org/MAGI-1 (6ff822e); the rows themselves are in its
example/assets/special_tokens.npz, which goes next to the weights.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .network import NULL_ROWS

FILE = "special_tokens.npz"
# name -> (array in the file, row)
ROWS = {
    "caption": ("caption_token", 0),
    "logo": ("logo_token", 0),
    "transition": ("other_tokens", 0),
    "hq": ("other_tokens", 1),
    "static": ("other_tokens", 2),
    "dynamic": ("other_tokens", 3),
    "border": ("other_tokens", 4),
    "3d": ("other_tokens", 15),
    "2d": ("other_tokens", 16),
}
STYLES = ("static", "dynamic", "border", "hq", "3d", "2d")  # that a user may ask for, in the source's order
NEGATIVE = ("caption", "logo", "transition", "border")  # what a video that guidance leads away from would have
DURATIONS, FIRST_DURATION = 8, 7  # rows 7 .. 14: one chunk left, the last one, to eight or more
MOST_BYTES = 1 << 26  # of the file, expanded; published are about a hundred rows of 4,096 numbers
DEFAULT = ("hq", "duration")  # what the published scripts ask for


@dataclasses.dataclass(frozen=True)
class Captions:
    """What goes before captions.

    Attributes:
        before: rows before each caption, the first one first: [n, caption_dim]; None: nothing.
        durations: [8, caption_dim], of which a chunk gets the row that says how many are left; None: none does.
        before_null: rows before the null caption.
    """

    before: Tensor | None = None
    durations: Tensor | None = None
    before_null: Tensor | None = None

    def key(self, remaining: int | None) -> int:
        """Chunks with the same key get the same rows. `remaining` of them follow; None: without end."""
        last = DURATIONS - 1
        return 0 if self.durations is None else last if remaining is None else min(remaining, last)

    def positive(self, rows: Tensor, remaining: int | None) -> Tensor:
        key = self.key(remaining)
        duration = None if self.durations is None else self.durations[key : key + 1]
        return _joined(duration, self.before, rows)

    def negative(self, rows: Tensor) -> Tensor:
        return _joined(self.before_null, rows)[:NULL_ROWS]


def load_captions(folder: Path, names: Sequence[str] | None, negative: bool = False) -> Captions:
    """Captions with these special rows: of STYLES, and "duration". None: DEFAULT if the folder has the file, else none.

    Args:
        negative: put rows before the null caption too.

    Raises:
        ValueError: a name is unknown, the file is missing or not what it must be.
    """
    path = folder / FILE
    if names is None and not negative and not path.exists():
        return Captions()
    names = DEFAULT if names is None else tuple(names)
    if unknown := [name for name in names if name not in (*STYLES, "duration")]:
        raise ValueError(f"special tokens must be of {', '.join(STYLES)}, duration, got {unknown[0]!r}")
    if not names and not negative:
        return Captions()
    if not path.exists():
        raise ValueError(f"special tokens: there is no {path}; MAGI-1 has it in example/assets")
    try:
        arrays = _arrays(path)
        pick = {name: arrays[array][row : row + 1] for name, (array, row) in ROWS.items()}
        durations = arrays["other_tokens"][FIRST_DURATION : FIRST_DURATION + DURATIONS]
        if {len(rows) for rows in pick.values()} != {1} or len(durations) != DURATIONS:
            raise ValueError("it has too few rows")
    except Exception as error:  # of a zip, of an array in it, of its header: numpy has no one error for them
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"special tokens: {path} is damaged or another file ({reason})") from None
    # The source puts one after another before what is there, so that the last of a list comes first.
    styles = [pick[name] for name in reversed(STYLES) if name in names]
    return Captions(
        torch.cat(styles) if styles else None,
        durations if "duration" in names else None,
        torch.cat([pick[name] for name in reversed(NEGATIVE)]) if negative else None,
    )


def _arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of the file, [rows, caption_dim] each, expanded to no more than they can be."""
    with zipfile.ZipFile(path) as archive:
        if (size := sum(member.file_size for member in archive.infolist())) > MOST_BYTES:
            raise ValueError(f"it would expand to {size} bytes")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name].astype(np.float16)).float() for name in file.files}
    if any(rows.ndim != 2 for rows in arrays.values()) or len({rows.shape[1] for rows in arrays.values()}) != 1:
        raise ValueError("its arrays must be [rows, caption_dim]")
    return arrays


def _joined(*parts: Tensor | None) -> Tensor:
    there = [part for part in parts if part is not None]
    return torch.cat([part.to(there[-1]) for part in there])
