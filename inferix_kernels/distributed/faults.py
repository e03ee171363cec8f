"""What is said, and by whom, when a rank is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Where(NamedTuple):
    """What a rank is doing: for messages."""

    op: str = "a message"
    layer: int = -1
    block: int = -1


class PeerLost(RuntimeError):
    """Ranks that others waited for, and in what. Every wait of a transport ends, in this if in nothing else.

    Attributes:
        ranks: of the group, ascending.
        op, layer, block: what the waiting rank had announced with `Transport.at`; -1: nothing.
        waited: seconds.
        reason: what is known of the ranks: "its process has ended", the message of an exception raised there, …

    Example:
        >>> from inferix_kernels.distributed import PeerLost
        >>> str(PeerLost([2], "ring hop 3 of 7", 12, 41, 10.0, "its heart has stopped"))
        'rank 2 was lost in ring hop 3 of 7, layer 12, block 41, after 10.0 s: its heart has stopped'
    """

    def __init__(self, ranks: Sequence[int], op: str, layer: int, block: int, waited: float, reason: str):
        self.ranks = tuple(sorted(ranks))
        self.op, self.layer, self.block, self.waited, self.reason = op, layer, block, waited, reason
        super().__init__(self.ranks, op, layer, block, waited, reason)  # as pickle calls it again

    def __str__(self) -> str:
        who = f"rank {self.ranks[0]} was" if len(self.ranks) == 1 else f"ranks {', '.join(map(str, self.ranks))} were"
        layer, block = (f", {name} {i}" if i >= 0 else "" for name, i in (("layer", self.layer), ("block", self.block)))
        return f"{who} lost in {self.op}{layer}{block}, after {self.waited:.1f} s: {self.reason}"
