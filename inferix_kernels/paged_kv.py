"""The KV store: pages shared by all layers' bookkeeping, one page table per world, and the passes that use them.

    store = KVStore(layers=30, heads=12, head_dim=128, frame_tokens=1560, format="int8", frames=21)
    table = store.open(Policy(window=18, sink=3))
    block = table.open_block(frames=3)                     # evicts by table edit, hands out scratch pages
    noisy = table.plan([block], rope=...)                  # once per block: page lists for all layers and steps
    for t in steps:
        x = update(x, model(x, t, attend=noisy.attend))    # every layer writes scratch, attends to past + scratch
    clean = table.plan([block], rope=..., commit=block)    # the clean pass quantizes each layer as it goes by
    model(x, 0, attend=clean.attend)
    table.seal(block)                                      # only now is the block part of the past

Three ideas carry it (DESIGN.md): the page list is the mask; the noisy passes write scratch and only the clean pass is
committed, quantized once; eviction is an edit of the table. A block that an exception leaves unsealed was never there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .layout import KVPages, PageList, Plan, make_plan
from .ops import kv_commit, kv_gather, paged_attention, qkv_prologue


class OutOfPages(RuntimeError):
    """The store has no free page left; nothing was changed."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a block sees of the past: the first `sink` frames, and recent frames up to `window` with its own.

    With window 18, sink 3 and blocks of 3, the block of frames 30..32 sees 0..2 and 15..32. `window=None` keeps all.
    """

    window: int | None = None
    sink: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 frame, got {self.window}")
        if self.sink < 0:
            raise ValueError(f"sink must be 0 or more frames, got {self.sink}")

    def sees(self, frame: int, block_end: int) -> bool:
        """Does a block that ends before frame `block_end` attend to the past frame `frame`?"""
        return self.window is None or frame < self.sink or frame >= block_end - self.window


@dataclasses.dataclass
class Block:
    """Frames [first, end) while they are denoised together: their scratch pages and, once planned, their own."""

    first: int
    end: int
    scratch: list[list[int]]  # [frame][page] ids in the scratch pool
    target: list[list[int]] = dataclasses.field(default_factory=list)  # the same in the store's pools, once planned

    @property
    def frames(self) -> range:
        return range(self.first, self.end)


class KVStore:
    """Pools of pages for every layer, and the free list they share.

    A page id means the same page in every layer. A frame's tokens begin on a page boundary; its last page may be
    partly valid. Scratch is one layer deep: a layer's noisy keys are read only by its own attention, and the clean
    pass commits each layer as it goes by.

    Args:
        layers, heads, head_dim: of the keys and values (heads is the number of KV heads).
        frame_tokens: tokens per latent frame; any count.
        frames: frames the store can hold, over all its worlds.
        block_frames: frames per block; scratch holds two blocks, for the fused clean pass.
        format: "fp32", "bf16" or "int8", how committed pages store K and V.
        scratch_format: "fp32" or "bf16", how the current block does.
        page_size: token slots per page, a multiple of 8.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        frame_tokens: int,
        frames: int,
        block_frames: int,
        format: str = "int8",
        scratch_format: str = "fp32",
        page_size: int = 64,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ):
        counts = {
            "layers": layers,
            "heads": heads,
            "head_dim": head_dim,
            "frame_tokens": frame_tokens,
            "frames": frames,
        }
        for name, count in (counts | {"block_frames": block_frames}).items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if page_size < 8 or page_size % 8:
            raise ValueError(f"page_size must be a positive multiple of 8, got {page_size}")
        if scratch_format == "int8":
            raise ValueError("scratch_format must be 'fp32' or 'bf16', got 'int8': noise is never quantized")
        self.frame_tokens, self.page_size, self.device, self.backend = frame_tokens, page_size, device, backend
        self.pages_per_frame = -(-frame_tokens // page_size)
        self.page_lens = [page_size] * (frame_tokens // page_size)
        self.page_lens += [frame_tokens % page_size] if frame_tokens % page_size else []
        self.num_pages = frames * self.pages_per_frame
        self.block_frames, self.format, self.heads, self.head_dim = block_frames, format, heads, head_dim
        shape = (heads, page_size, head_dim, device)
        self.layers = [KVPages.empty(format, self.num_pages, *shape) for _ in range(layers)]
        self.scratch = KVPages.empty(scratch_format, 2 * block_frames * self.pages_per_frame, *shape)
        self.free = list(range(self.num_pages))[::-1]

    def open(self, policy: Policy) -> PageTable:
        """A new, empty world over this store."""
        if policy.window is not None and policy.window < self.block_frames:
            raise ValueError(
                f"window must be at least one block of {self.block_frames} frames, as it counts the block "
                f"being made, got {policy.window}"
            )
        return PageTable(self, policy)

    def allocate(self, frames: int) -> list[list[int]]:
        """Page ids of `frames` new frames, [frame][page]."""
        need = frames * self.pages_per_frame
        if need > len(self.free):
            raise OutOfPages(f"{need} pages needed for {frames} frames, {len(self.free)} of {self.num_pages} are free")
        return [[self.free.pop() for _ in range(self.pages_per_frame)] for _ in range(frames)]

    def page_list(self, frames: Iterable[list[int]]) -> PageList:
        """The page list of whole frames, in order."""
        pages = [page for frame in frames for page in frame]
        lens = self.page_lens * (len(pages) // self.pages_per_frame)
        return PageList(*(torch.tensor(x, dtype=torch.int32, device=self.device) for x in (pages, lens)))

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of committed pages by format, and of scratch."""
        return {self.format: sum(pages.nbytes for pages in self.layers), "scratch": self.scratch.nbytes}


class PageTable:
    """Which pages hold which frames of one world. All of it lives on the host; attention sees only page lists."""

    def __init__(self, store: KVStore, policy: Policy):
        self.store, self.policy = store, policy
        self.held: dict[int, list[int]] = {}  # frame -> pages, in the order of the frames
        self.next_frame = 0
        self.open_blocks: list[Block] = []
        # One mean key per layer, frozen after the first block and taken off every key since: softmax does not change,
        # and what is left is smaller to quantize. None until then, and for formats that do not quantize.
        self.k_means: list[Tensor | None] = [None] * len(store.layers)

    def open_block(self, frames: int) -> Block:
        """The next `frames` frames, with scratch pages. At most two blocks are open: one to commit, one to denoise."""
        if not 1 <= frames <= self.store.block_frames:
            raise ValueError(f"frames must be 1 to {self.store.block_frames}, got {frames}")
        if len(self.open_blocks) == 2:
            raise RuntimeError("two blocks are open already: seal the first one before opening a third")
        per_frame, half = self.store.pages_per_frame, self.store.block_frames * self.store.pages_per_frame
        # The half of the scratch pool that the other open block does not use.
        start = half if self.open_blocks and self.open_blocks[0].scratch[0][0] < half else 0
        first = self.open_blocks[-1].end if self.open_blocks else self.next_frame
        scratch = [list(range(start + i * per_frame, start + (i + 1) * per_frame)) for i in range(frames)]
        block = Block(first, first + frames, scratch)
        self.open_blocks.append(block)
        if len(self.open_blocks) == 1:
            self._evict(block.end)
        return block

    def past(self, block: Block) -> list[list[int]]:
        """[frame][page] of what the policy lets a block see, a block still to be committed in this pass included."""
        planned = {frame: pages for b in self.open_blocks if b is not block for frame, pages in zip(b.frames, b.target)}
        seen = {frame: pages for frame, pages in (self.held | planned).items() if frame < block.first}
        return [pages for frame, pages in seen.items() if self.policy.sees(frame, block.end)]

    def plan(self, blocks: Sequence[Block], rope: Tensor, commit: Block | None = None, predict: bool = True) -> Pass:
        """Everything that all layers of a pass over `blocks` share.

        Args:
            blocks: open blocks, oldest first; each is one segment of the queries.
            rope: [tokens of all blocks, R / 2, 2] float32, cos and sin.
            commit: the block whose K and V this pass makes final; only the oldest open block can be. A later block
                of the same pass already reads its committed pages, so the fused clean pass equals the separate one.
            predict: False if only K and V are wanted: `attend` of the last layer then writes them and returns None.
        """
        for block in blocks:
            if not any(block is b for b in self.open_blocks):
                raise ValueError(f"blocks must be open in this table; frames {block.first}..{block.end - 1} are not")
        if commit is not None and (commit is not self.open_blocks[0] or commit is not blocks[0]):
            raise ValueError("commit must be the oldest open block and the first of the pass")
        if commit is not None and len(blocks) > 1 and not self.can_fuse:
            raise ValueError(
                "commit must be alone in the pass that freezes the mean key: the first clean pass is separate"
            )
        if commit is not None and not commit.target:
            commit.target = self.store.allocate(len(commit.frames))
        base, lens = self.store.num_pages, self.store.page_lens
        segments = []
        for block in blocks:
            frames = self.past(block) + [[base + page for page in frame] for frame in block.scratch]
            pages = [page for frame in frames for page in frame]
            segments.append((len(block.frames) * self.store.frame_tokens, pages, lens * len(frames)))
        written = self.store.page_list(pages for block in blocks for pages in block.scratch)
        return Pass(self, make_plan(segments, self.store.device), written, rope, commit, predict)

    @property
    def can_fuse(self) -> bool:
        """May a clean pass share its forward with the next block? Not the first one of a world that quantizes."""
        return self.store.format != "int8" or self.k_means[0] is not None

    def seal(self, block: Block) -> None:
        """The block's clean pass is done: it joins the past."""
        if not self.open_blocks or block is not self.open_blocks[0] or not block.target:
            raise RuntimeError("seal needs the oldest open block after a pass that committed it")
        self.open_blocks.pop(0)
        self.held.update(zip(block.frames, block.target))
        self.next_frame = block.end
        if self.open_blocks:
            self._evict(self.open_blocks[0].end)

    def abandon(self, keep: Block | None = None) -> None:
        """Forget the blocks that are still open, but for `keep`; the past stays as it is."""
        for block in self.open_blocks:
            self.store.free.extend(page for pages in block.target for page in pages)
            block.target = []
        self.open_blocks = [block for block in self.open_blocks if block is keep]

    def release(self) -> None:
        """Give every page back to the store."""
        self.abandon()
        self._free(list(self.held))

    def gather(self, layer: int, frames: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """K (rotated, frozen mean removed) and V of held frames, [tokens, heads, head_dim] each."""
        missing = [frame for frame in frames if frame not in self.held]
        if missing:
            raise KeyError(f"frames must be held (now {list(self.held)}), got {missing}")
        where = self.store.page_list(self.held[frame] for frame in frames)
        return kv_gather([self.store.layers[layer]], where, dtype, backend=self.store.backend)

    def _evict(self, block_end: int) -> None:
        self._free([frame for frame in self.held if not self.policy.sees(frame, block_end)])

    def _free(self, frames: Sequence[int]) -> None:
        for frame in frames:
            self.store.free.extend(self.held.pop(frame))


@dataclasses.dataclass
class Pass:
    """One forward over one or two blocks: its `attend` is all that a layer needs to know of the store."""

    table: PageTable
    plan: Plan
    written: PageList  # scratch pages of all blocks, in the order of the tokens
    rope: Tensor
    commit: Block | None
    predict: bool

    def __post_init__(self) -> None:
        store = self.table.store
        self._source = self._target = None
        if self.commit is not None:
            self._source, self._target = (store.page_list(x) for x in (self.commit.scratch, self.commit.target))

    def attend(
        self, layer: int, qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, eps: float = 1e-6
    ) -> Tensor | None:
        """Normalise, rotate, write, commit if this is the clean pass, and attend.

        qkv [T, (Hq + 2 H) * D] packed q | k | v of all blocks' tokens, before norm and rotation -> [T, Hq * D], or
        None from the last layer of a pass that predicts nothing.
        """
        store, means = self.table.store, self.table.k_means
        pages, mean = store.layers[layer], means[layer]
        q = qkv_prologue(
            qkv, norm_q, norm_k, self.rope, store.scratch, self.written, k_mean=mean, eps=eps, backend=store.backend
        )
        if self._source is not None and self._target is not None:
            if store.format == "int8" and mean is None:
                k, _ = kv_gather([store.scratch], self._source, backend=store.backend)
                means[layer] = fresh = k.mean(0)
            else:
                fresh = None  # scratch keys had their mean removed already
            kv_commit(store.scratch, self._source, pages, self._target, k_mean=fresh, backend=store.backend)
        if not self.predict and layer == len(store.layers) - 1:
            return None
        out, _ = paged_attention(q, [pages, store.scratch], self.plan, backend=store.backend)
        return out.flatten(1)
