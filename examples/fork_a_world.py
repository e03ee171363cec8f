"""Sixteen futures of one past: `python examples/fork_a_world.py`.

A world is played for a while, then forked. A fork is a copy of its page table: all of them read the same pages, and
pay only for the blocks in which they differ. Bytes are counted here from the tables themselves.
"""

import time
from collections import Counter

from inferix.world import World

FUTURES = 16
KEYS = ("up", "left", "down", "right")


def held_bytes(worlds: list[World]) -> tuple[int, int]:
    """(shared, private): bytes of pages that several of these worlds hold, counted once, and that only one does."""
    holders = Counter(extent for world in worlds for extent in world.table.held.values())
    pools = worlds[0].store.pools
    shared = sum(pools[extent.format].frame_bytes for extent, worlds in holders.items() if worlds > 1)
    private = sum(pools[extent.format].frame_bytes for extent, worlds in holders.items() if worlds == 1)
    return shared, private


def main() -> None:
    world = World("tiny", seed=3, worlds=1 + FUTURES)
    for i in range(8):
        world.step(action=KEYS[i % 4], prompt="a glacier at night")
    started = time.perf_counter()
    futures = [world.fork(seed=i) for i in range(FUTURES)]
    microseconds = 1e6 * (time.perf_counter() - started) / FUTURES
    print(f"{FUTURES} forks of a world of {world.frames} frames, {microseconds:.0f} us each")
    print(
        f"{'blocks since':>12}  {'shared':>9}  {'private':>9}  one world alone holds {held_bytes([world])[1]:,} bytes"
    )
    for blocks in range(4):
        shared, private = held_bytes(futures)
        print(f"{blocks:>12}  {shared:>9,}  {private:>9,}")
        for i, future in enumerate(futures):
            future.step(action=KEYS[i % 4])


if __name__ == "__main__":
    main()
