"""The semi-autoregressive decode loop: denoise a block, make it the past, go on.

This is the paper's figure as code. Whatever differs between models is data in their `Adapter`; whatever concerns
keys and values is a `Branch`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from inferix_kernels import OutOfPages, PageTable, profile
from inferix_kernels.store import Block

from .branch import Branch, CleanBlock
from .contract import Model
from .decoder import Decoder
from .graphs import Recorder
from .samplers import SAMPLERS, Sampler


class SequentialDecoder(Decoder):
    """One world's loop, one block at a time.

    The last block of a video never pays for a clean pass that nobody reads: see Branch.

    Args:
        table: empty; where this world's keys and values go.
        generator: of all noise.
        negative_conditioning: of classifier-free guidance, from the model's `conditioning`; None: no guidance.
        recorder: see Branch.

    Attributes:
        recent: the blocks that a new prompt or a new rollout may need again, oldest first.

    Raises:
        ValueError: the adapter asks for guidance and `negative_conditioning` is missing, or the other way round.
    """

    can_rewind = can_recache = commits_alone = True

    def __init__(
        self,
        model: Model,
        table: PageTable,
        generator: torch.Generator,
        negative_conditioning: Any = None,
        recorder: Recorder | None = None,
    ):
        super().__init__(model, generator)
        name, scale = model.adapter.name, model.adapter.guidance
        if (scale != 1) != (negative_conditioning is not None):
            wanted = "a conditioning" if negative_conditioning is None else "None"
            raise ValueError(f"negative_conditioning must be {wanted}: the guidance of {name} is {scale:g}")
        self.branches = [Branch(model, table, recorder=recorder)]
        if negative_conditioning is not None:
            self.branches.append(Branch(model, table.fork(), negative_conditioning, recorder))
        if model.branch is not None:  # the others are made by other ranks
            self.branches = [self.branches[model.branch.index]]
        self.recent: list[CleanBlock] = []
        self.opening: Tensor | None = None  # the world's first latent

    @property
    def tables(self) -> list[PageTable]:
        return [branch.table for branch in self.branches]

    @property
    def pending(self) -> CleanBlock | None:
        """The block whose clean pass is still to come."""
        return self.branches[0].pending

    @property
    def at_work(self) -> int:
        return self.model.adapter.frames(first=self._next_frame == 0)

    def _step(self, conditioning: Any) -> Tensor:
        adapter = self.model.adapter
        given = self.model.first_latents if self._next_frame == 0 else None
        with self._open_block(conditioning) as (x, steps, sampler, conditioning):
            for i, (level, t) in enumerate(steps):
                x = _begun(x, given)
                with profile.span("step", step=i):
                    predicted = self._predict(x, t, conditioning, given=0 if given is None else len(given))
                clean = predicted if adapter.prediction == "x0" else x - level * predicted
                x = sampler(i, x, clean) if i + 1 < len(steps) else clean
            x = _begun(x, given)
        return self._close_block(x, conditioning)

    def _replay(self, conditioning: Any, latents: Tensor) -> Tensor:
        with self._open_block(conditioning) as (x, steps, sampler, conditioning):
            if any(branch.pending for branch in self.branches):
                self._predict(x, steps[0][1], conditioning)  # what commits the pending block
            for i in range(len(steps) - 1):  # for the noise that the sampler draws
                x = sampler(i, x, latents)
        return self._close_block(latents, conditioning)

    @contextmanager
    def _open_block(self, conditioning: Any) -> Iterator[tuple[Tensor, list[tuple[float, float]], Sampler, Any]]:
        """The next block as noise, its (level, timestep)s, its sampler, and its conditioning where it stands. If
        anything fails, it is forgotten, and its noise is drawn again by the next one."""
        adapter = self.model.adapter
        if adapter.rollout and self._next_frame >= adapter.rollout:
            self._new_rollout(conditioning)
        first = self._next_frame == 0
        frames, steps, conditioning = adapter.frames(first), adapter.steps(first), self._placed(conditioning)
        try:
            for branch in self.branches:
                branch.open(frames, self.model.begins_shot(conditioning))
            yield self._noise(frames), steps, self._sampler([level for level, _ in steps], frames), conditioning
        except BaseException:
            for branch in self.branches:
                branch.abandon()
            assert self._noise_before is not None
            self.generator.set_state(self._noise_before)
            raise

    def _close_block(self, latents: Tensor, conditioning: Any) -> Tensor:
        made, *_ = [branch.close(latents, conditioning) for branch in self.branches]
        self._remember(made)
        return latents

    def _take_back_step(self) -> None:
        self.rewind(len(self.recent[-1].latents))

    def split_observed(self, frames: int) -> list[int]:
        sizes: list[int] = []
        while sum(sizes) < frames:
            sizes.append(self.model.adapter.frames(first=self.frames == 0 and not sizes))
        if (end := sum(sizes)) != frames:
            raise ValueError(f"frames must make whole blocks of latents, {end} or {end - sizes[-1]}, got {frames}")
        return sizes

    def _observe_block(self, latents: Tensor, conditioning: Any) -> None:
        conditioning = self._placed(conditioning)
        shot = self.model.begins_shot(conditioning)
        taken, *_ = [branch.take(latents, conditioning, shot) for branch in self.branches]
        self._remember(taken)
        self.commit_pending()

    @torch.inference_mode()
    def commit_pending(self) -> None:
        for branch in self.branches:
            branch.commit_pending()

    @torch.inference_mode()
    def warm_up(self, conditioning: Any) -> None:
        """As Decoder.warm_up has it: three blocks, for a block is made in other forwards with a past than without one,
        and in others again once it commits that past; and a clean pass by itself."""
        adapter = self.model.adapter
        policy = dataclasses.replace(self.table.policy, on_evict=None)  # which is not shown frames that nobody made
        branch = self.branches[0].beside(PageTable(self.table.store, policy))
        try:
            for _ in range(1 if adapter.at_once else 3):
                first = branch.next_frame == 0
                x = torch.zeros(adapter.frames(first), *self.model.latent_shape, device=self.model.device)
                branch.open(len(x))
                for _ in range(2):
                    branch.predict(x, adapter.steps(first)[0][1], conditioning)
                branch.close(x, conditioning)
            if not adapter.at_once:
                branch.commit_pending()
        finally:
            branch.table.release()

    def _without_graphs(self) -> None:
        for branch in self.branches:
            branch.without_graphs()

    def _fork_past(self) -> None:
        self.branches = [branch.fork() for branch in self.branches]
        self.recent = list(self.recent)

    @property
    def rewinds(self) -> list[int]:
        """As far as all is held that a block would see from there; there is no way back into what a rollout began
        with, nor to before a shot whose first frames are pinned."""
        end, sizes = self._next_frame, [0]
        pinned = [shot for shot in self.branches[0].shots if shot < self.table.next_frame]
        for clean in reversed(self.recent):
            if clean.block.first in pinned:
                break
            given = clean.block.first < self.model.adapter.overlap and self.frames != end  # to a later rollout
            if given or self.table.gone(clean.block.first):
                break
            sizes.append(end - clean.block.first)
        return sizes

    def rewind(self, frames: int) -> None:
        for branch in self.branches:
            branch.rewind(frames)
        self.frames -= frames
        self.recent = [clean for clean in self.recent if clean.block.end <= self._next_frame]

    def release(self) -> None:
        super().release()
        for branch in self.branches:
            branch.pending = None

    @torch.inference_mode()
    def recache(self, conditioning: Any, how: str) -> None:
        """Compute K and V of what the window holds again under this conditioning, in one of the ways of RECACHES.

        The frames that are to see each other are taken as one block, however many blocks they were made in.

        Source: _recache_after_switch of github.com/NVlabs/LongLive with its global sink: branch v1.0 (e52d9ef) is
        "bidirectional", pull request 21 (4f69408) "block-causal".

        Raises:
            OutOfPages: the store has no room, or its scratch none for such a block; nothing has changed. After any
                other failure half of the past is gone, and the loop is released.
        """
        policy, end = self.table.policy, self._next_frame
        begin = max(0, self.table.window_end(end) - (policy.window or end))
        if how == "bidirectional":
            begin = 0 if begin <= policy.sink else begin
            blocks = [torch.cat([clean.latents for clean in self.recent])[begin - end :]] if end else []
        else:
            again = [clean for clean in self.recent if clean.block.first >= max(policy.sink, begin)]
            blocks, begin = [clean.latents for clean in again], again[0].block.first if again else end
        if blocks and self.branches[0].conditioning is None:  # the negative prompt stays what it is
            try:
                self.branches[0].retake(begin, blocks, conditioning)
            except OutOfPages:
                raise
            except BaseException:
                self.release()
                raise

    def last_latents(self) -> Tensor | None:
        return self.recent[-1].latents if self.recent else None

    def state(self) -> dict[str, Any]:
        self.commit_pending()
        return {
            "frames": self.frames,
            "generator": self.generator.get_state(),
            "opening": None if self.opening is None else self.opening.cpu(),
            "shots": list(self.branches[0].shots),
            "recent": [(clean.block.first, clean.block.end, clean.latents.cpu()) for clean in self.recent],
            "carried": [self.model.carried(clean.conditioning) for clean in self.recent],
        }

    def restore(self, tables: list[PageTable], state: dict[str, Any]) -> None:
        device = self.table.store.device
        for branch, table in zip(self.branches, tables, strict=True):
            branch.go_on_from(table, state.get("shots") or ())
        self.generator.set_state(state["generator"])
        self.frames, self.released = state["frames"], False
        opening = state.get("opening")  # folders of before it was there have none
        self.opening = None if opening is None else opening.to(device)
        carried = state.get("carried") or [None] * len(state["recent"])
        self.recent = [
            CleanBlock(Block(first, end), latents.to(device), self.model.resumed(each))
            for (first, end, latents), each in zip(state["recent"], carried, strict=True)
        ]

    def _new_rollout(self, conditioning: Any) -> None:
        """Begin again at frame 0, with the last frames as the past."""
        overlap = self.model.adapter.overlap
        given = torch.cat([clean.latents for clean in self.recent])[-overlap:]
        if self.model.adapter.rollout_begins == "kept":
            assert self.opening is not None
            given = torch.cat([self.opening, given[1:]])
        else:
            given = self.restart(given)
        for branch in self.branches:
            branch.restart()
        self.recent = []
        for block in given.split(self.model.adapter.block_frames):
            self._observe_block(block, conditioning)
        self.frames -= overlap

    def _placed(self, conditioning: Any) -> Any:
        """The next block's conditioning, told where it stands."""
        return self.model.placed(conditioning, self._next_frame, [clean.conditioning for clean in self.recent])

    def _predict(self, x: Tensor, t: float, conditioning: Any, given: int = 0) -> Tensor:
        """The prediction or, guided, the negative one and `guidance` times the way from there.

        Args:
            given: frames at the front of x that are clean.
        """
        made = [branch.predict(x, t, conditioning, given) for branch in self.branches]
        predicted, *negative = made if self.model.branch is None else self.model.branch.all(made[0])
        for other in negative:
            predicted = other + self.model.adapter.guidance * (predicted - other)
        return predicted

    def _remember(self, clean: CleanBlock) -> None:
        policy, end = self.table.policy, clean.block.end
        depth = max(self.model.adapter.overlap, policy.sink + policy.window if policy.window else end) + policy.undo
        if self.frames == 0:
            self.opening = clean.latents[:1]
        self.frames += len(clean.latents)
        self.finished = len(clean.latents)
        self.recent = [old for old in self.recent if old.block.end > end - depth] + [clean]

    @property
    def _next_frame(self) -> int:
        """Index of the next frame in this rollout."""
        return self.branches[0].next_frame

    def _sampler(self, levels: Sequence[float], frames: int) -> Sampler:
        return SAMPLERS[self.model.adapter.sampler](levels, lambda: self._noise(frames))


def _begun(x: Tensor, given: Tensor | None) -> Tensor:
    """A block that begins with these frames, if any are given."""
    return x if given is None else torch.cat([given.to(x), x[len(given) :]])
