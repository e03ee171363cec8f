"""One story, told by one process and by several ranks: blocks, denoised and committed, with all that befalls a past.

`tell` runs it over a store and returns what every layer of every pass attended to, on the rows that the store's rank
has. `whole` puts the rows of all ranks together.
"""

from typing import NamedTuple

import torch

from inferix_kernels import KVStore, PageTable, Part, PassBuffers, Policy
from inferix_kernels.distributed.sharding import Sizes, agreement_sent, keys_sent, layer_sent, means_sent
from inferix_kernels.store import Shard
from inferix_kernels.store.memory import page_bytes

PAGE, WIDTH = 8, 16


class Story(NamedTuple):
    """Sizes of a world, and what happens to it."""

    format: str = "fp32"
    query_heads: int = 4
    heads: int = 4
    frame_tokens: int = 21  # three pages, the last one partly valid
    frames: int = 2  # of a block
    blocks: int = 3
    window: int = 4
    fused: bool = True
    events: bool = False  # fork, rewind, several blocks in flight
    dtype: torch.dtype = torch.float32
    buffers: bool = False
    layers: int = 2


def store_of(story, shard=Shard(), **options):
    scratch = "fp32" if story.dtype == torch.float32 else "bf16"
    sizes = {"layers": story.layers, "heads": story.heads, "head_dim": WIDTH, "frame_tokens": story.frame_tokens}
    held = 8 * story.frames + story.window
    return KVStore(
        **{
            **sizes,
            "block_frames": story.frames,
            "pools": {story.format: held},
            "scratch_format": scratch,
            "page_size": PAGE,
            "scratch_blocks": 4,
            "precision": "exact",
            "shard": shard,
            **options,
        }
    )


class Told(NamedTuple):
    outs: list  # of each layer of each pass
    table: PageTable
    passes: list


class Teller:
    """Makes passes over one store, with inputs that only depend on how many were made before."""

    def __init__(self, story, store, attention):
        self.story, self.store, self.options = story, store, {} if attention is None else {"attention": attention}
        self.outs, self.passes, self.random = [], [], torch.Generator().manual_seed(7)
        self.norms = [torch.rand(n * WIDTH, generator=self.random) + 0.5 for n in (story.query_heads, story.heads)]
        self.buffers = PassBuffers() if story.buffers else None

    def plan(self, table, blocks, **options):
        frames = sum(len(block.frames) for block in blocks)
        angles = torch.rand(frames * self.story.frame_tokens, WIDTH // 2, generator=self.random)
        rope = torch.stack([angles.cos(), angles.sin()], -1)
        return table.plan(blocks, rope, buffers=self.buffers, **options, **self.options)

    def run(self, passed, tokens):
        shard, frame_tokens = self.store.shard, self.story.frame_tokens
        width = (self.story.query_heads + 2 * self.story.heads) * WIDTH
        self.passes.append(passed)
        for layer in range(self.story.layers):
            qkv = torch.randn(tokens, width, generator=self.random) + torch.linspace(0, 2, width)
            out = passed.attend(layer, shard.own(qkv.to(self.story.dtype), frame_tokens), *self.norms)
            self.outs.append(None if out is None else out.clone())

    def over(self, table, blocks, **options):
        tokens = sum(len(block.frames) for block in blocks) * self.story.frame_tokens
        self.run(self.plan(table, blocks, **options), tokens)


def tell(story, store, attention=None):
    teller = Teller(story, store, attention)
    table = store.open(Policy(window=story.window, sink=1, undo=story.frames))
    pending = None
    for _ in range(story.blocks):
        pending = _block(teller, table, pending)
    if pending is not None:
        teller.over(table, [pending], commit=pending, predict=False)
        table.seal(pending)
    if story.events:
        _events(teller, table)
    return Told(teller.outs, table, teller.passes)


def _block(teller, table, pending):
    """Two noisy passes and a clean one, which is left pending where it may share the next block's first forward."""
    block = table.open_block(teller.story.frames)
    if pending is not None:
        teller.over(table, [pending, block], commit=pending)
        table.seal(pending)
    else:
        teller.over(table, [block])
    teller.over(table, [block])
    if teller.story.fused and table.can_fuse:
        return block
    teller.over(table, [block], commit=block, predict=False)
    table.seal(block)
    return None


def _events(teller, table):
    """A fork that goes another way, a rewind, three blocks in flight, two worlds in one pass, frames seen by name."""
    frames, tokens = teller.story.frames, teller.story.frames * teller.story.frame_tokens
    fork = table.fork()
    table.rewind(frames)
    for world in (table, fork):
        _block(teller, world, None) and world.abandon()
    blocks = [table.open_block(frames) for _ in range(3)]
    teller.over(table, blocks)
    teller.over(table, blocks[:2], see=[[*table.held][::2], list(blocks[0].frames)])
    teller.over(table, blocks, commit=blocks[0])
    table.seal(blocks[0])
    table.abandon()
    parts = [Part(world, [world.open_block(frames)]) for world in (table, fork)]
    angles = torch.zeros(2 * tokens, WIDTH // 2)
    rope = torch.stack([angles.cos(), angles.sin()], -1)
    teller.run(teller.store.plan(parts, rope, **teller.options), 2 * tokens)


def whole(story, told):
    """Of each rank's outs the rows of all, frame by frame."""
    passes = []
    for outs in zip(*told, strict=True):
        if outs[0] is None:
            passes.append(None)
            continue
        frames = sum(map(len, outs)) // story.frame_tokens
        parts = [out.view(frames, len(out) // frames, out.shape[1]) for out in outs]
        passes.append(torch.cat(parts, 1).flatten(0, 1))
    return passes


def distance(ours, theirs):
    """Of all passes: the largest error relative to the root mean square of a pass's numbers, and the largest relative
    root mean square error."""
    assert len(ours) == len(theirs)
    largest = mean = 0.0
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None) and (a is None or a.shape == b.shape)
        if a is not None:
            a, b = a.float(), b.float()
            size, error = b.square().mean().sqrt(), a - b
            assert torch.isfinite(error).all()
            largest, mean = max(largest, float(error.abs().max() / size)), max(mean, float(error.norm() / b.norm()))
    return largest, mean


def bytes_sent(story, schedule, shard, passes):
    """By the formulas of sharding.py, of all passes of one rank."""
    store, total = passes[0].store, 0
    for passed in passes:
        reads = passed._reads
        frames = sum(block.queries for block in reads.blocks) // story.frame_tokens
        size = 2 if story.dtype == torch.bfloat16 else 4
        sizes = Sizes(frames, story.frame_tokens, story.query_heads, story.heads, (WIDTH, WIDTH), size, size)
        read = {frame.place: frame for block in reads.blocks for frame in block.frames if not frame.made}
        past = [0] * shard.frames
        for (format, _), frame in read.items():
            past[frame.group] += store.pages_per_frame * page_bytes(format, store.heads, PAGE, WIDTH)
        layer = layer_sent(schedule, shard, sizes, past if shard.frames > 1 else ())
        last = layer if reads.predict else keys_sent(shard, sizes)
        total += agreement_sent(shard) + (story.layers - 1) * layer + last
    if store.freezes_mean:
        total += story.layers * means_sent(shard, story.heads, WIDTH)  # of the one world that has a first block
    return total
