"""The tiny world, profiled: all that a block is made of is there, the numbers are right, and the frames the same."""

import dataclasses
import json
import shutil
import subprocess
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import inferix
from inferix import World, profile
from inferix.models import load_model
from inferix.profile.overhead import overhead
from inferix_kernels import KVStore, Policy

BROWSER = shutil.which("chromium")
BLOCKS = 8


def opened():
    """A tiny world whose first block takes no more steps than the others, so that it is there at once."""
    model = load_model("tiny")
    model.adapter = dataclasses.replace(model.adapter, first_times=())
    return World(model, seed=3)


def run(level, blocks=BLOCKS):
    """(frames, what was recorded, seconds by our own clock); blocks are made as the page does, clean pass apart."""
    world = opened()
    world.step(action="up", prompt="desert day")
    with profile.Profiling(level) if level else nullcontext() as made:
        frames, began = [], profile.clock()
        for _ in range(blocks):
            frames.append(world.step(action="right"))
            world.commit_pending()
        seconds = profile.clock() - began
    return np.stack(frames), made and made.snapshot(), seconds


@pytest.fixture(scope="module")
def detailed():
    return run("layer")


def test_a_block_has_all_its_parts(detailed):
    _, taken, _ = detailed
    made = profile.summary(taken)
    layers = load_model("tiny").layers
    number = {name: each["number"] for name, each in made["spans"].items()}
    assert number.pop("wait for pictures", 0) <= BLOCKS, "one that nobody waits for has no span"
    assert made["others"]["pictures"]["number"] == BLOCKS, "on a thread of their own"
    # In each row the three steps of its block and the clean pass of the one before, which stops in the last layer.
    whole = (3 * layers + layers - 1) * BLOCKS
    assert number == {
        "block": BLOCKS,
        "conditioning": BLOCKS,
        "denoise": BLOCKS,
        "finite check": BLOCKS,
        "profiler": BLOCKS - 1,
        "clean pass": BLOCKS,
        "step": 3 * BLOCKS,
        "layer": whole + BLOCKS,
        "prologue": whole + BLOCKS,
        "attention": whole,
        "cross-attention": whole,
        "linear": 4 * whole + BLOCKS + 3 * BLOCKS,  # and the head's
        "elsewhere": 0,
    }
    assert made["frames"] == 3 * BLOCKS and not made["lost"]


def test_shares_add_up_to_the_time_that_passed(detailed):
    _, taken, seconds = detailed
    (process,) = taken["processes"]
    rows = process["blocks"]["rows"]
    own = sum(each[0] for row in rows for each in row["spans"].values())
    last = process["sums"]["clean pass"][1] / BLOCKS  # one comes after the last row
    assert abs(own + last - seconds) < 0.02 * seconds + last / 2
    made = profile.summary(taken)
    assert abs(sum(each["share"] for each in made["spans"].values()) - 1) < 0.02
    assert made["spans"]["elsewhere"]["share"] < 0.02 and made["spans"]["block"]["share"] < 0.05


def test_pages_are_counted_as_the_store_moves_them(detailed):
    _, taken, _ = detailed
    made = profile.summary(taken)
    model = load_model("tiny")
    layers, frames = model.layers, 3 * (BLOCKS + 1)  # the first block's clean pass was pending
    counts = made["counts"]
    assert counts["pages committed int8"] == layers * frames, "a frame of the tiny world is a page"
    # A block sees a window, its own frames included: three blocks. At its last row a world holds two and makes one.
    assert made["metrics"]["frames held"] == 6 and counts["pages evicted"] == layers * (frames - 9)
    window = [min(9, 3 * (block + 1)) for block in range(BLOCKS + 1)]
    assert counts["pages read"] == 3 * layers * sum(window[1:]) + (layers - 1) * sum(window)
    assert made["metrics"]["KV bytes int8"] > 0


@pytest.mark.parametrize("level", ["off", "block"])
def test_frames_are_the_same_at_every_level(detailed, level):
    frames, taken, _ = run(None if level == "off" else level, 3)
    assert (frames == detailed[0][:3]).all()
    if level == "block":
        names = set(profile.summary(taken)["spans"]) - {"wait for pictures"}
        assert names == {"block", "conditioning", "denoise", "finite check", "clean pass", "profiler", "elsewhere"}


def test_pictures_are_timed_on_their_thread_and_waiting_for_them_where_it_waits():
    world = opened()
    held = threading.Event()
    with profile.Profiling("block") as made:
        stream, beside = world.pictures.stream, []
        world.pictures.stream = lambda latents: held.wait(60) and stream(latents)
        world.pictures.stream.looks_back = False
        coming = world.advance(action="up", prompt="desert day")
        (row,) = made.recording.blocks.kept  # ends with `advance`, not with the pictures
        beside.append(threading.Thread(target=coming.result, name="viewer"))
        beside[0].start()
        held.set()
        assert len(coming.result()) == row.frames == 3
        beside[0].join()
    assert "pictures" not in row.spans and not world.pictures.coming.spoiled
    spans = {track.name: [each[0] for each in track.kept()] for track in made.recording.tracks}
    assert spans["inferix-pictures_0"] == ["pictures"]
    assert "pictures" not in spans["MainThread"] and set(spans.get("viewer", [])) <= {"wait for pictures"}


def test_a_video_is_profiled(tmp_path, capsys):
    folder = tmp_path / "out"
    video = inferix.generate(seconds=0.5, out=tmp_path / "a.mp4", profile=folder)
    taken, made = profile.read(folder), json.loads((folder / "summary.json").read_text())
    assert made["frames"] == 9 and video.frames == 8 and {"layer", "attention"} <= set(made["spans"])
    assert {"encode", "pictures"} <= set(made["others"]), "beside the blocks"
    denoise = [row["spans"]["denoise"][1] for row in taken["processes"][0]["blocks"]["rows"]]
    assert video.summary["first_block_seconds"] == denoise[0], "one measurement, not two"
    assert video.summary["fps"] == pytest.approx(8 / sum(denoise))
    (tmp_path / "file").touch()
    assert inferix.generate(seconds=0.1, out=tmp_path / "b.mp4", profile=tmp_path / "file").frames == 2
    assert "the profile of this run is lost" in capsys.readouterr().err and (tmp_path / "b.mp4").exists()


def test_a_video_is_whole_whatever_becomes_of_its_profile(tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("inferix.profile.session.written_or_said", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inferix.generate(seconds=0.1, out=tmp_path / "a.mp4", profile=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"], "no journal of an unfinished one"


def test_frames_that_move_are_counted():
    store = KVStore(
        layers=2, heads=1, head_dim=16, frame_tokens=20, block_frames=1, page_size=16,
        pools={"int8": 6, "int4": 4}, host={"int8": 4},
    )  # fmt: skip
    table, (k, v) = store.open(Policy(window=4)), torch.randn(2, 20, 1, 16)
    recording = profile.start("block")
    for _ in range(5):
        block = table.open_block(1)
        clean = table.plan([block], commit=block)
        for layer in range(2):
            clean.append(layer, k, v)
        table.seal(block)
    frame = 2 * 2  # layers, pages of a frame
    table.convert([2], "int4")
    table.offload([3])
    store.sync_copies()
    table.prefetch([3])
    assert recording.counts() == {
        "pages committed int8": 5 * frame,
        "pages evicted": frame,
        "pages converted": frame,
        "pages offloaded": frame,
        "pages prefetched": frame,
    }


def test_torch_looks_at_some_blocks(tmp_path):
    world = opened()
    with profile.profiling("layer", folder=tmp_path, torch_blocks=5):  # it ends with the recording, if not before
        for _ in range(3):
            world.step(action="up", prompt="desert day")
    names = {event.get("name") for event in json.loads((tmp_path / "kernels.json").read_text())["traceEvents"]}
    assert {"layer", "attention", "aten::linear"} <= names
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        profile.kernels(0, tmp_path)


def test_the_overhead_is_measured_in_turns():
    calls = []

    def step():
        calls.append(profile.level())
        sum(range(20_000))

    (cost,) = overhead(step, ["layer"], width=10.0, blocks=1)
    assert calls[:4] == ["off", "off", "off", "layer"] and cost.interval.rounds == 21
    assert 0.2 < cost.interval.low <= cost.interval.ratio <= cost.interval.high < 5
    assert cost.width <= 10.0 and "level layer: " in str(cost)


@pytest.mark.skipif(not BROWSER, reason="needs Debian's chromium, which is not here")
def test_the_report_looks_like_this(detailed, tmp_path, request):
    """With --screenshot FILE, the picture in docs/profile.md."""
    from PIL import Image

    _, taken, _ = detailed
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(profile.report(taken, "The tiny world"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/user"]
    # Nothing but the file itself can be reached.
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1300,1900", f"--screenshot={picture}"]
    subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, timeout=60, check=True)
    shown = Image.open(picture).convert("RGB")
    colours = {colour for _, colour in shown.getcolors(1 << 24)}
    for wanted in ("#e8a33d", "#3fa7a0", "#6c7ae0"):
        assert tuple(bytes.fromhex(wanted[1:])) in colours, "spans are drawn"
    if keep := request.config.getoption("--screenshot"):
        shown.save(Path(keep), optimize=True)
