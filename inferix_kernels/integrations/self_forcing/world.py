"""The keys and values that a repository's list of dicts stands for, in pages.

What lies in a slot of their cache is what the last pass wrote there: the clean pass wins by being the last. Here a slot
is an entry of a list that names a frame of page tables, and rolling deletes entries. The newest keys and values of the
block that is being made stay as they are, layer by layer. They are committed, once, when a pass wants to write
elsewhere: only then that block's last pass is known. With pages of the cache's own dtype the past is theirs bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...store import Block, KVStore, OutOfPages, Part, Pass, Policy
from .by_frame import ByFrame
from .slots import Rules, Span, biases, place, read

OPEN, UNWRITTEN = -1, -2  # slots of the block that is being made; slots that hold nothing
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Options(NamedTuple):
    """How keys and values are held.

    Attributes:
        format: see layout.FORMATS; None: as the repository's cache has them.
        worlds: how many full caches there are pages for, forks among them.
        page_size, backend, precision: see KVStore.
    """

    format: str | None = None
    worlds: int = 1
    page_size: int = 64
    backend: str = "auto"
    precision: str = "auto"


class World:
    """All layers of one list of dicts.

    Attributes:
        shape: [B, S, H, D], of k and v in each dict.
        slots: frame of the page tables, OPEN or UNWRITTEN.
        span: of the block that is being made; None before the first pass.
        rolled: by how many slots the newest pass moved what is pinned.
        newest: layer -> (k, v) [B, tokens, H, D] of that block, of its newest pass.
        tables: one for each of B sequences, all with the same frames.
    """

    def __init__(self, layers: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device, options: Options):
        self.layers, self.shape, self.dtype, self.device, self.options = layers, tuple(shape), dtype, device, options
        self.frame_tokens = 0  # until the first pass tells
        self.slots: list[int] = []
        self.span: Span | None = None
        self.rolled = 0
        self.newest: dict[int, tuple[Tensor, Tensor]] = {}
        self._opened: tuple[int, int, int, int] | None = None  # with what the block was begun
        self._planned: tuple[Rules, Pass] | None = None

    @property
    def nbytes(self) -> int:
        """Of the pages, without scratch."""
        return sum(pool.pages.nbytes for pool in self.store.pools.values()) if self.frame_tokens else 0

    def begin(self, made: int, held: int, start: int, tokens: int, frame_tokens: int, rules: Rules | None) -> Span:
        """A pass over `tokens` tokens from `start` on; it and the ends (made, held) are in tokens.

        Args:
            rules: None: the pass begins the cache anew and attends by itself.

        Raises:
            ValueError, Unsupported: it cannot be.
            OutOfPages: forks hold what the block before needs. Whatever is raised, what was held is held.
        """
        self._size(frame_tokens)
        given = {"global_end_index": made, "local_end_index": held, "current_start": start, "new tokens": tokens}
        for name, number in given.items():
            if number % frame_tokens:
                raise ValueError(f"{name} must be whole frames of {frame_tokens} tokens, got {number}")
        made, held, start, frames = (number // frame_tokens for number in given.values())
        opened = (made, held, start, frames)
        if self.span is not None and opened == self._opened:  # the very pass again, as it was broken off
            span, evicted = self.span, 0
        else:
            span, evicted = place(*opened, self.shape[1] // frame_tokens, rules or Rules())
        places = [] if rules is None else read(span, rules)
        if span != self.span or evicted or rules is None:
            self._turn(span, held, evicted, 0 if rules is None else rules.sink, places)
            self._opened = opened
        self.rolled = evicted if rules is not None and rules.pinned[1] and rules.pinned[0] >= rules.sink else 0
        if rules is not None and (self._planned is None or self._planned[0] != rules):
            self._planned = rules, self._plan(span, places, rules)
        return span

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Of the pass that was begun, [B, tokens, H, D]."""
        self.newest[layer] = k.to(self.dtype), v.to(self.dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In the pass that was begun: [B, tokens, Hq, D] -> the same."""
        assert self._planned is not None
        self.keep(layer, k, v)
        planned = self._planned[1]
        with self.store.turn:
            planned.append(layer, *(x.flatten(0, 1) for x in self.newest[layer]))
            return planned.read(layer, q.flatten(0, 1)).view(q.shape)

    def erase(self) -> None:
        """What was held may not be read again; the slots stay."""
        if self.span is not None or any(slot != UNWRITTEN for slot in self.slots):
            self._set([UNWRITTEN] * len(self.slots), None)

    def commit(self) -> None:
        """The block that was being made is as its last pass left it. A pass that was broken off in the first layers
        left nothing of use."""
        span, slots = self.span, list(self.slots)
        if span is None:
            return
        whole = len(self.newest) == self.layers
        first = self.tables[0].next_frame
        if whole:
            blocks = self._open(span.end - span.first)
            parts = [Part(table, [block], block) for table, block in zip(self.tables, blocks)]
            try:
                clean = self.store.plan(parts)
            except OutOfPages as error:
                raise OutOfPages(f"{error}: patch(..., worlds={self.options.worlds}) must count the forks") from None
            skipped = (span.first - span.begin) * self.frame_tokens
            for layer, kv in self.newest.items():
                clean.append(layer, *(x[:, skipped:].flatten(0, 1) for x in kv))
            for table, block in zip(self.tables, blocks):
                table.seal(block)
        slots[span.first : span.end] = [first + i if whole else UNWRITTEN for i in range(span.end - span.first)]
        self.slots, self.span = slots, None
        self.newest.clear()

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of all slots, [B, frames * frame_tokens, H, D] in the cache's dtype: a copy, to be looked at."""
        self.commit()
        _check_written(self.slots)
        pairs = []
        for table in self.tables if self.slots else []:
            k, v = table.gather(layer, self.slots)
            mean = table.k_means[layer]
            pairs.append((k if mean is None else k + mean, v))
        if not pairs:
            return (torch.empty(self.shape[0], 0, *self.shape[2:], dtype=self.dtype, device=self.device),) * 2
        k, v = (torch.stack(each).to(self.dtype) for each in zip(*pairs))
        return k, v

    def fork(self) -> World:
        """Another world with the same contents and pages."""
        other = copy.copy(self)
        other.newest, other._planned = dict(self.newest), None
        if self.frame_tokens:
            other.tables = [table.fork() for table in self.tables]
        return other

    def _size(self, frame_tokens: int) -> None:
        if self.frame_tokens == frame_tokens:
            return
        batch, size, heads, width = self.shape
        if self.frame_tokens or not 0 < frame_tokens <= size:
            now = f"frames of {self.frame_tokens} tokens" if self.frame_tokens else f"{size} tokens"
            raise ValueError(f"kv_cache must be made anew for other frames: it is for {now}, got {frame_tokens}")
        own, frames = DTYPES[self.dtype], size // frame_tokens
        self.store = KVStore(
            layers=self.layers,
            heads=heads,
            head_dim=width,
            frame_tokens=frame_tokens,
            block_frames=frames,  # a pass may write all that the cache holds; scratch is one layer deep
            scratch_blocks=batch,
            pools={self.options.format or own: frames * batch * self.options.worlds},
            scratch_format=own,
            page_size=self.options.page_size,
            device=self.device,
            backend=self.options.backend,
            precision=self.options.precision,
        )
        self.tables = [self.store.open(Policy()) for _ in range(batch)]
        self.frame_tokens = frame_tokens

    def _turn(self, span: Span, held: int, evicted: int, sink: int, places: Sequence[int]) -> None:
        """Another block is made from here on. Slots from `held` on count as empty."""
        if self.span is not None and self.span.begin < held:
            self.commit()
        slots = self.slots[:held]
        if len(slots) < held:
            raise ValueError(f"local_end_index must be at most {len(slots)} frames, which were written, got {held}")
        del slots[sink : sink + evicted]
        slots[span.first : span.end] = [OPEN] * (span.end - span.first)
        _check_written([slots[place] for place in places if slots[place] != OPEN])
        self._set(slots, span)

    def _set(self, slots: list[int], span: Span | None) -> None:
        """Other slots, and another block to be made. Frames that are in none of them are forgotten."""
        kept = {frame for frame in slots if frame >= 0}
        for i, table in enumerate(self.tables if self.frame_tokens else []):
            table.abandon()
            if kept:
                table.forget([frame for frame in table.held if frame not in kept])
            else:  # begun anew: the keys of another first block have another mean
                table.release()
                self.tables[i] = self.store.open(Policy())
        self.slots, self.span, self._planned = slots, span, None
        self.newest.clear()

    def _open(self, frames: int) -> list[Block]:
        self._planned = None  # it was for the blocks that are abandoned
        for table in self.tables:
            table.abandon()
        return [table.open_block(frames) for table in self.tables]

    def _plan(self, span: Span, places: Sequence[int], rules: Rules) -> Pass:
        seen = [self.slots[slot] for slot in places if not span.first <= slot < span.end]
        attention = ByFrame(span.first - span.begin, biases(len(places), rules) if rules.bias else None)
        parts = [Part(table, [block], None, [seen]) for table, block in zip(self.tables, self._open(span.frames))]
        return self.store.plan(parts, attention=attention)


def _check_written(slots: Sequence[int]) -> None:
    if UNWRITTEN in slots:
        raise ValueError(
            f"kv_cache must be written before it is read: {slots.count(UNWRITTEN)} of {len(slots)} frames were zeroed, "
            "or left by a pass that was broken off"
        )
