"""A cache policy of your own: `python examples/policy.py`.

Three worlds see the same video. The first keeps every frame as it is. The second has a sink and a window, whose older
half is held in 4 bits: a `Policy`, data alone. The third also keeps keyframes: a function, called with each
frame that leaves the window. At the end each world says which frames its next block sees, and what they cost.
"""

import torch

from inferix_kernels import KVStore, PageTable, Policy

LAYERS, HEADS, HEAD_DIM, FRAME_TOKENS, BLOCK_FRAMES, BLOCKS = 2, 4, 64, 128, 3, 20
KEYFRAME, KEPT = 12, 3  # every twelfth frame is a keyframe; the last three of them are kept


def keep_keyframes(table: PageTable, frame: int) -> None:
    """Called before a frame leaves the window: pin it, if it is a keyframe, and let the oldest one go."""
    if frame % KEYFRAME == 0:
        table.pin([frame])
        if len(table.pinned) > KEPT:
            table.unpin([min(table.pinned)])  # it leaves with the next block


POLICIES = {
    "everything": Policy(format="bf16"),
    "sink, window": Policy(window=12, sink=3, format="int8", older=(6, "int4")),
    "and keyframes": Policy(window=12, sink=3, format="int8", older=(6, "int4"), on_evict=keep_keyframes),
}


def play(policy: Policy) -> tuple[KVStore, PageTable]:
    """A world of random keys and values under this policy."""
    pools = policy.capacity(BLOCKS * BLOCK_FRAMES)
    if policy.on_evict:
        pools["int4"] += KEPT + 1  # what the function keeps is on top of what the policy says
    store = KVStore(
        layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, frame_tokens=FRAME_TOKENS, block_frames=BLOCK_FRAMES, pools=pools
    )
    table = store.open(policy)
    generator = torch.Generator().manual_seed(0)
    for _ in range(BLOCKS):
        block = table.open_block(BLOCK_FRAMES)  # here frames leave, and change format
        clean = table.plan([block], commit=block)
        for layer in range(LAYERS):
            k, v = torch.randn(2, BLOCK_FRAMES * FRAME_TOKENS, HEADS, HEAD_DIM, generator=generator)
            clean.append(layer, k, v)
        table.seal(block)
    return store, table


def held_bytes(store: KVStore, table: PageTable) -> int:
    return sum(store.pools[extent.format].frame_bytes for extent in table.held.values())


def main() -> None:
    whole = None
    for name, policy in POLICIES.items():
        store, table = play(policy)
        size = held_bytes(store, table)
        whole = whole or size
        seen = table.past(table.open_block(BLOCK_FRAMES))
        frames = f"all {len(seen)}" if len(seen) == BLOCKS * BLOCK_FRAMES else ", ".join(map(str, seen))
        print(f"{name:>13}: {size:>10,} bytes, {size / whole:4.0%} of everything; the next block sees {frames}")


if __name__ == "__main__":
    main()
