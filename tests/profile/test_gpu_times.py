"""Spans on a GPU, timed by events that happen late, out of order, or never. There is no GPU: the events are ours."""

import itertools

import pytest
import torch

from inferix_kernels import profile
from inferix_kernels._gpu_times import EVERY, GpuTimes


class Gpu:
    """A stream that is as far as it is told: an event happens when the work before it is done."""

    def __init__(self):
        self.host, self.zero = 50.0, -1000.0  # the GPU's clock has another zero
        self.busy_until, self.events = 0.0, itertools.count()
        self.stopped = False

    def event(self):
        return Event(self)

    def work(self, seconds):
        """Launch work of so many seconds: it begins when what was launched before is done."""
        self.busy_until = max(self.busy_until, self.host) + seconds


class Event:
    def __init__(self, gpu):
        self.gpu, self.at, self.number = gpu, None, next(gpu.events)
        self.never = False

    def record(self):
        self.at = max(self.gpu.busy_until, self.gpu.host)

    def query(self):
        return not self.never and self.at is not None and self.at <= self.gpu.host

    def elapsed_time(self, other):
        assert self.query() and other.query(), "nobody waits for an event"
        return 1e3 * (other.at - self.at)

    def synchronize(self):
        raise AssertionError("nobody waits for an event")


@pytest.fixture
def gpu():
    return Gpu()


def times_of(gpu, **options):
    rows = []
    times = GpuTimes(gpu.event, rows.append, clock=lambda: gpu.host, **options)
    return times, rows


def span(gpu, times, name, launch, work, depth=0):
    """A span that takes `launch` seconds on the host and gives the GPU `work`."""
    began = times.begin()
    gpu.work(work)
    gpu.host += launch
    if began is not None:
        times.end(began, name, depth, {})


def found(times, rows):
    return [(name, round(start + times.shift, 9), round(end - start, 9)) for name, start, end, _, _ in rows]


def test_a_span_is_where_the_gpu_was_at_work(gpu):
    times, rows = times_of(gpu)
    span(gpu, times, "a", 0.001, 0.010)  # the GPU was idle: begins when it is launched
    span(gpu, times, "b", 0.001, 0.020)  # begins when a is done
    times.block()
    assert not rows, "neither is done"
    gpu.host = 50.015
    times.block()
    assert found(times, rows) == [("a", 50.0, 0.01)]
    gpu.host = 51.0
    times.block()
    assert found(times, rows) == [("a", 50.0, 0.01), ("b", 50.01, 0.02)] and times.lost == 0


def test_clocks_agree_once_a_span_finds_the_gpu_idle(gpu):
    times, rows = times_of(gpu)
    gpu.busy_until = 50.5  # of what somebody else launched
    span(gpu, times, "late", 0.001, 0.010)
    gpu.host = 60.0
    times.block()
    assert found(times, rows)[0][1] < 50.5, "as early as it was launched: no more is known yet"
    span(gpu, times, "at once", 0.001, 0.010)
    gpu.host = 61.0
    times.block()
    assert found(times, rows) == [("late", 50.5, 0.01), ("at once", 60.0, 0.01)]


def test_events_of_several_streams_come_out_of_order(gpu):
    times, rows = times_of(gpu)
    span(gpu, times, "slow", 0.0, 5.0)
    gpu.busy_until = 0.0  # another stream, which is idle
    span(gpu, times, "quick", 0.0, 0.5)
    gpu.host = 51.0
    times.block()
    assert [row[0] for row in rows] == ["quick"]
    gpu.host = 56.0
    times.block()
    assert found(times, rows) == [("quick", 50.0, 0.5), ("slow", 50.0, 5.0)]


def test_events_that_never_happen_are_lost_and_no_more_than_the_pool_are_made(gpu):
    times, rows = times_of(gpu, size=16)
    made = []
    make, times._make = times._make, lambda: made.append(make()) or made[-1]
    for number in range(40):
        began = times.begin()
        if began is not None:
            times.end(began, "x", 0, {})
            times._pending[-1].end.never = number < 30
        times.block()
    gpu.host += 1
    times.block()
    assert len(times._pending) <= 8 and times.lost >= 20
    assert rows, "later spans are timed all the same"
    live = len(times._free) + 2 * len(times._pending) + (times._anchor is not None)
    assert live <= 16


def test_an_empty_pool_costs_spans_and_nothing_else(gpu):
    times, rows = times_of(gpu, size=4)
    gpu.busy_until = 100.0
    for _ in range(5):
        span(gpu, times, "x", 0.0, 1.0)
    assert times.lost == 3
    gpu.host = 200.0
    times.block()
    assert len(rows) == 2
    span(gpu, times, "y", 0.0, 1.0)
    gpu.host = 300.0
    times.block()
    assert rows[-1][0] == "y" and times.lost == 3


def test_nothing_is_timed_within_a_captured_graph(gpu):
    capturing = [True]
    times, rows = times_of(gpu, capturing=lambda: capturing[0])
    span(gpu, times, "within", 0.0, 1.0)
    capturing[0] = False
    began = times.begin()
    capturing[0] = True
    times.end(began, "ends within", 0, {})
    capturing[0] = False
    span(gpu, times, "launch", 0.0, 1.0)
    gpu.host += 10
    times.block()
    assert [row[0] for row in rows] == ["launch"] and times.lost == 1


def test_an_hour_keeps_its_microseconds(gpu):
    """elapsed_time is float32: the anchor moves along."""
    times, rows = times_of(gpu)
    exact = Event.elapsed_time
    import numpy as np

    for number in range(400):
        gpu.host = 50.0 + 10.0 * number
        span(gpu, times, "x", 0.0, 0.001)
        gpu.host += 5.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Event, "elapsed_time", lambda self, other: float(np.float32(exact(self, other))))
            times.block()
    assert abs(rows[-1][1] - rows[0][1] - 3990.0) < 1e-3
    assert times._anchor.at > 3000.0


def test_spans_of_a_thread_go_to_a_track_of_its_gpu(gpu, monkeypatch):
    """Where the device is a GPU, `block` has spans timed there: steps in every block, layers in one of a few."""
    recording = profile.start("layer")
    track = profile._track()
    rows = recording.track("GPU of MainThread")
    track.ring.gpu = GpuTimes(gpu.event, lambda row: rows.ring.write(*row), clock=lambda: gpu.host)
    for _ in range(EVERY + 1):
        with profile.block(), profile.timed("denoise"):
            with profile.span("layer", layer=1):
                gpu.work(0.5)
            gpu.host += 1.0
    names = [row[0] for row in rows.kept()]
    assert names.count("denoise") >= EVERY - 1 and 1 <= names.count("layer") <= 2
    assert [row[3] for row in rows.kept() if row[0] == "layer"] == [2] * names.count("layer")


def test_a_thread_without_blocks_looks_at_its_events_as_its_next_span_begins(gpu, monkeypatch):
    recording = profile.start("block")
    track, device = profile._track(), torch.device("cuda")
    rows = recording.track("GPU of MainThread")

    def use_gpu(track):
        track.ring.gpu = GpuTimes(gpu.event, lambda row: rows.ring.write(*row), clock=lambda: gpu.host)

    monkeypatch.setattr(profile, "_use_gpu", use_gpu)
    for number in range(3):
        with profile.timed("pictures", device, block=number):
            gpu.work(0.5)
        gpu.host += 1.0
    assert [(row[0], row[4]) for row in rows.kept()] == [("pictures", {"block": 0}), ("pictures", {"block": 1})]
    assert track.ring.count == 3
