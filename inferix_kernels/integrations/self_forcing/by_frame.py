"""Attention over whole frames with two exceptions that page lists can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

import torch

from ...plans import Plan
from ...store.attention import Attend, Local, Reads


@dataclasses.dataclass(frozen=True)
class ByFrame:
    """Attend as Local does, but for these frames.

    Attributes:
        hidden: first frames of a block that attend, and are not attended to.
        biases: added to the scores of each frame that is read, in the order of the page list; None: nothing.
    """

    hidden: int = 0
    biases: Sequence[float] | None = None

    def bind(self, reads: Reads) -> Attend:
        if not self.hidden and self.biases is None:
            return Local().bind(reads)
        size, plan = reads.store.pages_per_frame, reads.plan
        hidden = self.hidden * size
        blocks = tuple(block._replace(own=block.own - hidden) for block in reads.blocks)
        kept, page = [], 0
        for block in reads.blocks:
            own = page + block.past
            end = own + block.own
            kept += [*range(page, own), *range(own + hidden, end)]
            page = end
        device = plan.page_ids.device
        pages, indptr = (
            torch.tensor(each, dtype=torch.int32, device=device)
            for each in (kept, list(accumulate((block.past + block.own for block in blocks), initial=0)))
        )
        bias = None
        if self.biases is not None:
            each = [bias for bias in self.biases for _ in range(size)] * len(blocks)
            bias = torch.tensor(each, dtype=torch.float32, device=device)
        narrowed = Plan(plan.q_indptr, indptr, plan.page_ids[pages], plan.page_lens[pages], bias)
        return Local().bind(reads._replace(plan=narrowed, blocks=blocks))
