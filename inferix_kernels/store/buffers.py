"""What passes have on the device besides the pools: page lists, rope, mean keys, and room for q, lse and the output.

A pass makes them when it is planned. Passes that are planned with the same `PassBuffers` find theirs where the passes
before them had theirs: every argument of a kernel lies at the same address from pass to pass, nothing is allocated once
each kind of pass was there, and a CUDA graph that was captured of one pass is right for the next.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .page_lists import Packed

if TYPE_CHECKING:
    from .storage import Storage


class Rows:
    """Room for a number for each token, by name: made when it is first asked for."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Tensor] = {}

    def of(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        key = name, *shape, dtype
        if key not in self._made:
            self._made[key] = torch.empty(*shape, dtype=dtype, device=device)
        return self._made[key]


class Place:
    """Page lists and rope of passes of one kind.

    Attributes:
        kind: which.
        lists: of the pass that was planned here last.
        turn: how many were: only the last one may run.
    """

    def __init__(self, kind: Hashable, sizes: Sequence[int], device: torch.device):
        self.kind, self.lists, self.turn = kind, Packed(sizes, device), 0
        self._rope: Tensor | None = None

    def rope(self, rope: Tensor) -> Tensor:
        """The same numbers, where those of the passes before lay."""
        if self._rope is None:
            with torch.inference_mode(False):
                self._rope = torch.empty(rope.shape, dtype=rope.dtype, device=rope.device)
        return self._rope.copy_(rope)


class PassBuffers:
    """Memory for the passes of one world, one after another.

    Planning a pass ends the one before it that has the same place: the same blocks' sizes, and as many pages to read
    once these are rounded up to whole blocks. What `Pass.attend` and `Pass.read` return is overwritten by the next
    layer.

    Args:
        padded: page lists are filled up to whole blocks with pages that have no tokens, so that a captured graph serves
            a window of any length up to the next whole block.

    Example:
        >>> store = KVStore(layers=2, heads=2, head_dim=16, frame_tokens=10, block_frames=3, pools={"int8": 12})
        >>> table, buffers = store.open(Policy(window=9)), PassBuffers()
        >>> block = table.open_block(frames=3)
        >>> first, again = (table.plan([block], buffers=buffers) for _ in range(2))
        >>> first.plan.page_ids.data_ptr() == again.plan.page_ids.data_ptr(), first.stale
        (True, True)
    """

    def __init__(self, padded: bool = False):
        self.padded, self.rows = padded, Rows()
        self._store: Storage | None = None
        self._places: dict[Hashable, Place] = {}
        self._means: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: whose numbers they are, and where they lie

    def place(self, store: Storage, kind: Hashable, sizes: Sequence[int]) -> Place:
        """Where a pass of this kind lies, whose lists have at most so many numbers.

        Raises:
            ValueError: the buffers were used for passes of another store.
        """
        if self._store is not None and self._store is not store:
            raise ValueError("buffers must be of one store, got those of passes of another one: make new PassBuffers")
        self._store = store
        if kind not in self._places:
            self._places[kind] = Place(kind, sizes, store.device)
        place = self._places[kind]
        place.turn += 1
        return place

    def mean(self, layer: int, mean: Tensor | None) -> Tensor | None:
        """A layer's mean key where those of the passes before lay; it is copied when it is another one."""
        if mean is None:
            return None
        source, held = self._means.get(layer, (None, None))
        if held is None:
            with torch.inference_mode(False):
                held = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
        if source is not mean:
            held.copy_(mean)
            self._means[layer] = mean, held
        return held
