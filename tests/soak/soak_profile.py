"""Is the profiler's memory bounded? `python -m tests.soak.soak_profile --blocks 10000`.

Blocks of a network that is nearly nothing, recorded at level "layer", each with as many spans as a layer-by-layer
profile of a large model has. The most that Python held (tracemalloc) in each tenth of the run is printed; it must be
no more in the second half than in the first, in which rings and rows have been full.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tracemalloc

import torch

from inferix import profile

LAYERS, PARTS = 30, ("prologue", "attention", "linear", "cross-attention")
ALLOWED = 64 * 1024  # bytes


def make_block(network: torch.nn.Linear, x: torch.Tensor) -> None:
    with profile.block() as block:
        for layer in range(LAYERS):
            with profile.span("layer", layer=layer):
                for part in PARTS:
                    with profile.span(part):
                        pass
        network(x)
        profile.count("pages read", LAYERS)
        profile.metric("KV bytes int8", 1 << 20)
        block.frames = 3


def run(blocks: int, capacity: int = 1 << 15, steps: int = 10) -> list[int]:
    """The most bytes held in each tenth of the blocks; the sampler of the machine takes a sample per block."""
    network, x, held = torch.nn.Linear(8, 8), torch.ones(1, 8), []
    with profile.Profiling("layer", capacity=capacity) as made:
        tracemalloc.start()
        try:
            for number in range(1, blocks + 1):
                make_block(network, x)
                made.sampler.sample()
                if number % (blocks // steps) == 0:
                    held.append(tracemalloc.get_traced_memory()[1])
                    gc.collect()
                    tracemalloc.reset_peak()
        finally:
            tracemalloc.stop()
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=10_000)
    given = parser.parse_args()
    held = run(given.blocks)
    for i, size in enumerate(held, 1):
        print(f"{i * given.blocks // len(held):>7} blocks: {size / 2**20:.2f} MiB")
    middle = len(held) // 2
    grown = max(held[middle:]) - max(held[:middle])
    print(f"more in the second half than in the first: {grown / 1024:.1f} KiB")
    return int(grown > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
