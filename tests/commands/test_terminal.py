"""The terminal player, in a real pseudo-terminal."""

import os
import pty
import re
import select
import sys
import time

import numpy as np
import pytest
import torch

from inferix.commands.cli import main
from inferix.commands.terminal import picture
from inferix.models.tiny.model import TinyConfig, TinyWorldModel
from inferix.models.tiny.train import export


def test_a_picture_holds_every_pixel():
    frame = np.random.default_rng(0).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    cells = re.findall(r"38;2;(\d+);(\d+);(\d+)m\x1b\[48;2;(\d+);(\d+);(\d+)m▀", picture(frame))
    shown = np.array(cells, int).reshape(2, 3, 2, 3).transpose(0, 2, 1, 3).reshape(4, 3, 3)
    assert np.array_equal(shown, frame)


def test_without_a_terminal_play_says_so(capsys, tmp_path):
    export(TinyWorldModel(TinyConfig(dim=32, layers=1, heads=2, head_dim=16, ffn=32)), tmp_path / "w.safetensors", {})
    assert main(["play", "--terminal", "--weights", str(tmp_path / "w.safetensors")]) == 2
    assert "play needs a terminal" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_keys_steer_and_q_ends(tmp_path):
    torch.manual_seed(0)
    export(TinyWorldModel(TinyConfig(dim=32, layers=1, heads=2, head_dim=16, ffn=32)), tmp_path / "w.safetensors", {})
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "inferix", "play", "--terminal", "--weights", str(tmp_path / "w.safetensors")]
        os.execv(sys.executable, command)
    seen = _read_until(terminal, b"meadow day \xc2\xb7 none")
    os.write(terminal, b"w4")
    seen += _read_until(terminal, b"desert night \xc2\xb7 up")
    os.write(terminal, b"q")
    seen += _read_until(terminal, b"\x1b[?1049l")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert b"\x1b[?1049h" in seen


@pytest.mark.parametrize(
    "options, says",
    [
        (["--worlds", "3", "--undo", "1"], "--undo, --worlds: for the page only, not with --terminal"),
        (["--push", "x.mp4"], "--push: for the page only"),
        (["--max-gb", "1"], "--max-gb: for the page only"),
        (["--threads", "0"], "--threads must be from 1 to "),
        (["--window", "1"], "window must be at least the 3 frames"),
    ],
)
def test_options_are_followed_or_refused_by_name(options, says, capsys):
    assert main(["play", "--terminal", *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_world_is_the_one_that_was_asked_for(monkeypatch):
    played = []
    monkeypatch.setattr("inferix.commands.terminal.play", lambda world, prompts, keys: played.append(world))
    assert main(["play", "--terminal", "--window", "6", "--sink", "3", "--kv", "fp32", "--backend", "reference"]) == 0
    (world,) = played
    policy = world.table.policy
    assert (policy.window, policy.sink, policy.format, policy.undo) == (6, 3, "fp32", 0)
    assert world.store.backend == "reference"


WORDS_ALONE = """
from inferix.stream.testing import BarWorld
from inferix.commands.terminal import play
play(BarWorld(size=(16, 384), actions=()), ("calm", "storm"), {})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_model_without_actions_is_played_by_words():
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", WORDS_ALONE])
    _read_until(terminal, " calm · ".encode())
    os.write(terminal, b"w2")
    _read_until(terminal, " storm · ".encode())
    os.write(terminal, b"q")
    _read_until(terminal, b"\x1b[?1049l")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _read_until(terminal, text, seconds=60):
    seen, deadline = b"", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < deadline, f"{text!r} never came; saw {seen[-300:]!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 1 << 16)
            except OSError as error:  # the other side closed
                raise AssertionError(f"{text!r} never came; saw {seen[-300:]!r}") from error
    return seen
