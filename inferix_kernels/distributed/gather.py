"""U, G and U x G: every rank holds all frames, of all heads or some, and only a block's new keys and values move."""

from __future__ import annotations

import dataclasses

from ..store.attention import Attend, Local, Reads
from .arriving import Arriving
from .exchange import Exchange
from .transport import Ticket, Transport


@dataclasses.dataclass(frozen=True)
class Gather:
    """Attend to the past, which is there, while the new keys and values are on their way; then to these.

    The store's `shard.heads` says what moves: 1, keys and values alone (G); all ranks, queries and outputs too, each
    rank with its own heads (U); and in between, both, in groups (U x G).

    Attributes:
        arrivals: attend to all by one call, which waits for pages that are on their way, in place of one for the past
            and one for what has come. On a CPU alone.

    Example:
        >>> from inferix_kernels.distributed import Gather, in_process_group, run_ranks
        >>> def make(transport):
        ...     store = KVStore(layers=1, heads=2, head_dim=16, frame_tokens=10, block_frames=1, pools={"int8": 2},
        ...         shard=Shard(transport.rank, ranks=2))
        ...     table = store.open(Policy())
        ...     noisy = table.plan([table.open_block(frames=1)], attention=Gather(transport))
        ...     return noisy.attend(0, torch.ones(5, 3 * 2 * 16), None, None)
        >>> [list(out.shape) for out in run_ranks(in_process_group(2), make)]
        [[5, 32], [5, 32]]
    """

    transport: Transport
    arrivals: bool = False

    def bind(self, reads: Reads) -> Attend:
        if self.transport.size == 1 == reads.store.shard.ranks:
            return Local().bind(reads)
        if reads.store.shard.frames > 1:
            raise ValueError(f"attention: Gather needs a store with all frames, got shard={reads.store.shard}")
        return (_ArrivingGather if self.arrivals else _Gather)(reads, self.transport)


class _Gather(Exchange):
    name = "Gather"

    def __init__(self, reads: Reads, transport: Transport):
        super().__init__(reads, transport)
        self.past = self.page_lists(lambda frame: not frame.made)

    def _attend_past(self, layer: int, asked: Ticket) -> None:
        asked.wait()
        self.start()
        if self.past is not None:
            self.attend(layer, self.store.layers[layer], self.past)


class _ArrivingGather(Arriving):
    name = "Gather"

    def __init__(self, reads: Reads, transport: Transport):
        super().__init__(reads, transport)
        self.plan = self.plan_of(lambda frame: not frame.made)
