"""H.264 video written while it is made.

It is written under a temporary name in fragments, each a second or so long, and becomes a plain MP4 under its own name
when it is closed, also by Ctrl-C. If the process is killed, the temporary file plays up to its last fragment.
"""

from __future__ import annotations

import contextlib
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np

from inferix_kernels.files import require_space, require_writable, unwritable

from .output_file import OutputFile, delayed_interrupts, partial_path

QUALITY = "16"  # x264's constant rate factor: at 4-fold scale pixels keep their colour to about 40 dB
# What our H.264 says of its colours, and what `in_bt709` makes: matrix, primaries, transfer and limited range.
BT709 = {"color_primaries": "bt709", "color_trc": "bt709", "colorspace": "bt709", "color_range": "tv"}
MOST_SIDE, MOST_PIXELS = 16384, 139_264 * 16 * 16  # of a video: what x264 takes, and H.264's highest level
LEAST_BYTES = 1 << 16  # free on the disk, or no video is begun


def in_bt709(picture: np.ndarray) -> av.VideoFrame:
    """A picture uint8 [height, width, 3], even sides, as the yuv420p that `BT709` describes."""
    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return image.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")


class VideoWriter:
    """An MP4 in the making; a context manager.

    Attributes:
        frames: that were given.
        partial: where the video is while it is made; what it holds after an error is counted in `kept`.

    Args:
        path: must end in .mp4; replaced, if it exists, when the video is closed.
        fps: frames per second.
        size: pixels (height, width) of the frames to come.
        scale: edge of the square each pixel becomes, so that pixels stay crisp.
        argument: of the caller, that errors name for `path`.

    Raises:
        ValueError: the file can not be written, or is being written by another run, or the scaled size is odd (which
            yuv420p has no way to hold) or more than H.264 can hold.
    """

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int], scale: int = 4, argument: str = "path"):
        self.path, self.size, self.scale, self.frames, self.kept = Path(path), tuple(size), scale, 0, 0
        self._argument = argument
        height, width = size
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"{argument} must end in .mp4, got {str(path)!r}")
        if scale < 1 or height * scale % 2 or width * scale % 2:
            raise ValueError(f"scale must make {height} x {width} pixels an even height and width, got {scale}")
        if max(height, width) * scale > MOST_SIDE or height * width * scale**2 > MOST_PIXELS:
            most = f"at most {MOST_SIDE:,} a side and {MOST_PIXELS:,} in all"
            raise ValueError(f"scale must make {height} x {width} pixels {most}, got {scale}")
        self._target = require_writable(self.path, argument)
        self.partial = partial_path(self._target)
        require_writable(self.partial, argument)
        require_space(self.path, LEAST_BYTES, argument)
        self._file = OutputFile(self.partial, argument, self.path)
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
        # No B pictures: with them x264 codes the same pictures otherwise from one run to the next, by what lies in
        # memory beside them (its macroblock tree, in assembly), and a resumed file is to have the bits of a whole one.
        # They would save a tenth of the bytes.
        self._stream.options = {"crf": QUALITY, "preset": "veryfast", "bf": "0", **BT709}
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
            with delayed_interrupts():
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
        with delayed_interrupts(), contextlib.closing(self._file):  # unlocked, whatever happens
            if self.frames and known is None:
                self._mux(None)
            if self._file.error is not None or not self._packets:
                self._file.close()  # no trailer then: libavformat dies of one to a hybrid file without a packet
            self._container.close()
            if self._file.error is None and self._packets:
                self._file.sync()
            self._rename(whole)
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
            raise unwritable(self.path, self._file.error, self._argument) from None


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
