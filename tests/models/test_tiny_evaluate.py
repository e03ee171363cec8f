"""The evaluation, with the simulator in the model's place: it passes, and a world that stands still does not."""

from __future__ import annotations

import functools
import json
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inferix.models.tiny.evaluate import (
    CHANGE_EVERY,
    CONTEXT,
    HELD_OUT,
    SHEET_COLUMNS,
    SPEED_GATES,
    START_GATES,
    main,
    measure_speed,
    run_stream,
    run_streams,
    start_from_nothing,
)
from inferix.models.tiny.measures import GATES, Summary, summarise, true_video, verdict
from inferix.models.tiny.report import HEADER, ROWS, Report
from inferix.models.tiny.simulator import SIZE, Simulator, parse_theme

FRAMES = 65  # not a whole number of blocks, and one change of theme


class Oracle:
    """Goes on exactly as the simulator does, and insists on being asked for it; it has no weights, and no pages."""

    def __init__(self, seed: int, kv: str = "int8", weights: str | None = None, linear: str | None = None):
        self.seed, self.at, self.prompt = seed, 0, ""

    def observe(self, frames: np.ndarray, actions: Sequence[int | str], prompt: str | None = None) -> None:
        self.truth = true_video(self.seed, CONTEXT + 90, change_every=CHANGE_EVERY, start=CONTEXT)
        self.at, self.prompt = len(frames), prompt or self.prompt
        assert self.at == CONTEXT == 6 and (frames == self.truth.frames[:6]).all()
        assert list(actions) == self.truth.actions[:6].tolist()

    def step(self, actions: Sequence[int | str] | None = None, prompt: str | None = None) -> np.ndarray:
        self.prompt = prompt or self.prompt
        if not self.at:
            return self.room()
        start, self.at = self.at, self.at + 3
        assert list(actions or ()) == self.truth.actions[start : self.at].tolist()
        assert (self.truth.themes[start] == parse_theme(self.prompt)).all()
        return self.truth.frames[start : self.at]

    def room(self) -> np.ndarray:
        world = Simulator(1, np.random.default_rng(self.seed))
        world.theme[0] = parse_theme(self.prompt)
        return np.repeat(world.render(), 3, 0)


class Statue(Oracle):
    """Shows the last true frame forever, and floor alone when it starts from nothing."""

    def step(self, actions: Sequence[int | str] | None = None, prompt: str | None = None) -> np.ndarray:
        return self.truth.frames[[self.at - 1] * 3] if self.at else np.zeros((3, SIZE, SIZE, 3), np.uint8)


def run(*arguments: str, factory: Any = Oracle) -> int:
    return main(["--frames", str(FRAMES), "--seeds", "2", *arguments], factory=factory)


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this one happens to be is measured by the evaluation, not by its tests."""
    speed = {"first_frame": 1.0, "fps": 40.0, "block_seconds_p50": 0.07, "block_seconds_p95": 0.08}
    values = {name: Summary(value, ()) for name, value in speed.items()}
    monkeypatch.setattr("inferix.models.tiny.evaluate.measure_speed", lambda opened: values)


@pytest.mark.usefixtures("quick_machine")
def test_the_simulator_passes_and_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", str(tmp_path / "e.json"), "--sheet", str(tmp_path / "e.png"), "--markdown") == 0
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["passed"] and len(written["gates"]) == len(GATES) + len(START_GATES) + len(SPEED_GATES)
    assert all(gate["passes"] for gate in written["gates"])
    assert (written["frames"], written["seeds"], written["context_frames"], written["kv"]) == (FRAMES, 2, 6, "int8")
    assert written["measures"]["player_once"] == {"all": 1.0, "fifths": [1.0] * 5}
    assert written["measures"]["block_seconds_p95"]["all"] > 0
    sheet = Image.open(tmp_path / "e.png")
    assert sheet.width > SHEET_COLUMNS * 2 * SIZE and sheet.height > 2 * 2 * 2 * SIZE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == len(HEADER) + 1 and "missed" not in "".join(lines)
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(ROWS)
    assert "2 held-out seeds x 65 frames, 6 true frames to start from, int8 pages" in lines[-1]


@pytest.mark.usefixtures("quick_machine")
def test_a_world_that_stands_still_misses_its_gates(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(factory=Statue) == 1
    missed = capsys.readouterr().err
    for name in ("both boats moving", "action followed, moving", "from nothing: player exactly once", "theme right"):
        assert f"missed: {name}" in missed or f"missed: from nothing: {name}" in missed
    assert "missed: player exactly once" not in missed and "frames per second" not in missed


def test_a_stream_is_cut_to_its_length_and_changes_theme() -> None:
    told: list[int] = []
    stream = run_stream(Oracle, HELD_OUT, FRAMES, told.append)
    assert len(stream.measures.psnr) == FRAMES == sum(told)
    assert np.isnan(stream.measures.theme_right[CHANGE_EVERY : CHANGE_EVERY + 3]).all()
    assert np.nanmin(stream.measures.theme_right) == 1
    assert stream.pictures.shape == (2, SHEET_COLUMNS, SIZE, SIZE, 3)
    assert (stream.pictures[0] == stream.pictures[1]).all()
    assert len({label.split(": ")[1] for label in stream.labels}) == 2
    assert verdict(summarise([stream.measures])) == []


def test_streams_come_in_order_from_several_processes() -> None:
    opened = functools.partial(Oracle, kv="int8")
    streams = run_streams(opened, range(3), 30, jobs=2)
    assert [stream.seed for stream in streams] == [0, 1, 2]
    assert (streams[2].pictures == run_stream(opened, 2, 30).pictures).all()


def test_starts_from_nothing_are_judged_by_what_they_show() -> None:
    good, bad = start_from_nothing(Oracle), start_from_nothing(Statue)
    assert verdict(good, START_GATES) == [] and all(summary.overall == 1 for summary in good.values())
    assert verdict(bad, START_GATES) == list(START_GATES)


def test_speed_counts_from_the_start_of_a_process(
    monkeypatch: pytest.MonkeyPatch, quick_processes: Callable[[str], BaseContext]
) -> None:
    """Of its own, and a fresh one."""
    monkeypatch.setattr(multiprocessing, "get_context", quick_processes)
    speed = measure_speed(Oracle)
    assert all(0 < summary.overall < float("inf") for summary in speed.values())
    assert speed["first_frame"].overall > 0.05, "an interpreter alone takes that long"
    assert speed["fps"].overall > 100 and set(speed) == {"first_frame", "fps", "block_seconds_p50", "block_seconds_p95"}


def test_a_table_says_what_is_missed_and_what_has_no_data() -> None:
    summary = {measure: Summary(0.5, (0.5,) * 5) for measure, _, _ in ROWS}
    summary["player_once"] = Summary(0.9899, (1.0, 1.0, 1.0, 1.0, 0.95))
    summary["inside_wall"] = Summary(float("nan"), (float("nan"),) * 5)
    report = Report({"seeds": 1, "frames": 9, "context_frames": 6, "kv": "int8", "machine": "m"}, summary, GATES)
    rows = {row[0]: row for row in report.rows()}
    assert rows["player exactly once"][1:] == (
        *("98.99 %", "100.00", "100.00", "100.00", "100.00", "95.00"),
        *(">= 99 %, drop <= 2", "NO"),
    )
    assert rows["player inside a wall"][-1] == "NO" and rows["player inside a wall"][1] == "- %"
    assert rows["PSNR"][-2:] == ("", "")
    assert report.json()["measures"]["inside_wall"]["all"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frames", "0"), "--frames must be at least 15, got 0"),
        (("--seeds", "-1"), "--seeds must be at least 1, got -1"),
        (("--starts", "0"), "--starts must be at least 1, got 0"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--json", "/nowhere/e.json"), "--json: cannot write '/nowhere/e.json': No such file or directory"),
        (("--sheet", "/nowhere/e.png"), "--sheet: cannot write '/nowhere/e.png': No such file or directory"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"evaluate: {message}\n" and captured.out == ""


def test_every_measure_of_the_table_can_be_had() -> None:
    stream = run_stream(Oracle, HELD_OUT, 30)
    names = {*summarise([stream.measures]), *start_from_nothing(Oracle), "fps", "first_frame"}
    assert names == {measure for measure, _, _ in ROWS}
