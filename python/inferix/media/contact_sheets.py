"""Contact sheets: frames of a video side by side in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inferix_kernels.files import atomic_write

GAP, STRIP = 4, 15  # pixels between the pictures of a sheet, and of the strip that holds their labels
PAPER, INK = (24, 24, 28), (225, 225, 225)


def contact_sheet(
    frames: np.ndarray,
    rows: int,
    columns: int,
    path: str | Path,
    labels: Sequence[str] | None = None,
    scale: int = 2,
) -> None:
    """Write a PNG of frames side by side.

    Args:
        frames: uint8 [n, height, width, 3], row by row; n <= rows * columns, and the rest stays empty.
        labels: n short texts, each above its frame.
        scale: edge of the square each pixel becomes.
    """
    if len(frames) > rows * columns or not len(frames):
        raise ValueError(f"frames must be 1 to {rows} x {columns}, got {len(frames)}")
    if labels is not None and len(labels) != len(frames):
        raise ValueError(f"labels must be one for each of {len(frames)} frames, got {len(labels)}")
    height, width = (side * scale for side in frames.shape[1:3])
    strip = STRIP if labels is not None else 0
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + strip + GAP) + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(STRIP - 4)
    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        x, y = GAP + column * (width + GAP), GAP + row * (height + strip + GAP)
        if labels is not None:
            draw.text((x, y), labels[i], INK, font)
        sheet.paste(Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1)), (x, y + strip))
    with atomic_write(path, "contact sheet") as part:
        sheet.save(part, "PNG")
