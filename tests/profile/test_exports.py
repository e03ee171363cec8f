"""What is made of a recording: numbers that add up, a trace that is one, a page that needs nothing."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from inferix import profile
from inferix.profile.session import write
from inferix.profile.summary import ELSEWHERE
from inferix.profile.svg import number, ticks
from inferix_kernels import profile as kernels_profile
from tests.profile.runs import recorded

SYSTEM = [(100.0 + 0.1 * i, {"CPU %": 50.0 + i, "resident bytes": 2.0**30}) for i in range(8)]


@pytest.fixture
def taken(clock):
    return recorded(clock, system=SYSTEM)


def test_the_package_has_the_kernels_functions():
    for name in set(kernels_profile.__all__) & set(profile.__all__):
        assert getattr(profile, name) is getattr(kernels_profile, name)


def test_a_snapshot_is_json(taken):
    assert json.loads(json.dumps(taken, allow_nan=False)) == json.loads(json.dumps(taken))


def test_numbers_add_up(taken):
    made = profile.summary(taken)
    assert (made["blocks"], made["frames"]) == (30, 90)
    assert made["seconds"] == pytest.approx(30 * 20e-3 + 29 * 2e-3 + 20 * 0.03e-3, rel=1e-6)
    assert math.isclose(sum(each["share"] for each in made["spans"].values()), 1.0, rel_tol=1e-9)
    spans = made["spans"]
    assert list(spans)[-1] == ELSEWHERE and spans[ELSEWHERE]["own_seconds"] == pytest.approx(29 * 2e-3)
    assert spans["step"]["own_seconds"] == pytest.approx(30 * 10e-3) and spans["step"]["number"] == 60
    assert spans["step"]["seconds"] == pytest.approx(30 * 14e-3, rel=0.01)
    assert spans["denoise"]["own_seconds"] == pytest.approx(0, abs=1e-9)
    assert made["block"]["p50"] == pytest.approx(20e-3, rel=0.01)
    assert made["fps"] == pytest.approx(90 / made["seconds"])
    assert made["counts"] == {"pages read": 360} and made["metrics"] == {"KV bytes int8": 10 * 2**20}
    assert made["others"]["send"] == {"own_seconds": pytest.approx(4e-3), "seconds": pytest.approx(4e-3), "number": 2}
    assert made["system"]["world"]["CPU %"] == {"last": 57.0, "largest": 57.0} and made["lost"] == []


def test_a_recording_without_blocks_is_no_error(clock):
    recording = profile.start("block")
    profile.stop()
    taken = profile.snapshot(recording)
    assert profile.summary(taken)["blocks"] == 0 and "No block was recorded" in profile.report(taken)
    assert json.loads(profile.trace(taken))["traceEvents"]


def test_a_trace_is_one(taken):
    events = json.loads(profile.trace(taken))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == 30 * 8 and {event["tid"] for event in slices} == {1}
    stack = []
    for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
        while stack and stack[-1] <= event["ts"] + 1e-3:
            stack.pop()
        assert not stack or event["ts"] + event["dur"] <= stack[-1] + 2e-3, "slices lie within each other"
        stack.append(event["ts"] + event["dur"])
    assert {event["args"]["step"] for event in slices if event["name"] == "step"} == {0, 1}
    begun, ended = ([event for event in events if event["ph"] == phase] for phase in "be")
    assert len(begun) == len(ended) == 2 and {event["id"] for event in begun} == {event["id"] for event in ended}
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert counters == {"pages read", "KV bytes int8", "CPU %", "resident bytes"}
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["world", "MainThread", "viewers"]


class Tags(HTMLParser):
    """Whether tags are closed, and what the page would fetch."""

    VOID = ("meta", "line", "circle", "rect", "polygon")

    def __init__(self):
        super().__init__()
        self.open, self.names, self.fetched = [], [], []

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_and_shows_all(taken):
    page = profile.report(taken, "tiny <world>")
    tags = Tags()
    tags.feed(page)
    assert not tags.open and not tags.fetched and not {"script", "link", "img", "iframe"} & set(tags.names)
    assert "@import" not in page and "url(" not in page and "tiny &lt;world&gt;" in page
    assert tags.names.count("svg") == 6
    for word in ("One block", "Where the time goes", "Pace", "Memory", "attention", "pages read", "elsewhere", "p99"):
        assert word in page
    assert not re.search(r"\bnan\b|\binf\b", page)


def test_names_cannot_break_the_page_or_the_trace(clock):
    recording = profile.start("layer")
    for _ in range(2):
        with kernels_profile.block() as block:
            with profile.span('<script>alert("x")</script>', text="</title><b>"):
                clock.now += 1
            block.frames = 1
        profile.metric("<i>bytes", 1)
    profile.stop()
    taken = profile.snapshot(recording)
    page = profile.report(taken)
    assert "<script" not in page and "<i>bytes" not in page and "<b>&" not in page and "</title><b>" not in page
    assert len(json.loads(profile.trace(taken))["traceEvents"]) > 4


def test_a_trace_is_json_whatever_the_arguments_are(clock):
    recording = profile.start("layer")
    with profile.span("loss", now=float("nan"), most=float("inf"), step=3, kind="x"):
        clock.now += 1
    profile.stop()
    events = json.loads(profile.trace(profile.snapshot(recording)), parse_constant=pytest.fail)["traceEvents"]
    assert [event["args"] for event in events if event["name"] == "loss"] == [
        {"now": "nan", "most": "inf", "step": 3, "kind": "x"}
    ]


def test_axes_have_round_numbers():
    assert ticks(0, 97) == [0, 20, 40, 60, 80] and ticks(0, 0.0031)[1] == pytest.approx(0.001)
    assert ticks(3, 3) == [3] and ticks(0, math.inf) == [0]
    assert [number(x) for x in (0, 0.1234, 12.34, 1234, 43_210, 1.2e6, 3.4e9)] == [
        "0", "0.123", "12.3", "1234", "43.2k", "1.2M", "3.4G",
    ]  # fmt: skip


def test_what_was_lost_is_said_on_the_page_and_in_the_numbers(clock):
    taken = recorded(clock, capacity=64)
    line = "MainThread: the oldest 176 spans, as the ring holds 64"
    assert profile.summary(taken)["lost"] == [line] and line in profile.report(taken)
    assert profile.summary(taken)["spans"]["step"]["number"] == 60, "rows have all of them"


# Several processes


def test_two_processes_are_on_one_clock(clock):
    one, two = (recorded(clock, blocks=2, name=f"rank {i}", system=SYSTEM) for i in range(2))
    two["processes"][0]["unix"] += 0.5
    both = profile.merge([one, two], names=["first"])
    events = json.loads(profile.trace(both))["traceEvents"]
    first = {pid: min(e["ts"] for e in events if e["ph"] == "X" and e["pid"] == pid) for pid in (1, 2)}
    assert first[2] - first[1] == pytest.approx(0.5e6, abs=1)
    assert [p["name"] for p in both["processes"]] == ["first", "rank 1"]
    assert profile.summary(both)["frames"] == 12 and "rank 1" in profile.report(both)
    aligned = profile.merge([one, two], align="pictures")["processes"]
    assert aligned[1]["unix"] - aligned[0]["unix"] == pytest.approx(0, abs=1e-6)
    assert two["processes"][0]["unix"] == 1_000_000.5, "what was given is as it was"
    with pytest.raises(ValueError, match="align must be a span of every process, got 'barrier', which rank 0 has not"):
        profile.merge([one, two], align="barrier")


# On disk


def test_written_and_read_again(taken, tmp_path):
    paths = write(taken, tmp_path / "a" / "b")
    assert {path.name for path in paths} == {"report.html", "summary.json", "trace.json", "recording.json"}
    assert profile.read(tmp_path / "a" / "b") == json.loads(json.dumps(taken))
    for bad in ("nowhere", "summary.json"):
        with pytest.raises(ValueError, match="path must be that of a recording, or of its folder, got"):
            profile.read(tmp_path / "a" / "b" / bad)


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with profile.profiling("block", folder=file / "under"), profile.block() as block:
        block.frames = 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the profile of this run is lost" in said and str(file / "under") in said
    with pytest.raises(ValueError, match="profile: cannot write"):
        write(profile.snapshot(kernels_profile._recording or profile.start()), file)


def test_a_full_disk_ends_nothing(small_disk, taken, capsys):
    from inferix.profile.session import written_or_said

    small_disk.fill()
    assert written_or_said(taken, small_disk.folder / "out", "title") == []
    assert "no space left" in capsys.readouterr().err
    assert not [path for path in small_disk.folder.rglob("*") if path.suffix == ".part"]


def test_one_recording_serves_two_who_ask(tmp_path):
    outer = profile.Profiling("block")
    with profile.profiling("layer", folder=tmp_path) as inner:
        assert inner.recording is outer.recording and profile.level() == "layer"
        with profile.block():
            pass
    assert profile.level() == "block" and profile.recording() is outer.recording
    assert profile.read(tmp_path)["processes"][0]["blocks"]["seen"] == 1
    outer.stop()
    assert profile.recording() is None
    with pytest.raises(ValueError, match="level must be one of"):
        profile.Profiling("all")


# Comparing


def test_what_became_slower_is_named(clock):
    changes = profile.compare(recorded(clock), recorded(clock, attention=2.5, more=2e-3))
    found = {change.name: change for change in changes}
    assert changes[0].name == "whole block" and [c.name for c in changes[1:3]] == ["pictures", "attention"]
    assert found["attention"].verdict == "SLOWER" and found["attention"].interval.ratio == pytest.approx(1.25, rel=0.01)
    assert found["attention"].more == pytest.approx(1e-3, rel=0.05)
    assert found["step"].verdict == "FASTER" and found[ELSEWHERE].verdict == "SAME"
    assert {c.verdict for c in profile.compare(recorded(clock), recorded(clock))} == {"SAME"}


def test_a_part_that_only_one_has_and_too_little_to_compare(clock):
    one, two = recorded(clock), recorded(clock)
    for row in two["processes"][0]["blocks"]["rows"]:
        row["spans"]["VAE"] = row["spans"].pop("pictures")
    found = {change.name: change.verdict for change in profile.compare(one, two)}
    assert found["VAE"] == "NEW" and found["pictures"] == "GONE"
    with pytest.raises(ValueError, match="b must have two blocks after its first one, got 1"):
        profile.compare(one, recorded(clock, blocks=2))


def test_two_folders_are_compared_by_a_command(clock, tmp_path, capsys):
    from inferix.profile.__main__ import main

    for name, attention in (("a", 2.0), ("b", 3.0)):
        write(recorded(clock, attention=attention), tmp_path / name)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert re.search(r"^attention +4\.\d+ +6\.\d+ +1\.49\d .*SLOWER$", capsys.readouterr().out, re.MULTILINE)
    assert main([str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert "path must be that of a recording" in capsys.readouterr().err
