"""Two videos compared: the numbers by hand, where they part, and what is said of videos that can not be compared."""

import doctest
import json
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
from rich.console import Console

from inferix.commands import evaluate_pair
from inferix.commands.cli import main
from inferix.evaluate import pair, perceptual, weights
from inferix.evaluate.backbones import pixels
from inferix.evaluate.pair import apart, chosen_pair_metrics, compare, parting, remarks, report, table
from inferix.evaluate.perceptual import PAIR_METRICS, luma, psnr
from inferix.evaluate.video import chunks, open_video

from .known_weights import hashed, picture

FPS = 8
PSNR = [PAIR_METRICS["psnr"]]


def write(path, frames, fps=FPS):
    """A video of these uint8 frames [T, H, W, 3], nearly lossless."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def moving(frames, seed=0):
    """uint8 [frames, 64, 96, 3]: a picture that slides by two pixels a frame."""
    still = (picture(64, 96 + 200 + 2 * frames) * 255).byte().permute(1, 2, 0).numpy()
    return np.stack([still[:, 2 * i + 90 * seed : 2 * i + 90 * seed + 96] for i in range(frames)])


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The same 40 frames, twice with faults: noise in the fourth of five chunks, and another story from frame 24 on."""
    folder = tmp_path_factory.mktemp("videos")
    frames = moving(40)
    noisy, other = frames.copy(), moving(40)
    noise = (30 * hashed("noise", (8, 64, 96, 3))).numpy()
    noisy[24:32] = np.clip(frames[24:32] + noise, 0, 255).astype(np.uint8)
    other[24:] = moving(40, seed=1)[24:, ::-1]
    made = {"reference": frames, "noisy": noisy, "other": other, "short": frames[:30]}
    return {name: write(folder / f"{name}.mp4", each) for name, each in made.items()}


def test_psnr_by_hand():
    reference = np.full((2, 4, 4, 3), 100, np.uint8)
    off = reference.copy()
    off[0] += 6  # mean square 36 in one of two frames
    assert psnr(off, reference, 8.0) == pytest.approx(10 * np.log10(255**2 / 18))
    assert psnr(reference, reference, 8.0) == 100.0


def test_luma_is_bt601():
    frames = np.array([[[[0, 0, 0], [255, 255, 255], [255, 0, 0]]]], np.uint8)
    assert luma(frames).flatten().tolist() == pytest.approx([16.0, 235.0, 81.481], abs=1e-3)


def test_the_worst_chunk_is_shown_beside_the_mean(videos):
    found = compare(videos["noisy"], videos["reference"], PSNR, number=5)
    expected = [
        psnr(a.frames, b.frames, FPS)
        for a, b in zip(*(chunks(open_video(videos[n]), 5) for n in ("noisy", "reference")))
    ]
    assert found.scores["psnr"] == expected
    facts = report(found, PSNR)["pair"]
    assert facts["worst"]["psnr"] == {"chunk": 3, "score": min(expected)} and 20 < min(expected) < 27
    assert facts["mean"]["psnr"] == pytest.approx(np.mean(expected)) and facts["mean"]["psnr"] > 35
    assert found.parted is None  # noise is not another story
    assert facts["opening"]["psnr"] > 40


def test_where_trajectories_part(videos):
    found = compare(videos["other"], videos["reference"], PSNR, number=5)
    assert found.parted == 24 and len(found.apart) == 40
    assert found.opening["psnr"] > 40  # two seconds, 16 frames
    said = remarks(report(found, PSNR))
    assert said == ["other.mp4 and reference.mp4 part at frame 24, 3.00 s"]


def test_parting_needs_half_a_second():
    assert parting([3.0] * 10, 8.0) is None
    assert parting([3.0, 30.0, 30.0, 30.0, 3.0], 8.0) is None
    assert parting([3.0, 30.0, 30.0, 30.0, 30.0], 8.0) == 1
    assert parting([], 8.0) is None


def test_a_small_figure_that_goes_elsewhere_is_another_story():
    """An eighth of the picture's width and height: PSNR hardly sees it, its cell does."""
    reference = np.full((8, 18, 32, 3), 90, np.uint8)
    moved = reference.copy()
    moved[:, 4:6, 8:12] = 200
    assert psnr(moved, reference, 8.0) > 20
    assert parting(apart(moved, reference), 8.0) == 0


def test_a_noise_floor_stands_beside(videos, tmp_path, capsys):
    out = tmp_path / "pair.json"
    floor = f"{videos['other']},{videos['reference']}"
    arguments = [str(videos["noisy"]), str(videos["reference"]), "--floor", floor, "--metrics", "psnr", "--chunks", "5"]
    assert main(["evaluate", "pair", *arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "noisy.mp4 beside reference.mp4",
        "worst chunk",
        "  floor",
        "s/frame",
        "part at frame 24",
        str(out),
    ):
        assert text in printed
    found = json.loads(out.read_text())
    assert found["pair"]["mean"]["psnr"] > found["floor"]["mean"]["psnr"]
    assert found["pair"]["seconds_per_frame"]["psnr"] >= 0
    assert table(found).row_count == 2
    Console(width=200).print(table({**found, "pair": {**found["pair"], "video": "take[final].mp4"}}))
    assert "take[final].mp4 beside" in capsys.readouterr().out, "a name is no markup"


@pytest.mark.parametrize(
    "module", [pair, perceptual, weights, pixels, evaluate_pair], ids=lambda module: module.__name__
)
def test_the_examples_run(module, videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(videos["reference"], "demo.mp4")
    failed, tried = doctest.testmod(module, extraglobs={"np": np}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["short.mp4", "reference.mp4"], "must have the frames of its reference"),
        (["reference.mp4", "absent.mp4"], "reference: cannot read"),
        (["absent.mp4", "reference.mp4"], "video: cannot read"),
        (["reference.mp4", "reference.mp4", "--metrics", "lpips"], "metrics must be of psnr, cvvdp, vmaf, got 'lpips'"),
        (["reference.mp4", "reference.mp4", "--floor", "short.mp4"], "must be two video files"),
        (["reference.mp4", "reference.mp4", "--chunks", "100"], "100 chunks need at least 100 frames, it has 40"),
        (["reference.mp4", "noisy.mp4", "--out", "noisy.mp4"], "would be written over, which is one of the videos"),
    ],
)
def test_bad_input_is_one_line(videos, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(videos["reference"].parent)
    assert main(["evaluate", "pair", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


def test_a_metric_whose_package_is_absent_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, left_out = chosen_pair_metrics(None)
    assert [metric.name for metric in found] == ["psnr"] and list(left_out) == ["cvvdp", "vmaf"]
    assert "pycvvdp, which is not installed: pip install 'inferix-kernels[evaluate]'" in left_out["cvvdp"]
    with pytest.raises(ImportError, match="vmaf needs vmaf_torch, which is not installed"):
        chosen_pair_metrics(["vmaf"])


def test_a_metric_that_refuses_the_frames_leaves_the_others(videos, monkeypatch):
    def refuse(frames, reference, fps):
        raise RuntimeError("Padding size should be less\nthan the input")

    refusing = replace(PSNR[0], name="refusing", score=refuse)
    found = compare(videos["noisy"], videos["reference"], [refusing, *PSNR], number=5)
    assert list(found.scores) == ["psnr"] and found.failed == {"refusing": "Padding size should be less than the input"}
