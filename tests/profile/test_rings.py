"""Spans and rings of the extension: as Python's, of the right thread, and freed."""

import ast
import gc
import inspect
import math
import random
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from inferix_kernels import _recording, _spans, profile
from inferix_kernels._ring import Ring


def nested(generator, depth=0, now=0.0):
    """Spans within each other as they end, (name, start, end, depth, args), now and then one that is lost."""
    start = now
    for _ in range(generator.randrange(3) if depth < 70 else 0):
        now += generator.random()
        now = yield from nested(generator, depth + generator.choice([1, 1, 1, 2]), now)
    end = now + generator.random()
    if generator.random() < 0.9:
        yield generator.choice("abcde"), start, end, depth, generator.choice([{}, {"layer": depth}])
    return end


@pytest.mark.parametrize("seed", range(20))
def test_a_ring_keeps_and_adds_up_as_pythons_does(seed):
    generator = random.Random(seed)
    ours, theirs = _spans.Ring(64, 1), Ring(64, 1)
    for row in (row for i in range(12) for row in nested(generator, generator.choice([0, 60]), 100.0 * i)):
        for ring in (ours, theirs):
            ring.write(*row)
        if generator.random() < 0.02:
            assert ours.take() == theirs.take()
    assert ours.kept() == theirs.kept() and ours.count == theirs.count
    assert ours.take() == theirs.take() and ours.take() == ({}, 0, None)


@pytest.mark.parametrize("make", [Ring, _spans.Ring])
def test_a_ring_refuses_what_it_cannot_hold(make):
    for capacity in (0, -4, 12):
        with pytest.raises(ValueError, match=f"capacity must be a power of two, got {capacity}"):
            make(capacity, 1)


@pytest.mark.parametrize("make", [Ring, _spans.Ring])
def test_what_is_open_lies_within_each_other(make):
    ring, spans = make(4, 1), [object() for _ in range(200)]
    for span in spans:
        ring.push(span)
    ring.remove(spans[100])
    assert ring.open == spans[:100] + spans[101:] and ring.depth == 199
    assert [ring.pop() for _ in range(199)] == (spans[:100] + spans[101:])[::-1]
    with pytest.raises(IndexError):
        ring.pop()
    with pytest.raises(ValueError):
        ring.remove(spans[100])
    assert ring.open == [] and ring.depth == 0


def test_the_extension_refuses_what_it_cannot_read():
    ring = _spans.Ring(4, 1)
    for wrong in ((), ("x", 0.0, 1.0, 0), ("x", "0", 1.0, 0, {}), (3, 0.0, 1.0, 0, {}), ("x", 0.0, 1.0, -1, {})):
        with pytest.raises(TypeError):
            ring.write(*wrong)
    for wrong in ((ring,), (Ring(4, 1), 1), (ring, "1"), (ring, -1)):
        with pytest.raises((TypeError, OverflowError)):
            profile._fast.adopt(*wrong)
    assert ring.count == 0 and ring.kept() == []


def test_the_common_case_is_the_extensions_and_all_else_the_references():
    """Of a thread whose ring is known, and of numbers that it has given before."""
    recording, asked = profile.start("layer"), []

    def made(kind):
        return _spans.Function(profile._fast, kind, lambda *given, **args: asked.append((kind, *given, args)))

    span, timed, count, metric = map(made, ("span", "timed", "count", "metric"))
    count("n", 1), metric("m", 1)
    assert asked == [("count", "n", 1, {}), ("metric", "m", 1, {})], "no thread's ring is known yet"
    profile.count("n", 1), profile.metric("m", 1)
    with span("a", layer=3), timed("b", None, step=1):
        count("n", 2), count("n", 0.5), metric("m", 7)
    assert len(asked) == 2 and recording.counts() == {"n": 3.5} and recording.values() == {"m": 7}
    assert [(row[0], row[3], row[4]) for row in recording.tracks[0].kept()] == [
        ("b", 1, {"step": 1}),
        ("a", 0, {"layer": 3}),
    ]
    others = [lambda: span(3), lambda: timed(3, None), lambda: timed("b", device=3), lambda: timed("b", where=[])]
    others += [lambda wrong=wrong: count("n", wrong) for wrong in (True, "3", math.nan, math.inf, 1 << 63, -(10**400))]
    others += [
        lambda: count("n"),
        lambda: count("new", 1),
        lambda: metric("n", 1),
        lambda: metric(3, 1),
        lambda: metric("m"),
    ]
    for number, other in enumerate(others, 3):
        other()
        assert len(asked) == number
    assert recording.counts() == {"n": 3.5} and recording.values() == {"m": 7} and not recording.problems()
    with pytest.raises(ValueError, match="kind must be span, timed, count or metric, got block"):
        _spans.Function(profile._fast, "block", print)


def test_times_are_those_of_the_machines_clock():
    recording, times = profile.start("layer"), []
    profile.span("the first one, which is Python's").__exit__()
    times.append(time.perf_counter())
    with profile.span("x"):
        times.append(time.perf_counter())
        times.append(time.perf_counter())
    times.append(time.perf_counter())
    _, start, end, _, _ = recording.tracks[0].kept()[-1]
    assert times[0] <= start <= times[1] <= times[2] <= end <= times[3]


@pytest.mark.usefixtures("spans")
def test_a_span_that_somebody_holds_is_not_used_again(clock):
    recording = profile.start("layer")
    for _ in range(2):
        ended = profile.span("a")
        ended.__exit__(None, None, None)
        with profile.span("b"):
            ended.__exit__(None, None, None)
            clock.now += 1
    assert recording.problems() == ["'a' was closed without being open: 2"]
    assert [row[0] for row in recording.tracks[0].kept()] == ["a", "b", "a", "b"]


def test_a_ring_that_was_looked_up_before_a_recording_began_is_none_of_it():
    number, old = profile._fast.number(), _spans.Ring(4, threading.get_ident())
    recording = profile.start("layer")
    profile._fast.adopt(old, number)  # as a thread does that was interrupted just then
    with profile.span("x"):
        pass
    assert old.count == 0 and [row[0] for row in recording.tracks[0].kept()] == ["x"]


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize("level", ["off", "layer"])
def test_spans_are_contexts_to_an_exit_stack(level):
    recording = profile.start(level)
    with ExitStack() as stack:
        for name in "ab":
            stack.enter_context(profile.span(name))
    assert [row[0] for track in recording.tracks for row in track.kept()] == ([] if level == "off" else ["b", "a"])


@pytest.mark.usefixtures("spans")
def test_spans_may_be_deeper_than_their_own_times_are_told_apart(clock):
    recording = profile.start("layer")
    for _ in range(2):
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(profile.span("x"))
            clock.now += 1
    assert [row[3] for row in recording.tracks[0].kept()] == 2 * [*range(99, -1, -1)] and not recording.problems()
    recording.collect()
    assert recording.sums["x"][1:] == (200.0, 200)


@pytest.mark.usefixtures("spans")
def test_each_thread_writes_to_its_own_ring_while_others_add_up():
    recording, number = profile.start("layer", capacity=1 << 14), 3000

    def work():
        for i in range(number):
            with profile.span("outer", i=i), profile.span("inner"):
                pass

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        recording.collect()
    recording.collect()
    assert [track.ring.count for track in recording.tracks] == 3 * [2 * number]
    assert {name: each.number for name, each in recording.sums.items()} == {"inner": 3 * number, "outer": 3 * number}
    assert not recording.problems()


@pytest.mark.usefixtures("spans")
def test_a_recording_is_freed_whatever_is_open():
    def rings():
        gc.collect()
        return sum(isinstance(each, _recording.Ring) for each in gc.get_objects())

    before = rings()
    for _ in range(3):
        profile.start("layer")
        with profile.span("x", layer=3):
            profile.span("left open")
        profile.span("open")
        profile.stop()
    assert rings() <= before + 1, "of the last recording, which this thread's track is of"
    profile.start("layer")
    with profile.span("of a new one"):
        pass
    assert len(profile.stop().tracks[0].kept()) == 1


def test_the_stub_has_what_the_extension_has():
    stub = Path(_spans.__file__).with_name("_spans.pyi")
    for kind in ast.parse(stub.read_text()).body:
        if isinstance(kind, ast.ClassDef):
            said = {x.target.id if isinstance(x, ast.AnnAssign) else getattr(x, "name", None) for x in kind.body}
            there = {name for name in vars(getattr(_spans, kind.name)) if not name.startswith("__")}
            assert {name for name in said if name and not name.startswith("__")} == there


def test_span_is_a_documented_function():
    assert inspect.isroutine(profile.span) and profile.span.__qualname__ == "span"
    assert str(inspect.signature(profile.span)).startswith("(name: 'str', **args: 'Any')")
    assert "Example:" in inspect.getdoc(profile.span)
    assert type("C", (), {"span": profile.span})().span is profile.span


def test_without_the_extension_spans_are_pythons_and_so_are_pythons_own_profilers():
    """Our module is called profile, as one of Python's is, which cProfile imports."""
    code = (
        "import sys; sys.modules['inferix_kernels._spans'] = None\n"
        "from inferix_kernels import profile as ours\n"
        "recording = ours.start('layer')\n"
        "with ours.span('x', layer=3): pass\n"
        "print(type(recording.tracks[0].ring).__module__, recording.tracks[0].kept()[0][4], ours._fast)\n"
        "import inferix.profile, cProfile, profile; print(profile.__file__, profile.Profile)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = said.stdout.splitlines()
    assert lines[0] == "inferix_kernels._ring {'layer': 3} None", said.stderr
    assert "inferix" not in lines[1] and "profile.Profile" in lines[1]
