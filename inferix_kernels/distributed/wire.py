"""How many bytes a rank sends in one layer of one forward: the formulas that planner, schedules and tests count with.

Exact, for any cut of the rows: `rows` are those of the rank that sends, `others` those of all other ranks of its group
together. What is not said to be stored travels in working precision, `itemsize` bytes a number. A rank sends nothing to
itself. No torch here: the sizes of the formats' codes and scales stand in FORMATS, and a test compares them with
`inferix_kernels.layout`'s.

Sources: Ulysses is arXiv:2309.14509, ring attention arXiv:2310.01889, pass-Q arXiv:2411.01783.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LSE_BYTES = 4  # a float32 for each row and head


class Stored(NamedTuple):
    """Keys or values of one (page, head) tile: bits of a code, bytes beside each token, bytes beside each channel."""

    bits: int
    token: int = 0
    channel: int = 0


FORMATS = {  # keys, values
    "fp32": (Stored(32), Stored(32)),
    "fp16": (Stored(16), Stored(16)),
    "bf16": (Stored(16), Stored(16)),
    "int8": (Stored(8, token=4), Stored(8, channel=4)),
    "i8f8": (Stored(8, token=4), Stored(8, channel=4)),
    "fp8": (Stored(8, token=4), Stored(8, channel=4)),
    "int4": (Stored(4, channel=4), Stored(4, token=4)),
}
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}  # of formats that keep floats as they are


def rows_of(tokens: int, ranks: int, rank: int) -> range:
    """The rows of a frame that are a rank's: an even cut, anywhere.

    Example:
        >>> from inferix_kernels.distributed.wire import rows_of
        >>> [len(rows_of(10, 4, rank)) for rank in range(4)]
        [2, 3, 2, 3]
    """
    return range(tokens * rank // ranks, tokens * (rank + 1) // ranks)


def page_bytes(format: str, heads: int, page_size: int, head_dim: int) -> int:
    """One page of one layer as it is stored and as it travels: codes and scales of its keys and values.

    Example:
        >>> from inferix_kernels.distributed.wire import page_bytes
        >>> [page_bytes(format, 1, 64, 128) // 64 for format in ("bf16", "int8", "int4")]
        [512, 268, 140]
    """
    sides = FORMATS[format]
    return heads * sum(s.bits * page_size * head_dim // 8 + s.token * page_size + s.channel * head_dim for s in sides)


def keys(rows: int, ranks: int, kv_heads: int, widths: int, itemsize: int) -> int:
    """Every schedule: k and v of own rows, to each other rank those heads that it holds.

    Args:
        kv_heads: that one rank holds: all of them (G), or its part (U).
        widths: of a key and a value together.

    Example:
        >>> from inferix_kernels.distributed.wire import keys
        >>> keys(rows=10, ranks=4, kv_heads=2, widths=16 + 16, itemsize=2)
        3840
    """
    return (ranks - 1) * rows * kv_heads * widths * itemsize


def queries(rows: int, ranks: int, heads: int, head_dim: int, itemsize: int) -> int:
    """q of own rows, to each other rank those heads that it attends with (Ulysses), or keeps the frames for (pass-Q).

    Args:
        ranks: of the group in which they are sent; heads: of one of its ranks.

    Example:
        >>> from inferix_kernels.distributed.wire import queries
        >>> queries(rows=10, ranks=4, heads=2, head_dim=16, itemsize=2)
        1920
    """
    return (ranks - 1) * rows * heads * head_dim * itemsize


def outputs(others: int, heads: int, head_dim: int, itemsize: int, lse: bool = False) -> int:
    """What others' rows attended to with the heads (Ulysses) or the frames (pass-Q, with the LSE) here, back to them.

    Args:
        others: rows of all that asked.

    Example:
        >>> from inferix_kernels.distributed.wire import outputs
        >>> outputs(others=30, heads=2, head_dim=16, itemsize=2), outputs(30, 2, 16, 2, lse=True)
        (1920, 2160)
    """
    return others * heads * (head_dim * itemsize + (LSE_BYTES if lse else 0))


def round_the_ring(shards: Sequence[int], rank: int) -> int:
    """Ring: every rank sends what it holds, then what it got, to the next one; never what that one held at first.

    Args:
        shards: bytes that each rank holds of the past: pages, and scales, as they are stored.

    Example:
        >>> from inferix_kernels.distributed.wire import round_the_ring
        >>> [round_the_ring([100, 200, 0], rank) for rank in range(3)]
        [100, 300, 200]
    """
    return sum(shards) - shards[(rank + 1) % len(shards)]
