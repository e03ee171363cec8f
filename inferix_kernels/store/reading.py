"""How a block reads what it sees, where page lists alone do not say it: with which bias, and at which distance in time.

Keys are stored rotated to the frames' own positions. What counts is the difference between a query's position and a
key's; so to count time anew the queries are turned back, by as many frames as lie between what the block sees and are
not seen. The frames of a window follow each other and the block, so their queries stay as they are; the sink, and
pinned frames, are met by queries that were turned: one variant of them for each gap.

Source: relative indices of github.com/yesiltepe-hidir/infinity-rope (arXiv:2511.20649) and of NVlabs/LongLive's
causal_model_infinity.py (e52d9ef), which store keys unrotated and rotate all of them in each layer of each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..plans import Plan
from ..uploads import upload
from .past import Block
from .policy import Policy

# frames -> [R / 2, 2] (cos, sin) by which queries are turned back so many frames
TurnBack = Callable[[int], Tensor]


class Met(NamedTuple):
    """A block of a pass, and the frames that its page list begins with. `clean`: the pass commits it."""

    policy: Policy
    block: Block
    seen: Sequence[int]
    clean: bool


def is_plain(policies: Sequence[Policy]) -> bool:
    """Do page lists say all of it?"""
    return all([policy.past_bias == 0 and policy.time == "absolute" for policy in policies])


def read_by_policy(
    plan: Plan, met: Sequence[Met], pages_per_frame: int, frame_tokens: int, turn_back: TurnBack | None
) -> tuple[Plan, list[Tensor]]:
    """The plan with a bias and a variant of the queries for each page, and how the variants but for the first, the
    queries as they are, are turned: [T, R / 2, 2] each.

    Raises:
        ValueError: time is counted anew and nothing says how queries are turned.
    """
    bias: list[float] = []
    for policy, block, seen, clean in met:
        bias += [0.0 if clean or frame < policy.sink else policy.past_bias for frame in seen]
        bias += [0.0] * len(block.frames)
    back = [frames_back(policy, block, seen) for policy, block, seen, _ in met]
    steps = [list(dict.fromkeys([0, *distances])) for distances in back]  # of each block, by variant
    variants = [of.index(distance) for of, distances in zip(steps, back) for distance in distances]
    device = plan.page_ids.device

    def of_pages(frames: Sequence[float], dtype: type) -> Tensor:
        numbers: np.ndarray = np.zeros(len(plan.page_ids), dtype)  # pages that a list is filled up with have no tokens
        numbers[: len(frames) * pages_per_frame] = np.repeat(np.array(frames, dtype), pages_per_frame)
        return upload(torch.from_numpy(numbers), device)

    count = max(map(len, steps))
    plan = plan._replace(page_bias=of_pages(bias, np.float32) if any(bias) else None)
    if count == 1:
        return plan, []
    if turn_back is None:
        raise ValueError("turn_back must be given to the store for a policy with time='relative'")
    turns = []
    for variant in range(1, count):
        parts = [
            turn_back(of[variant] if variant < len(of) else 0).expand(len(block.frames) * frame_tokens, -1, -1)
            for of, (_, block, *_) in zip(steps, met)
        ]
        turns.append(torch.cat(parts).to(device))
    return plan._replace(page_variants=of_pages(variants, np.int32)), turns


def frames_back(policy: Policy, block: Block, seen: Sequence[int]) -> list[int]:
    """How many frames a block's queries are turned back to meet each frame that it sees, and then its own.

    Example:
        >>> frames_back(Policy(window=6, sink=2, time="relative"), Block(30, 32), seen=[0, 1, 26, 27, 28, 29])
        [24, 24, 0, 0, 0, 0, 0, 0]
    """
    frames = [*seen, *block.frames]
    if policy.time == "absolute":
        return [0] * len(frames)
    place = {frame: i for i, frame in enumerate(sorted(frames))}
    return [(block.first - frame) - (place[block.first] - place[frame]) for frame in frames]


def turned(q: Tensor, turns: Sequence[Tensor], interleaved: bool) -> Tensor:
    """q [T, Hq, D] -> [V, T, Hq, D]: as it is, and turned in each of these ways."""
    from ..reference.qkv import rotate  # importing the store imports no backend

    exact = q.to(torch.promote_types(q.dtype, torch.float32))
    return torch.stack([q, *(rotate(exact, turn, interleaved).to(q.dtype) for turn in turns)])
