"""Q: each group of ranks holds some frames of the past, and queries go to where the frames are (arXiv:2411.01783)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..ops import merge_attention, paged_attention
from ..store.attention import Attend, Local, Reads
from .frame_shards import FrameShards
from .transport import Message, Ticket, Transport, as_blob


@dataclasses.dataclass(frozen=True)
class PassQ:
    """Queries go to every group, attend there to the frames of the past that it holds, and what they attended to comes
    back with its LSE, to be merged.

    The past does not move: for blocks that are short beside it. It needs a store with some of the frames,
    `Shard(..., frames=...)`. Outputs on their way are in q's dtype, LSEs in float32.

    Example:
        >>> from inferix_kernels.distributed import PassQ, in_process_group, run_ranks
        >>> def make(transport):
        ...     store = KVStore(layers=1, heads=2, head_dim=16, frame_tokens=10, block_frames=1, pools={"int8": 2},
        ...         shard=Shard(transport.rank, ranks=2, frames=2))
        ...     table = store.open(Policy())
        ...     noisy = table.plan([table.open_block(frames=1)], attention=PassQ(transport))
        ...     return noisy.attend(0, torch.ones(5, 3 * 2 * 16), None, None)
        >>> [list(out.shape) for out in run_ranks(in_process_group(2), make)]
        [[5, 32], [5, 32]]
    """

    transport: Transport

    def bind(self, reads: Reads) -> Attend:
        alone = self.transport.size == 1 == reads.store.shard.ranks
        return Local().bind(reads) if alone else _PassQ(reads, self.transport)


class _PassQ(FrameShards):
    name = "PassQ"

    def __init__(self, reads: Reads, transport: Transport):
        super().__init__(reads, transport)
        self.plans = [self.here(group) for group in range(self.shard.groups)]
        self.anything = any(not frame.made for block in reads.blocks for frame in block.frames)

    def _attend_past(self, layer: int, asked: Ticket) -> None:
        asked.wait()
        q = self._queries
        assert q is not None
        self.start()
        if not self.anything:
            return
        self.transport.at(f"{self.name}: queries", layer, self.first_frame)
        others = [group for group in range(self.shard.groups) if group != self.shard.group]
        ranks, rows = self.shard.alike, {group: self.rows_of_group(group) for group in others}
        sizes = {group: (rows[group].stop - rows[group].start, *q.shape[1:]) for group in others}
        theirs = {group: self._room(f"queries of {group}", *sizes[group], dtype=q.dtype) for group in others}
        q = q.contiguous()
        sent = self.transport.post(
            [Message(ranks[group], as_blob(q)) for group in others],
            [Message(ranks[group], as_blob(theirs[group])) for group in others],
        )
        self.attend(layer, self.store.layers[layer], self.plans[self.shard.group])
        sent.wait()
        made = {group: self._answer(layer, group, theirs[group]) for group in others}
        answers = {group: self._answers(f"answer of {group}", q) for group in others}
        self.transport.at(f"{self.name}: answers", layer, self.first_frame)
        self.transport.post(
            [Message(ranks[group], as_blob(x)) for group in others for x in made[group]],
            [Message(ranks[group], as_blob(x)) for group in others for x in answers[group]],
        ).wait()
        assert self._out is not None and self._lse is not None
        if len(q):
            for out, lse in answers.values():  # in the order of the groups, whichever came first
                merge_attention(
                    *(self._out, self._lse, out.float(), lse),
                    out=self._out,
                    lse=self._lse,
                    backend=self.store.backend,
                )

    def _answers(self, name: str, q: Tensor) -> tuple[Tensor, Tensor]:
        out = self._room(f"{name}: out", *q.shape[:2], self.widths[1], dtype=q.dtype)
        return out, self._room(f"{name}: lse", *q.shape[:2], dtype=torch.float32)

    def _answer(self, layer: int, group: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """What another group's queries attend to here."""
        out, lse = self._answers(f"for {group}", q)
        plan = self.plans[group]
        if plan is None:
            return out.zero_(), lse.fill_(-torch.inf)
        options = {"precision": self.precision(layer), "backend": self.store.backend}
        paged_attention(q, self.store.layers[layer], plan, out=out, lse=lse, **options)  # type: ignore[arg-type]
        return out, lse
