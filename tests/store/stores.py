"""Small stores and worlds for the tests of the KV store."""

import torch

from inferix_kernels import KVStore, PageTable

HEADS, HEAD_DIM, FRAME_TOKENS, PAGE_SIZE = 2, 16, 21, 8  # 21 tokens: three pages, the last one partly valid


def open_store(format="fp32", frames=6, block_frames=3, layers=2, **options):
    options = {"pools": {format: frames}, "head_dim": HEAD_DIM, "frame_tokens": FRAME_TOKENS} | options
    return KVStore(layers=layers, heads=HEADS, block_frames=block_frames, page_size=PAGE_SIZE, **options)


def rope(frames):
    return torch.tensor([1.0, 0.0]).expand(frames * FRAME_TOKENS, HEAD_DIM // 2, 2).contiguous()


def run(passed, tokens, layers=2, seed=0):
    """All layers of one pass over random q, k, v: what each attended to."""
    generator = torch.Generator().manual_seed(seed)
    outs = []
    for layer in range(layers):
        qkv = torch.randn(tokens, 3 * HEADS * HEAD_DIM, generator=generator)
        outs.append(passed.attend(layer, qkv, None, None))
    return outs


def add_block(table: PageTable, frames: int, seed: int = 0):
    block = table.open_block(frames)
    outs = run(table.plan([block], rope(frames), commit=block), frames * FRAME_TOKENS, seed=seed)
    table.seal(block)
    return outs


def add_blocks(table: PageTable, blocks: int, frames: int = 3):
    return [add_block(table, frames, seed=table.next_frame) for _ in range(blocks)]


def free_slots(store: KVStore):
    return {format: len(pool.free) for format, pool in store.pools.items()}


def contents(table: PageTable):
    return [table.gather(layer, list(table.held)) for layer in range(table.store.num_layers)]


def equal(a, b):
    return all(torch.equal(x, y) for pairs in zip(a, b, strict=True) for x, y in zip(*pairs, strict=True))


def mixed_store(frames=9):
    pools = {"int8": frames, "int4": frames, "bf16": 2}
    return open_store(pools=pools, host={"int8": frames, "int4": frames, "bf16": 2})
