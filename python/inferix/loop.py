"""The semi-autoregressive decode loop: denoise a block, make it the past, go on.

This is the paper's figure as code. Whatever differs between models is data in their `Adapter`; whatever concerns
keys and values is a `Branch`.
"""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inferix_kernels import PageTable

from .branch import Branch, Clean
from .models import BlockModel
from .samplers import SAMPLERS, Sampler


class Decoder:
    """One world's loop. `step` makes the next block; `observe` takes a given one as if it had been made.

    The last block of a video never pays for a clean pass that nobody reads: see Branch.

    Args:
        table: empty; where this world's keys and values go.
        generator: of all noise.
        against: what a guided model is guided away from, as the model's `condition` made it; None: no guidance.

    Raises:
        ValueError: the adapter asks for guidance and `against` is missing, or the other way round.
    """

    def __init__(self, model: BlockModel, table: PageTable, generator: torch.Generator, against: Any = None):
        name, scale = model.adapter.name, model.adapter.guidance
        if (scale != 1) != (against is not None):
            wanted = "a condition" if against is None else "None"
            raise ValueError(f"against must be {wanted}: the guidance of {name} is {scale:g}")
        self.model, self.generator = model, generator
        self.branches = [Branch(model, table)]
        if against is not None:
            self.branches.append(Branch(model, table.fork(), against))
        self.recent: list[Clean] = []  # the blocks a new prompt or a new rollout may need again
        self.frames = 0  # latent frames made or observed
        self.finished: int | None = None  # frames at the front of what `step` returns that are done: all of them
        self.ahead = 0  # latent frames begun and not done
        self.seconds = 0.0  # that the last block took
        self._noise_before: Tensor | None = None  # the generator's state when the last block was begun
        # Overlapping latents as the next rollout begins with them; a VAE encodes the first one again.
        self.restart: Callable[[Tensor], Tensor] = lambda latents: latents
        self.busy = threading.RLock()  # see turns.py

    @property
    def table(self) -> PageTable:
        return self.branches[0].table

    @property
    def owed(self) -> Clean | None:
        """The block whose clean pass is still to come."""
        return self.branches[0].owed

    @torch.inference_mode()
    def step(self, condition: Any, known: Tensor | None = None) -> Tensor:
        """The next block, clean: [frames, *latent_shape].

        `known` is a block that was made before, from the same seed and past: it is taken as the result. What later
        blocks depend on, K, V and the state of the generator, becomes what it was then, at the cost of one forward.
        """
        started = time.perf_counter()
        adapter = self.model.adapter
        if adapter.rollout and self._next_frame >= adapter.rollout:
            self._new_rollout(condition)
        first = self._next_frame == 0
        frames, (levels, told) = adapter.frames(first), zip(*adapter.schedule(first))
        self._noise_before = self.generator.get_state()
        try:
            for branch in self.branches:
                branch.open(frames)
            x, sampler = self._noise(frames), self._sampler(levels, frames)
            for i, (level, t) in enumerate(zip(levels, told)):
                if known is None or any(branch.owed for branch in self.branches):
                    predicted = self._predict(x, t, condition)
                if known is not None:
                    clean = known
                else:
                    clean = predicted if adapter.prediction == "x0" else x - level * predicted
                x = sampler(i, x, clean) if i + 1 < len(levels) else clean
        except BaseException:
            for branch in self.branches:
                branch.abandon()
            raise
        made, *_ = [branch.close(x, condition) for branch in self.branches]
        self._remember(made)
        self.seconds = time.perf_counter() - started
        return x

    def repeat(self, condition: Any) -> None:
        """Run the last `step` again, with the same noise: for a closer look at it, if the world is not to go on."""
        assert self._noise_before is not None
        self.rewind(len(self.recent[-1].latents))
        self.generator.set_state(self._noise_before)
        self.step(condition)

    @torch.inference_mode()
    def observe(self, latents: Tensor, condition: Any) -> None:
        """Take a given clean block [frames, *latent_shape] as the next block of the world."""
        taken, *_ = [branch.take(latents, condition) for branch in self.branches]
        self._remember(taken)
        self.settle()

    @torch.inference_mode()
    def settle(self) -> None:
        """Run the clean pass that is owed, if one is, so that the last block's K and V are there to be read."""
        for branch in self.branches:
            branch.settle()

    def fork(self) -> Decoder:
        """Another world's loop with the same past."""
        other = copy.copy(self)
        other.busy = threading.RLock()
        other.branches = [branch.fork() for branch in self.branches]
        other.generator = torch.Generator(self.generator.device)
        other.generator.set_state(self.generator.get_state())
        other.recent = list(self.recent)
        return other

    @property
    def rewinds(self) -> list[int]:
        """How many frames `rewind` can take back: none, the last block, the last two, and so on, as far as all is held
        that a block would see from there. There is no way back into what a rollout began with.
        """
        end, sizes = self._next_frame, [0]
        for clean in reversed(self.recent):
            given = clean.block.first == 0 and self.frames != end  # a later rollout's overlap
            if given or self.table.gone(clean.block.first):
                break
            sizes.append(end - clean.block.first)
        return sizes

    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames, one of `rewinds`."""
        for branch in self.branches:
            branch.rewind(frames)
        self.frames -= frames
        self.recent = [clean for clean in self.recent if clean.block.end <= self._next_frame]

    def release(self) -> None:
        """Give all pages back to the store."""
        for branch in self.branches:
            branch.table.release()

    @torch.inference_mode()
    def recache(self, condition: Any) -> None:
        """Compute K and V of what the window holds again, as if it had been made under this condition.

        Oldest block first, each seeing the sink, which keeps what it has, and those before it that are made anew. The
        last block's clean pass stays owed.

        Source: _recache_after_switch of github.com/NVlabs/LongLive (4f69408), with its global sink.

        Raises:
            OutOfPages: the store has no room; nothing has changed. After any other failure half of the past is gone.
        """
        policy = self.table.policy
        begin = max(policy.sink, self._next_frame - (policy.window or self._next_frame))
        if blocks := [clean for clean in self.recent if clean.block.first >= begin]:
            older = [clean for clean in self.recent if clean.block.end <= blocks[0].block.first]
            self.recent = older + self.branches[0].replay(blocks, condition)

    def _new_rollout(self, condition: Any) -> None:
        """Begin again at frame 0, with the last frames as the past."""
        overlap = self.model.adapter.overlap
        given = self.restart(torch.cat([clean.latents for clean in self.recent])[-overlap:])
        for branch in self.branches:
            branch.restart()
        self.recent = []
        self.observe(given, condition)
        self.frames -= overlap

    def _predict(self, x: Tensor, t: float, condition: Any) -> Tensor:
        """The prediction or, guided, the one it is guided away from and `guidance` times the way from there."""
        predicted, *against = (branch.predict(x, t, condition) for branch in self.branches)
        for other in against:
            predicted = other + self.model.adapter.guidance * (predicted - other)
        return predicted

    def _remember(self, clean: Clean) -> None:
        policy, end = self.table.policy, clean.block.end
        depth = max(self.model.adapter.overlap, policy.window or end) + policy.undo
        self.frames += len(clean.latents)
        self.recent = [old for old in self.recent if old.block.end > end - depth] + [clean]

    @property
    def _next_frame(self) -> int:
        """Index of the next frame in this rollout."""
        return self.branches[0].next_frame

    def _sampler(self, levels: Sequence[float], frames: int) -> Sampler:
        return SAMPLERS[self.model.adapter.sampler](levels, lambda: self._noise(frames))

    def _noise(self, frames: int) -> Tensor:
        """Drawn on the generator's device, so that a seed means the same wherever the model runs."""
        shape = (frames, *self.model.latent_shape)
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.table.store.device)


def weakly(method: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A World's method for its loop, which must not keep the world alive: one that is dropped gives its pages back."""
    reference = weakref.WeakMethod(method)

    def call(latents: Tensor) -> Tensor:
        alive = reference()
        return latents if alive is None else alive(latents)

    return call
