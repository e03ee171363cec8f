"""`inferix generate` with a journal: clips it goes on from, a second run, a full disk."""

import os

import numpy as np
import pytest

from inferix.commands.cli import main
from inferix.media import VideoWriter
from inferix.world import World
from tests.models.test_wan_generate import SIZE, frames_of, options
from tests.models.wan_folder import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def prompt_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


@pytest.mark.parametrize("count, taken", [(9, 9), (17, 9), (100, 69)])
def test_a_clip_of_any_length_is_cut_to_whole_blocks(count, taken, folder, prompt_cache, tmp_path, monkeypatch):
    """Of blocks of 3 latent frames, 1 + 4 (3 k - 1) pictures; at most what --seconds leaves, here 80."""
    with VideoWriter(tmp_path / "clip.mp4", 16, SIZE, scale=1) as video:
        video.write(np.zeros((count, *SIZE, 3), np.uint8))
    seen, observe = [], World.observe
    monkeypatch.setattr(World, "observe", lambda self, x, **more: seen.append(len(x)) or observe(self, x, **more))
    more = ["--video", tmp_path / "clip.mp4", "--window", 6]
    assert main(options(folder, tmp_path / "v.mp4", prompt_cache, *more, seconds=5)) == 0
    assert seen == [taken] and len(frames_of(tmp_path / "v.mp4")) == 80


def test_clips_and_pictures_that_do_not_do_name_what_does(folder, prompt_cache, tmp_path, capsys):
    from PIL import Image

    with VideoWriter(tmp_path / "clip.mp4", 16, SIZE, scale=1) as video:
        video.write(np.zeros((8, *SIZE, 3), np.uint8))
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "first.png")
    steps = [f"causal-forcing-framewise{steps}" for steps in ("", "-2step", "-1step")]
    rows = (
        ", ".join(["self-forcing-framewise", "self-forcing-first-frame", *steps, "longlive-2-i2v"])
        + " take one picture"
    )
    cases = [
        (["--video", tmp_path / "clip.mp4"], "--video: self-forcing goes on from at least 9 pictures, got 8"),
        (["--image", tmp_path / "first.png"], f"--image: self-forcing begins with several pictures: {rows}"),
    ]
    for more, said in cases:
        assert main(options(folder, tmp_path / "v.mp4", prompt_cache, *more)) == 2
        assert capsys.readouterr().err == f"inferix generate: {said}\n"


def test_a_run_with_a_journal_is_alone(folder, prompt_cache, tmp_path, monkeypatch, capsys):
    """A second run is refused while the first one is at it, with --resume and without."""
    command, step, codes = (
        options(folder, tmp_path / "v.mp4", prompt_cache, "--window", 6, seconds=1),
        World.advance,
        [],
    )

    def stepping(world, *args, **more):
        if not codes:
            codes.extend([None, None])
            codes[:] = [main(command), main([*command, "--resume"])]
        return step(world, *args, **more)

    monkeypatch.setattr(World, "advance", stepping)
    assert main(command) == 0 and codes == [2, 2]
    assert capsys.readouterr().err.count(f"--out: '{tmp_path / 'v.mp4'}' is being written by another run\n") == 2
    assert len(frames_of(tmp_path / "v.mp4")) == 16 and sorted(os.listdir(tmp_path)) == ["v.json", "v.mp4", "v.png"]


def test_a_full_disk_leaves_what_can_be_resumed(folder, prompt_cache, tmp_path, small_disk, capsys):
    whole, out = tmp_path / "whole.mp4", small_disk.folder / "v.mp4"
    more = {"seconds": 8}
    assert main(options(folder, whole, prompt_cache, "--window", 6, **more)) == 0
    capsys.readouterr()
    small_disk.fill(leave=80 << 10)
    assert main(options(folder, out, prompt_cache, "--window", 6, **more)) == 2
    assert f"no space left: '{small_disk.folder}/" in capsys.readouterr().err
    (small_disk.folder / "fill").unlink()
    assert main(options(folder, out, prompt_cache, "--window", 6, "--resume", **more)) == 0
    assert out.read_bytes() == whole.read_bytes()
