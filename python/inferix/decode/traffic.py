"""How much of the past is read while several blocks are in flight."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferix_kernels import PageTable


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

    def bytes_per_step(self, table: PageTable) -> dict[str, int]:
        """Of a layer, on average: "read" from pages; "copied" where the past is one bf16 tensor of all frames."""
        store, format = table.store, table.policy.format
        assert format is not None and isinstance(store.head_dim, int)
        page = store.pools[format].frame_bytes // store.num_layers
        row = 2 * 2 * store.frame_tokens * store.heads * store.head_dim  # keys and values, two bytes each
        steps = max(self.steps, 1)
        return {"read": self.read * page // steps, "copied": self.history * row // steps}
