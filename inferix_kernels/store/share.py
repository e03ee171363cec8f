"""Rows of a pass that are written by one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ..layout import KVPages, PageList
from .buffers import PassBuffers
from .table_view import TableView


@dataclasses.dataclass
class Share:
    """Rows of a pass that are written by one call: their keys have the same mean taken off, or none.

    Attributes:
        tables: of the worlds.
        rows: of the tokens that this process has of the pass; None: all.
        rope: of these rows.
        pages, written: where their keys and values are written: scratch and pool pages in it, or an exchange's staging.
            None: it has none of these rows.
        scratch: pool pages in scratch of its blocks.
        final: does it commit?
        commits: (format, pool pages in scratch, pool pages of the format's pool) of what is committed here.
        buffers: of a pass that has them; it is one world's then.
        fresh: of the layers committed so far, in the pass that freezes them: the mean key, and whether queries may be
            rounded to 8 bits. It is one world's then.
    """

    tables: Sequence[TableView]
    rows: slice | None
    rope: Tensor | None
    pages: KVPages
    written: PageList | None
    scratch: PageList
    final: bool
    commits: Sequence[tuple[str, PageList, PageList]]
    buffers: PassBuffers | None = None
    fresh: dict[int, tuple[Tensor, bool]] = dataclasses.field(default_factory=dict)

    def of(self, x: Tensor) -> Tensor:
        """Its rows of a tensor that has one for each token of the pass."""
        return x if self.rows is None else x[self.rows]

    def k_mean(self, layer: int) -> Tensor | None:
        """[heads, D], frozen; None: these worlds have none."""
        mean = self.tables[0].state.k_means[layer]
        return mean if self.buffers is None else self.buffers.mean(layer, mean)
