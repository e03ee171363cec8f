"""The parts of the show that need no server: clock, lead, steering, encoders, bounded queues, the archive."""

import asyncio
import time

import av
import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix.stream import video
from inferix.stream.archive import Archive
from inferix.stream.playout import Lead, PlayoutClock
from inferix.stream.steering import SILENCE, Steering
from inferix.stream.testing import BITS, CELL, bars, read_bars
from inferix.stream.video import DEPTH, TICKS, Encoder, JpegEncoder, Packet, Subscription
from inferix.stream.worker import Order


def show(clock, now):
    """The time at which a picture that is here at `now` is shown."""
    due = clock.next(now)
    clock.show(due)
    return due


def test_the_clock_paces_slips_and_never_hurries():
    clock = PlayoutClock(fps=10)
    assert show(clock, 5.0) == 5.0  # the first picture, at once
    assert clock.next(5.0) == clock.next(5.0) == pytest.approx(5.1), "asking changes nothing"
    assert show(clock, 5.0) == pytest.approx(5.1)  # here already, shown in its time
    assert show(clock, 5.35) == 5.35 and clock.slips == 1  # late: shown at once
    assert show(clock, 5.36) == pytest.approx(5.45)  # and the next one is not hurried to make up for it
    assert clock.left(2, now=5.5) == pytest.approx(0.25)  # behind two more, which are due at 5.55 and 5.65
    assert clock.left(0, now=7.0) == 0
    clock.rest()
    assert clock.left(2, now=7.0) == pytest.approx(0.2)
    assert show(clock, 9.0) == 9.0 and clock.slips == 1  # after a pause nothing is late


def test_pictures_are_never_closer_than_their_pace():
    generator = np.random.default_rng(0)
    clock, now, shown = PlayoutClock(fps=16), 0.0, []
    for wait in generator.exponential(1 / 16, 500):
        now = max(now + wait, shown[-1] if shown else 0.0)
        shown.append(show(clock, now))
        assert shown[-1] >= now
    assert np.diff(shown).min() >= 1 / 16 - 1e-9


def test_a_block_is_begun_as_late_as_its_making_allows():
    lead = Lead(limit=0.4, margin=0.02)
    assert lead.wait(left=0.4) == 0.0  # nothing known yet: as far ahead as is allowed
    for _ in range(100):
        lead.made(0.08)
    assert lead.wait(left=0.3) == pytest.approx(0.2)
    lead.made(0.2)  # a slow block is believed at once
    assert lead.wait(left=0.3) == pytest.approx(0.08)
    for _ in range(200):
        lead.made(0.08)  # and forgotten slowly
    assert lead.wait(left=0.3) == pytest.approx(0.2, abs=1e-3)
    lead.made(9.0)
    assert lead.wait(left=0.5) > 0, "however slow blocks are, the world runs no further ahead than the limit"


def steering():
    return Steering(("none", "up", "down"), {"w": "up", "s": "down"})


def test_keys_are_state_and_the_last_pressed_wins():
    wheel = steering()
    assert wheel.orders(["a"], now=0.0) == ({"a": Order("none")}, -1, [])
    assert wheel.press(1, ["w", "down"], now=0.0)
    assert wheel.orders(["a"], now=0.1)[:2] == ({"a": Order("down")}, 1)
    assert wheel.orders(["a"], now=0.2)[0] == {"a": Order("down")}, "held"
    assert not wheel.press(1, [], now=0.2) and not wheel.press(0, [], now=0.2), "old news"
    with pytest.raises(ValueError, match="of none, up, down, got 'jump'"):
        wheel.press(9, ["jump"])
    assert wheel.seq == 1
    assert wheel.orders(["a"], now=0.1 + SILENCE + 1)[0] == {"a": Order("none")}, "a driver that fell silent let go"


def test_what_is_held_at_once_is_done_at_once_where_a_model_can():
    wheel = Steering(("nomove", "forward", "camera_l"), {"w": "forward", "j": "camera_l"}, together=True)
    assert wheel.orders(["a"], now=0.0)[0] == {"a": Order("nomove")}
    wheel.press(1, ["w", "j", "w"], now=0.0)
    assert wheel.orders(["a"], now=0.1)[0] == {"a": Order("forward+camera_l")}
    wheel.press(2, [], now=0.2)
    assert wheel.orders(["a"], now=0.3)[0] == {"a": Order("nomove")}


def test_a_tap_is_kept_for_one_block():
    wheel = steering()
    wheel.press(1, ["w"], now=0.0)
    wheel.press(2, [], now=0.0)
    assert wheel.orders(["a"], now=0.1)[:2] == ({"a": Order("up")}, 2)
    assert wheel.orders(["a"], now=0.2)[0] == {"a": Order("none")}


def test_words_wait_for_their_block_and_the_last_ones_hold():
    wheel = steering()
    assert wheel.say(["a"], "rain", None, "1") == []
    assert [words.id for words in wheel.say(["a", "b"], "snow", True, "2")] == ["1"]
    orders, _, said = wheel.orders(["a", "b"], now=0.0)
    assert orders == {"a": Order("none", "snow", True), "b": Order("none", "snow", True)}
    assert [words.id for words in said] == ["2"]
    assert wheel.orders(["a", "b"], now=0.0)[2] == []


def test_a_world_has_one_prompt_waiting_however_many_are_said():
    wheel, replaced = steering(), []
    for i in range(500):
        replaced += wheel.say([["a"], ["b"], ["a", "b"]][i % 3], f"words {i}", None, str(i))
    orders, _, said = wheel.orders(["a", "b"], now=0.0)
    assert [(words.id, words.worlds) for words in said] == [("498", ["a"]), ("499", ["b"])]
    assert [orders[name].prompt for name in "ab"] == ["words 498", "words 499"]
    assert sorted(int(words.id) for words in replaced) == list(range(498)), "each is answered for, once"


def test_words_follow_worlds_that_fork_and_close():
    wheel = steering()
    wheel.prompts = {"a": "calm"}
    wheel.say(["a"], "rain", None, None)
    wheel.fork()
    assert wheel.worlds == ["b"] and wheel.prompts == {"a": "calm", "b": "calm"}
    assert wheel._waiting[0].worlds == ["a", "b"]
    wheel.say(["b"], "snow", None, None)
    wheel.close("a")
    assert wheel.worlds == ["a"] and [(words.text, words.worlds) for words in wheel._waiting] == [("snow", ["a"])]


@pytest.mark.parametrize("codec", ["h264", "vp8"])
def test_what_is_encoded_comes_back(codec):
    encoder = Encoder(codec, (4 * CELL, BITS * CELL), fps=16)
    decoder = av.CodecContext.create(codec, "r")
    for i in range(56):
        picture = np.full((4 * CELL, BITS * CELL, 3), (200, 60, 30), np.uint8)
        picture[:CELL] = bars(i * 1021, i % 5, i % 3)
        packet = encoder.encode(picture, i, i * TICKS // 16, keyframe=i == 20)
        assert packet.frame == i and packet.pts == i * TICKS // 16
        assert packet.keyframe == (i in (0, 20, 52))  # the first, one that was asked for, and two seconds after it
        (image,) = decoder.decode(av.Packet(packet.data))  # at once: nothing is held back
        if codec == "h264":
            assert (image.colorspace, packet.data[:4]) == (1, b"\0\0\0\1")  # BT.709, Annex B
        back = image.to_ndarray(format="rgb24")
        assert read_bars(back) == (i * 1021 % 2**16, i % 5, i % 3)
    rgb = image.reformat(format="rgb24", src_colorspace="ITU709" if codec == "h264" else "ITU601").to_ndarray()
    assert np.abs(rgb[-8:].reshape(-1, 3).mean(0) - (200, 60, 30)).max() < 6  # limited range, and a lossy codec


def test_small_pictures_are_enlarged_to_crisp_squares():
    picture = np.random.default_rng(0).integers(0, 2, (8, 8, 1), np.uint8).repeat(3, 2) * 255
    packet = Encoder("h264", (32, 32), fps=16).encode(picture, 0, 0, True)
    (image,) = av.CodecContext.create("h264", "r").decode(av.Packet(packet.data))
    assert np.array_equal(image.to_ndarray(format="rgb24")[2::4, 2::4] > 127, picture > 127)
    assert JpegEncoder((32, 32)).encode(picture, 0, 0, False).data.startswith(b"\xff\xd8")


def test_a_viewer_that_is_too_slow_goes_on_with_a_keyframe():
    wanted, arrived = [], []
    viewer = Subscription("h264", lambda: arrived.append(1), lambda: wanted.append(1))
    viewer.push(Packet(b"", 0, 0, False))
    assert viewer.pop() is None, "nothing can be shown before the first keyframe"
    for i in range(DEPTH):
        viewer.push(Packet(b"", 1 + i, 0, i == 0))
    assert not wanted and len(arrived) == DEPTH
    viewer.push(Packet(b"", 20, 0, False))
    assert wanted == [1] and viewer.pop() is None
    viewer.push(Packet(b"", 21, 0, True))
    assert viewer.pop().frame == 21 and viewer.dropped == 1 + DEPTH + 1


def test_an_archive_lists_what_it_named_and_nothing_else(tmp_path):
    archive = Archive(tmp_path / "worlds")
    assert archive.worlds() == [] and not (tmp_path / "worlds").exists()
    names = [archive.new("Self Forcing!/..") for _ in range(3)]
    assert len(set(names)) == 3 and all(name.startswith("self-forcing-") and "/" not in name for name in names)
    archive.world(names[0]).mkdir()
    archive.video(names[1]).write_text("x")
    archive.video("mine").write_text("x")
    (tmp_path / "worlds" / ".tiny-20260101-000000-1.part").mkdir()
    assert archive.worlds() == [names[0]] and list(archive.videos()) == [f"{names[1]}.mp4"]


def test_an_archive_has_room_for_so_many_and_so_much(tmp_path):
    (tmp_path / "mine.mp4").write_bytes(b"x" * 10**6)  # not ours: neither counted nor listed
    archive = Archive(tmp_path, max_files=3, max_gb=1e-6)
    assert archive.room() == 1000
    archive.world(archive.new("bars")).mkdir()
    archive.video(archive.new("bars")).write_bytes(b"x" * 300)
    unfinished = tmp_path / f".{archive.new('bars')}.mp4.part"
    unfinished.write_bytes(b"x" * 400)
    assert archive.room() == 300 and len(archive.worlds()) == len(archive.videos()) == 1
    with pytest.raises(ValueError, match=r"holds 3 of at most 3 worlds and recordings, .*--max-files"):
        archive.new("bars")
    unfinished.unlink()
    (archive.world(archive.worlds()[0]) / "past0.safetensors").write_bytes(b"x" * 700)
    with pytest.raises(ValueError, match=r"holds 2 of at most 3 .*, 0.0 of at most 1e-06 GB: remove some"):
        archive.new("bars")
    (archive.world(archive.worlds()[0]) / "past0.safetensors").unlink()
    assert archive.new("bars")
    with pytest.raises(ValueError, match=r"mine\.mp4 cannot be made: "):
        Archive(tmp_path / "mine.mp4").new("bars")


def test_two_pictures_at_once_meet_the_encoder_one_after_the_other(monkeypatch):
    inside, most = [], []

    class Slow:
        def __init__(self, codec, size, fps):
            self.size = size

        def encode(self, picture, frame, pts, keyframe):
            inside.append(frame)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(frame)

    monkeypatch.setattr(video, "Encoder", Slow)

    async def crowd():
        broadcast = video.Broadcast(16)
        broadcast.subscribe("h264", lambda: None)
        picture = np.zeros((16, 16, 3), np.uint8)
        await asyncio.gather(*(broadcast.show(picture, i, i) for i in range(6)))

    asyncio.run(crowd())
    assert len(most) == 6 and max(most) == 1
