"""One world's page table, and the passes that read and write through it.

    block = table.open_block(frames=3)                     # evicts by table edit, hands out scratch pages
    noisy = table.plan([block], rope=...)                  # once per block: page lists for all layers and steps
    for t in steps:
        x = update(x, model(x, t, attend=noisy.attend))    # every layer writes scratch, attends to past + scratch
    clean = table.plan([block], rope=..., commit=block)    # the clean pass quantizes each layer as it goes by
    model(x, 0, attend=clean.attend)
    table.seal(block)                                      # only now is the block part of the past

Three ideas carry it (DESIGN.md): the page list is the mask; the noisy passes write scratch and only the clean pass is
committed, quantized once; eviction, fork and rewind are edits of the table. A block that an exception leaves unsealed
was never there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .layout import PageList
from .ops import kv_append
from .paged_kv import Extent, KVStore, NotResident
from .passes import Block, Pass, TopK
from .policy import Policy


class PageTable:
    """Which extents hold which frames of one world. All of it lives on the host; attention sees only page lists."""

    def __init__(self, store: KVStore, policy: Policy):
        if policy.window is not None and policy.window < store.block_frames:
            raise ValueError(
                f"window must be at least one block of {store.block_frames} frames, as it counts the block "
                f"being made, got {policy.window}"
            )
        if policy.format is None:
            policy = dataclasses.replace(policy, format=next(iter(store.pools)))
        for format in (policy.format, policy.sink_format, policy.older and policy.older[1]):
            if format is not None and format not in store.pools:
                raise ValueError(f"the policy's format {format!r} has no pool in this store ({', '.join(store.pools)})")
        if policy.archive and not store.host:
            raise ValueError("archive needs host memory in the store: KVStore(host={format: frames})")
        self.store, self.policy = store, policy
        self.held: dict[int, Extent] = {}  # frame -> extent, in the order of the frames
        self.cold: set[int] = set()  # held frames that this world does not want on the device
        self.pinned: set[int] = set()
        self.next_frame = 0
        self.open_blocks: list[Block] = []
        # One mean key per layer, frozen after the first block and taken off every key since: softmax does not change,
        # and what is left is smaller to quantize. None until then, and in stores that do not quantize.
        self.k_means: list[Tensor | None] = [None] * store.num_layers

    # A block's life

    def open_block(self, frames: int) -> Block:
        """The next `frames` frames, with scratch pages: for a block to commit and one to denoise or, where the store's
        `scratch_blocks` say so, for more that are denoised together."""
        store = self.store
        if not 1 <= frames <= store.block_frames:
            raise ValueError(f"frames must be 1 to {store.block_frames}, got {frames}")
        # The scratch pool is cut into places for one block each.
        size = store.block_frames * store.pages_per_frame
        free = set(range(store.scratch_blocks)) - {block.scratch[0] // size for block in self.open_blocks}
        if not free:
            raise RuntimeError(
                f"{store.scratch_blocks} blocks are open, and scratch holds no more: seal the first one before opening "
                "another, or give the store more scratch_blocks"
            )
        first = self.open_blocks[-1].end if self.open_blocks else self.next_frame
        scratch = [min(free) * size + i * store.pages_per_frame for i in range(frames)]
        if not self.open_blocks:
            self._turn_page(first + frames)
        block = Block(first, first + frames, scratch)
        self.open_blocks.append(block)
        return block

    def seal(self, block: Block, horizon: int | None = None) -> None:
        """The block's clean pass is done: it joins the past.

        Args:
            horizon: the frame that the window is counted back from, for what now leaves it; by default the end of the
                oldest block that is still open.
        """
        if not self.open_blocks or block is not self.open_blocks[0] or not block.target:
            raise RuntimeError("seal needs the oldest open block after a pass that committed it")
        self.open_blocks.pop(0)
        self.held.update(zip(block.frames, block.target))
        self.next_frame = block.end
        if self.open_blocks:
            self._turn_page(self.open_blocks[0].end if horizon is None else horizon)

    def abandon(self, keep: Block | Sequence[Block] | None = None) -> None:
        """Forget the blocks that are still open, but for these, which may be planned anew; the past stays as it is."""
        kept = [keep] if isinstance(keep, Block) else keep or []
        stay = [block for block in self.open_blocks if block in kept]
        for block in list(self.open_blocks):
            self.drop(block)
        self.open_blocks = stay
        self._thaw()

    def drop(self, block: Block) -> None:
        """Forget one open block, whatever becomes of the others."""
        for extent in block.target:
            self.store.release(extent)
        block.target = []
        self.open_blocks.remove(block)

    def _turn_page(self, block_end: int) -> None:
        """A block boundary: what was fetched has arrived, old frames go, and those that grew old change format."""
        self.store.settle()
        policy = self.policy
        stay = self.pinned | self.cold if policy.archive else self.pinned
        leaving = [frame for frame in self.held if frame not in stay and not policy.keeps(frame, block_end)]
        for frame in leaving:
            if policy.on_evict is not None:
                policy.on_evict(self, frame)
        if policy.archive:
            self.offload(leaving)
        else:
            self._forget(leaving)
        if policy.older is not None:
            ageing = [f for f, e in self.held.items() if f not in self.cold and e.format == policy.format]
            self._convert([f for f in ageing if policy.format_of(f, block_end) == policy.older[1]], policy.older[1])

    # Reading

    def range(self, first: int, last: int) -> PageList:
        """Pages of the held frames first .. last, both included, for attention over `store.layers[layer]`."""
        return self.select(range(first, last + 1))

    def window(self, recent: int, sink: int = 0) -> PageList:
        """Pages of the first `sink` frames and of the `recent` last ones, as far as they are held."""
        return self.select([f for f in self.held if f < sink or f >= self.next_frame - recent])

    def select(self, frames: Iterable[int]) -> PageList:
        """Pages of these held frames, in this order.

        Raises:
            KeyError: a frame is not held. ValueError: a frame is named twice. NotResident: see `prefetch`.
        """
        return self.store.page_list(map(self.store.first_page, self._resident(list(frames))))

    def gather(self, layer: int, frames: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """K (rotated, frozen mean removed) and V of held frames: [tokens, heads, D] and [tokens, heads, Dv]."""
        return self.store.gather(self.store.layers[layer], self.select(frames), dtype)

    def _held(self, frames: Sequence[int]) -> list[Extent]:
        missing = [frame for frame in frames if frame not in self.held]
        if missing:
            raise KeyError(f"frames must be held (now {list(self.held)}), got {missing}")
        if len(set(frames)) < len(frames):
            raise ValueError(f"frames must be named once, got {[f for f in set(frames) if frames.count(f) > 1]} again")
        return [self.held[frame] for frame in frames]

    def _resident(self, frames: Sequence[int]) -> list[Extent]:
        extents = self._held(frames)
        away = [frame for frame, extent in zip(frames, extents) if not extent.resident]
        if away:
            raise NotResident(f"frames {away} are in host memory: call prefetch({away}) before the block is opened")
        return extents

    def plan(
        self,
        blocks: Sequence[Block],
        rope: Tensor | None = None,
        commit: Block | None = None,
        predict: bool = True,
        see: Sequence[Sequence[int]] | None = None,
        top_k: TopK | None = None,
    ) -> Pass:
        """Everything that all layers of a pass over `blocks` share.

        Args:
            blocks: open blocks, oldest first; each is one segment of the queries.
            rope: [tokens of all blocks, R / 2, 2] float32, cos and sin; only `Pass.attend` needs it.
            commit: the block whose K and V this pass makes final; only the oldest open block can be. A later block
                of the same pass already reads its committed pages, so the fused clean pass equals the separate one.
                Of blocks that are not committed, later ones read what this pass writes to scratch.
            predict: False if only K and V are wanted: `attend` of the last layer then writes them and returns None.
            see: for each block, the frames before it that it attends to, instead of what the policy says: held ones,
                and those of other blocks of the pass. A block always attends to itself.
            top_k: of these, attend only to the pages that suit each run of queries best. For a pass over one block.
        """
        for block in blocks:
            if block not in self.open_blocks:
                raise ValueError(f"blocks must be open in this table; frames {block.first}..{block.end - 1} are not")
        if commit is not None and (commit is not self.open_blocks[0] or commit is not blocks[0]):
            raise ValueError("commit must be the oldest open block and the first of the pass")
        if commit is not None and len(blocks) > 1 and not self.can_fuse:
            raise ValueError(
                "commit must be alone in the pass that freezes the mean key: the first clean pass is separate"
            )
        if top_k is not None and len(blocks) != 1:
            raise ValueError(f"top_k needs a pass over one block, got {len(blocks)}")
        past = [self._past(block, blocks, see[i] if see else None) for i, block in enumerate(blocks)]
        if commit is not None and not commit.target:
            commit.target = self.store.allocate([self.policy.format_of(f, commit.end) for f in commit.frames])
        return Pass(self, blocks, past, rope, commit, predict, top_k)

    def past(self, block: Block) -> list[int]:
        """Held frames that the policy lets a block see."""
        return [f for f in self.held if f < block.first and (f in self.pinned or self.policy.sees(f, block.end))]

    def _past(self, block: Block, blocks: Sequence[Block], see: Sequence[int] | None) -> list[int]:
        """Frames that a block of a pass sees besides its own, of the other blocks of the pass too; all can be read."""
        others = [frame for other in blocks if other is not block for frame in other.frames]
        before = [frame for frame in others if frame < block.first and self.policy.sees(frame, block.end)]
        frames = self.past(block) + before if see is None else list(see)
        self._resident([frame for frame in frames if frame not in others])
        return frames

    @property
    def can_fuse(self) -> bool:
        """May a clean pass share its forward with the next block? Not the first one of a world that quantizes."""
        return not self.store.freezes_mean or self.k_means[0] is not None

    # Changing the past

    def fork(self) -> PageTable:
        """Another world with the same past, sharing its pages. Blocks that are still open stay with this one."""
        other = PageTable(self.store, self.policy)
        cold, share = self.cold, self.store.share
        other.held = {frame: share(extent, frame not in cold) for frame, extent in self.held.items()}
        other.cold, other.pinned, other.next_frame = set(cold), set(self.pinned), self.next_frame
        other.k_means = list(self.k_means)
        return other

    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames.

        Raises:
            RuntimeError: a block is open.
            ValueError: more than there are, or what the next block would see then has been evicted (Policy.undo).
        """
        if self.open_blocks:
            raise RuntimeError("rewind needs all blocks sealed or abandoned")
        if not 0 <= frames <= self.next_frame:
            raise ValueError(f"frames must be 0 to {self.next_frame}, as many as there are, got {frames}")
        end = self.next_frame - frames
        if gone := self.gone(end):
            raise ValueError(
                f"frames {gone} have left the window, which frame {end} would see: rewind less, give the policy "
                f"undo={self.policy.undo + frames}, or keep a fork"
            )
        self.truncate(end)

    def gone(self, end: int) -> list[int]:
        """Frames before `end` that the next block would see from there, and that are held no more."""
        horizon = end + self.store.block_frames
        return [f for f in range(end) if self.policy.sees(f, horizon) and f not in self.held]

    def truncate(self, end: int) -> None:
        """Forget frames `end` and later, even if what the next block would see has been evicted. No block is open."""
        if self.open_blocks:
            raise RuntimeError("truncate needs all blocks sealed or abandoned")
        self._forget([frame for frame in self.held if frame >= end])
        self.next_frame = end
        self._thaw()

    def forget(self, frames: Iterable[int]) -> None:
        """Forget these held frames: no block sees them any more."""
        frames = list(frames)
        self._held(frames)
        self._forget(frames)

    def check_room(self, blocks: Sequence[Block], leaving: Sequence[int]) -> None:
        """Could these blocks be committed, one after another, once the held frames `leaving` are forgotten?

        Raises:
            OutOfPages: not so.
        """
        formats = [self.policy.format_of(frame, block.end) for block in blocks for frame in block.frames]
        self.store.check_room(formats, self._held(leaving))

    def _thaw(self) -> None:
        """A world without a first block has no mean key, even if a clean pass that failed had frozen some layers'."""
        if self.next_frame == 0:
            self.k_means = [None] * len(self.k_means)

    def release(self) -> None:
        """Give everything back to the store."""
        self.abandon()
        self._forget(list(self.held))

    def pin(self, frames: Iterable[int]) -> None:
        """Keep these held frames, and see them, whatever the policy says."""
        frames = list(frames)
        self._held(frames)
        self.pinned.update(frames)

    def unpin(self, frames: Iterable[int]) -> None:
        self.pinned.difference_update(frames)

    def convert(self, frames: Sequence[int], format: str, *, sink: bool = False) -> None:
        """Hold these frames in another format. Worlds that share them keep theirs.

        Args:
            sink: frames of the sink too, which are protected otherwise.
        """
        self._check_sink("convert", frames, sink)
        self._resident(frames)
        self._convert([f for f in frames if self.held[f].format != format], format)

    def rewrite(
        self, frame: int, change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]], *, sink: bool = False
    ) -> None:
        """Give a held frame other contents, for instance a sink that follows what leaves the window.

        Args:
            change: (layer, k, v) -> (k, v), float32 [frame_tokens, heads, D], as `gather` returns them.
            sink: as for `convert`.
        """
        self._check_sink("rewrite", [frame], sink)
        (old,) = self._resident([frame])
        (new,) = self.store.allocate([old.format])
        try:
            for layer in range(self.store.num_layers):
                k, v = change(layer, *self.gather(layer, [frame]))
                pool = self.store.pools[new.format]
                where = self.store.page_list([self.store.first_page(new) - pool.base])
                kv_append(k, v, pool.layers[layer], where, backend=self.store.backend)
        except BaseException:
            self.store.release(new)
            raise
        self._replace(frame, new)

    def _check_sink(self, what: str, frames: Sequence[int], sink: bool) -> None:
        if not sink and any(frame < self.policy.sink for frame in frames):
            raise ValueError(f"{what}: frames below {self.policy.sink} are the sink and protected; pass sink=True")

    def _convert(self, frames: Sequence[int], format: str) -> None:
        if not frames:
            return
        for frame, extent in zip(frames, self.store.converted(self._resident(frames), format)):
            self._replace(frame, extent)

    def _replace(self, frame: int, extent: Extent) -> None:
        self.store.release(self.held[frame], frame not in self.cold)
        self.cold.discard(frame)
        self.held[frame] = extent

    def _forget(self, frames: Sequence[int]) -> None:
        for frame in frames:
            self.store.release(self.held.pop(frame), frame not in self.cold)
            self.cold.discard(frame)
            self.pinned.discard(frame)

    # Host memory

    def offload(self, frames: Sequence[int]) -> None:
        """Let these frames wait in host memory. They stay held, and readable until the next block is opened."""
        extents = [extent for frame, extent in zip(frames, self._held(frames)) if frame not in self.cold]
        self.store.offload(extents)
        for extent in extents:
            extent.hot -= 1
        self.cold.update(frames)

    def prefetch(self, frames: Sequence[int]) -> None:
        """Start to bring these frames back: they can be read once the next block is opened."""
        extents = [extent for frame, extent in zip(frames, self._held(frames)) if frame in self.cold]
        self.store.prefetch(extents)
        for extent in extents:
            extent.hot += 1
        self.cold.difference_update(frames)
