"""A world without a network, for tests and benchmarks: its pictures say in bars what they are and what steered them.

The bars lie along the top edge, CELL pixels each, black or white: 16 bits number the picture within its world, 4 bits
the action and 4 bits the words, all with the highest bit first.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np

from inferix_kernels import profile

from ..decode.contract import Adapter, Presentation

CELL = 16
BITS = 16 + 4 + 4
ACTIONS = ("none", "up", "down", "left", "right")
WORDS = ("calm", "storm", "snow")
TROUBLE = ("crash", "exit", "hang")  # words that do what they say, when a block is made under them


def bars(number: int, action: int, words: int) -> np.ndarray:
    """uint8 [CELL, BITS * CELL, 3]."""
    code = (number % 2**16) << 8 | action << 4 | words
    bits = [code >> (BITS - 1 - i) & 1 for i in range(BITS)]
    return np.repeat(np.array(bits, np.uint8) * 255, CELL)[None, :, None].repeat(CELL, 0).repeat(3, 2)


def read_bars(picture: np.ndarray) -> tuple[int, int, int]:
    """(number, action, words) of a picture uint8 [height, width, 3], perhaps coded and decoded since."""
    middle = picture[CELL // 4 : -(-3 * CELL // 4), : BITS * CELL].mean((0, 2)).reshape(BITS, CELL)
    code = sum(int(bit > 127) << (BITS - 1 - i) for i, bit in enumerate(middle[:, CELL // 4 : -CELL // 4].mean(1)))
    return code >> 8, code >> 4 & 15, code & 15


class BarWorld:
    """Answers as inferix.world.World does, as far as a Stage asks.

    Args:
        size: pixels (height, width); at least BITS * CELL wide.
        block: pictures made at once.
        seconds: that a block takes.
        texture: fill the picture with noise that moves, which is as hard to code as real video; otherwise it is grey.
        can_rewind: False plays a model whose pictures depend on those before.
    """

    def __init__(
        self,
        size: tuple[int, int] = (96, BITS * CELL),
        block: int = 3,
        fps: int = 16,
        seconds: float = 0.0,
        texture: bool = False,
        can_rewind: bool = True,
        actions: tuple[str, ...] = ACTIONS,
    ):
        keys = {"w": "up", "s": "down", "a": "left", "d": "right"} if actions else {}
        adapter = Adapter(name="bars", block_frames=block, times=(1.0,), size=size, actions=actions)
        presentation = Presentation(fps=fps, keys=keys, example_prompts=WORDS)
        self.model = SimpleNamespace(adapter=adapter, presentation=presentation, prepare=self._prepare)
        self.ranks = None
        self.seconds, self.can_rewind, self.undo = seconds, can_rewind, 100 * block
        self.frames, self.prompt, self.denoising, self.worlds = 0, "", 0.0, 2
        self._ground = _noise(size) if texture else np.full((*size, 3), 90, np.uint8)

    def step(self, *, action: str | None, prompt: str | None, recache: bool | None = None) -> np.ndarray:
        with profile.block() as block, profile.timed("denoise") as taken:
            pictures = self._block(action, prompt)
            block.frames = len(pictures)
        self.denoising = taken.seconds
        return np.stack(pictures)

    def _block(self, action: str | None, prompt: str | None) -> list[np.ndarray]:
        self.prompt = self.prompt if prompt is None else prompt
        if self.prompt == "crash":
            raise RuntimeError("asked to crash")
        if self.prompt == "exit":
            os._exit(3)
        time.sleep(60 if self.prompt == "hang" else self.seconds)
        adapter = self.model.adapter
        index = adapter.actions.index(action) if adapter.actions else 0
        words = WORDS.index(self.prompt) if self.prompt in WORDS else 15
        pictures = []
        for number in range(self.frames, self.frames + adapter.block_frames):
            picture = np.roll(self._ground, (number, 3 * number), (0, 1))
            picture[:CELL, : BITS * CELL] = bars(number, index, words)
            pictures.append(picture)
        self.frames += len(pictures)
        return pictures

    def advance(self, **order: Any) -> Future[np.ndarray]:
        """The same, as pictures to come, which are there."""
        coming: Future[np.ndarray] = Future()
        coming.set_result(self.step(**order))
        return coming

    def fork(self) -> BarWorld:
        other = type(self).__new__(type(self))
        other.__dict__ = dict(self.__dict__)
        return other

    def rewind(self, frames: int) -> None:
        self.frames -= frames

    def reset(self, seed: int) -> None:
        self.frames, self.prompt = 0, ""

    def commit_pending(self) -> None:
        pass

    def release(self) -> None:
        pass

    def last_picture(self) -> np.ndarray | None:
        return None

    def kv_bytes(self) -> dict[str, int]:
        return {"int8": 3 * 2**20, "scratch": 2**20}

    def _prepare(self, text: str) -> None:
        if text not in (*WORDS, *TROUBLE):
            raise ValueError(f"prompt: must be one of {', '.join(WORDS)}, got {text!r}")


def _noise(size: tuple[int, int]) -> np.ndarray:
    """Noise whose power falls with the square of its frequency, as a photograph's does: uint8 [height, width, 3]."""
    height, width = size
    generator = np.random.default_rng(0)
    falloff = np.maximum(np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]), 1 / max(size))
    channels = [np.fft.irfft2(np.fft.rfft2(generator.normal(size=size)) / falloff, s=size) for _ in range(3)]
    ground = np.stack(channels, -1)
    return (128 + 45 * (ground - ground.mean()) / ground.std()).clip(0, 255).astype(np.uint8)


def open_bars(**options: Any) -> BarWorld:
    return BarWorld(**options)
