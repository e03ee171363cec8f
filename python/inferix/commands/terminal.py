"""A world in a terminal: two pixels per character cell, WASD to steer, number keys for words.

A fallback for where there is no browser, and the shortest example of a player: read keys, step the world, show frames
at their pace.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from ..world import World

HELP = "WASD move · space stop · 1-8 look · q quit"


def play(world: World, prompts: Sequence[str], keys: Mapping[str, str]) -> None:
    """Run until q or Ctrl-C.

    Args:
        world: not yet begun, or anywhere in its video.
        prompts: what the number keys say, the first at the start.
        keys: key -> action; an action lasts until the next key.
    """
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        raise ValueError("play needs a terminal for keys and picture; `inferix generate` writes a video instead")
    adapter, pace, prompt = world.model.adapter, 1 / world.model.presentation.fps, prompts[0]
    new: str | None = prompt
    action = adapter.actions[0] if adapter.actions else None  # None: steered by words alone
    with _raw_terminal():
        due = time.perf_counter()
        while True:
            for key in _pressed():
                if key in ("q", "\x03"):
                    return
                action = keys.get(key, action)
                if key.isdigit() and 0 < int(key) <= len(prompts):
                    prompt = new = prompts[int(key) - 1]
            started = time.perf_counter()
            frames, new = world.step(action=action, prompt=new), None
            speed = len(frames) / (time.perf_counter() - started)
            for frame in frames:
                due = max(due + pace, time.perf_counter())  # late frames slip; they are never rushed
                time.sleep(max(0.0, due - time.perf_counter()))
                said = " · ".join(filter(None, (prompt, action)))
                sys.stdout.write(f"\x1b[H{picture(frame)}\x1b[0m {said} · {speed:.0f} FPS · {HELP}\x1b[K")
                sys.stdout.flush()


def picture(frame: np.ndarray) -> str:
    """A frame uint8 [height, width, 3] as rows of half blocks: upper pixel in front, lower pixel behind."""
    rows = []
    for upper, lower in zip(frame[::2], frame[1::2]):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper.tolist(), lower.tolist())
        )
        rows.append("".join(cells) + "\x1b[0m\r\n")
    return "".join(rows)


def _pressed() -> Iterator[str]:
    while select.select([sys.stdin], [], [], 0)[0]:
        yield os.read(sys.stdin.fileno(), 1).decode(errors="ignore").lower()


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Keys one by one, on the second screen, without a cursor; all put back at the end."""
    settings = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[2J")
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
