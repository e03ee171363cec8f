"""A decode loop: what it offers a World, and what all loops share. The loops are in sequential.py and pipeline.py."""

from __future__ import annotations

import abc
import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inferix_kernels import PageTable, profile
from inferix_kernels._check import check_tensor, device_of
from inferix_kernels.uploads import upload

from .contract import Model


class Decoder(abc.ABC):
    """One world's loop over a model. `step` makes the next block, or moves those in flight.

    Args:
        generator: of all noise.

    Attributes:
        frames: latent frames made or observed.
        finished: frames at the front of what `step` returned that are done.
        seconds: that the last step, or replay of one, took.
        restart: overlapping latents as the next rollout begins with them; a VAE encodes the first one again.
        busy: held while a thread is at work; see turns.py.
        released: its pages are given back, and it can't go on.
        can_rewind: there is a way back to earlier blocks.
        can_recache: `recache` can be asked for.
        commits_alone: a clean pass by itself leaves what one leaves that shares a forward.
    """

    can_rewind = can_recache = commits_alone = False

    def __init__(self, model: Model, generator: torch.Generator):
        self.model, self.generator = model, generator
        self.frames = self.finished = 0
        self.seconds = 0.0
        self.restart: Callable[[Tensor], Tensor] = lambda latents: latents
        self.busy, self.released = threading.RLock(), False
        self._noise_before: Tensor | None = None  # the generator's state before the last step

    @property
    @abc.abstractmethod
    def tables(self) -> list[PageTable]:
        """The pasts: one, and a second one under the negative prompt in a guided world."""

    @property
    def table(self) -> PageTable:
        """The world's page table."""
        return self.tables[0]

    @property
    def ahead(self) -> int:
        """Latent frames begun and not done."""
        return 0

    def step(self, conditioning: Any) -> Tensor:
        """Make the next block under `conditioning` or, with several in flight, begin it and move all by a stage.

        Returns:
            [frames, *latent_shape] of all blocks at work, oldest first; the first `finished` frames are done.
        """
        return self._timed(self._step, conditioning)

    def replay(self, conditioning: Any, latents: Tensor) -> Tensor:
        """The next step again, from what it returned in an earlier run of the same seed and past.

        All that later blocks depend on, K, V and the state of the generator, becomes what it was then, bit for bit, at
        the cost of the one forward that commits the pending block.

        Returns:
            `latents`.
        """
        return self._timed(self._replay, conditioning, latents)

    def check_replay(self, latents: Tensor) -> None:
        """Raise ValueError, or TypeError, unless the next step could have returned these latents."""
        device = device_of("latents", latents)
        wanted, got = [self.at_work, *self.model.latent_shape], list(latents.shape)
        if got != wanted:
            raise ValueError(f"latents must be {wanted}, what the next step returns, got {got}")
        dtypes = dict.fromkeys((torch.float32, torch.promote_types(self.model.dtype, torch.float32)))
        check_tensor("latents", latents.detach(), tuple(dtypes), " ".join(map(str, wanted)), {}, device)

    @property
    @abc.abstractmethod
    def at_work(self) -> int:
        """Latent frames that the next step works on, and returns."""

    def repeat(self, conditioning: Any) -> None:
        """Run the last `step` again, with the same noise: for a closer look at it, if the world is not to go on. What
        it committed stays committed."""
        assert self._noise_before is not None
        self._take_back_step()
        self._without_graphs()
        self.generator.set_state(self._noise_before)
        self.step(conditioning)

    @torch.inference_mode()
    def observe(self, latents: Tensor, conditioning: Any) -> None:
        """Take given clean frames [frames, *latent_shape] as if they had been made.

        Raises:
            ValueError, RuntimeError: as `split_observed`; nothing has changed.
        """
        for block in latents.split(self.split_observed(len(latents))):
            self._observe_block(block, conditioning)

    @abc.abstractmethod
    def split_observed(self, frames: int) -> list[int]:
        """Sizes of the blocks that so many given latent frames make.

        Raises:
            ValueError: they make no blocks; says which would. RuntimeError: it is too late for given frames.
        """

    @abc.abstractmethod
    def warm_up(self, conditioning: Any) -> None:
        """Run every kind of forward once, over a past that is forgotten, so that no kernel is compiled or loaded while
        a video is made. The store has room for one world; nothing of this one changes."""

    @abc.abstractmethod
    def commit_pending(self) -> None:
        """Run the clean pass that is pending, if one is, so that the last block's K and V can be read."""

    @torch.inference_mode()
    def recache(self, conditioning: Any, how: str) -> None:
        """Compute K and V of what the window holds again under this conditioning, in one of the ways of RECACHES.

        Raises:
            OutOfPages: the store has no room; nothing has changed. After any other failure the loop is released.
        """
        raise ValueError(f"recache must not be asked for: {self.model.adapter.name} can't compute its past again")

    def fork(self) -> Decoder:
        """Another world's loop with the same past, and a copy of this one's noise."""
        other = copy.copy(self)
        other.busy = threading.RLock()
        other.generator = torch.Generator(self.generator.device)
        other.generator.set_state(self.generator.get_state())
        other._fork_past()
        return other

    @property
    def rewinds(self) -> list[int]:
        """How many frames `rewind` can take back: none, the last block, the last two, and so on."""
        return [0]

    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames, one of `rewinds`."""
        raise RuntimeError(
            "rewind: the blocks in flight rest on the last ones made, which can't be unmade: keep a fork"
        )

    def release(self) -> None:
        """Give all pages back to the store."""
        self.released = True
        for table in self.tables:
            table.release()

    def last_latents(self) -> Tensor | None:
        """The block made last, [frames, *latent_shape]; None if it is not kept."""
        return None

    def kv_read(self) -> dict[str, int]:
        """See World.kv_read."""
        raise ValueError(f"kv_read: {self.model.adapter.name} does not run in a pipeline")

    def state(self) -> dict[str, Any]:
        """What the next block depends on besides the pasts, as plain values and tensors in host memory. Nothing is
        pending then.

        Raises:
            ValueError: a world of this kind can't be saved.
        """
        raise ValueError(
            f"world must have one block under way at a time to be saved, got a {self.model.adapter.name} one"
        )

    def restore(self, tables: list[PageTable], state: dict[str, Any]) -> None:
        """Go on from this `state`, over these pasts, in the place of what was there."""
        raise NotImplementedError  # for who has no `state` either

    @abc.abstractmethod
    def _step(self, conditioning: Any) -> Tensor: ...

    @abc.abstractmethod
    def _replay(self, conditioning: Any, latents: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _take_back_step(self) -> None:
        """Undo the last step, as far as repeating it needs."""

    @abc.abstractmethod
    def _without_graphs(self) -> None:
        """Launch every forward from Python from here on, for who watches its layers."""

    @abc.abstractmethod
    def _observe_block(self, latents: Tensor, conditioning: Any) -> None: ...

    @abc.abstractmethod
    def _fork_past(self) -> None:
        """Replace what a copy of a loop shares with the loop it was copied from."""

    @torch.inference_mode()
    def _timed(self, make: Callable[..., Tensor], *given: Any) -> Tensor:
        with profile.timed("denoise") as taken:
            self._noise_before = self.generator.get_state()
            made = make(*given)
        self.seconds = taken.seconds
        return made

    def _noise(self, frames: int) -> Tensor:
        """Drawn on the generator's device, so that a seed means the same wherever the model runs."""
        shape = (frames, *self.model.latent_shape)
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return upload(drawn, self.model.device)
