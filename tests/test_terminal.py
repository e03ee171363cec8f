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

from inferix.cli import main
from inferix.models.tiny.model import TinyConfig, TinyWorldModel
from inferix.models.tiny.train import export
from inferix.terminal import picture


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
