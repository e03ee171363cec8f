"""What a mistake costs: of a hook, of numbers, of a recording that changes; and tracks of threads that ended."""

import threading

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
