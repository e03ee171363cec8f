"""A video whose pictures are decoded and written beside its next blocks: what interruptions and errors leave of it."""

import json
import threading
from concurrent import futures

from inferix.commands import maker
from inferix.media import VideoWriter
from inferix.models.tiny import TinyWorld
from inferix.world import World
from tests.commands.test_cli import frames_in, generate, weights

__all__ = ["weights"]  # a fixture


def test_a_third_ctrl_c_leaves_out_the_pictures_on_their_way(weights, tmp_path, capsys, monkeypatch):
    """They come once the video is closed, and nothing is written to it any more."""
    closed, blocks, calls = threading.Event(), [], []
    decode, close, advance = TinyWorld.decode, VideoWriter.close, World.advance

    def late(model, latents):
        blocks.append(latents)
        assert len(blocks) < 4 or closed.wait(60)
        return decode(model, latents)

    def closing(video, whole=True):
        close(video, whole)
        closed.set()

    def interrupted(world, *args, **options):
        calls.append(world)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return advance(world, *args, **options)

    def waiting(jobs):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return futures.wait(jobs)

    monkeypatch.setattr(TinyWorld, "decode", late)
    monkeypatch.setattr(VideoWriter, "close", closing)
    monkeypatch.setattr(maker, "wait", waiting)
    monkeypatch.setattr(World, "advance", interrupted)
    assert generate(weights, tmp_path / "v.mp4") == 130
    made = json.loads((tmp_path / "v.json").read_text())["frames"]
    assert made == frames_in(tmp_path / "v.mp4") == 9 and f"{made} frames" in capsys.readouterr().out


def test_pictures_that_are_not_finite_are_one_line_and_those_before_them_are_kept(
    weights, tmp_path, capsys, monkeypatch
):
    decode, blocks = TinyWorld.decode, []

    def spoiled(model, latents):
        blocks.append(latents)
        return decode(model, latents * float("inf") if len(blocks) == 3 else latents)

    monkeypatch.setattr(TinyWorld, "decode", spoiled)
    assert generate(weights, tmp_path / "v.mp4") == 2
    error, part = capsys.readouterr().err, tmp_path / ".v.mp4.part"
    assert "latent frames 6 to 8 of tiny are not finite, first in what the decoder of pictures gives\n" in error
    assert f"the first 6 frames are in {part}\n" in error and frames_in(part) == 6


def test_a_decoder_that_gives_another_number_of_pictures_is_named(weights, tmp_path, capsys, monkeypatch):
    decode = TinyWorld.decode
    monkeypatch.setattr(TinyWorld, "decode", lambda model, latents: decode(model, latents)[:2])
    assert generate(weights, tmp_path / "v.mp4") == 2
    assert "tiny: its decoder must give 3 pictures of this block, got 2\n" in capsys.readouterr().err
