"""A running world: actions and prompts in, frames out. Long because a third of it is docstrings.

world = World("tiny", kv="int8", seed=0)
frames = world.step(actions=["right"] * 3, prompt="desert night")     # uint8 [3, 96, 96, 3]
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from inferix_kernels import KVStore, OutOfPages, PageTable, Policy
from inferix_kernels._check import is_whole, whole
from inferix_kernels.layout import KV_FORMATS, scratch_format
from inferix_kernels.proofs import stored

from .finite import NotFinite, shown
from .loop import Decoder, weakly
from .models import BlockModel, load_model
from .pipeline import Pipeline, PipelinedModel
from .turns import one_at_a_time

Action = int | str


class World:
    """One world, opened and steered.

    Threads: a world takes one call at a time, another one raises RuntimeError. A world and its forks, and others of one
    model, may be at work in a thread each: every one makes the frames that it would make alone.

    Args:
        model: a name from inferix.models.MODELS, or a BlockModel.
        kv: format of the committed pages, see inferix_kernels.layout.FORMATS.
        window: frames a block sees, its own included; by default what the model was trained for.
        sink: first frames that are never forgotten.
        undo: frames that `rewind` can take back, besides the block made last. A VAE that looks back in time keeps its
            state for each of these blocks, gigabytes at 480p; with 0, such a world can not be rewound.
        blocks: that the world is to have, for a model with several in flight: after them it begins none. None: no end.
        worlds: that the store has room for, this one and its forks, should they come to share nothing.
        seed: of all noise. The same seed, actions and prompts give the same frames.
        weights: checkpoint file or folder, for models that do not ship one.
        backend: kernels to run on; see `python -m inferix_kernels`.
        options: passed on to the model's loader, for example size=(height, width) in pixels.

    Raises:
        ValueError: an argument is not what it must be; nothing has been allocated.

    Example:
        >>> from inferix import World
        >>> world = World("tiny", kv="int8", seed=0, undo=6, worlds=2)
        >>> frames = world.step(action="right", prompt="desert night")
        >>> frames.shape, frames.dtype
        ((3, 96, 96, 3), dtype('uint8'))
    """

    def __init__(
        self,
        model: str | BlockModel = "tiny",
        *,
        kv: str = "int8",
        window: int | None = None,
        sink: int | None = None,
        undo: int = 0,
        blocks: int | None = None,
        worlds: int = 1,
        seed: int = 0,
        weights: str | None = None,
        backend: str = "auto",
        **options: Any,
    ):
        if kv not in KV_FORMATS:
            raise ValueError(f"kv must be one of {', '.join(KV_FORMATS)}, got {kv!r}")
        _check_seed(seed)
        self.model = load_model(model, weights, **options) if isinstance(model, str) else model
        adapter = self.model.adapter
        if adapter.at_once and (window is not None or sink is not None):
            raise ValueError(f"window and sink must not be given: {adapter.name} makes a video at once, from no past")
        window, sink = adapter.window if window is None else window, adapter.sink if sink is None else sink
        policy = Policy(window, sink, format=kv, undo=undo)
        largest = max(adapter.block_frames, adapter.first_block_frames)
        if policy.window is None or policy.window < largest:
            raise ValueError(
                f"window must be at least the {largest} frames of one block, which it counts, got {window}"
            )
        if not is_whole(worlds) or worlds < 1:
            raise ValueError(f"worlds must be at least 1, got {worlds!r}")
        if blocks is not None and (not adapter.stages or not is_whole(blocks) or blocks < 1):
            raise ValueError(
                "blocks must be at least 1, and given only for a model that runs in a pipeline, "
                f"got {blocks} for {adapter.name}"
            )
        guided = adapter.guidance != 1
        against = self.model.condition(adapter.negative_prompt, []) if guided else None
        # Worlds the store has room for; with no past to see nothing is ever committed.
        device = torch.device(getattr(self.model, "device", "cpu"))
        room = 0 if adapter.at_once else worlds * (2 if guided else 1)
        self.store = KVStore(
            layers=self.model.layers,
            heads=self.model.heads,
            head_dim=self.model.head_dim,
            frame_tokens=self.model.frame_tokens,
            block_frames=largest,
            # The clean block, the one in the making, and in a pipeline the others in flight and a copy of one.
            scratch_blocks=2 + adapter.stages,
            scratch_format=scratch_format(device, self.model.dtype),
            pools={format: max(1, room * frames) for format, frames in policy.capacity().items()},
            device=device,
            backend=backend,
        )
        if backend == "auto" and (unproved := stored.notice(device)):
            logging.getLogger("inferix").warning(unproved)
        self._against, self.worlds, self._blocks = against, worlds, blocks
        self._begin(policy, seed)

    def _begin(self, policy: Policy, seed: int) -> None:
        table, generator = self.store.open(policy), torch.Generator().manual_seed(int(seed))
        self.decoder: Decoder | Pipeline = (
            Pipeline(cast(PipelinedModel, self.model), table, generator, self._blocks)
            if self.model.adapter.stages
            else Decoder(self.model, table, generator, self._against)
        )
        self.pictures = self.model.stream()
        self.decoder.restart = weakly(self._restart)
        self._kept: list[tuple[int, Any]] = []  # (frames made, `pictures` as it was then), for `rewind`
        self.prompt: str | None = None
        self.released = False

    @property
    def table(self) -> PageTable:
        """The world's page table; a new one with every rollout."""
        return self.decoder.table

    @property
    def frames(self) -> int:
        """Latent frames made or observed so far."""
        return self.decoder.frames

    @one_at_a_time
    def step(
        self,
        actions: Sequence[Action] | None = None,
        prompt: str | None = None,
        *,
        action: Action | None = None,
        known: Tensor | None = None,
        recache: bool | None = None,
    ) -> np.ndarray:
        """Make the next block or, of a model with several in flight, begin one and move all by a stage.

        Args:
            actions: one per frame of the block; none for a model that takes none.
            action: in their place, one held for the whole block.
            prompt: words for the world from this block on; None keeps the last prompt.
            known: what `latents` was after this very step in an earlier run with the same seed; see Decoder.step.
            recache: when the prompt changes, compute what the window remembers again under the new one; None does as
                the model's adapter says. Not for a model that takes actions: each block was told its own.

        Returns:
            uint8 [pictures, height, width, 3]: none as long as a pipeline fills. A model without a decoder gives its
            latents, float32 [frames, ...].

        Raises:
            NotFinite: NaN or infinity came out; names the layer. This world has ended, its forks go on.

        Example:
            >>> frames = world.step(actions=["up", "up", "left"])  # one per frame, under the same prompt
            >>> frames = world.step(action="none", prompt="glacier day")  # the look changes with this block
        """
        self._check_alive("step")
        if actions is not None and action is not None:
            raise ValueError(f"step needs actions or one action, got both: {actions!r} and {action!r}")
        if actions is None:
            if action is None and self.model.adapter.actions:
                raise ValueError("step needs actions, one per frame, or one action for the whole block; got neither")
            actions = [] if action is None else [action] * self.model.adapter.block_frames
        if self.model.adapter.at_once and self.frames:
            raise ValueError(f"step: {self.model.adapter.name} has made its video, at once; for another open a World")
        wanted = self.model.adapter.recache if recache is None else recache
        if wanted and self.model.adapter.actions:
            raise ValueError(
                f"recache must not be asked for: each block of {self.model.adapter.name} was told actions of its own, "
                "under which it would not be computed again"
            )
        before = self.prompt
        condition = self._condition(actions, prompt)
        if wanted and before not in (None, self.prompt) and isinstance(self.decoder, Decoder):
            self._recache(self.decoder, condition, before)
        self._keep()
        self.latents = self.decoder.step(condition, None if known is None else known.to(self.store.device))
        return shown(self, condition)

    def _recache(self, decoder: Decoder, condition: Any, before: str | None) -> None:
        try:
            decoder.recache(condition)
        except OutOfPages:  # before anything was changed
            self.prompt = before
            raise
        except BaseException:  # half of what it remembered is gone
            self.release()
            raise

    @one_at_a_time
    def observe(self, frames: np.ndarray, actions: Sequence[Action] = (), prompt: str | None = None) -> np.ndarray:
        """Take given frames as the world's past, as if it had made them.

        Args:
            frames: uint8 [n, height, width, 3], whole blocks: for a model with a VAE, n = 1 + 4 k makes 1 + k latents.
            actions: n, each the one that led to its frame; none for a model that takes none.
            prompt: as in `step`.

        Returns:
            uint8 [n, height, width, 3], as the model sees them: encoded and decoded again. With several blocks in
            flight those of whole blocks; the rest come with the block that they begin.

        Raises:
            NotFinite: the VAE made NaN or infinity of them, which ends the world if blocks were taken already.

        Example:
            >>> import numpy as np
            >>> given = np.repeat(frames[-1:], 3, axis=0)  # uint8 [3, 96, 96, 3]
            >>> seen = world.observe(given, actions=["none"] * 3)
        """
        self._check_alive("observe")
        adapter = self.model.adapter
        size = adapter.block_frames
        if adapter.at_once:
            raise ValueError(f"observe: {adapter.name} makes a video at once, from no past")
        if adapter.actions and (len(frames) % size or len(frames) != len(actions) or not len(frames)):
            raise ValueError(
                f"frames must be a multiple of {size}, one action each, got {len(frames)} and {len(actions)} actions"
            )
        latents, start, blocks = self.model.encode(np.ascontiguousarray(frames)), 0, []
        if not torch.isfinite(latents).all():
            raise NotFinite("frames: the encoder made NaN or infinity of them")
        if adapter.stages:
            self.decoder.observe(latents, self._condition(actions, prompt))
            return self.pictures(latents[: self.frames])
        while start < len(latents):
            count = adapter.frames(first=self.frames + start == 0)
            blocks.append((latents[start : start + count], self._condition(actions[start : start + count], prompt)))
            start += count
        if start != len(latents):
            raise ValueError(
                f"frames must make whole blocks of latents, {start} or {start - count}, got {len(latents)}"
            )
        seen = []
        for block, condition in blocks:
            self._keep()
            self.decoder.observe(block, condition)
            try:
                seen.append(self.pictures(block))
            except NotFinite:
                self.release()
                raise
        return np.concatenate(seen)

    @one_at_a_time
    def settle(self) -> None:
        """Do now what the last block still owes, its clean pass, so that the next one is there sooner.

        Left alone, the next step does it in its first forward, which costs less in all: for who waits for nothing.
        A released world owes nothing.

        Example:
            >>> world.settle()
        """
        if isinstance(self.decoder, Decoder) and not self.released:
            self.decoder.settle()

    @one_at_a_time
    def fork(self, seed: int | None = None) -> World:
        """Another world with the same past: it shares the pages and goes its own way. The store needs `worlds` for it.

        Args:
            seed: of the fork's noise; None goes on with a copy of this world's, so that the same actions give the
                same frames.

        Example:
            >>> other = world.fork()
            >>> bool((other.step(action="up") == world.step(action="up")).all())  # the same past, the same noise
            True
        """
        self._check_alive("fork")
        if seed is not None:
            _check_seed(seed)
        other = copy.copy(self)
        other.decoder = self.decoder.fork()
        if hasattr(self.pictures, "fork"):
            other.pictures = self.pictures.fork()
        other.decoder.restart, other._kept = weakly(other._restart), list(self._kept)
        if seed is not None:
            other.decoder.generator.manual_seed(int(seed))
        return other

    @property
    def can_rewind(self) -> bool:
        """May `rewind` take anything back? Where pictures depend on those before them, only with an `undo`."""
        if isinstance(self.decoder, Pipeline):
            return False
        return self.table.policy.undo > 0 or not hasattr(self.pictures, "fork")

    @property
    def rewinds(self) -> list[int]:
        """How many latent frames `rewind` can take back now: none, the last block, the last two, and so on."""
        if isinstance(self.decoder, Pipeline):
            return [0]
        kept = {self.frames, *(at for at, _ in self._kept)}
        sizes = self.decoder.rewinds
        return [size for size in sizes if self.frames - size in kept] if hasattr(self.pictures, "fork") else sizes

    @one_at_a_time
    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames, whole blocks; the noise goes on. The last block always can be taken back,
        `undo` frames before it too; if pictures depend on those before them, only with an `undo`. A new rollout can not
        be taken back to before it.

        Raises:
            ValueError: it is not one of `rewinds`; nothing has changed.

        Example:
            >>> before = world.frames
            >>> frames = world.step(action="left")
            >>> world.rewind(3)
            >>> world.frames == before
            True
        """
        if isinstance(self.decoder, Decoder) and (frames := whole("frames", frames)) not in self.rewinds:
            sizes = ", ".join(map(str, self.rewinds))
            raise ValueError(
                f"frames must be one of {sizes}, whole blocks that are remembered, got {frames}: World(undo=...) "
                "remembers more"
            )
        pictures, end = self.pictures, self.frames - frames
        if frames and hasattr(pictures, "fork"):
            pictures = dict(self._kept)[end].fork()
        self.decoder.rewind(frames)
        self.pictures, self._kept = pictures, [(at, state) for at, state in self._kept if at < end]

    def _keep(self) -> None:
        """A block is about to be made: keep what its pictures look back on, as long as `rewind` may ask for it."""
        undo = self.table.policy.undo
        if undo and hasattr(self.pictures, "fork"):
            self._kept = [(at, state) for at, state in self._kept if self.frames - undo <= at < self.frames]
            self._kept.append((self.frames, self.pictures.fork()))

    def _restart(self, latents: Tensor) -> Tensor:
        """A new rollout begins with these, the last latents; there is no way back to before it."""
        if hasattr(self.pictures, "restart"):
            latents, self._kept = self.pictures.restart(latents), []
            self._keep()
        return latents

    @property
    def denoising(self) -> float:
        """Seconds that the last step took, pictures apart; 0 before the first."""
        return self.decoder.seconds

    @property
    def undo(self) -> int:
        """Latent frames that `rewind` can take back now, at most."""
        return self.rewinds[-1]

    def last_picture(self) -> np.ndarray | None:
        """uint8 [height, width, 3]: what the world looks like now; None if that can't be made again."""
        if isinstance(self.decoder, Pipeline) or hasattr(self.pictures, "fork") or not self.decoder.recent:
            return None
        picture: np.ndarray = self.pictures(self.decoder.recent[-1].latents)[-1]
        return picture

    @one_at_a_time
    def reset(self, seed: int) -> None:
        """Begin again, with nothing remembered and this seed.

        Example:
            >>> world.reset(seed=1)
            >>> world.frames
            0
        """
        _check_seed(seed)
        policy = self.table.policy
        self.release()
        self._begin(policy, seed)

    @one_at_a_time
    def release(self) -> None:
        """Give this world's pages back to the store; it can't go on.

        Example:
            >>> world.release()
        """
        self.released = True
        self.decoder.release()

    def _check_alive(self, what: str) -> None:
        if self.released:
            raise RuntimeError(f"{what}: this world was released, or lost as it was recached, and can't go on")

    @property
    def ahead(self) -> int:
        """Latent frames that are begun and not done."""
        return self.decoder.ahead

    def kv_read(self) -> dict[str, int]:
        """Bytes of the past that a layer reads in one step of a model with several blocks in flight, on average so far.

        Returns:
            "read": from pages. "copied": where the past is one bf16 tensor of all frames since the beginning, which
            MAGI-1's own code copies in every forward.
        """
        if not isinstance(self.decoder, Pipeline):
            raise ValueError(f"kv_read: {self.model.adapter.name} does not run in a pipeline")
        return self.decoder.kv_read()

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of the KV store by format, scratch apart."""
        return self.store.nbytes

    def _condition(self, actions: Sequence[Action], prompt: str | None) -> Any:
        prompt = self.prompt if prompt is None else prompt
        if prompt is None:
            raise ValueError("prompt must be given with the first block: the world has no look yet")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be words, got {prompt!r}")
        wanted = self.model.adapter.block_frames if self.model.adapter.actions else len(actions)
        if len(actions) != wanted:
            raise ValueError(f"actions must be {wanted}, one per frame, got {len(actions)}")
        condition = self.model.condition(prompt, actions)
        self.prompt = prompt
        return condition


def _check_seed(seed: int) -> None:
    if not is_whole(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number from 0 to 2^64 - 1, got {seed!r}")
