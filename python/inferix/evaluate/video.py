"""A video's chunks, decoded one after the other: what is in memory at a time does not grow with its length.

A video is read twice at least. Its packets alone say how many frames there are and when they are shown, which has to be
known before the first chunk can be cut; then frames are decoded, and those that nobody looks at are not even converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np

from ..media.pictures import check_frame, first_line

CHUNKS = 10  # as VDE is published
FRAMES = 12  # of a chunk that are looked at, unless all are
MOST_CHUNK_BYTES = 4 << 30  # of the frames of a chunk, which are in memory at once
Size = tuple[int, int]  # height, width
# How FFmpeg converts (libswscale/swscale.h). Without EXACT it rounds down, and takes every other chroma value.
BICUBIC, AREA = 0x4, 0x20
EXACT = 0x2000 | 0x4000 | 0x40000  # FULL_CHR_H_INT, FULL_CHR_H_INP, ACCURATE_RND
UNREADABLE = (OSError, ValueError, MemoryError, av.FFmpegError)


@dataclass(frozen=True)
class Video:
    """A video file, as far as its packets tell.

    Attributes:
        path: of the file.
        frames: how many.
        fps: of them in a second, evenly.
        size: pixels (height, width).
    """

    path: Path
    frames: int
    fps: float
    size: Size


@dataclass(frozen=True)
class Chunk:
    """One of the equal parts of a video.

    Attributes:
        number: from 0.
        start, stop: its frames within the video, all of them.
        first: the frame within the video that `frames` begins with.
        frames: uint8 [T, H, W, 3] RGB, consecutive: from the middle of the chunk, if not all of it.
        small: every frame of the chunk, by the (height, width) asked for: uint8 [stop - start, height, width, 3].
    """

    number: int
    start: int
    stop: int
    first: int
    frames: np.ndarray
    small: dict[Size, np.ndarray]


def open_video(path: str | Path, argument: str = "videos") -> Video:
    """What the packets of a video file say of it; nothing is decoded.

    Args:
        argument: of the caller, that errors name for `path`.

    Raises:
        ValueError: it can not be read, ends before the frames that it announces, or frames do not come evenly.

    Example:
        >>> video = open_video("clip.mp4")
        >>> video.frames, video.fps, video.size
        (64, 16.0, (32, 48))
    """
    with _reading(path, argument), av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        stream = container.streams.video[0]
        times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if not times:
            raise ValueError("it holds no frames")
        if len(times) < stream.frames:
            raise ValueError(f"it is truncated: it announces {stream.frames} frames and has {len(times)}")
        tick = float(stream.time_base or 0)
        shown = [time for time in times if time is not None]
        if len(shown) == len(times):  # some containers do not say when a frame is shown
            _check_even(np.sort(np.asarray(shown, np.float64)) * tick, tick)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        return Video(Path(path), len(times), fps, (stream.height, stream.width))


def chunks(
    video: Video, number: int = CHUNKS, most: int | None = FRAMES, sizes: Sequence[Size] = (), argument: str = "videos"
) -> Iterator[Chunk]:
    """Decode a video's chunks: as many frames each as make them equal; what is left over at its end is not decoded.

    Args:
        number: of chunks.
        most: consecutive frames of each that are handed over, those in its middle; None: all.
        sizes: (height, width) in which every frame is wanted as well.
        argument: of the caller, that errors name for the video.

    Raises:
        ValueError: fewer frames than chunks; more of a chunk than fits in memory; or a frame that can not be decoded.

    Example:
        >>> [chunk.frames.shape for chunk in chunks(open_video("clip.mp4"), 2)]
        [(12, 32, 48, 3), (12, 32, 48, 3)]
    """
    length = video.frames // number
    if not length:
        raise ValueError(
            f"{argument}: {str(video.path)!r} is too short: {number} chunks need at least {number} frames, "
            f"it has {video.frames}"
        )
    taken = length if most is None else min(most, length)
    nbytes = taken * 3 * video.size[0] * video.size[1]
    if nbytes > MOST_CHUNK_BYTES:
        raise ValueError(
            f"{argument}: {taken} frames of {str(video.path)!r} at once would take {nbytes / 2**30:.1f} GiB, "
            f"more than {MOST_CHUNK_BYTES >> 30}: take more `chunks`, or not `all` of their frames"
        )
    skipped = (length - taken) // 2
    with _reading(video.path, argument):
        decoded = _decoded(video)
        for i in range(number):
            frames = np.empty((taken, *video.size, 3), np.uint8)
            small = {size: np.empty((length, *size, 3), np.uint8) for size in sizes}
            for j, frame in enumerate(islice(decoded, length)):
                if skipped <= j < skipped + taken:
                    frames[j - skipped] = _rgb(frame, video.size, BICUBIC)
                for size, shrunk in small.items():
                    shrunk[j] = _rgb(frame, size, AREA)
            yield Chunk(i, i * length, (i + 1) * length, i * length + skipped, frames, small)


def beginning(video: Video, count: int, argument: str = "videos") -> Iterator[np.ndarray]:
    """The first frames of a video, in parts of at most FRAMES, which are as long as each other or a frame shorter.

    Args:
        count: of frames; all, if there are fewer.
        argument: of the caller, that errors name for the video.

    Returns:
        uint8 [T, H, W, 3] RGB each.

    Raises:
        ValueError: a frame can not be decoded.

    Example:
        >>> [len(part) for part in beginning(open_video("clip.mp4"), 32)]
        [11, 11, 10]
    """
    count = min(count, video.frames)
    parts = -(-count // FRAMES)
    with _reading(video.path, argument):
        decoded = _decoded(video)
        for i in range(parts):
            length = -(-(count - i) // parts)
            yield np.stack([_rgb(frame, video.size, BICUBIC) for frame in islice(decoded, length)])


@contextmanager
def _reading(path: str | Path, argument: str) -> Iterator[None]:
    """Whatever goes wrong becomes a ValueError of one line."""
    try:
        yield
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"{argument}: cannot read {str(path)!r} ({reason})") from None


def _decoded(video: Video) -> Iterator[av.VideoFrame]:
    """Its frames, one after the other, each of them whole and of the video's size."""
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        decoded = container.decode(stream)
        for i in range(video.frames):
            frame = next(decoded, None)
            if frame is None:
                raise ValueError(f"it is damaged: {i} of {video.frames} frames can be decoded")
            _check(frame, video, i)
            yield frame


def _rgb(frame: av.VideoFrame, size: Size, scaling: int) -> np.ndarray:
    """uint8 [height, width, 3]. As the file says its colours are; if it does not, they are taken for BT.601."""
    made = frame.reformat(width=size[1], height=size[0], format="rgb24", interpolation=scaling | EXACT)
    return np.asarray(made.to_ndarray())


def _check(frame: av.VideoFrame, video: Video, at: int) -> None:
    if frame.is_corrupt:
        raise ValueError(f"it is damaged: frame {at} is not whole")
    if (frame.height, frame.width) != video.size:
        raise ValueError(f"its pictures change from {video.size[1]}x{video.size[0]} to {frame.width}x{frame.height}")
    check_frame(frame)


def _check_even(seconds: np.ndarray, tick: float) -> None:
    """Raise ValueError unless frames come at an even rate, as well as ticks of the container's clock can say it."""
    apart = np.diff(seconds)
    if not len(apart):
        return
    usual = float(np.median(apart))
    off = np.abs(apart - usual)
    worst = int(off.argmax())
    if off[worst] > 1.5 * tick + 0.01 * usual:
        raise ValueError(
            f"its frame rate varies: at {seconds[worst] - seconds[0]:.2f} s the next frame comes after "
            f"{1000 * apart[worst]:.1f} ms, usually after {1000 * usual:.1f} ms"
        )
