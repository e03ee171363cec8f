"""Plans a pass: which frames its blocks read, where they are written, and what is committed to which slots.

All of it is worked out on the host and goes to the device in one copy. A plan is made whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, count, groupby
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .._check import shown
from ..layout import KVPages, PageList
from ..plans import Plan
from .attention import Attend, Attention, BlockReads, FrameRead, Reads, Sharded
from .buffers import PassBuffers, Place, Rows
from .extent import Extent
from .passes import Pass
from .past import Block
from .reading import Met, is_plain, read_by_policy
from .share import Share
from .slots import Slot
from .storage import Storage
from .table_view import TableView, replace_states

Target = Sequence[tuple[Extent, Slot]]  # what a committed block becomes, frame by frame
# (format, first pool pages in scratch of the frames that are committed in it, first pool pages of its pool)
Commit = tuple[str, list[int], list[int]]


class Part(NamedTuple):
    """One world's part of a pass.

    Attributes:
        table: the world's PageTable.
        blocks: open blocks of it, oldest first; each is one segment of the queries.
        commit: the block whose K and V this pass makes final; see PageTable.plan.
        see: for each block, the frames that it attends to besides its own; None: as the policy says.

    Example:
        >>> store = KVStore(layers=2, heads=2, head_dim=16, frame_tokens=10, block_frames=3, pools={"int8": 12})
        >>> table = store.open(Policy(window=9))
        >>> block = table.open_block(frames=3)
        >>> clean = store.plan([Part(table, [block], commit=block)])  # one world's; other worlds' parts may follow
    """

    table: TableView
    blocks: Sequence[Block]
    commit: Block | None = None
    see: Sequence[Sequence[int]] | None = None

    @property
    def frames(self) -> list[int]:
        """Of its blocks, in the order of the queries."""
        return [frame for block in self.blocks for frame in block.frames]


def plan_pass(
    store: Storage,
    parts: Sequence[Part],
    rope: Tensor | None,
    predict: bool,
    attention: Attention,
    buffers: PassBuffers | None = None,
) -> Pass:
    """One pass over blocks of several worlds of a store. Arguments and errors: as for KVStore.plan and, of one world,
    PageTable.plan."""
    # A Part is itself a tuple: without this line a lone one would be read as a list of its fields.
    if isinstance(parts, Part) or not isinstance(parts, Sequence) or not all(isinstance(each, Part) for each in parts):
        raise ValueError(f"parts must be a list of Part, got {shown(parts):.80}")
    if not parts:
        raise ValueError("parts must be at least one world's, got none")
    with store.turn:
        _check_parts(store, parts, rope)
        seen = [_seen(part) for part in parts]
        new = {part.table: _formats(part) for part in parts if part.commit is not None and not part.table.state.target}
        if not new:
            return _pass(store, _placed(store, parts, seen, {}), rope, predict, attention, buffers)
        with store.take(list(chain(*new.values()))) as slots:
            free = iter(slots)
            targets = {
                table: tuple((Extent(format, slot), slot) for format, slot in zip(formats, free))
                for table, formats in new.items()
            }
            planned = _pass(store, _placed(store, parts, seen, targets), rope, predict, attention, buffers)
        replace_states([(table, table.state._replace(target=target)) for table, target in targets.items()])
    return planned


def _check_parts(store: Storage, parts: Sequence[Part], rope: Tensor | None) -> None:
    """Raises ValueError, naming the argument, unless these parts make a pass."""
    for part in parts:
        if part.table.store is not store:
            raise ValueError("parts must be of worlds of this store, got one of another")
        _check_part(part)
    if len({id(part.table) for part in parts}) < len(parts):
        raise ValueError("parts must be of different worlds, got one world twice: name its blocks in one part")
    frames = sum(block.end - block.first for part in parts for block in part.blocks)
    most = store.scratch_frames
    if frames > most:
        raise ValueError(
            f"blocks must be {most} frames at most in one pass, as scratch holds {store.scratch_blocks} blocks of "
            f"{store.block_frames}, got {frames}: give the store more scratch_blocks"
        )
    if rope is not None and len(rope) != frames * store.frame_tokens:
        raise ValueError(
            f"rope must have {frames * store.frame_tokens} rows, one for each token of the pass, got {len(rope)}"
        )


def _check_part(part: Part) -> None:
    table, blocks, commit, see = part
    if not blocks:
        raise ValueError("blocks must be at least one open block, got none")
    table.check_open(blocks)
    if len({block.first for block in blocks}) < len(blocks):
        raise ValueError("blocks must be different ones, got one twice")
    if commit is not None and (commit is not table.state.open_blocks[0] or commit is not blocks[0]):
        raise ValueError("commit must be the oldest open block and the first of the pass")
    if commit is not None and len(blocks) > 1 and not table.can_fuse:
        raise ValueError("commit must be alone in the pass that freezes the mean key: the first clean pass is separate")
    if see is not None and len(see) != len(blocks):
        raise ValueError(f"see must be the frames of each of the {len(blocks)} blocks, got {len(see)} lists")


def _seen(part: Part) -> list[Sequence[Slot | int]]:
    """What each block reads besides itself: see TableView.seen."""
    return [part.table.seen(block, part.blocks, frames) for block, frames in zip(part.blocks, _sees(part))]


def _sees(part: Part) -> Sequence[Sequence[int] | None]:
    return part.see or [None] * len(part.blocks)


def _formats(part: Part) -> list[str]:
    """In which the frames of its committed block are held."""
    assert part.commit is not None
    return [part.table.policy.format_of(frame, part.commit.end) for frame in part.commit.frames]


# Where a pass reads and writes


class _Placed(NamedTuple):
    """One part on the host; frames are given by the first page of each.

    Attributes:
        reads: page ids for one block after another, each block's own last.
        pairs: (pool page in scratch, slot) of each frame that is committed.
        part: what was asked for.
    """

    table: TableView
    blocks: list[BlockReads]
    reads: list[int]
    pairs: list[tuple[int, Slot]]
    part: Part


def _placed(
    store: Storage,
    parts: Sequence[Part],
    seen: Sequence[Sequence[Sequence[Slot | int]]],
    targets: Mapping[TableView, Target],
) -> list[_Placed]:
    """Frames of the pass lie in scratch one after another, in the order of the queries."""
    placed, first = [], 0
    for world, (part, reads) in enumerate(zip(parts, seen)):
        target = targets.get(part.table, part.table.state.target)
        scratch = dict(zip(part.frames, count(first, store.pages_per_frame)))
        placed.append(_place(part, reads, target, scratch, world))
        first += len(scratch) * store.pages_per_frame
    return placed


def _place(
    part: Part, seen: Sequence[Sequence[Slot | int]], target: Target, scratch: Mapping[int, int], world: int
) -> _Placed:
    """Args: scratch: the first pool page in scratch of each frame of the part's blocks."""
    store = part.table.store
    own = {frame: store.scratch_page_id + page for frame, page in scratch.items()}
    made, pairs = own, []  # what a block sees of another one: what the pass writes to scratch or, committed, that
    slots: Mapping[int, Slot] = {}
    if part.commit is not None:
        slots = dict(zip(part.commit.frames, (slot for _, slot in target)))
        made = {**own, **{frame: slot.page_id for frame, slot in slots.items()}}
        pairs = [(scratch[frame], slot) for frame, slot in slots.items()]
    blocks, reads, size = [], [], store.pages_per_frame
    for block, past in zip(part.blocks, seen):
        ids = [frame.page_id if isinstance(frame, Slot) else made[frame] for frame in past]
        ids += [own[frame] for frame in block.frames]
        reads += ids
        frames = block.end - block.first
        sizes = frames * store.frame_tokens, len(past) * size, frames * size
        named = () if store.shard.ranks == 1 else _named(store, past, block.frames, ids, slots, own)
        blocks.append(BlockReads(world, *sizes, named))
    return _Placed(part.table, blocks, reads, pairs, part)


def _named(
    store: Storage,
    past: Sequence[Slot | int],
    frames: Sequence[int],
    ids: Sequence[int],
    committed: Mapping[int, Slot],
    own: Mapping[int, int],
) -> tuple[FrameRead, ...]:
    """What ranks that make a pass together must agree on: where each frame lies that a block reads. A page id does not
    say it: that of a slot which lies on another rank means nothing here."""
    slots = [frame if isinstance(frame, Slot) else committed.get(frame) for frame in past] + [None] * len(frames)
    named = []
    for frame, slot, page_id in zip([*past, *frames], slots, ids, strict=True):
        index = (page_id - store.scratch_page_id) // store.pages_per_frame
        place = ("scratch", index) if slot is None else (slot.pool.format, slot.index)
        named.append(FrameRead(place, page_id, not isinstance(frame, Slot), 0 if slot is None else slot.group))
    return tuple(named)


def _met(part: Part) -> list[Met]:
    table, sees = part.table, _sees(part)
    return [
        Met(table.policy, block, table.frames_seen(block, part.blocks, see), block is part.commit)
        for block, see in zip(part.blocks, sees)
    ]


def _pass(
    store: Storage,
    placed: Sequence[_Placed],
    rope: Tensor | None,
    predict: bool,
    attention: Attention,
    buffers: PassBuffers | None,
) -> Pass:
    groups = [list(group) for _, group in groupby(placed, lambda each: _mean_of(each.table))]
    commits = [_by_format(group) for group in groups]
    blocks = tuple(block for each in placed for block in each.blocks)
    place = None if buffers is None else _place_of(store, buffers, blocks, commits, rope)
    plan, pairs = _lists(store, placed, blocks, commits, place, padded=buffers is not None and buffers.padded)
    turns: list[Tensor] = []
    if not is_plain([each.table.policy for each in placed]):
        met = [block for each in placed for block in _met(each.part)]
        plan, turns = read_by_policy(plan, met, store.pages_per_frame, store.frame_tokens, store.turn_back)
    if rope is not None and place is not None:
        rope = place.rope(rope)
    captured = buffers is not None and buffers.padded
    room = Rows() if buffers is None else buffers.rows
    first = placed[0].part.blocks[0].first
    committed = () if store.shard.ranks == 1 else _committed(store, placed)
    reads = Reads(store, plan, blocks, _precision(store, placed), room, captured, predict, committed, first)
    attend = attention.bind(reads) if store.shard.ranks == 1 else _bound(attention, reads, placed)
    sharded = attend if isinstance(attend, Sharded) else None
    rest, shares, row = iter(pairs), [], 0
    for group, commit in zip(groups, commits):
        rows = slice(row, row + sum(block.queries for each in group for block in each.blocks))
        row = rows.stop
        first, end = rows.start // store.frame_tokens, rows.stop // store.frame_tokens
        scratch = store.scratch_list(first, end)
        own, pages, written = (rows, store.scratch, scratch) if sharded is None else _staged(store, sharded, first, end)
        shares.append(
            Share(
                tables=[each.table for each in group],
                rows=own if len(groups) > 1 else None,
                rope=None if rope is None else rope[rows] if sharded is None else _own(store, rope[rows]),
                pages=pages,
                written=written,
                scratch=scratch,
                final=any(each.pairs for each in group),
                commits=[(format, next(rest), next(rest)) for format, *_ in commit],
                buffers=buffers,
            )
        )
    return Pass(reads, shares, predict, attention, attend, turns, place)


def _own(store: Storage, x: Tensor) -> Tensor:
    return store.shard.own(x, store.frame_tokens).contiguous()


def _bound(attention: Attention, reads: Reads, placed: Sequence[_Placed]) -> Attend:
    attend, shard = attention.bind(reads), reads.store.shard
    if not isinstance(attend, Sharded):
        raise ValueError(
            f"attention must be of inferix_kernels.distributed in a store that is rank {shard.rank} of {shard.ranks}, "
            f"got {shown(attention):.80}"
        )
    if not is_plain([each.table.policy for each in placed]):
        raise ValueError("attention of several ranks needs a policy without past_bias and with time='absolute'")
    return attend


def _staged(store: Storage, sharded: Sharded, first: int, end: int) -> tuple[slice, KVPages, PageList | None]:
    """Of frames first .. end - 1 of a pass: the rows that this process has, and where it writes them."""
    each = store.shard.rows(store.frame_tokens)
    own = slice(*(frame * (each.stop - each.start) for frame in (first, end)))
    return (own, *sharded.staging(own)) if own.start < own.stop else (own, store.scratch, None)


def _committed(store: Storage, placed: Sequence[_Placed]) -> tuple[tuple[int, str, int], ...]:
    size = store.pages_per_frame
    return tuple((page // size, slot.pool.format, slot.index) for each in placed for page, slot in each.pairs)


def _lists(
    store: Storage,
    placed: Sequence[_Placed],
    blocks: Sequence[BlockReads],
    commits: Sequence[Sequence[Commit]],
    place: Place | None,
    padded: bool,
) -> tuple[Plan, list[PageList]]:
    """The plan, and page lists of what is committed: one copy to the device for all."""
    ids = store.lists.pages([page for each in placed for page in each.reads])
    queries, pages = ([*accumulate(n, initial=0)] for n in zip(*((b.queries, b.past + b.own) for b in blocks)))
    kept = [] if place is None else [store.lists.lengths(len(ids))]  # of pages that are the same from pass to pass
    if padded and (more := _whole_blocks(store, len(ids)) - len(ids)):  # the last list goes on, without tokens
        pages[-1] += more
        ids, kept = np.append(ids, [ids[-1]] * more).astype(np.int32), [np.append(kept[0], [0] * more).astype(np.int32)]
    frames = [part for commit in commits for _, *pair in commit for part in pair]
    indptrs = (np.array(each, np.int32) for each in (queries, pages))
    lists = [ids, *indptrs, *map(store.lists.pages, frames), *kept]
    page_ids, q_indptr, page_indptr, *rest = store.lists.upload(lists, None if place is None else place.lists)
    page_lens = rest.pop() if kept else store.lists.lens(len(ids) // store.pages_per_frame)
    committed = [PageList(pages, store.lists.lens(len(part))) for pages, part in zip(rest, frames)]
    return Plan(q_indptr, page_indptr, page_ids, page_lens), committed


def _place_of(
    store: Storage,
    buffers: PassBuffers,
    blocks: Sequence[BlockReads],
    commits: Sequence[Sequence[Commit]],
    rope: Tensor | None,
) -> Place:
    """Where the passes lie that run the same kernels over as many pages, rounded up to whole blocks."""
    pages = _whole_blocks(store, sum(block.past + block.own for block in blocks))
    committed = [(format, len(pages)) for commit in commits for format, pages, _ in commit]
    turned = None if rope is None else (*rope.shape, rope.dtype)
    kind = pages, tuple(block.queries for block in blocks), tuple(committed), turned
    frames = [frames for _, frames in committed for _ in ("source", "target")]
    sizes = [pages, *[len(blocks) + 1] * 2, *(n * store.pages_per_frame for n in frames), pages]
    return buffers.place(store, kind, sizes)


def _whole_blocks(store: Storage, pages: int) -> int:
    block = store.block_frames * store.pages_per_frame
    return -(-pages // block) * block


def _precision(store: Storage, placed: Sequence[_Placed]) -> Sequence[Sequence[str]]:
    """Of each world and layer: "auto" is 8 bits where the world's first block has shown that q allows it."""
    if store.precision != "auto":
        return [(store.precision,) * store.num_layers] * len(placed)
    return [["8bit" if allowed else "auto" for allowed in each.table.state.eight_bit] for each in placed]


def _mean_of(table: TableView) -> int:
    """Neighbours of which this is the same are written by one call: forks, with the mean of their first block, and
    worlds that never have one. A world whose mean is still to be frozen, or may thaw, is written by itself."""
    mean = table.state.k_means[0]
    settled = not table.store.freezes_mean if mean is None else table.next_frame > 0
    return id(mean) if settled else id(table)


def _by_format(group: Sequence[_Placed]) -> list[Commit]:
    """(format, pool pages in scratch, pool pages of its pool) of what is committed, by the first page of each frame."""
    pairs = [pair for each in group for pair in each.pairs]
    found = []
    for format in dict.fromkeys(slot.pool.format for _, slot in pairs if slot.own):
        of = [(page, slot.pool_page) for page, slot in pairs if slot.pool.format == format and slot.own]
        found.append((format, [page for page, _ in of], [page for _, page in of]))
    return found
