"""A sink that takes up what leaves the window: Reward Forcing's, an exponential moving average (arXiv:2512.04678).

Source: incremental_update in wan/modules/causal_model.py of github.com/JaydenLyh/Reward-Forcing (4317f5a), which keeps
keys unrotated. There it runs in the cache's bfloat16, as ours does in bfloat16 pages: 0.999 x is rounded to x again, so
what was there never fades, and what leaves is taken up only where the sink's number is small beside it.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from inferix_kernels import PageTable
from inferix_kernels.store.reading import turned


@dataclasses.dataclass(frozen=True)
class MovingSink:
    """An `on_evict`: the sink's keys and values become share * theirs + (1 - share) * those of the frame that leaves.

    The frames that leave are merged into those of the sink in turn. Keys are stored rotated, so those that leave are
    turned back to where the sink is. Without a sink nothing is merged.

    Attributes:
        share: that the sink keeps.

    Raises:
        ValueError: share is not between 0 and 1.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be between 0 and 1, got {self.share}")

    def __call__(self, table: PageTable, frame: int) -> None:
        if table.policy.sink == 0:
            return
        place = frame % table.policy.sink

        def merged(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            leaving_k, leaving_v = table.gather(layer, [frame])
            leaving_k = _at(table, layer, leaving_k, frame - place)
            return (
                self.share * k + (1 - self.share) * leaving_k,
                self.share * v + (1 - self.share) * leaving_v,
            )

        table.rewrite(place, merged, sink=True)


def _at(table: PageTable, layer: int, k: Tensor, frames: int) -> Tensor:
    """Keys [tokens, heads, D] of a frame as they would be so many frames earlier. The mean that was taken off them, if
    there is one, is the same there."""
    turn_back, mean = table.store.turn_back, table.k_means[layer]
    assert turn_back is not None
    if mean is not None:
        k = k + mean
    _, k = turned(k, [turn_back(frames).to(k.device).expand(len(k), -1, -1)], interleaved=True)
    return k if mean is None else k - mean
