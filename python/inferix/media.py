"""Pictures of a world: H.264 video written while it is made, and contact sheets.

A video is written under a temporary name in fragments, each a second or so long, and becomes a plain MP4 under its own
name when it is closed, also by Ctrl-C. If the process is killed, the temporary file plays up to its last fragment.
After an error it is closed and keeps the temporary name: what was there before stays what it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType

import av
import av.filter
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

QUALITY = "16"  # x264's constant rate factor: at 4-fold scale pixels keep their colour to about 40 dB
GAP, STRIP = 4, 15  # pixels between the pictures of a sheet, and of the strip that holds their labels
PAPER, INK = (24, 24, 28), (225, 225, 225)


def partial_path(path: Path) -> Path:
    """Where a video is while it is made."""
    return path.with_name(f".{path.name}.part")


def require_writable(path: str | Path, name: str) -> None:
    """Raise ValueError, naming the argument, unless a file can be written at `path`. Leaves nothing behind."""
    path = Path(path)
    try:
        existed = path.exists()
        with path.open("ab"):
            pass
    except OSError as error:
        raise ValueError(f"{name}: cannot write {str(path)!r}: {error.strerror}") from None
    if not existed:
        path.unlink()


class VideoWriter:
    """An MP4 under way; a context manager.

    Args:
        path: must end in .mp4; replaced, if it exists, when the video is closed.
        fps: frames per second.
        size: pixels (height, width) of the frames to come.
        scale: edge of the square each pixel becomes, so that pixels stay crisp.

    Raises:
        ValueError: --out can not be written, or the scaled size is odd (which yuv420p has no way to hold).
    """

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int], scale: int = 4):
        self.path, self.size, self.scale, self.frames = Path(path), tuple(size), scale, 0
        height, width = size
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"--out must end in .mp4, got {str(path)!r}")
        if scale < 1 or height * scale % 2 or width * scale % 2:
            raise ValueError(f"--scale must make {height} x {width} pixels an even height and width, got {scale}")
        self.partial = partial_path(self.path)
        require_writable(self.path, "--out")  # PyAV opens its file with the first packet, too late
        # A packet is on disk as soon as it is encoded. Hybrid: fragments while writing, one index once it is closed, so
        # that players can seek; FFmpeg 7.1 brought it, hence av >= 14.
        options = {"movflags": "hybrid_fragmented", "flush_packets": "1"}
        self._container = av.open(str(self.partial), "w", format="mp4", options=options)
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        self._stream.width, self._stream.height = width * scale, height * scale
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": QUALITY, "preset": "veryfast"}
        self._stream.codec_context.gop_size = max(1, round(fps))
        self._stream.codec_context.thread_count = 1  # ample for live speed; the other cores belong to the world
        self._open = True

    def write(self, frames: np.ndarray) -> None:
        """Append frames uint8 [n, height, width, 3]."""
        if frames.ndim != 4 or frames.shape[1:] != (*self.size, 3) or frames.dtype != np.uint8:
            height, width = self.size
            raise ValueError(f"frames must be uint8 [n, {height}, {width}, 3], got {frames.dtype} {list(frames.shape)}")
        try:
            for frame in frames:
                large = np.ascontiguousarray(frame.repeat(self.scale, 0).repeat(self.scale, 1))
                self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(large, format="rgb24")))
                self.frames += 1
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self, whole: bool = True) -> None:
        """Finish the video under its own name or, if it is not `whole`, its temporary one; without a frame, leave
        nothing."""
        if not self._open:
            return
        self._open = False
        try:
            if self.frames:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if self.frames and whole:
                self.partial.replace(self.path)
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            if whole or not self.frames:
                self.partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(whole=kind is None or issubclass(kind, KeyboardInterrupt))

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(f"--out: cannot write {str(self.path)!r}: {error.strerror}")


class LatentWriter:
    """A NumPy array file under way, [frames, ...] float32; a context manager. For models without a decoder.

    It is written under a temporary name, at its full size from the start, and mapped: what is kept in memory does not
    grow with it. If it is closed early, it becomes as short as what was written.

    Args:
        path: replaced, if it exists, when the file is closed; .npy takes the place of any other ending.
        frames: to come.
        shape: of one frame.
    """

    def __init__(self, path: str | Path, frames: int, shape: tuple[int, ...]):
        self.path, self.frames = Path(path).with_suffix(".npy"), 0
        require_writable(self.path, "--out")
        self.partial = partial_path(self.path)
        try:
            self._array = np.lib.format.open_memmap(self.partial, "w+", np.float32, (frames, *shape))
        except OSError as error:
            self.partial.unlink(missing_ok=True)
            raise ValueError(f"--out: cannot write {str(self.path)!r}: {error.strerror}") from None

    def write(self, frames: np.ndarray) -> None:
        """Append frames [n, ...]."""
        self._array[self.frames : self.frames + len(frames)] = frames
        self.frames += len(frames)

    def close(self, whole: bool = True) -> None:
        """Finish the file under its own name or, if it is not `whole`, its temporary one; without a frame, leave
        nothing. It holds the frames that were written."""
        self._array.flush()
        shape, start = self._array.shape, self._array.offset
        size = start + self.frames * self._array[0].nbytes
        del self._array
        if not self.frames:
            self.partial.unlink()
            return
        with self.partial.open("rb+") as file:
            header, (before, now) = file.read(start), (str(s).encode() for s in (shape, (self.frames, *shape[1:])))
            file.seek(0)
            file.write(header.replace(before, now.ljust(len(before))))
            file.truncate(size)
        if whole:
            self.partial.replace(self.path)

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(whole=kind is None or issubclass(kind, KeyboardInterrupt))


def read_video(path: Path, size: tuple[int, int], fps: int, most: int) -> np.ndarray:
    """The first frames of a video file, at most so many, as uint8 [n, height, width, 3]; FFmpeg's filters bring them to
    this rate and size."""
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            graph, stream = av.filter.Graph(), container.streams.video[0]
            wanted = (("fps", str(fps)), ("scale", f"{size[1]}:{size[0]}"), ("format", "rgb24"), ("buffersink", None))
            graph.link_nodes(graph.add_buffer(template=stream), *(graph.add(*each) for each in wanted)).configure()
            for frame in chain(container.decode(stream), [None]):
                graph.push(frame)
                with contextlib.suppress(BlockingIOError, EOFError):
                    while len(frames) < most:
                        picture = graph.pull()
                        assert isinstance(picture, av.VideoFrame)
                        frames.append(picture.to_ndarray(format="rgb24"))
                if len(frames) == most:
                    break
    except (OSError, IndexError, av.FFmpegError) as error:
        raise ValueError(f"--video: cannot read {str(path)!r} ({error})") from None
    if not frames:
        raise ValueError(f"--video: {str(path)!r} holds no frames")
    return np.stack(frames)


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture file as uint8 [1, height, width, 3]: turned as it says, scaled to cover `size`, then cut about its
    middle."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            picture = ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.LANCZOS)
    except OSError as error:
        raise ValueError(f"--image: cannot read {str(path)!r} ({error})") from None
    return np.asarray(picture)[None]


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
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise ValueError(f"contact sheet: cannot write {str(path)!r}: {error.strerror}") from None
