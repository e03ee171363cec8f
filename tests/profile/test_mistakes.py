"""What a mistake costs: of a hook, of numbers, of a recording that changes; and tracks of threads that ended."""

import os
import re
import threading

import pytest

from inferix_kernels import _recording, profile
from tests.profile.test_spans import spend, sums


def test_a_block_that_is_open_when_the_recording_changes_is_no_row_of_the_new_one(clock):
    profile.start("layer")
    with profile.block() as made:
        spend(clock, "old", 1)
        profile.stop()
        recording = profile.start("layer")
        made.frames = 3
    assert made.row is None and recording.frames == 0 and sums(recording) == {}
    profile.stop()


def test_a_hook_that_ends_itself_and_fails_ends_no_block(clock):
    recording = profile.start("block")

    def hook(row):
        end()
        raise ValueError("no")

    end = profile.on_block(hook)
    for _ in range(2):
        with profile.block():
            pass
    assert recording.problems() == ["hook hook failed (ValueError: no) and is not called again: 1"]
    profile.stop()


def test_arguments_that_no_trace_can_hold_are_left_out_of_every_kind_of_span():
    recording = profile.start("block")
    with profile.timed("denoise", where=object(), step=3):
        pass
    profile.record("send", 0.0, 1.0, track="viewers", to=object(), bytes=5)
    profile.stop()
    assert [row[4] for track in recording.tracks for row in track.kept()] == [{"step": 3}, {"bytes": 5}]
    said = [f"arguments of {name!r} that are neither numbers nor texts: 1" for name in ("denoise", "send")]
    assert recording.problems() == said


def test_numbers_too_large_for_a_float_are_said():
    recording = profile.start("block")
    profile.count("pages", 10**400)
    profile.metric("queue", -(10**400))
    assert not recording.counts() and not recording.values() and len(recording.problems()) == 2
    profile.stop()


def test_tracks_that_are_not_shared_are_each_a_threads_own_and_are_forgotten_when_it_ends():
    recording = profile.start("block")
    made = []
    for _ in range(_recording.MOST_TRACKS + 9):
        thread = threading.Thread(target=lambda: made.append(recording.track("GPU of x", shared=False)))
        thread.start()
        thread.join()
    assert len(set(map(id, made))) == len(made)
    assert len(recording.tracks) <= _recording.MOST_TRACKS
    profile.stop()


class Cased(str):
    """Has a hash of its own."""

    __hash__ = None


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize("level", ["off", "block", "layer"])
@pytest.mark.parametrize("name", [["layer"], 3, None, b"layer"])
def test_a_name_that_is_no_text_is_refused_at_every_level(level, name):
    recording = profile.start(level)
    said = re.escape(f"name must be a str, got {name!r}")
    for make in (profile.span, profile.timed, lambda name: profile.record(name, 0.0, 1.0, track="x")):
        with pytest.raises(TypeError, match=said):
            make(name)
    if name != 3:  # which has no name, but is not asked for one
        with pytest.raises(TypeError, match="what must be a name, or a function that has one, got"):
            profile.profiled(name)
    profile.count(name)
    profile.metric(name, 1)
    assert not recording.counts() and not recording.values()
    assert len(recording.problems()) == (0 if level == "off" else 2)
    assert not any(track.ring.count or track.ring.open for track in recording.tracks)


@pytest.mark.usefixtures("spans")
def test_a_name_of_another_kind_of_text_is_one(clock):
    recording = profile.start("layer")
    for _ in range(2):  # of which the second is the extension's, as far as it does it
        spend(clock, Cased("x"), 1)
        profile.count(Cased("n"), 2)
    profile.record(Cased("x"), 0.0, 2.0, track="y")
    assert sums(recording) == {"x": (4.0, 4.0, 3)} and recording.counts() == {"n": 4}


@pytest.mark.usefixtures("spans")
def test_arguments_are_checked_as_those_of_a_function():
    recording = profile.start("layer")
    for wrong in (lambda: profile.span(), lambda: profile.span("x", 3), lambda: profile.span("x", **{"name": 3})):
        with pytest.raises(TypeError, match="span"):
            wrong()
    with profile.span(name="x"):
        pass
    assert [row[0] for row in recording.tracks[0].kept()] == ["x"]


@pytest.mark.usefixtures("spans")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_is_forked_off_records_nothing_until_it_starts_to(clock):
    recording = profile.start("layer")
    spend(clock, "before", 1)
    hold, go = threading.Event(), threading.Event()

    def held():  # as another thread may have the lock just then
        with recording.lock:
            hold.set()
            go.wait(60)

    thread = threading.Thread(target=held)
    thread.start()
    hold.wait(60)
    with profile.span("around"), profile.timed("block"):
        child = os.fork()
        if child:
            continues = profile.level() == "layer" and profile.recording() is recording
        else:
            code = 1
            try:
                assert profile.recording() is None and profile.level() == "off"
                spend(clock, "nobody's", 1)
                recording.collect()
                assert list(recording.sums) == ["before"]
                own = profile.start("layer")
                spend(clock, "own", 1)
                assert list(sums(own)) == ["own"] and not own.problems()
                code = 0
            finally:
                os._exit(code)
    go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and continues
    assert list(sums(recording)) == ["before", "block", "around"] and not recording.problems()
