"""Videos hold the frames that were written, also when writing ends early; bad outputs are named before any work."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from PIL import Image

from inferix.media import LatentWriter, VideoWriter, contact_sheet, output_file, read_picture
from inferix.media.contact_sheets import GAP, STRIP
from inferix.models.tiny.simulator import SIZE, Simulator, play
from inferix.stream.video import Encoder
from inferix_kernels.files import require_writable

if TYPE_CHECKING:
    from conftest import SmallDisk


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """[40, 96, 96, 3] uint8 of a room."""
    world = Simulator(1, np.random.default_rng(3))
    return play(world, [world.wander() for _ in range(40)])[0]


def decode(path: Path, scale: int) -> np.ndarray:
    """[n, h, w, 3] uint8: the middle of each enlarged pixel."""
    with av.open(str(path)) as video:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    return decoded[:, scale // 2 :: scale, scale // 2 :: scale]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def test_a_video_holds_the_frames_that_were_written(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "world.mp4"
    with VideoWriter(path, 16, (SIZE, SIZE)) as video:
        for start in range(0, 40, 3):
            video.write(frames[start : start + 3])
        assert not path.exists(), "the name appears when the video is whole"
    assert os.listdir(tmp_path) == ["world.mp4"]
    with av.open(str(path)) as opened:
        stream = opened.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (4 * SIZE, 4 * SIZE, 16)
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert opened.duration == pytest.approx(40 / 16 * 1e6)
    # 35 dB is an error of 4.5 of 255; colour averaged over squares of 2 x 2 at scale 1 would stay under 30.
    assert psnr(decode(path, 4), frames) > 35


def test_no_picture_is_coded_between_two_others(tmp_path: Path, frames: np.ndarray) -> None:
    """With B pictures x264 codes the same pictures otherwise now and then, and a resumed file would differ."""
    with VideoWriter(tmp_path / "a.mp4", 8, (SIZE, SIZE)) as video:
        video.write(frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        kinds = [av.video.frame.PictureType(frame.pict_type).name for frame in container.decode(video=0)]
    assert len(kinds) == len(frames) and set(kinds) == {"I", "P"}


def test_oblong_frames_and_scale_one(tmp_path: Path) -> None:
    y, x = np.mgrid[:32, :64]
    ramp = np.broadcast_to(np.stack([2 * x, 4 * y, x + y], -1).astype(np.uint8), (5, 32, 64, 3))
    with VideoWriter(tmp_path / "ramp.mp4", 24, (32, 64), scale=1) as video:
        video.write(ramp)
    assert psnr(decode(tmp_path / "ramp.mp4", 1), ramp) > 35


def test_an_interrupted_video_is_closed(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "cut.mp4", 16, (SIZE, SIZE)) as video:
        video.write(frames[:7])
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["cut.mp4"]
    assert psnr(decode(tmp_path / "cut.mp4", 4), frames[:7]) > 35


def test_a_failed_video_takes_no_name(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(b"earlier")
    with pytest.raises(RuntimeError), VideoWriter(path, 16, (SIZE, SIZE)) as video:
        video.write(frames[:7])
        raise RuntimeError
    assert path.read_bytes() == b"earlier" and len(decode(video.partial, 4)) == 7
    assert sorted(os.listdir(tmp_path)) == [".cut.mp4.part", "cut.mp4"]


@pytest.mark.parametrize("written", [9, 10, 100])
def test_latents_that_end_early_hold_what_was_written(tmp_path: Path, written: int) -> None:
    latents = np.random.default_rng(0).random((written, 3, 2), dtype=np.float32)
    with pytest.raises(KeyboardInterrupt), LatentWriter(tmp_path / "x.npy", 100, (3, 2)) as file:
        file.write(latents)
        raise KeyboardInterrupt
    assert np.array_equal(np.load(tmp_path / "x.npy"), latents) and os.listdir(tmp_path) == ["x.npy"]
    with pytest.raises(RuntimeError), LatentWriter(tmp_path / "x.npy", 100, (3, 2)) as file:
        file.write(latents[:5])
        raise RuntimeError
    assert np.array_equal(np.load(tmp_path / "x.npy"), latents)
    assert np.array_equal(np.load(file.partial), latents[:5])


def test_latents_that_are_too_many_are_named_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: no space left: '.*x\.npy' needs 4,000"):
        LatentWriter(tmp_path / "x.npy", 10**15, (1000,))
    assert os.listdir(tmp_path) == []


def test_an_interrupt_before_the_first_frame_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "none.mp4", 16, (SIZE, SIZE)):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_a_file_that_plays(tmp_path: Path) -> None:
    """Killed, it can close nothing: what is on disk must play by itself."""
    program = f"""
        import sys
        import numpy as np
        from inferix.media import VideoWriter
        frames = np.random.default_rng(0).integers(0, 255, (96, 96, 96, 3), dtype=np.uint8)
        video = VideoWriter({str(tmp_path / "killed.mp4")!r}, 16, (96, 96))
        video.write(frames)
        print("written", flush=True)
        sys.stdin.read()
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "written\n"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    (left,) = tmp_path.iterdir()
    assert len(decode(left, 4)) >= 48, "at most a few seconds that the encoder still held may be lost"


def test_an_earlier_video_is_kept_until_the_new_one_is_whole(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "world.mp4"
    path.write_bytes(b"earlier")
    with VideoWriter(path, 16, (SIZE, SIZE)) as video:
        video.write(frames[:3])
        assert path.read_bytes() == b"earlier"
    assert len(decode(path, 4)) == 3


@pytest.mark.parametrize("out", ["missing/world.mp4", "folder.mp4", "file/world.mp4"])
def test_an_unwritable_video_is_named_and_leaves_nothing(tmp_path: Path, out: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"path: cannot write '.*{out}': (No such|Is a|Not a)"):
        VideoWriter(tmp_path / out, 16, (SIZE, SIZE))
    assert sorted(tmp_path.rglob("*")) == before


def noise(count: int) -> np.ndarray:
    """[count, 96, 96, 3] uint8, which no encoder makes small."""
    return np.random.default_rng(0).integers(0, 255, (count, 96, 96, 3), dtype=np.uint8)


def test_a_disk_that_fills_up_leaves_what_was_whole(small_disk: SmallDisk) -> None:
    path = small_disk.folder / "v.mp4"
    path.write_bytes(b"earlier")
    with (
        pytest.raises(ValueError, match=rf"^path: no space left: '{path}'$"),
        VideoWriter(path, 16, (96, 96), scale=1) as video,
    ):
        for frame in noise(160):
            video.write(frame[None])
    assert path.read_bytes() == b"earlier"
    assert 0 < video.kept < 160 and len(decode(video.partial, 1)) == video.kept


def test_a_full_disk_is_said_before_the_first_frame(small_disk: SmallDisk) -> None:
    small_disk.fill()
    for make in (lambda out: VideoWriter(out, 16, (96, 96)), lambda out: LatentWriter(out, 9, (3, 2))):
        with pytest.raises(ValueError, match=r"^path: no space left: '.*v\.(mp4|npy)'"):
            make(small_disk.folder / "v.mp4")
    assert os.listdir(small_disk.folder) == ["fill"]
    small_disk.fill(leave=8 << 10)
    with (
        pytest.raises(ValueError, match=r"^path: no space left: '.*v\.npy'"),
        LatentWriter(small_disk.folder / "v.npy", 1, (9,)) as file,
    ):
        for _ in range(1000):
            file.write(np.ones((1, 9), np.float32))
    assert 0 < file.kept < 1000 and np.array_equal(np.load(file.partial), np.ones((file.kept, 9), np.float32))


def test_a_write_that_fails_at_any_point_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libavformat must not notice: it dies of a header written again, and of a trailer without a packet."""
    frames, calls = noise(40), 0

    def run(failing: int) -> VideoWriter:
        nonlocal calls
        calls = 0

        def write(file: object, data: bytes) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                real(file, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(file, data)

        monkeypatch.setattr(output_file, "write_all", write)
        video = VideoWriter(tmp_path / "v.mp4", 16, (96, 96), scale=1)
        try:
            video.write(frames[:30])
            video.write(frames[30:])
        finally:
            video.close()
        return video

    real = output_file.write_all
    run(0)
    whole = (tmp_path / "v.mp4").read_bytes()
    assert calls > 5
    for failing in range(1, calls + 1):
        with pytest.raises(ValueError, match=r"^path: no space left: '.*v\.mp4'$"):
            run(failing)
        part = tmp_path / ".v.mp4.part"
        assert (tmp_path / "v.mp4").read_bytes() == whole
        assert not part.exists() or len(decode(part, 1)) > 0
    assert part.exists() and len(decode(part, 1)) == 40, "when the index fails all frames are there"


def test_ctrl_c_waits_for_the_file(tmp_path: Path, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """While libavformat writes through Python no exception may come up: it would lose a part of the file."""
    real, sent = output_file.write_all, []

    def write(file: object, data: bytes) -> None:
        if not sent:
            sent.append(signal.raise_signal(signal.SIGINT))
        real(file, data)

    monkeypatch.setattr(output_file, "write_all", write)
    path = tmp_path / "v.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 16, (SIZE, SIZE)) as video:
        for frame in [*frames, *frames]:
            video.write(frame[None])
    assert sent and len(decode(path, 4)) == video.frames > 0


def test_an_encoder_that_is_not_there_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ValueError("no codec")

    monkeypatch.setattr("inferix.media.video_writer.Fraction", missing)
    with pytest.raises(ValueError, match="no codec"):
        VideoWriter(tmp_path / "v.mp4", 16, (SIZE, SIZE))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [VideoWriter, LatentWriter])
def test_a_second_writer_of_a_file_is_refused(tmp_path: Path, kind: type) -> None:
    path = tmp_path / {VideoWriter: "v.mp4", LatentWriter: "v.npy"}[kind]
    (options, frames) = {
        VideoWriter: ((16, (4, 4), 1), np.zeros((1, 4, 4, 3), np.uint8)),
        LatentWriter: ((9, (3, 2)), np.zeros((1, 3, 2), np.float32)),
    }[kind]
    with kind(path, *options) as first:
        first.write(frames)
        with pytest.raises(ValueError, match=rf"^path: '{path}' is being written by another run$"):
            kind(path, *options)
        first.write(frames)
    assert first.frames == 2 and os.listdir(tmp_path) == [path.name]
    with kind(path, *options) as again:
        again.write(frames)


@pytest.mark.parametrize("name", ["v.mp4", ".v.mp4.part"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"path must be a file, got '.*{name}', which is a device or a pipe"):
        VideoWriter(tmp_path / "v.mp4", 16, (SIZE, SIZE))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("size", [(64, 64), (720, 1280)])
def test_a_video_says_what_its_colours_are(tmp_path: Path, size: tuple[int, int]) -> None:
    colour = np.array((200, 40, 60), np.uint8)
    with VideoWriter(tmp_path / "v.mp4", 16, size, scale=1) as video:
        video.write(np.broadcast_to(colour, (3, *size, 3)))
    with av.open(str(tmp_path / "v.mp4")) as container:
        frame = next(container.decode(video=0))
    said = (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range)
    assert said == (1, 1, 1, 1), "BT.709 three times, limited range"
    # y = 0.2126 R + 0.7152 G + 0.0722 B: 16 + 219 y / 255, 128 + 224 (B - y) / 1.8556 / 255, .. (R - y) / 1.5748
    y, u, v = (plane.astype(int) for plane in np.split(frame.to_ndarray(), [size[0], size[0] * 5 // 4]))
    assert abs(y - 81).max() <= 1 and abs(u - 121).max() <= 1 and abs(v - 197).max() <= 1
    as_said = frame.reformat(format="rgb24", src_colorspace=frame.colorspace).to_ndarray()
    assert abs(as_said.astype(int) - colour).max() <= 3


@pytest.mark.parametrize("codec, said, name", [("h264", (1, 1, 1, 1), "ITU709"), ("vp8", (5, 2, 2, 1), "ITU601")])
@pytest.mark.parametrize("size", [(96, 96), (720, 1280)])
def test_live_video_says_what_its_colours_are(size: tuple[int, int], codec: str, said: tuple, name: str) -> None:
    """H.264 BT.709, limited range; VP8, which has no way to say more, BT.601, as every decoder takes it."""
    encoder, decoder = Encoder(codec, size, 16), av.CodecContext.create(codec, "r")
    colour = np.array((200, 40, 60), np.uint8)
    packet = encoder.encode(np.broadcast_to(colour, (*size, 3)), 0, 0, True)
    (frame,) = [*decoder.decode(av.Packet(packet.data)), *decoder.decode(None)]
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == said
    seen = frame.reformat(format="rgb24", src_colorspace=name).to_ndarray()
    assert abs(seen[size[0] // 2, size[1] // 2].astype(int) - colour).max() <= 4


def test_bad_arguments_of_a_video_are_named(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.mp4, got '.*world\.avi'"):
        VideoWriter(tmp_path / "world.avi", 16, (SIZE, SIZE))
    with pytest.raises(ValueError, match="scale must make 96 x 96 pixels at most 16,384 a side and 35,651,584 in all"):
        VideoWriter(tmp_path / "large.mp4", 16, (SIZE, SIZE), scale=63)
    with pytest.raises(ValueError, match="scale must make 3 x 4 pixels an even height and width, got 1"):
        VideoWriter(tmp_path / "odd.mp4", 16, (3, 4), scale=1)
    with (
        pytest.raises(ValueError, match=r"frames must be uint8 \[n, 96, 96, 3\], got uint8 \[40, 96, 96\]"),
        VideoWriter(tmp_path / "flat.mp4", 16, (SIZE, SIZE)) as video,
    ):
        video.write(frames[..., 0])
    assert os.listdir(tmp_path) == []


def test_a_picture_is_turned_as_it_says(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = 255  # red on the left
    turn = Image.Exif()
    turn[0x0112] = 6  # to be turned a quarter clockwise: red on top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turn)
    (picture,) = read_picture(tmp_path / "turned.png", (40, 20))
    assert (picture[:15, :, 0] > 250).all() and (picture[25:, :, 0] < 5).all()


def test_a_contact_sheet_shows_frames_in_order(tmp_path: Path, frames: np.ndarray) -> None:
    contact_sheet(frames[:5], 2, 3, tmp_path / "sheet.png", labels=[f"{i} s" for i in range(5)], scale=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    side = 2 * SIZE
    assert sheet.shape == (2 * (side + STRIP + GAP) + GAP, 3 * (side + GAP) + GAP, 3)
    for i in range(5):
        y = GAP + i // 3 * (side + STRIP + GAP) + STRIP
        x = GAP + i % 3 * (side + GAP)
        assert (sheet[y : y + side : 2, x : x + side : 2] == frames[i]).all()
        assert sheet[y - STRIP : y, x : x + side].max() > 150, "the label is there"
    assert sheet[-GAP - side :, -GAP - side :].max() < 50, "the sixth place stays empty"


def test_bad_arguments_of_a_sheet_are_named(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="frames must be 1 to 2 x 3, got 7"):
        contact_sheet(frames[:7], 2, 3, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="labels must be one for each of 6 frames, got 1"):
        contact_sheet(frames[:6], 2, 3, tmp_path / "sheet.png", labels=["0 s"])
    with pytest.raises(ValueError, match="cannot write"):
        contact_sheet(frames[:6], 2, 3, tmp_path / "missing" / "sheet.png")


def test_require_writable_leaves_files_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    require_writable(path, "--json")
    assert not path.exists()
    path.write_text("kept")
    require_writable(path, "--json")
    assert path.read_text() == "kept"
    with pytest.raises(ValueError, match=r"--json: cannot write .* Is a directory"):
        require_writable(tmp_path, "--json")
