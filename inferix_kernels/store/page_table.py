"""One world's page table, and the passes that read and write through it. Long because half of it is docstrings.

    block = table.open_block(frames=3)                     # evicts by table edit
    noisy = table.plan([block], rope=...)                  # once per block: page lists for all layers and steps
    for t in steps:
        x = update(x, model(x, t, attend=noisy.attend))    # every layer writes scratch, attends to past + scratch
    clean = table.plan([block], rope=..., commit=block)    # the clean pass quantizes each layer as it goes by
    model(x, 0, attend=clean.attend)
    table.seal(block)                                      # only now is the block part of the past

Three ideas carry it (DESIGN.md): the page list is the mask; the noisy passes write scratch and only the clean pass is
committed, quantized once; eviction, fork and rewind are edits of the table. A block that an exception leaves unsealed
was never there.

An edit puts another `Past` in place with one assignment (past.py): an exception leaves all of it or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

from torch import Tensor

from .._check import whole
from ..ops import kv_append
from .attention import Attention, Local
from .boundary import turn_page
from .buffers import PassBuffers
from .extent import Extent
from .passes import Pass
from .past import NOTHING, Block
from .planning import Part, plan_pass
from .slots import OutOfPages
from .table_view import TableView
from .turns import in_turn


class PageTable(TableView):
    """Which extents hold which frames of one world. All of it lives on the host; attention sees only page lists.

    Example:
        >>> store = KVStore(layers=2, heads=2, head_dim=16, frame_tokens=10, block_frames=3, page_size=16,
        ...     pools={"int8": 40, "int4": 8}, host={"int8": 8})
        >>> table = store.open(Policy(window=9, sink=1, undo=3))
        >>> def make_block():
        ...     block = table.open_block(frames=3)
        ...     clean = table.plan([block], commit=block)
        ...     for layer in range(2):
        ...         y = clean.attend(layer, torch.randn(30, 3 * 2 * 16), None, None)
        ...     table.seal(block)
        >>> for _ in range(5):
        ...     make_block()
        >>> list(table.held)
        [0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    """

    # A block's life

    @in_turn
    def open_block(self, frames: int) -> Block:
        """The next `frames` frames. One block may be open to be committed and one to be denoised or, where the store's
        `scratch_blocks` say so, more that are denoised together. A block that is open by itself may be as long as
        scratch: frames that are to see each other when they are computed again, say.

        Raises:
            OutOfPages: there is no room for frames that leave the window to host memory, or that change format; nothing
                was changed.

        Example:
            >>> block = table.open_block(frames=3)
            >>> block.frames
            range(15, 18)
        """
        store, blocks, frames = self.store, self.state.open_blocks, whole("frames", frames)
        most = store.block_frames if blocks else store.scratch_frames
        if not 1 <= frames <= most:
            raise ValueError(f"frames must be 1 to {most}, got {frames}")
        if len(blocks) >= store.scratch_blocks:
            raise RuntimeError(
                f"{store.scratch_blocks} blocks are open, and scratch holds no more: seal the first one before opening "
                "another, or give the store more scratch_blocks"
            )
        first = blocks[-1].end if blocks else self.state.next_frame
        block = Block(first, first + frames)
        past = self.state if blocks else turn_page(self, first + frames)
        self.state = past._replace(open_blocks=(*blocks, block))
        return block

    @in_turn
    def seal(self, block: Block, horizon: int | None = None) -> None:
        """The block's clean pass is done: it joins the past.

        Args:
            horizon: the frame that the window is counted back from, for what now leaves it; by default the end of the
                oldest block that is still open.

        Raises:
            RuntimeError: the block is not the oldest open one, or no pass was planned that commits it.
            OutOfPages: as for `open_block`; the block is still open.

        Example:
            >>> block = table.open_block(frames=3)
            >>> clean = table.plan([block], commit=block)
            >>> for layer in range(2):
            ...     y = clean.attend(layer, torch.randn(30, 3 * 2 * 16), None, None)
            >>> table.seal(block)
            >>> table.next_frame
            18
        """
        blocks, horizon = self.state.open_blocks, None if horizon is None else whole("horizon", horizon)
        if not blocks or block is not blocks[0] or not self.state.target:
            raise RuntimeError("seal needs the oldest open block after a pass that committed it")
        if len(blocks) > 1:
            self.state = turn_page(self, blocks[1].end if horizon is None else horizon, seal=True)
        else:
            self.state = self.state.sealed()

    @in_turn
    def abandon(self, keep: Block | Sequence[Block] | None = None) -> None:
        """Forget the blocks that are still open, but for these, which may be planned anew; the past stays as it is.

        Example:
            >>> block = table.open_block(frames=3)
            >>> table.abandon()
            >>> table.open_blocks
            []
        """
        kept = [keep] if isinstance(keep, Block) else keep or []
        self.state = self.state.only_blocks([block for block in self.open_blocks if block in kept]).thawed()

    @in_turn
    def drop(self, block: Block) -> None:
        """Forget one open block, whatever becomes of the others.

        Example:
            >>> block = table.open_block(frames=3)
            >>> table.drop(block)
        """
        self.check_open([block])
        self.state = self.state.only_blocks([other for other in self.state.open_blocks if other is not block])

    @in_turn
    def plan(
        self,
        blocks: Sequence[Block],
        rope: Tensor | None = None,
        commit: Block | None = None,
        predict: bool = True,
        see: Sequence[Sequence[int]] | None = None,
        attention: Attention = Local(),
        buffers: PassBuffers | None = None,
    ) -> Pass:
        """Everything that all layers of a pass over `blocks` share.

        Args:
            blocks: open blocks, oldest first; each is one segment of the queries.
            rope: [tokens of all blocks, R / 2, 2] float32, cos and sin; only `Pass.attend` needs it.
            commit: the block whose K and V this pass makes final; only the oldest open block can be. A later block
                of the same pass already reads its committed pages, so the fused clean pass equals the separate one.
                Of blocks that are not committed, later ones read what this pass writes to scratch.
            predict: False if only K and V are wanted: `attend` of the last layer then writes them and returns None.
            see: for each block, the frames that it attends to, instead of what the policy says: held ones, and those of
                other blocks of the pass, later ones too. A block always attends to itself.
            attention: how queries attend to what they see: to all of it, or as TopK does.
            buffers: memory that the pass takes over from those planned with it before; None: of its own.

        Raises:
            ValueError: a block is not open, or an argument does not fit the others.
            NotResident: a frame to be seen lies in host memory alone.
            OutOfPages: there is no room for the block to commit. Whatever is raised, nothing was changed.

        Example:
            >>> block = table.open_block(frames=3)
            >>> noisy = table.plan([block])  # what the policy lets the block see
            >>> some = table.plan([block], see=[[0, 14]])  # these frames and the block itself
            >>> best = table.plan([block], attention=TopK(pages=4, queries=10))  # the best pages for each 10 queries
        """
        return plan_pass(self.store, [Part(self, blocks, commit, see)], rope, predict, attention, buffers)

    # Changing the past

    @in_turn
    def fork(self) -> PageTable:
        """Another world with the same past, sharing its pages. Blocks that are still open stay with this one.

        Example:
            >>> other = table.fork()
            >>> other.held == table.held  # the same pages
            True
        """
        other = object.__new__(PageTable)
        other.store, other.policy, other.turn = self.store, self.policy, self.turn
        other.state = self.state._replace(kept=NOTHING, open_blocks=(), target=())
        self.store.register(other)
        return other

    @in_turn
    def rewind(self, frames: int) -> None:
        """Forget the last `frames` frames.

        Raises:
            RuntimeError: a block is open.
            ValueError: more than there are, or what the next block would see then has been evicted (Policy.undo).

        Example:
            >>> table.rewind(3)
            >>> table.next_frame
            12
        """
        if self.state.open_blocks:
            raise RuntimeError("rewind needs all blocks sealed or abandoned")
        next_frame, frames = self.state.next_frame, whole("frames", frames)
        if not 0 <= frames <= next_frame:
            raise ValueError(f"frames must be 0 to {next_frame}, as many as there are, got {frames}")
        end = next_frame - frames
        if gone := self.gone(end):
            raise ValueError(
                f"frames {gone} have left the window, which frame {end} would see: rewind less, give the policy "
                f"undo={self.policy.undo + frames}, or keep a fork"
            )
        self.truncate(end)

    def gone(self, end: int) -> list[int]:
        """Frames before `end`, ten at most, that the next block would see from there and that are held no more."""
        policy, end = self.policy, whole("end", end)
        held, horizon = self.state.held, self.window_end(end + self.store.block_frames)
        recent = 0 if policy.window is None else min(end, max(0, horizon - policy.window))
        seen = chain(range(min(policy.sink, recent)), range(recent, end))
        return list(islice((frame for frame in seen if frame not in held), 10))

    @in_turn
    def truncate(self, end: int) -> None:
        """Forget frames `end` and later, even if what the next block would see has been evicted. No block is open.

        Example:
            >>> table.truncate(12)
            >>> max(table.held)
            11
        """
        past, end = self.state, whole("end", end)
        if past.open_blocks:
            raise RuntimeError("truncate needs all blocks sealed or abandoned")
        if not 0 <= end <= past.next_frame:
            raise ValueError(f"end must be 0 to {past.next_frame}, the frames there are, got {end}")
        self.state = past.without([f for f in past.held if f >= end])._replace(next_frame=end).thawed()

    @in_turn
    def forget(self, frames: Iterable[int]) -> None:
        """Forget these held frames: no block sees them any more.

        Example:
            >>> table.forget([4])
            >>> 4 in table.held
            False
        """
        frames = self.check_held(frames)
        self.state = self.state.without(frames)

    @in_turn
    def check_room(self, blocks: Sequence[Block], leaving: Sequence[int]) -> None:
        """Could these blocks be opened and committed, one after another, once the held frames `leaving` are forgotten?

        Raises:
            OutOfPages: the pools have no room, or scratch has none for one of the blocks.
        """
        leaving, slots, most = self.check_held(leaving), self.state.slots, self.store.scratch_frames
        if (longest := max((len(block.frames) for block in blocks), default=0)) > most:
            raise OutOfPages(
                f"scratch: a block of {longest} frames was asked for, and it holds {most}: give it more scratch_blocks"
            )
        formats = [self.policy.format_of(frame, block.end) for block in blocks for frame in block.frames]
        self.store.check_room(self, formats, [slots[frame] for frame in leaving if frame in slots])

    @in_turn
    def release(self) -> None:
        """Give everything back to the store, now. A world that is dropped gives it back too, once it is collected.

        Example:
            >>> table.release()
            >>> dict(table.held)
            {}
        """
        self.state = self.state.only_blocks([]).without(self.state.held).thawed()

    @in_turn
    def pin(self, frames: Iterable[int]) -> None:
        """Keep these held frames, and see them, whatever the policy says.

        Example:
            >>> table.pin([4])
            >>> make_block(), make_block(), 4 in table.held
            (None, None, True)
        """
        frames = self.check_held(frames)
        self.state = self.state._replace(pinned=self.state.pinned.union(frames))

    @in_turn
    def unpin(self, frames: Iterable[int]) -> None:
        """Let the policy decide about these frames again.

        Example:
            >>> table.pin([4])
            >>> table.unpin([4])
            >>> table.pinned
            frozenset()
        """
        gone = {whole("frames", frame) for frame in frames}
        self.state = self.state._replace(pinned=self.state.pinned - gone)

    @in_turn
    def convert(self, frames: Sequence[int], format: str, *, sink: bool = False) -> None:
        """Hold these frames in another format. Worlds that share them keep theirs.

        Args:
            sink: frames of the sink too, which are protected otherwise.

        Example:
            >>> table.convert([3, 4], "int4")
            >>> table.held[3].format
            'int4'
        """
        self._check_sink("convert", frames := self.check_held(frames), sink)
        slots = self.resident(frames)
        changing = [frame for frame, slot in zip(frames, slots) if slot.pool.format != format]
        if changing:
            self.state = self.converted(self.state, changing, format)

    @in_turn
    def rewrite(
        self, frame: int, change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]], *, sink: bool = False
    ) -> None:
        """Give a held frame other contents, for instance a sink that follows what leaves the window.

        Args:
            change: (layer, k, v) -> (k, v), float32 [frame_tokens, heads, D], as `gather` returns them.
            sink: as for `convert`.

        Example:
            >>> table.rewrite(4, lambda layer, k, v: (k, 2 * v))
        """
        self._check_sink("rewrite", [frame := whole("frame", frame)], sink)
        (old,) = self.resident([frame])
        with self.store.take([old.pool.format]) as (slot,):
            where = self.store.lists.of([slot.pool_page])
            for layer in range(self.store.num_layers):
                k, v = change(layer, *self.gather(layer, [frame]))
                kv_append(k, v, slot.pool.layers[layer], where, backend=self.store.backend)
        self.check_held([frame])  # still, whatever `change` did
        self.state = self.state.replaced({frame: (Extent(old.pool.format, slot), slot)})

    def _check_sink(self, what: str, frames: Sequence[int], sink: bool) -> None:
        if not sink and any(frame < self.policy.sink for frame in frames):
            raise ValueError(f"{what}: frames below {self.policy.sink} are the sink and protected; pass sink=True")

    # Host memory

    @in_turn
    def offload(self, frames: Sequence[int]) -> None:
        """Let these frames wait in host memory. They stay held, and can be read until this world's next block boundary,
        where a block is opened after all others were sealed, or the oldest of several is sealed. Without an open block,
        another world's boundary and `KVStore.sync_copies` end that too.

        Raises:
            OutOfPages: host memory has no room for all of them; nothing was changed.

        Example:
            >>> table.offload([3, 4])
            >>> sorted(table.cold)
            [3, 4]
        """
        frames, past = self.check_held(frames), self.state
        going = [frame for frame in frames if frame in past.slots]
        self.store.to_host([(past.held[frame], past.slots[frame]) for frame in going])
        self.store.keeping(self)
        self.state = past.away(going, keep=True)

    @in_turn
    def prefetch(self, frames: Sequence[int]) -> None:
        """Start to bring these frames back: they can be read once the next block is opened.

        Raises:
            OutOfPages: the device has no room for all of them; nothing was changed.

        Example:
            >>> table.offload([3, 4])
            >>> table.prefetch([3])
            >>> sorted(table.cold)
            [4]
        """
        frames, past = self.check_held(frames), self.state
        coming = [frame for frame in frames if frame not in past.slots]
        self.state = past.back(dict(zip(coming, self.store.to_device([past.held[frame] for frame in coming]))))
