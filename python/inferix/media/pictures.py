"""What a video begins with: picture and video files as they are meant to be seen.

What a file says of its own pixels is followed: which way is up, how wide a pixel is, how many bits a number has, what
is transparent (it lies on white), and in which colours the numbers are meant. The result is sRGB, or BT.709 as video
has it. What covers another shape than it is to have is cut about its middle.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
from PIL import Image, ImageCms, ImageOps

MOST_PIXELS = 178_956_970  # of a picture; Pillow, too, takes what is larger for an attempt to exhaust memory
MOST_CLIP_BYTES = 4 << 30  # of the pictures of a clip, which are in memory at once
PROFILES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of an ICC profile -> Pillow's mode
GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I")
HDR = {16: "PQ", 18: "HLG"}  # transfers whose numbers are not brightness as sRGB has it
HD_ROWS = 720  # of a video that does not say its colours: from here on players take BT.709, below BT.601


def read_picture(path: str | Path, size: tuple[int, int], argument: str = "path") -> np.ndarray:
    """A picture file, or the first picture of one that holds several.

    Args:
        size: pixels (height, width) that it is scaled to cover.
        argument: of the caller, that errors name for `path`.

    Returns:
        uint8 [1, height, width, 3]: sRGB, turned as it says; what is transparent lies on white.

    Raises:
        ValueError: it can not be read, has too many pixels, or numbers whose range it does not say.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd about a file: it is taken, or refused below
            with Image.open(path) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise Image.DecompressionBombError
                picture = ImageOps.fit(_in_srgb(image), (size[1], size[0]), Image.Resampling.LANCZOS)
    except Image.DecompressionBombError:
        raise ValueError(f"{argument} must have at most {MOST_PIXELS:,} pixels, {str(path)!r} has more") from None
    except Exception as error:  # what a damaged picture raises is anyone's guess
        raise ValueError(f"{argument}: cannot read {str(path)!r} ({first_line(error)})") from None
    return np.asarray(picture)[None]


def _in_srgb(image: Image.Image) -> Image.Image:
    """As it is to be seen: upright, without transparency, mode RGB."""
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        numbers = np.asarray(image)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError("its numbers have more than 16 bits and an unknown range")
        image = Image.fromarray(((numbers.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its numbers are floating-point, of an unknown range: it must have 8 or 16 bits")
    colours = image.convert("L" if image.mode in GREY else "CMYK" if image.mode == "CMYK" else "RGB")
    colours = _managed(colours, profile) if profile else colours.convert("RGB")
    if alpha is None:
        return colours
    return Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)


def _managed(image: Image.Image, profile: bytes) -> Image.Image:
    """From the colours of an ICC profile to sRGB."""
    theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = PROFILES.get(theirs.profile.xcolor_space)
    if mode is None or ("CMYK" in (mode, image.mode) and mode != image.mode) or (mode, image.mode) == ("L", "RGB"):
        raise ValueError(f"its colour profile is for {theirs.profile.xcolor_space.strip()}, not {image.mode}")
    srgb = ImageCms.createProfile("sRGB")
    managed = ImageCms.profileToProfile(image.convert(mode), theirs, srgb, outputMode="RGB")
    assert managed is not None  # it is, only if done in place
    return managed


def read_video(path: str | Path, size: tuple[int, int], fps: int, most: int, argument: str = "path") -> np.ndarray:
    """The first pictures of a video file, at this rate.

    Args:
        size: pixels (height, width) that each is scaled to cover.
        most: pictures.
        argument: of the caller, that errors name for `path`.

    Returns:
        uint8 [n, height, width, 3], turned as the file says, pixels made square.

    Raises:
        ValueError: it can not be read, holds no pictures or too large ones, or is HDR.
    """
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            decoded = container.decode(stream)
            first = next(decoded, None)
            if first is None:
                raise ValueError("it holds no frames")
            check_frame(first)
            turn, turned = _turn(first)
            graph = _graph(stream, first, size[::-1] if turned else size, fps)
            for frame in _filtered(graph, chain([first], decoded)):
                frames.append(np.ascontiguousarray(turn(frame.to_ndarray(format="rgb24"))))
                if len(frames) * frames[0].nbytes > MOST_CLIP_BYTES:
                    raise ValueError(f"its first {len(frames) / fps:.0f} s are more than {MOST_CLIP_BYTES >> 30} GiB")
                if len(frames) == most:
                    break
    except (OSError, IndexError, ValueError, MemoryError, av.FFmpegError) as error:
        raise ValueError(f"{argument}: cannot read {str(path)!r} ({first_line(error)})") from None
    return np.stack(frames)


def check_frame(frame: av.VideoFrame) -> None:
    """Raise ValueError if its numbers are not brightness as sRGB has it, or there are too many of them."""
    if frame.width * frame.height > MOST_PIXELS:
        raise ValueError(f"its pictures have more than {MOST_PIXELS:,} pixels")
    if frame.color_trc in HDR:
        raise ValueError(f"it is HDR ({HDR[frame.color_trc]}): it must be converted to BT.709")


def _turn(frame: av.VideoFrame) -> tuple[Callable[[np.ndarray], np.ndarray], bool]:
    """What its display matrix does to a picture [height, width, 3], and whether rows become columns.

    The matrix sends a point (x, y) to (a x + c y, b x + d y), in 65536ths.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d, *_ = (1, 0, 0, 0, 1) if matrix is None else struct.unpack("=9i", bytes(matrix)[:36])
    if bool(a) != bool(d) or bool(b) != bool(c) or bool(a) == bool(b):
        raise ValueError("it is turned by an angle that is no multiple of 90 degrees")
    turned, across, down = bool(b), c if b else a, b or d

    def turn(picture: np.ndarray) -> np.ndarray:
        upright = picture.swapaxes(0, 1) if turned else picture
        return upright[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1]

    return turn, turned


def _graph(stream: Any, frame: av.VideoFrame, size: tuple[int, int], fps: int) -> av.filter.Graph:
    """Brings pictures to this rate and size: pixels square, covering it, cut about the middle."""
    height, width = size
    shape = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1
    wide = frame.width * float(shape if shape > 0 else 1)
    larger = max(width / wide, height / frame.height)
    covering = max(width, round(wide * larger)), max(height, round(frame.height * larger))
    scale = f"{covering[0]}:{covering[1]}:flags=lanczos+accurate_rnd+full_chroma_int+full_chroma_inp"
    if frame.format.is_rgb is False and frame.colorspace == 2:  # it does not say
        scale += f":in_color_matrix={'bt709' if frame.height >= HD_ROWS else 'bt601'}"
    graph = av.filter.Graph()
    wanted = (("fps", str(fps)), ("scale", scale), ("format", "rgb24"), ("crop", f"{width}:{height}"))
    graph.link_nodes(
        graph.add_buffer(template=stream), *(graph.add(*each) for each in wanted), graph.add("buffersink")
    ).configure()
    return graph


def _filtered(graph: av.filter.Graph, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    for frame in chain(frames, [None]):
        graph.push(frame)
        with contextlib.suppress(BlockingIOError, EOFError):
            while True:
                picture = graph.pull()
                assert isinstance(picture, av.VideoFrame)
                yield picture


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
