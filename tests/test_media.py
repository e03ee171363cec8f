"""Videos hold the frames that were written, also when writing ends early; bad outputs are named before any work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from inferix.media import GAP, STRIP, LatentWriter, VideoWriter, contact_sheet, read_picture, require_writable
from inferix.models.tiny.simulator import SIZE, Simulator, play


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
    with pytest.raises(ValueError, match=r"--out: cannot write '.*x\.npy': "):
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
    with pytest.raises(ValueError, match=rf"--out: cannot write '.*{out}': (No such|Is a|Not a)"):
        VideoWriter(tmp_path / out, 16, (SIZE, SIZE))
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_arguments_of_a_video_are_named(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"--out must end in \.mp4, got '.*world\.avi'"):
        VideoWriter(tmp_path / "world.avi", 16, (SIZE, SIZE))
    with pytest.raises(ValueError, match="--scale must make 3 x 4 pixels an even height and width, got 1"):
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
