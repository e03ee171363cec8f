"""Pictures of a world: H.264 video written while it is made, latents, and contact sheets.

A video is written under a temporary name in fragments, each a second or so long, and becomes a plain MP4 under its own
name when it is closed, also by Ctrl-C. If the process is killed, the temporary file plays up to its last fragment.
After an error it is closed and keeps the temporary name: what was there before stays what it was. While it is written
the temporary file is locked: a second writer of the same video is refused.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inferix_kernels.files import atomic_write, open_locked, require_space, require_writable, unwritable, write_all

from .pictures import read_picture as read_picture
from .pictures import read_video as read_video

QUALITY = "16"  # x264's constant rate factor: at 4-fold scale pixels keep their colour to about 40 dB
# What our H.264 says of its colours, and what `in_bt709` makes: matrix, primaries, transfer and limited range.
BT709 = {"color_primaries": "bt709", "color_trc": "bt709", "colorspace": "bt709", "color_range": "tv"}
MOST_SIDE, MOST_PIXELS = 16384, 139_264 * 16 * 16  # of a video: what x264 takes, and H.264's highest level
LEAST_BYTES = 1 << 16  # free on the disk, or no video is begun
HEADER_BYTES = 246  # of a .npy file, so that the numbers begin at 256
GAP, STRIP = 4, 15  # pixels between the pictures of a sheet, and of the strip that holds their labels
PAPER, INK = (24, 24, 28), (225, 225, 225)


def partial_path(path: Path) -> Path:
    """Where a video is while it is made; `path` is no link."""
    return path.with_name(f".{path.name}.part")


def in_bt709(picture: np.ndarray) -> av.VideoFrame:
    """A picture uint8 [height, width, 3], even sides, as the yuv420p that `BT709` describes."""
    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return image.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")


class OutputFile:
    """A file for PyAV to write to (`av.open(OutputFile(...), "w", ...)`) through which no error reaches libavformat.

    PyAV's next `mux` would write a header again that could not be written, over state that libavformat has freed by
    then: a segmentation fault. So this takes all it is given; the first failure is kept as `error`, after which nothing
    is written any more: the file keeps what it had. Who writes must look at `error`.

    Args:
        path: emptied if it exists, and locked until it is closed.
        argument, target: of the caller, that errors name: `path` is a temporary name of `target`.

    Raises:
        ValueError: the file can not be opened, or is being written by someone else.
    """

    def __init__(self, path: str | Path, argument: str, target: str | Path | None = None):
        self.error: Exception | None = None
        self._file, self._position = open_locked(path, argument, target), 0
        self._file.truncate(0)

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.seek(self._position)
                write_all(self._file, data)
            except Exception as error:  # the file system's, or ours: none may reach the C code that calls this
                self.error = error
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """From the beginning or from here: libavformat never counts from the end of what it writes."""
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def sync(self) -> None:
        """Wait until it is on the disk, which may be found full only now."""
        if self.error is None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self.error = error

    @property
    def closed(self) -> bool:
        """PyAV writes no trailer to a closed file."""
        return self._file.closed

    def close(self) -> None:
        """Close and unlock the file; what is written after this is dropped."""
        self._file.close()


class VideoWriter:
    """An MP4 under way; a context manager.

    Attributes:
        frames: that were given.
        partial: where the video is while it is made; what it holds after an error is counted in `kept`.

    Args:
        path: must end in .mp4; replaced, if it exists, when the video is closed.
        fps: frames per second.
        size: pixels (height, width) of the frames to come.
        scale: edge of the square each pixel becomes, so that pixels stay crisp.

    Raises:
        ValueError: --out can not be written, or is being written by another run, or the scaled size is odd (which
            yuv420p has no way to hold) or more than H.264 can hold.
    """

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int], scale: int = 4):
        self.path, self.size, self.scale, self.frames, self.kept = Path(path), tuple(size), scale, 0, 0
        height, width = size
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"--out must end in .mp4, got {str(path)!r}")
        if scale < 1 or height * scale % 2 or width * scale % 2:
            raise ValueError(f"--scale must make {height} x {width} pixels an even height and width, got {scale}")
        if max(height, width) * scale > MOST_SIDE or height * width * scale**2 > MOST_PIXELS:
            most = f"at most {MOST_SIDE:,} a side and {MOST_PIXELS:,} in all"
            raise ValueError(f"--scale must make {height} x {width} pixels {most}, got {scale}")
        self._target = require_writable(self.path, "--out")
        self.partial = partial_path(self._target)
        require_writable(self.partial, "--out")
        require_space(self.path, LEAST_BYTES, "--out")
        self._file = OutputFile(self.partial, "--out", self.path)
        try:
            self._begin(fps)
        except BaseException:  # no such encoder, say
            self.partial.unlink(missing_ok=True)
            self._file.close()
            raise
        self._packets, self._open = 0, True

    def _begin(self, fps: float) -> None:
        # A packet is on disk as soon as it is encoded. Hybrid: fragments while writing, one index once it is closed, so
        # that players can seek; FFmpeg 7.1 brought it, hence av >= 14.
        options = {"movflags": "hybrid_fragmented", "flush_packets": "1"}
        self._container: Any = av.open(self._file, "w", format="mp4", options=options)
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        self._stream.height, self._stream.width = (side * self.scale for side in self.size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": QUALITY, "preset": "veryfast", **BT709}
        self._stream.codec_context.gop_size = max(1, round(fps))
        self._stream.codec_context.thread_count = 1  # ample for live speed; the other cores belong to the world

    def write(self, frames: np.ndarray) -> None:
        """Append frames uint8 [n, height, width, 3].

        Raises:
            ValueError: they are of another shape, or the file can not be written any more; `close` keeps what is whole.
        """
        if frames.ndim != 4 or frames.shape[1:] != (*self.size, 3) or frames.dtype != np.uint8:
            height, width = self.size
            raise ValueError(f"frames must be uint8 [n, {height}, {width}, 3], got {frames.dtype} {list(frames.shape)}")
        for frame in frames:
            self._check()
            image = in_bt709(frame.repeat(self.scale, 0).repeat(self.scale, 1))
            with _uninterrupted():
                self._mux(image)
                self.frames += 1
        self._check()

    def close(self, whole: bool = True) -> None:
        """Finish the video under its own name or, if it is not `whole`, its temporary one; without a frame, leave
        nothing.

        Raises:
            ValueError: it could not be written; the temporary file has the first `kept` frames, or is gone if there
                are none.
        """
        if not self._open:
            return
        self._open, known = False, self._file.error
        with _uninterrupted():
            if self.frames and known is None:
                self._mux(None)
            if self._file.error is not None or not self._packets:
                self._file.close()  # no trailer then: libavformat dies of one to a hybrid file without a packet
            self._container.close()
            if self._file.error is None and self._packets:
                self._file.sync()
            self._rename(whole)
            self._file.close()
        if known is None:  # and else it has been raised before
            self._check()

    def _rename(self, whole: bool) -> None:
        """The temporary file to where it belongs."""
        try:
            if self.frames and whole and self._file.error is None:
                self.partial.replace(self._target)
                return
        except OSError as error:
            self._file.error = error
        if self._file.error is not None:
            _cut_to_whole_fragments(self.partial)
        self.kept = _frames_in(self.partial) if self.frames else 0
        if not self.kept:
            self.partial.unlink(missing_ok=True)

    def _mux(self, image: av.VideoFrame | None) -> None:
        """Encode a picture, or what the encoder still holds."""
        for packet in self._stream.encode(image):
            self._container.mux(packet)
            self._packets += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(whole=kind is None or issubclass(kind, KeyboardInterrupt))

    def _check(self) -> None:
        if self._file.error is not None:
            raise unwritable(self.path, self._file.error, "--out") from None


class LatentWriter:
    """A NumPy array file under way, [frames, ...] float32; a context manager. For models without a decoder.

    It is written under a temporary name, and holds at any time what was written so far, whole frames. Like a
    VideoWriter's, that file is locked while it is written, and kept after an error.

    Args:
        path: replaced, if it exists, when the file is closed; .npy takes the place of any other ending.
        frames: to come; there must be room for them.
        shape: of one frame.

    Raises:
        ValueError: --out can not be written, has no room, or is being written by another run.
    """

    def __init__(self, path: str | Path, frames: int, shape: tuple[int, ...]):
        self.path, self.shape, self.frames, self.kept = Path(path).with_suffix(".npy"), tuple(shape), 0, 0
        self._target = require_writable(self.path, "--out")
        self.partial = partial_path(self._target)
        require_writable(self.partial, "--out")
        self._frame_bytes = 4 * int(np.prod(shape))
        require_space(self.path, frames * self._frame_bytes, "--out")
        self._file, self._open = open_locked(self.partial, "--out", self.path), True
        try:
            self._file.truncate(0)
            self._write_header()
        except BaseException as error:
            self.partial.unlink(missing_ok=True)
            self._file.close()
            if isinstance(error, OSError):
                raise unwritable(self.path, error, "--out") from None
            raise

    def write(self, frames: np.ndarray) -> None:
        """Append frames [n, ...]; errors are those of VideoWriter.write."""
        if frames.shape[1:] != self.shape:
            raise ValueError(f"frames must be [n, {', '.join(map(str, self.shape))}], got {list(frames.shape)}")
        try:
            with _uninterrupted():
                self._file.seek(self._start + self.frames * self._frame_bytes)
                write_all(self._file, np.ascontiguousarray(frames, np.float32).tobytes())
                self.frames += len(frames)
                self._write_header()
        except OSError as error:
            raise unwritable(self.path, error, "--out") from None

    def close(self, whole: bool = True) -> None:
        """Finish the file under its own name or, if it is not `whole`, its temporary one; without a frame, leave
        nothing. It holds the frames that were written."""
        if not self._open:
            return
        self._open = False
        try:
            with _uninterrupted():
                if not self.frames:
                    self.partial.unlink(missing_ok=True)
                    return
                self.kept = self.frames  # until it has its own name
                self._file.truncate(self._start + self.frames * self._frame_bytes)
                os.fsync(self._file.fileno())
                if whole:
                    self.partial.replace(self._target)
                    self.kept = 0
        except OSError as error:
            raise unwritable(self.path, error, "--out") from None
        finally:
            self._file.close()

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(whole=kind is None or issubclass(kind, KeyboardInterrupt))

    def _write_header(self) -> None:
        """Of as many frames as there are; it has the same length whatever their number."""
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {(self.frames, *self.shape)}, }}"
        self._start = 10 + HEADER_BYTES
        text = header.ljust(HEADER_BYTES - 1).encode() + b"\n"
        self._file.seek(0)
        write_all(self._file, np.lib.format.magic(1, 0) + HEADER_BYTES.to_bytes(2, "little") + text)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end of the block. Within, libavformat calls Python, out of which no exception could come
    without leaving a hole in the file."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    asked: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *said: asked.append(said))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if asked:
        previous(*asked[0])


def _cut_to_whole_fragments(path: Path) -> None:
    """Cut off what is half written at the end of an MP4, which is boxes of (size, name, contents) one after another; a
    fragment is the box "moof" and the one that follows."""
    with path.open("rb+") as file:
        end, at, whole = file.seek(0, os.SEEK_END), 0, 0
        while at + 16 <= end:
            file.seek(at)
            size, name, long = (int.from_bytes(file.read(4), "big"), file.read(4), int.from_bytes(file.read(8), "big"))
            at += long if size == 1 else size
            if size == 0 or at > end:
                break
            whole = whole if name == b"moof" else at
        file.truncate(whole)


def _frames_in(path: Path) -> int:
    """Frames of a video; none if it is no video."""
    try:
        with av.open(str(path)) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0))
    except (OSError, IndexError, av.FFmpegError):
        return 0


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
