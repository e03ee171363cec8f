"""How MAGI-1 denoises: times, ranges, guidance and the nearly clean copy, as segments of forwards.

Up to four chunks of six latent frames are in flight, each a stage of a quarter of its steps ahead of the next. The
noisier a chunk, the further back it sees. A chunk that is done is prepended to the next forward, whose keys and values
of it stay.

Source: github.com/SandAI-org/MAGI-1 (6ff822e), inference/pipeline/video_generate.py and model/dit/dit_model.py, and the
configs next to them; arXiv:2505.13211.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ...decode.contract import Forward, Segment

CAPTION, NULL, DROPPED = "caption", "null", "dropped"  # the conditionings of a segment: Magi.variants
SHIFT = 3.0
EPSILON = 1e-7  # by which the source lowers the edges of its guidance table
# Twelve steps go through each quarter of u by unequal strides: two sixteenths and one half of them, in this order.
SHORTCUTS = {"8,16,16": (2, 1, 1), "16,16,8": (1, 1, 2)}


def times(steps: int, shortcut: str = "8,16,16") -> Tensor:
    """[steps + 1] float32: t of every step, 0 (noise) to 1 (clean): u squared, then shifted by 3.

    Computed in float32 as in the source: where 0.3 is a threshold, it matters that a t is 0.30000001.
    """
    if steps == 12:
        offsets = torch.tensor([0, *SHORTCUTS[shortcut][:2]]).cumsum(0) / 16
        quarters = torch.linspace(0, 1, 5)
        u = (quarters[:, None] + offsets).flatten()[: steps + 1]
    else:
        u = torch.linspace(0, 1, steps + 1)
    t, inverse = u**2, 1 / SHIFT
    return inverse * t / (1 + (inverse - 1) * t)


@dataclasses.dataclass(frozen=True)
class MagiSchedule:
    """A schedule, as `inferix.decode.pipeline` runs it.

    Attributes:
        steps: denoising steps of a chunk; a multiple of `stages`.
        stages: chunks in flight.
        shortcut: order of the strides where `steps` is 12; see SHORTCUTS.
        ranges: chunks that a chunk sees, its own included, from the noisiest stage to the cleanest.
        clean_range: the same for a clean chunk.
        clean_time: the network's t of a clean chunk.
        distilled: the network was distilled to few steps: it takes their stride as well and needs no guidance.
        edges, past_scales, text_scales: guidance of a network that was not: from `edges[i]` on, these scales hold for
            what the past and the caption change.
        nearly_clean: a distilled network is also asked about the cleanest chunk in flight without its past, once its t
            is past this; own_share: the weight of the answer with the past.
    """

    steps: int
    stages: int = 4
    shortcut: str = "8,16,16"
    ranges: tuple[int, ...] = (5, 4, 3, 2)
    clean_range: int = 1
    clean_time: float = 0.9999
    distilled: bool = False
    edges: tuple[float, ...] = (0.0, 0.0217, 0.1, 0.3, 0.999)
    past_scales: tuple[float, ...] = (1.5, 1.5, 1.5, 1.0, 1.0)
    text_scales: tuple[float, ...] = (7.5, 7.5, 7.5, 0.0, 0.0)
    nearly_clean: float = 0.3
    own_share: float = 0.7
    partly_given: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, parts in (("stages", self.stages), ("ranges", len(self.ranges))):
            if parts < 1 or self.steps < 1 or self.steps % parts:
                raise ValueError(f"steps must be a multiple of the {parts} {name}, got {self.steps}")
        if list(self.ranges) != sorted(self.ranges, reverse=True):
            raise ValueError(f"ranges must not grow from noisy to clean, got {self.ranges}")
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {self.shortcut!r}")

    @property
    def stage_steps(self) -> int:
        return self.steps // self.stages

    @cached_property
    def times(self) -> list[float]:
        return times(self.steps, self.shortcut).tolist()

    def forwards(self, flight: Sequence[tuple[int, int]], clean: int | None) -> list[Forward]:
        """See `Schedule`."""
        noisy = [self._segment(block, step) for block, step in flight]
        if self.distilled:
            return [self._distilled(noisy, [] if clean is None else [self._clean(clean, NULL)])]
        scales = [self._scales(segment.t) for segment in noisy]
        before = [[] if clean is None else [self._clean(clean, name)] for name in (NULL, DROPPED)]
        return [
            Forward((*before[0], *(_under(s, CAPTION, text) for s, (_, text) in zip(noisy, scales)))),
            Forward(
                (*before[1], *(_under(s, DROPPED, past - text) for s, (past, text) in zip(noisy, scales))),
                commit=clean is not None,
            ),
            Forward(tuple(_under(s, DROPPED, 1 - past) for s, (past, _) in zip(noisy, scales)), apart=True),
        ]

    def clean_pass(self, block: int) -> Forward:
        name, stride = (NULL, self._stride(0)) if self.distilled else (DROPPED, None)
        return Forward((self._clean(block, name),), commit=True, stride=stride)

    def advance(self, step: int, x: Tensor, predicted: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        """Euler's step along the velocity; its length is a float32 number, as in the source."""
        t = torch.tensor(self.times[step : step + 2])
        return x + predicted * (t[1] - t[0]).item()

    def _distilled(self, noisy: Sequence[Segment], clean: Sequence[Segment]) -> Forward:
        first, *others = noisy
        copies = []
        if first.t > self.nearly_clean:
            copies = [dataclasses.replace(first, lookback=1, weight=1 - self.own_share, copy=True)]
            first = dataclasses.replace(first, weight=self.own_share)
        segments = (*clean, first, *others, *copies)
        return Forward(segments, commit=bool(clean), stride=self._stride(first.step))

    def _stride(self, step: int) -> float:
        """A step's size as a distilled network takes it: twice the steps of a quarter, were all as long as this."""
        if self.steps == 12:
            return 8.0 / SHORTCUTS[self.shortcut][step % 3]
        return self.steps / 4 * 2

    def _segment(self, block: int, step: int) -> Segment:
        lookback = self.ranges[step * len(self.ranges) // self.steps]
        return Segment(block, step, self.times[step], lookback, CAPTION)

    def _clean(self, block: int, conditioning: str) -> Segment:
        return Segment(block, self.steps, self.clean_time, self.clean_range, conditioning, weight=0.0)

    def _scales(self, t: float) -> tuple[float, float]:
        """Of the past and of the text at t."""
        found = bisect.bisect_left([edge - EPSILON for edge in self.edges], t) - 1
        return self.past_scales[found], self.text_scales[found]


def _under(segment: Segment, conditioning: str, weight: float) -> Segment:
    return dataclasses.replace(segment, conditioning=conditioning, weight=weight)
