"""Who holds what, by the name of a schedule; and how many bytes each rank sends in it: `wire`, of a shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd
from typing import NamedTuple

from .._check import check_counts
from ..store.shard import Shard
from . import wire
from .agreement import DIGESTS

SCHEDULES = ("ulysses", "gather", "ring", "pass-q")


def shard_for(schedule: str, rank: int, ranks: int, heads: int, head_parts: int | None = None) -> Shard:
    """What a rank's store is to hold.

    Args:
        schedule: "ulysses", heads are cut into as many parts as possible: gcd(ranks, heads), in groups if these are not
            all ranks; "gather", each rank holds everything; "ring" and "pass-q", each group holds other frames.
        heads: KV heads, of all ranks together.
        head_parts: into how many parts to cut the heads instead.

    Raises:
        ValueError: the heads can't be cut so.

    Example:
        >>> from inferix_kernels.distributed.sharding import shard_for
        >>> shard_for("ulysses", rank=5, ranks=8, heads=12)  # two groups of four
        Shard(rank=5, ranks=8, heads=4, frames=1)
        >>> shard_for("ring", rank=1, ranks=2, heads=12)
        Shard(rank=1, ranks=2, heads=1, frames=2)
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    check_counts({"ranks": ranks, "heads": heads})
    if head_parts is None:
        head_parts = gcd(ranks, heads) if schedule == "ulysses" else 1
    shard = Shard(rank, ranks, head_parts)
    shard.share("heads", heads)
    return Shard(rank, ranks, head_parts, shard.groups) if schedule in ("ring", "pass-q") else shard


class Sizes(NamedTuple):
    """Of a pass, what its bytes depend on besides the shard.

    Attributes:
        frames, frame_tokens: of all its blocks.
        query_heads, heads: of all ranks together.
        widths: of keys and values.
        activation, scratch: bytes of a number of q and out, and of keys and values in scratch.
    """

    frames: int
    frame_tokens: int
    query_heads: int
    heads: int
    widths: tuple[int, int]
    activation: int
    scratch: int


def layer_sent(schedule: str, shard: Shard, sizes: Sizes, past: Sequence[int] = ()) -> int:
    """Bytes that a rank sends in one layer that attends; in one that only writes, `keys_sent`.

    Args:
        past: for "ring" and "pass-q", bytes of the past's pages that the pass reads, as stored, scales with them, of
            each group and of this rank's heads.

    Example:
        >>> from inferix_kernels.distributed.sharding import Sizes, layer_sent, shard_for
        >>> sizes = Sizes(3, 1560, 12, 12, (128, 128), activation=2, scratch=2)  # a block of Wan 1.3B
        >>> layer_sent("ulysses", shard_for("ulysses", 0, 4, heads=12), sizes) / 1e6
        10.78272
        >>> layer_sent("gather", shard_for("gather", 0, 4, heads=12), sizes) / 1e6  # hidden under attention to the past
        21.56544
    """
    sent = keys_sent(shard, sizes) + queries_sent(shard, sizes) + outputs_sent(shard, sizes)
    if not any(past):
        return sent
    return sent + (ring_sent(shard, past) if schedule == "ring" else pass_q_sent(shard, sizes))


def keys_sent(shard: Shard, sizes: Sizes) -> int:
    """In a layer: own rows' keys and values, to each other rank the heads that it holds."""
    own = _rows(shard, sizes, [shard.rank])
    return wire.keys(own, shard.ranks, sizes.heads // shard.heads, sum(sizes.widths), sizes.scratch)


def queries_sent(shard: Shard, sizes: Sizes) -> int:
    """In a layer: own rows' queries, to each other rank of the group its heads."""
    own = _rows(shard, sizes, [shard.rank])
    heads = sizes.query_heads // shard.heads
    return wire.queries(own, shard.heads, heads, sizes.widths[0], sizes.activation)


def outputs_sent(shard: Shard, sizes: Sizes) -> int:
    """In a layer: own heads' outputs, to each other rank of the group its rows."""
    others = _rows(shard, sizes, [rank for rank in shard.group_ranks if rank != shard.rank])
    return wire.outputs(others, sizes.query_heads // shard.heads, sizes.widths[1], sizes.activation)


def ring_sent(shard: Shard, past: Sequence[int]) -> int:
    """In a layer: the past's pages go round, and each rank passes on all but those of the group after it.

    Args:
        past: bytes of the pages that a pass reads, scales with them, of each group's frames and this rank's heads.
    """
    return wire.round_the_ring(past, shard.frame_rank)


def pass_q_sent(shard: Shard, sizes: Sizes) -> int:
    """In a layer: the group's queries, to each other group; and what theirs attended to here, with its LSE."""
    heads = sizes.query_heads // shard.heads
    own, all_rows = _rows(shard, sizes, shard.group_ranks), sizes.frames * sizes.frame_tokens
    asked = wire.queries(own, shard.groups, heads, sizes.widths[0], sizes.activation)
    return asked + wire.outputs(all_rows - own, heads, sizes.widths[1], sizes.activation, lse=True)


def agreement_sent(shard: Shard) -> int:
    """In a forward, to see that all ranks make the same one; on a GPU in the first of each pass alone."""
    return (shard.ranks - 1) * DIGESTS


def means_sent(shard: Shard, heads: int, width: int) -> int:
    """In a layer of the one pass that freezes a world's mean keys."""
    return (shard.heads - 1) * heads // shard.heads * width * 4


def _rows(shard: Shard, sizes: Sizes, ranks: Iterable[int]) -> int:
    each = (shard.rows(sizes.frame_tokens, rank) for rank in ranks)
    return sizes.frames * sum(rows.stop - rows.start for rows in each)
