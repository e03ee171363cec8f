"""Spans, metrics and hooks: what is recorded, what a mistake costs, and that memory is bounded."""

import gc
import math
import threading
import weakref

import pytest

from inferix_kernels import _recording, profile

pytestmark = pytest.mark.usefixtures("spans")


def sums(recording):
    recording.collect()
    return {name: tuple(each) for name, each in recording.sums.items()}


def spend(clock, name, seconds, **args):
    with profile.span(name, **args):
        clock.now += seconds


def test_a_span_has_its_own_time_and_that_of_the_spans_within(clock):
    recording = profile.start("layer")
    for layer in range(2):
        with profile.span("layer", layer=layer):
            clock.now += 1
            spend(clock, "attention", 2)
            spend(clock, "linear", 4)
            clock.now += 8
            with profile.span("cross-attention"):
                spend(clock, "linear", 16)
    assert sums(recording) == {
        "layer": (18.0, 62.0, 2),
        "attention": (4.0, 4.0, 2),
        "linear": (40.0, 40.0, 4),
        "cross-attention": (0.0, 32.0, 2),
    }
    (track,) = recording.tracks
    assert [(row[0], row[3], row[4]) for row in track.kept()[:5]] == [
        ("attention", 1, {}),
        ("linear", 1, {}),
        ("linear", 2, {}),
        ("cross-attention", 1, {}),
        ("layer", 0, {"layer": 0}),
    ]


def test_what_is_off_reads_no_clock_and_keeps_nothing(clock):
    with pytest.raises(KeyError), profile.span("layer", layer=3):
        raise KeyError
    profile.count("pages", 3)
    profile.metric("queue", 3)
    profile.record("send", 0.0, 1.0, track="viewers")
    assert profile.profiled(len)("four") == 4
    assert clock.read == 0 and profile.level() == "off"
    recording = profile.start("block")
    with profile.span("layer"):
        pass
    assert clock.read == 0 and not recording.tracks


def test_timed_measures_at_any_level_and_is_recorded_from_block_on(clock):
    with profile.timed("denoise") as taken:
        clock.now += 3
    assert taken.seconds == 3
    recording = profile.start("block")
    for _ in range(2):
        with profile.timed("denoise") as taken:
            with pytest.raises(AttributeError):
                assert taken.seconds
            clock.now += 5
            spend(clock, "step", 2)
        assert taken.seconds == 7
    assert sums(recording) == {"denoise": (14.0, 14.0, 2)}


def test_levels_are_switched_while_spans_are_open(clock):
    recording = profile.start("layer")
    with profile.span("a"):
        profile.set_level("off")
        with profile.span("b"), profile.timed("c"):
            clock.now += 1
        profile.set_level("layer")
        spend(clock, "d", 1)
    assert sums(recording) == {"d": (1.0, 1.0, 1), "a": (1.0, 2.0, 1)} and not recording.problems()
    with pytest.raises(ValueError, match="level must be one of off, block, layer, got 'loud'"):
        profile.set_level("loud")
    with pytest.raises(RuntimeError, match="start: a recording is under way"):
        profile.start()
    assert profile.stop() is recording
    with pytest.raises(RuntimeError, match="set_level: there is no recording"):
        profile.set_level("block")
    with pytest.raises(ValueError, match="capacity must be a power of two, got 12"):
        profile.start(capacity=12)


def test_a_span_that_is_open_when_the_recording_changes_is_in_the_old_one(clock):
    old = profile.start("layer")
    with profile.span("outer"):
        profile.stop()
        new = profile.start("layer")
        spend(clock, "inner", 1)
    assert list(sums(old)) == ["outer"] and list(sums(new)) == ["inner"]
    assert not old.problems() and not new.problems()


# Mistakes


def test_a_span_left_open_is_said_and_those_around_it_are_right(clock):
    recording = profile.start("layer")
    with profile.span("outer"):
        profile.span("lost")
        profile.timed("lost")
        spend(clock, "in what is lost", 1)
    with profile.span("outer"), profile.span("good"):
        clock.now += 2
    assert sums(recording) == {"outer": (1.0, 3.0, 2), "in what is lost": (1.0, 1.0, 1), "good": (2.0, 2.0, 1)}
    assert recording.problems() == ["'lost' was left open: 2"]
    profile.span("still")
    assert recording.problems()[1:] == ["MainThread: 'still' is still open"]


def test_a_span_closed_twice_is_said(clock):
    recording = profile.start("layer")
    with profile.span("x") as _:
        clock.now += 1
        open_one = recording.tracks[0].ring.open[0]
    open_one.__exit__(None, None, None)
    with profile.timed("y") as timed:
        with timed:
            clock.now += 1
        clock.now += 1
    assert recording.problems() == ["'x' was closed without being open: 1", "'y' was closed without being open: 1"]
    assert sums(recording) == {"x": (1.0, 1.0, 1), "y": (1.0, 1.0, 1)}
    spend(clock, "y", 1)
    assert recording.tracks[0].kept()[-1][3] == 0, "what comes after is not within it"


def test_a_span_closed_on_another_thread_is_said(clock):
    recording = profile.start("layer")
    span = profile.span("x")
    other = threading.Thread(target=span.__exit__, args=(None, None, None))
    other.start()
    other.join()
    spend(clock, "y", 1)
    assert recording.problems() == ["'x' was closed on another thread than it was opened on: 1"]
    assert sums(recording) == {"y": (1.0, 1.0, 1)}


def test_a_span_ends_with_an_exception_which_passes(clock):
    recording = profile.start("layer")
    with pytest.raises(KeyError), profile.span("outer"), profile.span("inner"):
        raise KeyError
    assert set(sums(recording)) == {"inner", "outer"} and not recording.tracks[0].ring.open


def test_a_full_ring_drops_the_oldest_and_says_how_many(clock):
    recording = profile.start("layer", capacity=8)
    for i in range(20):
        spend(clock, "x", 1, i=i)
        if i % 5 == 0:
            recording.collect()
    (track,) = recording.tracks
    assert [row[4]["i"] for row in track.kept()] == list(range(12, 20))
    assert sums(recording)["x"] == (20.0, 20.0, 20), "sums have all of them"
    assert recording.problems() == ["MainThread: the oldest 12 spans, as the ring holds 8"]
    for _ in range(30):
        spend(clock, "x", 1)
    assert sums(recording)["x"] == (28.0, 28.0, 28)
    assert (
        "spans of MainThread that no sum has, as more ended in a block than the ring holds: 22" in recording.problems()
    )


def test_a_number_is_what_it_was_before_or_it_is_said():
    recording = profile.start("block")
    profile.count("hits", 2)
    profile.count("hits")
    profile.metric("hits", 7)
    profile.metric("queue", 1)
    profile.metric("queue", 2.5)
    profile.count("queue")
    for wrong in ("three", None, True, [1], math.nan, math.inf):
        profile.metric("queue", wrong)
    assert recording.counts() == {"hits": 3} and recording.values() == {"queue": 2.5}
    assert recording.problems() == [
        "'hits' was given as a metric, and was something else before or is one name too many: 1",
        "'queue' was given as a count, and was something else before or is one name too many: 1",
        "'queue' was given what is no finite number: 6",
    ]


def test_names_threads_and_complaints_are_bounded(clock):
    recording = profile.start("layer", capacity=8)
    for i in range(3000):
        profile.count(f"count {i}")
        spend(clock, f"span {i}", 1)
        recording.collect()
        recording.lose(f"text {i}")
    for _ in range(100):
        thread = threading.Thread(target=spend, args=(clock, "on a thread", 1))
        thread.start()
        thread.join()
    assert max(map(len, (recording.counts(), recording.sums, recording.lost, recording.tracks))) <= 1024
    assert len(recording.tracks) <= _recording.MOST_TRACKS and len(recording.lost) <= _recording.MOST_TEXTS


def test_nothing_outlives_a_span():
    class Thing:
        pass

    profile.start("layer")
    thing = Thing()
    gone = weakref.ref(thing)
    with profile.span("x", layer=1, thing=thing):
        pass
    del thing
    gc.collect()
    assert gone() is None
    assert profile.recording().tracks[0].kept()[0][4] == {"layer": 1}
    assert profile.recording().problems() == ["arguments of 'x' that are neither numbers nor texts: 1"]


def test_a_decorated_function_is_the_function():
    recording = profile.start("layer")

    @profile.profiled
    def add(a: int, *, b: int) -> int:
        """Adds."""
        return a + b

    @profile.profiled("sum")
    def other(a):
        raise OSError

    assert add(1, b=2) == 3 and (add.__name__, add.__doc__) == ("add", "Adds.")
    with pytest.raises(OSError):
        other(1)
    assert set(sums(recording)) == {"add", "sum"}


# Blocks and hooks


def make_block(clock, seconds=4, frames=3):
    with profile.block() as block:
        with profile.timed("denoise"):
            clock.now += seconds
            profile.count("pages", 5)
        block.frames = frames
    return block.row


def test_a_row_has_all_since_the_block_before(clock):
    recording = profile.start("layer")
    make_block(clock)
    profile.metric("queue", 2)
    with profile.timed("encode"):
        clock.now += 2
    clock.now += 1  # nobody's
    row = make_block(clock, 8)
    assert (row.number, row.seconds, row.wall, row.elsewhere, row.frames) == (1, 8.0, 11.0, 1.0, 3)
    assert {name: tuple(each) for name, each in row.spans.items()} == {
        "profiler": (0.0, 0.0, 1),
        "encode": (2.0, 2.0, 1),
        "denoise": (8.0, 8.0, 1),
        "block": (0.0, 8.0, 1),
    }
    assert row.counts == {"pages": 5} and row.values == {"queue": 2}
    assert recording.frames == 6 and recording.counts() == {"pages": 10}
    assert recording.blocks.kept[0].wall == 4.0, "the first one counts from the first span"


def test_a_block_that_fails_is_no_row(clock):
    recording = profile.start("block")
    with pytest.raises(OSError), profile.block():
        clock.now += 1
        raise OSError
    assert not recording.blocks.seen
    assert make_block(clock).wall == 5.0, "its time is the next one's"


def test_rows_are_thinned_out_evenly():
    thinned = _recording.Thinned(8)
    for i in range(1000):
        thinned.append(i)
        assert len(thinned.kept) <= 8
    assert thinned.kept == list(range(0, 1000, thinned.stride)) and thinned.seen == 1000


def test_a_hook_is_timed_and_one_that_fails_is_not_called_again(clock):
    recording, seen = profile.start("block"), []

    def slow(row):
        clock.now += 7
        seen.append(row.number)

    def broken(row):
        raise ValueError("no disk")

    profile.on_block(broken)
    end = profile.on_block(slow)
    make_block(clock)
    row = make_block(clock)
    assert row.spans["hook slow"].seconds == 7 and seen == [0, 1]
    assert recording.problems() == ["hook broken failed (ValueError: no disk) and is not called again: 1"]
    end()
    end()
    make_block(clock)
    assert seen == [0, 1]


def test_each_thread_has_its_own_blocks(clock):
    recording = profile.start("block")

    def work():
        for _ in range(2):
            with profile.block() as block:
                block.frames = 1

    threads = [threading.Thread(target=work, name=name) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((row.track, row.number) for row in recording.blocks.kept) == [
        ("one", 0),
        ("one", 1),
        ("two", 0),
        ("two", 1),
    ]


def test_what_has_passed_is_recorded_on_a_track_of_its_own(clock):
    recording = profile.start("block")
    profile.record("send", 1.0, 3.0, track="viewers", bytes=5)
    profile.record("send", 2.0, 4.0, track="viewers")
    (track,) = recording.tracks
    assert track.overlapping and [row[:3] for row in track.kept()] == [("send", 1.0, 3.0), ("send", 2.0, 4.0)]
    assert sums(recording) == {"send": (4.0, 4.0, 2)}
