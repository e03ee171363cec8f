"""Small videos: written frame by frame, each at a time of its own."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write(path: Path, frames: np.ndarray, times: Sequence[int] | None = None, fps: int = 16) -> Path:
    """H.264 of uint8 [T, H, W, 3]; `times` of the frames in 1/fps seconds, if they do not come evenly.

    The index is at the file's beginning: cut off at its end, the file can still be opened.
    """
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, fps)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts, picture.time_base = i if times is None else times[i], Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def counted(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Grey frames whose brightness is 4 x their number, of 256."""
    levels = np.arange(frames, dtype=np.uint8) * 4
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    """The number of each frame of `counted`."""
    return [round(float(frame.mean()) / 4) for frame in frames]
