"""A running world: actions and words in, frames out.

world = World("tiny", kv="int8", seed=0)
frames = world.step(actions=["right"] * 3, prompt="desert night")     # uint8 [3, 96, 96, 3]
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from inferix_kernels import KVStore, Policy
from inferix_kernels.layout import KV_FORMATS

from .loop import Decoder
from .models import BlockModel, load_model

Action = int | str


class World:
    """One world, opened and steered.

    Args:
        model: a name from inferix.models.MODELS, or a BlockModel.
        kv: format of the committed pages, see inferix_kernels.layout.FORMATS.
        window: frames a block sees, its own included; by default what the model was trained for.
        sink: first frames that are never forgotten.
        undo: frames that `rewind` can take back, besides the block made last.
        worlds: that the store has room for, this one and its forks, should they come to share nothing.
        seed: of all noise. The same seed, actions and prompts give the same frames.
        weights: checkpoint file, for models that do not ship one.
        backend: kernels to run on; see `python -m inferix_kernels`.

    Raises:
        ValueError: an argument is not what it must be; nothing has been allocated.
    """

    def __init__(
        self,
        model: str | BlockModel = "tiny",
        *,
        kv: str = "int8",
        window: int | None = None,
        sink: int | None = None,
        undo: int = 0,
        worlds: int = 1,
        seed: int = 0,
        weights: str | None = None,
        backend: str = "auto",
    ):
        if kv not in KV_FORMATS:
            raise ValueError(f"kv must be one of {', '.join(KV_FORMATS)}, got {kv!r}")
        self.model = load_model(model, weights) if isinstance(model, str) else model
        adapter = self.model.adapter
        window, sink = adapter.window if window is None else window, adapter.sink if sink is None else sink
        policy = Policy(window, sink, format=kv, undo=undo)
        if policy.window is None or policy.window < adapter.block_frames:
            raise ValueError(
                f"window must be at least the {adapter.block_frames} frames of one block, which it counts, got {window}"
            )
        if worlds < 1:
            raise ValueError(f"worlds must be at least 1, got {worlds}")
        self.store = KVStore(
            layers=self.model.layers,
            heads=self.model.heads,
            head_dim=self.model.head_dim,
            frame_tokens=self.model.frame_tokens,
            block_frames=adapter.block_frames,
            pools={format: worlds * frames for format, frames in policy.capacity().items()},
            backend=backend,
        )
        self.table = self.store.open(policy)
        self.decoder = Decoder(self.model, self.table, torch.Generator().manual_seed(seed))
        self.prompt: str | None = None

    @property
    def frames(self) -> int:
        """Frames made or observed so far."""
        return self.table.next_frame + (len(self.decoder.owed.block.frames) if self.decoder.owed else 0)

    def step(
        self, actions: Sequence[Action] | None = None, prompt: str | None = None, *, action: Action | None = None
    ) -> np.ndarray:
        """Make the next block.

        Args:
            actions: one per frame of the block.
            action: instead, one held for the whole block.
            prompt: words for the world from this block on; None keeps the last prompt.

        Returns:
            uint8 [block_frames, height, width, 3].
        """
        if actions is None:
            if action is None:
                raise ValueError("step needs actions, one per frame, or one action for the whole block; got neither")
            actions = [action] * self.model.adapter.block_frames
        return self.model.decode(self.decoder.step(self._condition(actions, prompt)))

    def observe(self, frames: np.ndarray, actions: Sequence[Action], prompt: str | None = None) -> None:
        """Take given frames as the world's past, as if it had made them.

        Args:
            frames: uint8 [n, height, width, 3]; n a multiple of the block.
            actions: n, each the one that led to its frame.
            prompt: as in `step`.
        """
        size = self.model.adapter.block_frames
        if len(frames) % size or len(frames) != len(actions) or not len(frames):
            raise ValueError(
                f"frames must be a multiple of {size}, one action each, got {len(frames)} and {len(actions)} actions"
            )
        latents = self.model.encode(frames)
        conditions = [self._condition(actions[i : i + size], prompt) for i in range(0, len(frames), size)]
        for block, condition in zip(latents.split(size), conditions):
            self.decoder.observe(block, condition)

    def fork(self, seed: int | None = None) -> World:
        """Another world with the same past: it shares the pages and goes its own way. The store needs `worlds` for it.

        Args:
            seed: of the fork's noise; None goes on with a copy of this world's, so that the same actions give the
                same frames.
        """
        other = copy.copy(self)
        other.decoder = self.decoder.fork()
        other.table = other.decoder.table
        if seed is not None:
            other.decoder.generator.manual_seed(seed)
        return other

    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames, whole blocks; the noise goes on. The last block always can be taken back,
        `undo` frames before it too."""
        self.decoder.rewind(frames)

    def release(self) -> None:
        """Give this world's pages back to the store; it can't go on."""
        self.table.release()

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of the KV store by format, scratch apart."""
        return self.store.nbytes

    def _condition(self, actions: Sequence[Action], prompt: str | None) -> Any:
        prompt = self.prompt if prompt is None else prompt
        if prompt is None:
            raise ValueError("prompt must be given with the first block: the world has no look yet")
        if len(actions) != self.model.adapter.block_frames:
            raise ValueError(f"actions must be {self.model.adapter.block_frames}, one per frame, got {len(actions)}")
        condition = self.model.condition(prompt, actions)
        self.prompt = prompt
        return condition
