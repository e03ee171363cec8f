"""What R and Q have in common: each group of ranks holds other frames of the past, and all see the block being made."""

from __future__ import annotations

from ..layout import KVPages, PageList
from ..ops import kv_commit
from ..plans import Plan
from ..store.attention import FrameRead, Reads
from .exchange import Exchange
from .transport import Transport


class FrameShards(Exchange):
    """A clean pass commits a frame where its slot lies. A later block of the same pass reads it too: a copy that each
    rank commits for itself, of the keys that all have, by the same rule."""

    def __init__(self, reads: Reads, transport: Transport):
        store = reads.store
        if store.shard.frames < max(2, store.shard.groups):
            raise ValueError(f"attention: {self.name} needs a store with some of the frames, got shard={store.shard}")
        later = {frame.place for block in reads.blocks for frame in block.frames if frame.made}
        read = [commit for commit in reads.commits if commit[1:] in later]
        self._copied: dict[tuple[str, int], int] = {}  # place -> page id
        self._copies: list[tuple[KVPages, PageList, PageList]] = []
        tile, first = (store.heads, store.page_size, store.head_dim), store.scratch_page_id + store.scratch.pages
        for format in dict.fromkeys(format for _, format, _ in read):
            frames = [(frame, slot) for frame, its, slot in read if its == format]
            pages = KVPages.empty(format, len(frames) * store.pages_per_frame, *tile, store.device)
            starts = [i * store.pages_per_frame for i in range(len(frames))]
            self._copied |= {(format, slot): first + start for (_, slot), start in zip(frames, starts)}
            sources = [frame * store.pages_per_frame for frame, _ in frames]
            self._copies.append((pages, store.lists.of(sources), store.lists.of(starts)))
            first += pages.pages
        super().__init__(reads, transport)

    def page_id(self, frame: FrameRead) -> int:
        return self._copied.get(frame.place, frame.page_id) if frame.made else frame.page_id

    def _attend_new(self, layer: int) -> None:
        for pages, source, target in self._copies:
            kv_commit(self.store.scratch, source, pages, target, backend=self.store.backend)
        self.attend(layer, [*self.store.layers[layer], *(pages for pages, *_ in self._copies)], self.new)

    def here(self, group: int | None = None) -> Plan | None:
        """The plan of a group's queries, by default this rank's, over the frames of the past that lie here."""
        return self.page_lists(self.lies_here, group)

    def lies_here(self, frame: FrameRead) -> bool:
        return not frame.made and frame.group == self.shard.frame_rank
