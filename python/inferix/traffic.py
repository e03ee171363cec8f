"""How much of the past is read while several blocks are in flight."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferix_kernels import PageTable

    from .models import BlockModel


@dataclasses.dataclass
class Traffic:
    """What a layer's attention has read of the past so far.

    Attributes:
        steps: denoising steps.
        read: committed frames that lay in some segment's page list, summed over forwards.
        history: all frames committed since the world began, once for every forward that has a past: what is read where
            the past is one tensor that each forward copies, as in MAGI-1's own code.
    """

    steps: int = 0
    read: int = 0
    history: int = 0

    def bytes_per_step(self, model: BlockModel, table: PageTable) -> dict[str, int]:
        """Of a layer, on average: "read" from pages; "copied" where the past is one bf16 tensor of all frames."""
        assert table.policy.format is not None
        page = table.store.pools[table.policy.format].frame_bytes // model.layers
        row = 2 * 2 * model.frame_tokens * model.heads * model.head_dim  # keys and values, two bytes each
        steps = max(self.steps, 1)
        return {"read": self.read * page // steps, "copied": self.history * row // steps}
