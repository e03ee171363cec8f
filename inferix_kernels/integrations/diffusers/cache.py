"""The keys and values of a stock WanTransformer3DModel, which generates block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..._check import check_counts, check_index, whole
from ..._install import require
from ...layout import KV_FORMATS
from ...store import Policy
from ...store.table_view import replace_states
from .branch import Branch, Shape
from .layer import CacheLayer

COND = "cond"  # the branch of a call outside any cache_context


def enable_block_cache(
    transformer: Any, policy: Policy, *, block_frames: int = 3, frames: int | None = None
) -> BlockCache:
    """Have a stock Wan transformer attend to its past, so that it generates block by block, without end.

    Self-attention and rotary positions are replaced until the cache's `disable()`; all else stays as diffusers has it:
    pipelines, schedulers, LoRA, the backend of cross-attention. Memory is taken at the first call, which shows how
    large latents are and how many videos are made side by side. `transformer.compile_repeated_blocks(fullgraph=True)`
    makes one graph. Read against diffusers 0.42.1.

    Args:
        transformer: a WanTransformer3DModel, not wrapped by torch.compile.
        policy: what is kept of the past, and in which format: Policy(window=21, sink=3, format="int8").
        block_frames: latent frames of a block, at most.
        frames: latent frames of the video; only a policy that keeps all needs it.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: an argument is not what it must be, or the transformer has a cache already; nothing was changed.
        Unsupported: the model splits latents in time, or turns by other angles than Wan's; an older diffusers.

    Example:
        >>> from diffusers import WanTransformer3DModel
        >>> from inferix_kernels.integrations.diffusers import enable_block_cache
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "ffn_dim": 32, "text_dim": 8}
        >>> transformer = WanTransformer3DModel(**sizes)
        >>> cache = enable_block_cache(transformer, Policy(window=9, sink=3, format="int8"))
        >>> x, prompt, t = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 5, 8), torch.tensor([900.0])
        >>> with torch.no_grad(), cache.block(frames=3) as block:
        ...     velocity = transformer(x, timestep=t, encoder_hidden_states=prompt).sample  # as often as you like
        ...     cache.commit(x - 0.9 * velocity)  # the clean latents
        >>> cache.next_frame
        3
        >>> cache.disable()
    """
    require("diffusers", "wan", "enable_block_cache")
    from .patch import check

    check(transformer)
    check_counts({"block_frames": block_frames})
    if not isinstance(policy, Policy):
        raise ValueError(f"policy must be an inferix_kernels.Policy, got {type(policy).__name__}")
    if policy.archive:
        raise ValueError("policy must not archive: the cache has no host memory")
    if unknown := policy.capacity(frames).keys() - KV_FORMATS:  # which raises for what it cannot be
        raise ValueError(f"policy must have formats among {', '.join(KV_FORMATS)}, got {', '.join(unknown)}")
    if policy.window is not None and policy.window < block_frames:
        raise ValueError(f"policy must have a window of at least block_frames={block_frames}, got {policy.window}")
    return BlockCache(transformer, policy, int(block_frames), frames)


class BlockCache:
    """The past of a transformer, by branch of guidance (`transformer.cache_context(name)`; outside any it is "cond").

    `enable_block_cache` makes it. A block goes so: inside `with cache.block(frames)`, call the transformer, or a
    pipeline, on noisy latents as often as you like, then `commit` the clean ones. Keys and values of noisy calls are
    seen by those calls alone.

    Example:
        >>> from diffusers import WanTransformer3DModel
        >>> from inferix_kernels.integrations.diffusers import enable_block_cache
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "ffn_dim": 32, "text_dim": 8}
        >>> transformer = WanTransformer3DModel(**sizes)
        >>> cache = enable_block_cache(transformer, Policy(window=4, sink=1, format="int8"), block_frames=2)
        >>> texts = {"cond": torch.randn(1, 5, 8), "uncond": torch.randn(1, 5, 8)}
        >>> for start in range(3):
        ...     with torch.no_grad(), cache.block(frames=2):
        ...         x = torch.randn(1, 16, 2, 4, 4)
        ...         for name, text in texts.items():
        ...             with transformer.cache_context(name):
        ...                 y = transformer(x, timestep=torch.tensor([900.0]), encoder_hidden_states=text).sample
        ...         cache.commit(x)  # both branches
        >>> cache.held("uncond")
        [0, 2, 3, 4, 5]
    """

    def __init__(self, transformer: Any, policy: Policy, block_frames: int, frames: int | None):
        from .patch import patch

        self.transformer, self.policy, self.block_frames, self.frames = transformer, policy, block_frames, frames
        self._layers = [CacheLayer(self, i) for i in range(transformer.config.num_layers)]
        self._branches: dict[str, Branch] = {}
        self._block: range | None = None
        self._table: Tensor | None = None  # cos and sin of the open block
        self._running: Branch | None = None  # the branch that the transformer runs for
        self._committing = False
        self._written: set[int] = set()  # layers, in this call
        self._rope: Any
        self._hook: Any  # None: disabled
        self._rope, self._hook = patch(transformer, self)

    # For users

    @property
    def next_frame(self) -> int:
        """Index of the first frame of the next block; of the open one, while there is one."""
        return next((branch.tables[0].next_frame for branch in self._branches.values()), 0)

    def get(self, layer: int) -> CacheLayer:
        """The cache of one layer."""
        return self._layers[check_index("layer", layer, len(self._layers))]

    @contextlib.contextmanager
    def block(self, frames: int) -> Iterator[range]:
        """The next `frames` latent frames, at most block_frames: all calls of the transformer inside are about them.

        Leaving it makes the committed block part of the past. Whatever is raised inside, the block is forgotten.

        Raises:
            RuntimeError: on leaving, a branch that was used was not committed (see `commit` and `abandon`).
        """
        frames = whole("frames", frames)
        if not 1 <= frames <= self.block_frames:
            raise ValueError(f"frames must be 1 to block_frames={self.block_frames}, got {frames}")
        if self._block is not None:
            raise RuntimeError("a block is open already: leave it before you begin another")
        if self._hook is None:
            raise RuntimeError("this cache is disabled: call enable_block_cache again")
        self._block = range(self.next_frame, self.next_frame + frames)
        self._rope.first = self._block.start
        try:
            for branch in self._branches.values():
                branch.open(frames)
            yield self._block
            self._seal()
        finally:
            self.abandon()

    @torch.no_grad()
    def commit(self, hidden_states: Tensor, timestep: float = 0.0, **inputs: Any) -> None:
        """The clean pass: the transformer runs on the clean latents, once for each branch of this block or, inside a
        cache_context, for that one. Each layer keeps its keys and values, in the policy's format.

        Args:
            hidden_states: [B, C, frames, height, width], as the transformer takes them, in any floating dtype.
            timestep: of the noise that the model is told to see in its past.
            inputs: other arguments of the transformer; by default what it was last given in this block.
        """
        if self._block is None or self._hook is None:
            raise RuntimeError("commit needs an open block: call it inside `with cache.block(frames)`")
        context = self._hook.context
        used = [name for name, branch in self._branches.items() if branch.inputs is not None and not branch.committed]
        for name in [context] if context else used or [COND]:
            before = self._branches.get(name)
            given = (before.inputs if before else None) or {}
            steps = (before.steps if before else None) or (len(hidden_states),)
            x = hidden_states.to(before.shape.dtype if before else hidden_states.dtype)
            t = torch.full(steps, float(timestep), device=hidden_states.device)
            with contextlib.nullcontext() if context else self.transformer.cache_context(name):
                self._committing = True
                try:
                    self.transformer(x, timestep=t, return_dict=False, **{**given, **inputs})
                finally:
                    self._committing = False
            if missing := sorted(set(range(len(self._layers))) - self._written):
                raise RuntimeError(f"commit: layers {missing} were not run, and left no keys and values")
            self._branches[name].committed = True

    def abandon(self) -> None:
        """Forget the open block, if there is one; the past stays as it is."""
        if self._block is not None:
            self._block = self._table = self._running = None
            for branch in self._branches.values():
                branch.abandon()
            if not self.next_frame:  # branches, and the size of latents, are those of the first block that is kept
                self._branches = {}

    def reset(self) -> None:
        """Forget all, and give back the memory: the next block begins at frame 0, of any size."""
        if self._block is not None:
            raise RuntimeError("reset needs the open block to be left first")
        self._branches = {}

    clear = reset  # as diffusers' own containers call it

    def disable(self) -> None:
        """Give the transformer its stock parts back; the past is forgotten.

        Raises:
            RuntimeError: a block is open, or another tool has replaced a part since; nothing was changed.
        """
        from .patch import unpatch

        if self._block is not None:
            raise RuntimeError("disable needs the open block to be left first")
        if self._hook is None:
            raise RuntimeError("this cache is disabled already")
        unpatch(self.transformer)
        self._hook = None
        self.reset()

    def held(self, branch: str = COND) -> list[int]:
        """Frames that a branch holds."""
        return list(self._branches[branch].tables[0].held) if branch in self._branches else []

    @property
    def nbytes(self) -> int:
        """Of all keys and values on the device, and the room for the open block."""
        return sum(sum(branch.store.nbytes.values()) for branch in self._branches.values())

    # For its layers, and for what `patch` puts into the transformer

    def begin(self, branch: str | None, hidden_states: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> None:
        """The transformer is called."""
        if self._block is None:
            raise RuntimeError("no block is open: call the transformer inside `with cache.block(frames)`")
        if hidden_states.ndim != 5:
            raise ValueError(f"hidden_states must be [B, C, frames, height, width], got {list(hidden_states.shape)}")
        name, (videos, _, frames, height, width) = branch or COND, hidden_states.shape
        shape = Shape(videos, height, width, hidden_states.device, hidden_states.dtype)
        if frames != len(self._block):
            raise ValueError(f"hidden_states must have the {len(self._block)} frames of the open block, got {frames}")
        for other in self._branches.values():
            if shape != other.shape:
                raise ValueError(f"hidden_states must be as in the first call, {other.shape}, got {shape}")
        if name not in self._branches:
            if self.next_frame:
                raise RuntimeError(f"cache_context {name!r} is new: it must be used in every block from frame 0 on")
            made = Branch(self.transformer.config, shape, self.policy, self.block_frames, self.frames)
            made.open(frames)
            self._branches[name] = made
        found = self._branches[name]
        if found.committed:
            raise RuntimeError("this block is committed already: leave it and begin the next one")
        if self._table is None:
            self._table = self._rope.table(frames, height, width, hidden_states.device)
        found.begin(self._table, self._committing)
        found.inputs, found.steps = inputs, timestep.shape
        self._running, self._written = found, set()

    def end(self) -> None:
        """The call is over."""
        self._running = None

    def running(self) -> Branch:
        """The branch that the transformer runs for."""
        if self._running is None:
            raise RuntimeError("no call of the transformer is under way")
        return self._running

    def wrote(self, layer: int) -> None:
        self._written.add(layer)

    def _seal(self) -> None:
        if self._block is None:
            return  # abandoned
        for name, branch in self._branches.items():
            if not branch.committed:
                reason = "was not committed" if branch.inputs is not None else "was not used in this block"
                raise RuntimeError(
                    f"cache_context {name!r} {reason}: call cache.commit(clean latents) before you leave a block, or "
                    "cache.abandon()"
                )
        if not self._branches:
            raise RuntimeError("the transformer was not called in this block: call cache.abandon() to leave it so")
        tables = [table for branch in self._branches.values() for table in branch.tables]
        replace_states([(table, table.state.sealed()) for table in tables])  # all of them, or none
