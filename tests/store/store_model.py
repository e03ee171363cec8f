"""A model of the KV store that cannot be wrong: one list of tensors per world. And a store whose copies arrive late."""

import dataclasses
import itertools

import torch

from inferix_kernels import KVPages, KVStore, PageList, Policy
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.reference import kv_append, kv_gather
from inferix_kernels.store.copies import Copies
from tests.store.injected import SEAMS

LAYERS, HEADS, HEAD_DIM, TOKENS, PAGE = 2, 1, 4, 11, 8  # two pages per frame, the second holds three tokens


class LateCopies(Copies):
    """Copies between the device and host memory happen when they are waited for, as late as a GPU may have them."""

    late = ()

    def _transfer(self, pairs, to_host):
        self.late = [*self.late, (list(pairs), to_host)]

    def _wait(self):
        for pairs, to_host in self.late:
            TRANSFER(self, pairs, to_host)
        self.late = ()  # only now: waiting may be interrupted, and is done again


class LateStore(KVStore):
    def __init__(self, **options):
        super().__init__(**options)
        self.copies = LateCopies(self.device)


TRANSFER = Copies._transfer  # what is under way by then can't be made to fail
STORE_SEAMS = [(LateCopies if owner is Copies else owner, name) for owner, name in SEAMS]


def through(format, k, v):
    """k, v [tokens, heads, D] as a page of this format gives them back."""
    pages, where = KVPages.empty(format, 2, HEADS, PAGE, HEAD_DIM), PageList.of([0, 1], [PAGE, TOKENS - PAGE])
    kv_append(k, v, pages, where)
    return kv_gather([pages], where, out=(torch.empty_like(k), torch.empty_like(v)))


@dataclasses.dataclass(frozen=True)
class Open:
    """An open block: what its clean pass is given, in each layer, and how far that has come."""

    frames: range
    inputs: list
    planned: bool = False
    done: bool = False


@dataclasses.dataclass
class World:
    """What a page table should hold. frames: frame -> (format, [(k, v) of each layer])."""

    policy: Policy
    frames: dict = dataclasses.field(default_factory=dict)
    cold: set = dataclasses.field(default_factory=set)
    pinned: set = dataclasses.field(default_factory=set)
    next_frame: int = 0
    means: list | None = None
    blocks: list = dataclasses.field(default_factory=list)

    def copy(self):
        return dataclasses.replace(
            self, frames=dict(self.frames), cold=set(self.cold), pinned=set(self.pinned), blocks=list(self.blocks)
        )

    def fork(self):
        return dataclasses.replace(self.copy(), blocks=[])

    def forget(self, frames):
        for frame in list(frames):
            del self.frames[frame]
        self.cold, self.pinned = (group.difference(frames) for group in (self.cold, self.pinned))
        return self

    def evict(self, end):
        leaving = [f for f in self.frames if f not in self.pinned and not self.policy.keeps(f, end)]
        if self.policy.archive:
            self.cold.update(leaving)
            return self
        return self.forget(leaving)

    def turn(self, end):
        self.evict(end)
        if older := self.policy.older:
            for frame, (format, layers) in self.frames.items():
                old = format == self.policy.format and self.policy.format_of(frame, end) == older[1]
                if old and frame not in self.cold:
                    self.frames[frame] = older[1], [through(older[1], *kv) for kv in layers]
        return self

    def seal(self):
        opened = self.blocks.pop(0)
        for i, frame in enumerate(opened.frames):
            part, format = slice(i * TOKENS, (i + 1) * TOKENS), self.policy.format_of(frame, opened.frames.stop)
            layers = [(k - mean, v) for (k, v), mean in zip(opened.inputs, self.means or itertools.repeat(0))]
            self.frames[frame] = format, [through(format, k[part], v[part]) for k, v in layers]
        self.next_frame = opened.frames.stop
        return self

    def rewind(self, end):
        self.forget([frame for frame in self.frames if frame >= end])
        self.next_frame, self.means = end, self.means if end else None
        return self

    def convert(self, frames, format):
        for frame in frames:
            was, layers = self.frames[frame]
            if was != format:
                self.frames[frame] = format, [through(format, *kv) for kv in layers]
                self.cold.discard(frame)
        return self


def policies(format, older):
    return (
        Policy(window=None, format=format),
        Policy(window=3, sink=1, format=format),
        Policy(window=4, undo=2, format=format),
        Policy(window=5, sink=1, sink_format=older, older=(2, older), format=format),
        Policy(window=4, older=(2, older), format=format),
        Policy(window=2, archive=True, format=format),
        Policy(window=2, format=older),
        Policy(window=3, sink=1, format=format, on_evict=follow),
    )


def mix(layer, k, v):
    return layer - k, v / -2  # neither grows, however often


def follow(table, frame):
    """A sink that follows what leaves, as far as it can be read and there is room."""
    if 0 in table.held and 0 not in table.cold:
        table.rewrite(0, mix, sink=True)


PAIRS = list(zip(KV_FORMATS, (*KV_FORMATS[1:], KV_FORMATS[0])))
