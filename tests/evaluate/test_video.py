"""Chunks hold the frames that they should; a file that is no even, whole video is refused in one line."""

import doctest
import resource
from pathlib import Path

import numpy as np
import pytest

from inferix.evaluate import video as module
from inferix.evaluate.video import beginning, chunks, open_video
from tests.evaluate.clips import counted, numbers, write


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("videos") / "clip.mp4", counted(64))


def test_a_videos_packets_say_what_it_is(clip: Path) -> None:
    video = open_video(clip)
    assert (video.path, video.frames, video.fps, video.size) == (clip, 64, 16.0, (32, 48))


def test_chunks_are_equal_and_what_is_left_over_is_in_none(clip: Path) -> None:
    found = list(chunks(open_video(clip), 10, None))
    assert [(chunk.number, chunk.start, chunk.stop) for chunk in found] == [(i, 6 * i, 6 * i + 6) for i in range(10)]
    assert [numbers(chunk.frames) for chunk in found] == [list(range(6 * i, 6 * i + 6)) for i in range(10)]
    assert all(chunk.frames.dtype == np.uint8 and chunk.frames.shape == (6, 32, 48, 3) for chunk in found)


def test_of_a_long_chunk_the_frames_in_the_middle_are_taken(clip: Path) -> None:
    first, second = chunks(open_video(clip), 2, 12)
    assert (first.first, numbers(first.frames)) == (10, list(range(10, 22)))
    assert (second.first, numbers(second.frames)) == (42, list(range(42, 54)))


def test_every_frame_is_had_small(clip: Path) -> None:
    found = list(chunks(open_video(clip), 3, 2, [(9, 16), (4, 4)]))
    assert [chunk.small[9, 16].shape for chunk in found] == [(21, 9, 16, 3)] * 3
    assert numbers(np.concatenate([chunk.small[4, 4] for chunk in found])) == list(range(63))


@pytest.mark.parametrize(
    "count, lengths", [(1, [1]), (12, [12]), (13, [7, 6]), (32, [11, 11, 10]), (99, [11] * 4 + [10] * 2)]
)
def test_its_beginning_comes_in_parts_of_about_one_length(clip: Path, count: int, lengths: list[int]) -> None:
    found = list(beginning(open_video(clip), count))
    assert [len(part) for part in found] == lengths
    assert numbers(np.concatenate(found)) == list(range(min(count, 64)))


def refused(path: Path, number: int = 4) -> str:
    with pytest.raises(ValueError) as error:
        list(chunks(open_video(path), number))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_a_video_that_is_too_short(tmp_path: Path) -> None:
    path = write(tmp_path / "short.mp4", counted(3))
    assert refused(path).endswith("is too short: 4 chunks need at least 4 frames, it has 3")


def test_a_frame_rate_that_varies(tmp_path: Path) -> None:
    times = [*range(20), *range(22, 42)]
    path = write(tmp_path / "uneven.mp4", counted(40), times)
    assert "its frame rate varies: at 1.19 s the next frame comes after 187.5 ms, usually after 62.5 ms" in refused(
        path
    )


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_a_clock_of_milliseconds_is_even_enough(tmp_path: Path, ending: str) -> None:
    """Matroska's: at 24 fps frames are 41 or 42 of its ticks apart."""
    assert open_video(write(tmp_path / f"even.{ending}", counted(30), fps=24)).frames == 30


def test_a_truncated_file(tmp_path: Path, clip: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(clip.read_bytes()[: -clip.stat().st_size // 3])
    assert "it is truncated: it announces 64 frames and has" in refused(path)


def test_a_file_with_a_hole(tmp_path: Path, clip: Path) -> None:
    data = bytearray(clip.read_bytes())
    data[-len(data) // 2 : -len(data) // 4] = bytes(len(data) // 4)
    path = tmp_path / "hole.mp4"
    path.write_bytes(data)
    assert "cannot read" in refused(path)


@pytest.mark.parametrize("data, said", [(b"", "Invalid data"), (b"no video at all" * 99, "Invalid data")])
def test_what_is_no_video(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "no.mp4"
    path.write_bytes(data)
    assert said in refused(path)
    assert "No such file" in refused(tmp_path / "none.mp4")


def test_a_chunk_that_would_not_fit_in_memory(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CHUNK_BYTES", 32 * 48 * 3 * 12)
    assert len(list(chunks(open_video(clip), 2))) == 2
    with pytest.raises(ValueError, match=r"take more `chunks`, or not `all` of their frames"):
        list(chunks(open_video(clip), 2, None))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much memory a process has")
def test_memory_does_not_grow_with_the_videos_length(tmp_path: Path) -> None:
    """Of a video whose frames are 96 MB."""
    path = write(tmp_path / "long.mp4", np.broadcast_to(np.uint8(90), (320, 320, 320, 3)))
    taken = [resident() for _ in chunks(open_video(path), sizes=[(27, 48)])]
    assert len(taken) == 10 and max(taken) < taken[0] + 30e6


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_examples(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clip.parent)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
