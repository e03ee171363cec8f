"""Some ranks of a group as a group of their own."""

from __future__ import annotations

from collections.abc import Sequence

from .transport import Message, Ticket, Transport


class Subgroup(Transport):
    """The same transport, for some of its ranks, who count themselves anew. `PeerLost` names ranks of the whole group.

    Args:
        whole: the group's.
        ranks: of the whole group, this process's among them; the same list on each of them.

    Raises:
        ValueError: they are not ranks of the group, or this process is none of them.

    Example:
        >>> import torch
        >>> from inferix_kernels.distributed import Subgroup, TokenShard, in_process_group, run_ranks
        >>> def pair(transport):
        ...     group = Subgroup(transport, [0, 2] if transport.rank % 2 == 0 else [1, 3])
        ...     return group.rank, group.size
        >>> run_ranks(in_process_group(4), pair)
        [(0, 2), (0, 2), (1, 2), (1, 2)]
    """

    def __init__(self, whole: Transport, ranks: Sequence[int]):
        good = len(set(ranks)) == len(ranks) and all(type(rank) is int and 0 <= rank < whole.size for rank in ranks)
        if not good or whole.rank not in ranks:
            raise ValueError(
                f"ranks must be of 0 to {whole.size - 1}, each once, with {whole.rank} among them, got {list(ranks)} "
                f"on rank {whole.rank}"
            )
        super().__init__(list(ranks).index(whole.rank), len(ranks), whole.device, whole.deadline)
        self.whole, self.ranks = whole, tuple(ranks)

    def at(self, op: str, layer: int, block: int) -> None:
        super().at(op, layer, block)
        self.whole.at(op, layer, block)

    def _begin(self, sends: Sequence[Message], receives: Sequence[Message]) -> Ticket:
        self.whole.sent += sum(len(message.blob) for message in sends)
        theirs = ([Message(self.ranks[peer], blob) for peer, blob in messages] for messages in (sends, receives))
        return self.whole._begin(*theirs)
