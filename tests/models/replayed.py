"""A recorded run of a relative's own code, replayed through the decode loop and compared with what was recorded."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from inferix.decode.pipeline import PipelineDecoder
from tests.models.wan_golden import DenseTable, Replay, golden, model_for, table_for


@dataclasses.dataclass
class Replayed:
    """A run and what was recorded of it.

    Attributes:
        pairs: what is compared, by name: (ours, recorded).
        seen: the frames that each block attended to, as the repository's cache holds them; of a pipeline, those of each
            forward's blocks in flight, and those of each clean pass.
    """

    decoder: Replay | PipelineReplay
    pairs: dict[str, tuple[Tensor, Tensor]]
    seen: list[list[int]]

    @property
    def error(self):
        """The largest difference of all."""
        return max((ours.double() - theirs.double()).abs().max().item() for ours, theirs in self.pairs.values())

    @property
    def psnr(self):
        """Of the latents, over their range, in dB."""
        ours, theirs = (x.double() for x in self.pairs["latents"])
        error = (ours - theirs).square().mean().sqrt()
        return 20 * torch.log10((theirs.max() - theirs.min()) / error).item()


@functools.cache
def recorded(name):
    """Recordings without weights are of those of longlive_switch15, its noise and its prompts."""
    tensors = golden(name)
    return tensors if any(key.startswith("model.") for key in tensors) else recorded("longlive_switch15") | tensors


def over(way, tensors, name, policy, kv, scratch_blocks=2, **changes):
    """A model and an empty table for it: float64 and dense, or float32 over pages, on the backend called `way`."""
    model = model_for(tensors, name, torch.float64 if way == "dense" else torch.float32, **changes)
    if way == "dense":
        return model, DenseTable(model, policy)
    return model, table_for(model, policy, kv, way, scratch_blocks=scratch_blocks)


def in_turn(tensors, noise, renoised, first=0):
    """Recorded noise in the order in which the loop asks for it: a block's own, then as often again as it is renoised.

    Args:
        noise: of each block. renoised: how often each of them is. first: number of the first recorded draw.
    """
    draws = (tensors[f"draws.{i}"] for i in range(first, first + sum(renoised)))
    pairs = zip(noise, renoised, strict=True)
    return [x for block, times in pairs for x in (block, *(next(draws) for _ in range(times)))]


def cached(ends, frames, sink=0):
    """What a cache of so many frames holds when blocks that end there are made."""
    return [sorted({*range(min(sink, end)), *range(max(0, end - frames + sink), end)}) for end in ends]


def played(decoder, prompts):
    for prompt in prompts:
        decoder.step(prompt)
    return torch.cat([steps[-1] for steps in decoder.x0])


class KeepsAll(DenseTable):
    """A dense table for blocks in flight: nothing leaves it, and what is seen is what the loop says."""

    @property
    def held(self):
        return list(self.sealed)


class PipelineReplay(PipelineDecoder):
    """The loop with recorded noise instead of drawn, which notes what its blocks see in each forward: those in flight,
    and clean ones, by block."""

    def __init__(self, model, table, draws, total):
        super().__init__(model, table, torch.Generator(), total)
        self.draws, self.noisy, self.clean = iter(draws), [], {}

    @property
    def held(self):
        return [self.noisy, list(self.clean.values())]

    def _velocities(self, flight):
        self.noisy.append([])
        return super()._velocities(flight)

    def _sees(self, block, segment, here):
        seen = super()._sees(block, segment, here)
        attended = sorted([*seen, *block.frames])
        if segment.weight:  # all in flight see the same
            assert self.noisy[-1] in ([], attended)
            self.noisy[-1] = attended
        else:
            self.clean[segment.block] = attended
        return seen

    def _noise(self, frames):
        return next(self.draws).to(self.model.network.dtype)
