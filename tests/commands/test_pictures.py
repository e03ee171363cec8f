"""Picture and video files as they are meant to be seen: what a file says of its own pixels is followed."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from inferix.media.pictures import MOST_PIXELS, read_picture, read_video

SIZE = (32, 48)
RAMP = np.linspace(0, 1, SIZE[0] * SIZE[1]).reshape(SIZE)


def picture(path: Path, size: tuple[int, int] = SIZE) -> np.ndarray:
    (read,) = read_picture(path, size)
    assert read.shape == (*size, 3) and read.dtype == np.uint8
    return read


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (SIZE[1], SIZE[0]), colour)


@pytest.mark.parametrize("name", ["g.png", "g.tif", "g.pgm"])
def test_sixteen_bits_become_eight(tmp_path: Path, name: str) -> None:
    Image.fromarray((RAMP * 65535).round().astype(np.uint16)).save(tmp_path / name)
    read = picture(tmp_path / name)
    assert abs(read[..., 0] - RAMP * 255).max() <= 1 and (read == read[..., :1]).all()


@pytest.mark.parametrize(
    "numbers, said",
    [
        (RAMP.astype(np.float32), r"its numbers are floating-point, of an unknown range: it must have 8 or 16 bits"),
        ((RAMP * 1e6).astype(np.int32), r"its numbers have more than 16 bits and an unknown range"),
    ],
)
def test_numbers_of_unknown_range_are_refused(tmp_path: Path, numbers: np.ndarray, said: str) -> None:
    Image.fromarray(numbers).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=rf"^path: cannot read '.*x\.tif' \({said}\)$"):
        picture(tmp_path / "x.tif")


TRANSPARENT = {
    "RGBA": (flat("RGBA", (255, 0, 255, 0)), {}, 255, 255),
    "half": (flat("RGBA", (0, 0, 0, 128)), {}, 127, 127),
    "LA": (flat("LA", (0, 64)), {}, 191, 191),
    "palette": (flat("RGBA", (9, 9, 9, 0)).quantize(4), {}, 255, 255),
    "tRNS": (flat("RGB", (9, 9, 9)), {"transparency": (9, 9, 9)}, 255, 255),
    "opaque": (flat("RGBA", (9, 9, 9, 255)), {}, 9, 9),
}


@pytest.mark.parametrize("case", TRANSPARENT)
def test_what_is_transparent_lies_on_white(tmp_path: Path, case: str) -> None:
    image, options, least, most = TRANSPARENT[case]
    image.save(tmp_path / "x.png", **options)
    read = picture(tmp_path / "x.png")
    assert least <= read.min() and read.max() <= most


def test_cmyk_is_ink(tmp_path: Path) -> None:
    flat("CMYK", (0, 255, 255, 0)).save(tmp_path / "x.tif")
    assert tuple(picture(tmp_path / "x.tif")[9, 9]) == (255, 0, 0)


def swapped_profile() -> bytes:
    """sRGB with red and green primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * profile[131], 12)}
    for name, other in ((b"rXYZ", b"gXYZ"), (b"gXYZ", b"rXYZ")):
        profile[tags[name] : tags[name] + 4] = other
    return bytes(profile)


def test_a_colour_profile_is_applied(tmp_path: Path) -> None:
    for mode, colour in (("RGB", (255, 0, 0)), ("RGBA", (255, 0, 0, 255))):
        flat(mode, colour).save(tmp_path / "x.png", icc_profile=swapped_profile())
        read = picture(tmp_path / "x.png")[9, 9].astype(int)
        assert read[1] > 250 and read[0] < 60, "its red is green"
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    flat("L", 90).save(tmp_path / "grey.png", icc_profile=srgb)
    assert abs(picture(tmp_path / "grey.png").astype(int) - 90).max() <= 1


def test_a_profile_that_does_not_belong_is_refused(tmp_path: Path) -> None:
    for name, profile, said in (("a", b"no profile", "profile"), ("b", swapped_profile(), "is for RGB, not CMYK")):
        flat("CMYK", (0, 0, 0, 0)).save(tmp_path / f"{name}.tif", icc_profile=profile)
        with pytest.raises(ValueError, match=rf"^path: cannot read '.*{name}\.tif' \([^\n]*{said}[^\n]*\)$"):
            picture(tmp_path / f"{name}.tif")


def test_of_several_pictures_the_first_is_taken(tmp_path: Path) -> None:
    first, second = flat("RGB", (200, 0, 0)), flat("RGB", (0, 0, 200))
    for name in ("x.gif", "x.png", "x.tif", "x.webp"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        read = picture(tmp_path / name)[9, 9].astype(int)
        assert read[0] > 150 and read[2] < 60, name


def test_too_many_pixels_are_one_line(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "x.png")
    said = rf"^path must have at most {MOST_PIXELS:,} pixels, '.*x\.png' has more$"
    with pytest.raises(ValueError, match=said):
        picture(tmp_path / "x.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "y.png")
    picture(tmp_path / "y.png")
    assert not recwarn.list


def test_damaged_pictures_are_one_line(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    noise = Image.fromarray(chance.integers(0, 255, (*SIZE, 3), dtype=np.uint8))
    refused = 0
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "GIF"):
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        whole = np.frombuffer(buffer.getvalue(), np.uint8)
        for _ in range(20):
            bad = whole.copy()
            bad[chance.integers(0, len(bad), 8)] = chance.integers(0, 255, 8)
            (tmp_path / "x").write_bytes(bad[: chance.integers(1, len(bad) + 1)].tobytes())
            try:
                picture(tmp_path / "x")
            except ValueError as error:
                assert str(error).startswith("path") and "\n" not in str(error)
                refused += 1
    assert refused > 50


def write(path: Path, frames: np.ndarray, rate: int = 16, **settings: object) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "1"}
        if "aspect" in settings:
            stream.codec_context.sample_aspect_ratio = settings["aspect"]
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image.reformat(format="yuv420p", dst_colorspace=settings.get("matrix"))))
        container.mux(stream.encode(None))


QUARTERS = np.zeros((2, 64, 96, 3), np.uint8)  # red, green / blue, white
QUARTERS[:, :32, :48, 0] = QUARTERS[:, :32, 48:, 1] = QUARTERS[:, 32:, :48, 2] = 255
QUARTERS[:, 32:, 48:] = 255
TURNS = {  # what is done to the upright picture before it is written, and the matrix that undoes it: (a, b, c, d)
    "none": (lambda x: x, (1, 0, 0, 1)),
    "clockwise": (lambda x: np.rot90(x, 1, (1, 2)), (0, 1, -1, 0)),
    "around": (lambda x: np.rot90(x, 2, (1, 2)), (-1, 0, 0, -1)),
    "counterclockwise": (lambda x: np.rot90(x, 3, (1, 2)), (0, -1, 1, 0)),
    "mirrored": (lambda x: x[:, :, ::-1], (-1, 0, 0, 1)),
    "upside down": (lambda x: x[:, ::-1], (1, 0, 0, -1)),
    "transposed": (lambda x: x.swapaxes(1, 2), (0, 1, 1, 0)),
}


def set_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    data = bytearray(path.read_bytes())
    fixed = [round(x * 65536) for x in (a, b, 0, c, d, 0, 0, 0)]
    struct.pack_into(">9i", data, data.find(b"tkhd") + 4 + 40, *fixed, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("turn", TURNS)
def test_a_clip_is_turned_as_it_says(tmp_path: Path, turn: str) -> None:
    how, matrix = TURNS[turn]
    write(tmp_path / "x.mp4", how(QUARTERS))
    set_matrix(tmp_path / "x.mp4", *matrix)
    read = read_video(tmp_path / "x.mp4", (64, 96), 16, 2)
    assert read.shape == (2, 64, 96, 3) and read.flags.c_contiguous
    seen = [read[0, y, x].astype(int) for y in (10, 54) for x in (10, 86)]
    wanted = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert all(abs(got - np.array(want)).max() < 25 for got, want in zip(seen, wanted)), seen


def test_a_clip_that_lies_askew_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.mp4", QUARTERS)
    set_matrix(tmp_path / "x.mp4", 0.7071, 0.7071, -0.7071, 0.7071)
    with pytest.raises(ValueError, match=r"^path: cannot read '.*' \(it is turned by an angle that is no multiple"):
        read_video(tmp_path / "x.mp4", (64, 96), 16, 2)


def extent(picture: np.ndarray) -> tuple[int, int]:
    rows, columns = np.where(picture[..., 0] > 200)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def test_a_square_stays_a_square(tmp_path: Path) -> None:
    tall = np.full((2, 192, 64, 3), 60, np.uint8)
    tall[:, 80:112, 16:48] = 255
    write(tmp_path / "tall.mp4", tall)
    Image.fromarray(tall[0]).save(tmp_path / "tall.png")
    wide = np.full((2, 64, 96, 3), 60, np.uint8)
    wide[:, 16:48, 32:64] = 255
    write(tmp_path / "wide.mp4", wide, aspect=Fraction(2, 1))  # pixels twice as wide as high
    wanted = extent(picture(tmp_path / "tall.png", (64, 96)))
    height, width = extent(read_video(tmp_path / "tall.mp4", (64, 96), 16, 1)[0])
    assert abs(height - 48) <= 2 and abs(width - 48) <= 2 and wanted == (48, 48)
    height, width = extent(read_video(tmp_path / "wide.mp4", (64, 96), 16, 1)[0])
    assert abs(height - 32) <= 2 and abs(width - 64) <= 2


@pytest.mark.parametrize("size, matrix", [((64, 96), "ITU601"), ((720, 960), "ITU709")])
def test_colours_that_are_not_said_go_by_size(tmp_path: Path, size: tuple[int, int], matrix: str) -> None:
    colour = np.array((200, 40, 60))
    write(tmp_path / "x.mp4", np.full((2, *size, 3), colour, np.uint8), matrix=matrix)
    read = read_video(tmp_path / "x.mp4", (32, 48), 16, 1)[0, 16, 24].astype(int)
    assert abs(read - colour).max() <= 4


def test_a_clip_is_brought_to_the_rate_and_cut(tmp_path: Path) -> None:
    frames = np.full((24, 32, 48, 3), 0, np.uint8)
    frames[12:] = 255
    write(tmp_path / "x.mp4", frames, rate=8)
    read = read_video(tmp_path / "x.mp4", SIZE, 16, 100)
    assert len(read) == 48 and (read[:24] < 5).all() and (read[24:] > 250).all()
    assert len(read_video(tmp_path / "x.mp4", SIZE, 16, 7)) == 7


def test_files_that_are_no_clips_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("no video")
    write(tmp_path / "x.mp4", QUARTERS)
    with pytest.raises(ValueError, match=r"^path: cannot read '.*text' \([^\n]*\)$"):
        read_video(tmp_path / "text", SIZE, 16, 1)
    monkeypatch.setattr("inferix.media.pictures.MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"^path: cannot read '.*' \(its pictures have more than 1,000 pixels\)$"):
        read_video(tmp_path / "x.mp4", SIZE, 16, 1)
    monkeypatch.undo()
    monkeypatch.setattr("inferix.media.pictures.MOST_CLIP_BYTES", 1000)
    with pytest.raises(ValueError, match=r"^path: cannot read '.*' \(its first 0 s are more than"):
        read_video(tmp_path / "x.mp4", SIZE, 16, 1)
