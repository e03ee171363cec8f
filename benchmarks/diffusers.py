"""Self-attention of a stock Wan transformer of diffusers, block by block at a full window: ours over int8 pages, and
SDPA over the window's keys and values in bfloat16, joined for every call, as a script over diffusers has it today.

Both are a processor's work from the projections of q, k and v to what the output's projection takes: norm, rotation,
keeping or joining keys and values, attention. One layer, random weights in bfloat16, the shape's heads and tokens; the
feed-forward is narrow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inferix_kernels import Policy

from .harness.case import LIMITS, error_of
from .harness.measure import Settings
from .harness.rows import Row
from .shapes import Shape, find_shape

LAYERS, TEXT, CHANNELS = 1, 64, 16
FORMAT = "int8"


class Window:
    """As much of a CacheLayer as its processor needs: keys and values of the past in a list, joined to attend."""

    def __init__(self) -> None:
        self.committing = False
        self.past: list[tuple[Tensor, Tensor]] = []
        self.table: tuple[Tensor, Tensor] | None = None  # cos, sin [1, tokens, 1, D] of the open block

    def attend(self, qkv: Tensor, norm_q: Tensor, norm_k: Tensor, eps: float) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        assert self.table is not None
        q, k, v = qkv.chunk(3, -1)
        width = self.table[0].shape[-1]
        q, k = (F.rms_norm(x, x.shape[-1:], norm, eps) for x, norm in ((q, norm_q), (k, norm_k)))
        q, k, v = (x.unflatten(2, (-1, width)) for x in (q, k, v))
        q, k = turned(q, *self.table), turned(k, *self.table)
        keys, values = (torch.cat([*(pair[i] for pair in self.past), x], 1) for i, x in enumerate((k, v)))
        if self.committing:
            self.past.append((k, v))
        out: Tensor = dispatch_attention_fn(q, keys, values)
        return out.flatten(2)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation of diffusers' WanAttnProcessor: pairs of channels, in float32."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., ::2], sin[..., ::2]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).type_as(x)


class Timed:
    """A layer whose `attend` notes the seconds that it takes, and its last result."""

    def __init__(self, layer: Any, clock: Callable[[], float]):
        self.layer, self.clock = layer, clock
        self.seconds: list[float] = []
        self.out: Tensor

    def attend(self, *arguments: Any) -> Tensor:
        started = self.clock()
        self.out = self.layer.attend(*arguments)
        self.seconds.append(self.clock() - started)
        return self.out


class Model:
    """A transformer whose past is filled with blocks of noise, and the last block of the window still open.

    Args:
        cached: with our cache; else with a Window.
    """

    def __init__(self, shape: Shape, device: str, clock: Callable[[], float], cached: bool):
        from diffusers import WanTransformer3DModel

        from inferix_kernels.integrations.diffusers import enable_block_cache
        from inferix_kernels.integrations.diffusers.patch import BlockAttnProcessor
        from inferix_kernels.integrations.diffusers.rope import OffsetRotaryPosEmbed

        torch.manual_seed(0)
        self.transformer = WanTransformer3DModel(
            num_attention_heads=shape.heads, attention_head_dim=shape.head_dim, num_layers=LAYERS, ffn_dim=64,
            text_dim=TEXT, in_channels=CHANNELS,
        ).to(device, torch.bfloat16)  # fmt: skip
        rows = max(n for n in range(1, math.isqrt(shape.frame_tokens) + 1) if shape.frame_tokens % n == 0)
        frames, blocks = shape.queries // shape.frame_tokens, shape.keys // shape.queries
        grid = (1, CHANNELS, frames, 2 * rows, 2 * shape.frame_tokens // rows)
        generator = torch.Generator().manual_seed(1)
        latents = [torch.randn(grid, generator=generator).to(device, torch.bfloat16) for _ in range(blocks)]
        self.text = torch.randn(1, 8, TEXT, generator=generator).to(device, torch.bfloat16)
        attention, self.last = self.transformer.blocks[0].attn1, latents[-1]
        if cached:
            self.cache = enable_block_cache(
                self.transformer, Policy(window=frames * blocks, format=FORMAT), block_frames=frames
            )
            for x in latents[:-1]:
                with self.cache.block(frames):
                    self.cache.commit(x, encoder_hidden_states=self.text)
            attention.processor.layer = self.timed = Timed(attention.processor.layer, clock)
            self.open = contextlib.ExitStack()
            self.open.enter_context(self.cache.block(frames))
            return
        rope = self.transformer.rope = OffsetRotaryPosEmbed(self.transformer.rope)
        window = Window()
        self.timed = Timed(window, clock)
        attention.processor = BlockAttnProcessor(self.timed, attention.processor)
        for i, x in enumerate(latents):
            rope.first, window.committing = i * frames, i + 1 < blocks
            window.table = rope(x)
            self.call(x, 0.0)

    def call(self, x: Tensor, t: float) -> Tensor:
        timestep = torch.tensor([t], device=x.device)
        out: Tensor = self.transformer(x, timestep=timestep, encoder_hidden_states=self.text, return_dict=False)[0]
        return out

    def run(self) -> Tensor:
        """A noisy pass of the last block."""
        return self.call(self.last, 900.0)


@torch.inference_mode()
def measure(shape: Shape, settings: Settings) -> tuple[Row, Row]:
    """Rows of ours and of SDPA, in turns."""
    clock = time.process_time if settings.timer == "cpu" else time.perf_counter
    models = [Model(shape, settings.device, clock, cached) for cached in (True, False)]
    for model in models:
        model.run()
        model.timed.seconds.clear()
    error = error_of(*(model.timed.out for model in models))
    for _ in range(settings.rounds):
        for model in models:
            model.run()
    made = [
        Row("diffusers", "attention", shape.name, name, format, settings.device, "ok", seconds=model.timed.seconds)
        for name, format, model in zip(("ours", "sdpa-joined"), (FORMAT, "bf16"), models)
    ]
    ours, sdpa = made
    limit = LIMITS[FORMAT]
    ours.error = {**error._asdict(), "limit": limit.relative}
    if not error.within(limit):
        ours.status, ours.seconds = "wrong", []
        ours.note = f"differs from SDPA by {error.relative:.1e}"
    elif settings.rounds:
        ours.metrics = {"of SDPA's time": ours.median / sdpa.median}
    return ours, sdpa


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    """Two rows for each shape."""
    for shape in map(find_shape, shapes):
        row = Row("diffusers", "attention", shape.name, "ours", FORMAT, settings.device, "ok")
        if settings.device != "cpu":
            yield dataclasses.replace(row, status="unsupported", note="its clock is the host's: CPUs only")
            continue
        try:
            yield from measure(shape, settings)
        except ModuleNotFoundError as reason:
            yield dataclasses.replace(row, status="absent", note=f"pip install {reason.name}")
