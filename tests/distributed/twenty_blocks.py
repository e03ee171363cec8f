"""Worlds of 20 blocks on several ranks against one process: eviction, a fork, prompt switches.

`python -m tests.distributed.twenty_blocks` prints a table: ranks are processes over gloo. fp32 pages must be the same
within 2e-5. Of int8 pages a code that lies between two numbers may be rounded to the other one, and every later block
reads it: 99.9% of the codes must be equal, none off by more than 1, and latents within 2e-3. That is with attention's
products in float32. In bfloat16, which a CPU may have, numbers are rounded where a list of pages ends, and a schedule
moves that; so there one process whose first layer is off by the last bit ("nudged") is the measure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from inferix.models.magi import SCHEDULES, Magi
from inferix.models.magi.adapters import adapter_for
from inferix.ranks import Ranks
from inferix.turns import one_at_a_time
from inferix.world import World
from inferix_kernels import compiled
from inferix_kernels.store import snapshot
from tests.distributed import groups
from tests.models import magi_folder
from tests.models.test_wan_world import wan

WORDS = ("fog", "rain", "snow")
BLOCKS = 20


def wan_world(kv: str, ranks: Ranks | None = None) -> World:
    return World(wan(window=6, sink=1), kv=kv, precision="exact", seed=3, worlds=2, ranks=ranks)


def magi_world(kv: str, ranks: Ranks | None = None) -> World:
    network = magi_folder.random_network(magi_folder.tiny_config())
    schedule = SCHEDULES["magi-4.5b"]
    rows = {
        word: torch.randn(5, magi_folder.CAPTION_DIM, generator=torch.Generator().manual_seed(i))
        for i, word in enumerate(WORDS)
    }
    model = Magi(network, adapter_for("magi-4.5b", schedule, (32, 48)), schedule, rows.__getitem__)
    return World(model, kv=kv, precision="exact", seed=3, worlds=2, ranks=ranks)


WORLDS = {"wan": wan_world, "magi": magi_world}


class Told(NamedTuple):
    """latents: of all steps. codes: of all layers and held frames at the end, without their scales."""

    latents: np.ndarray
    codes: np.ndarray


def story(world: World, blocks: int = BLOCKS) -> Told:
    """Another prompt every third of it; at half of it a fork goes another way for two blocks and is let go."""
    made: list[np.ndarray] = []

    def step(one: World, word: str) -> None:
        one.step(prompt=word)
        made.append(one.latents.numpy().copy())

    for i in range(blocks):
        word = WORDS[len(WORDS) * i // blocks]
        step(world, word)
        if i == blocks // 2:
            fork = world.fork(seed=9)
            for other in WORDS[:2]:
                step(fork, other)
                step(world, word)
            fork.release()
    world.commit_pending()
    return Told(np.concatenate(made), codes(world))


@one_at_a_time
def codes(world: World) -> np.ndarray:
    """What the world's pages hold, of all ranks; nothing on ranks > 0."""
    taken = snapshot.taken(world.table, None if world.ranks is None else world.ranks.collect)
    tensors = {} if taken is None else taken.tensors
    return np.concatenate([np.empty(0), *(x.float().flatten() for n, x in tensors.items() if n.endswith((".k", ".v")))])


class Case(NamedTuple):
    model: str
    kv: str
    ranks: int
    schedule: str  # or "alone", "nudged": without a group


SCHEDULES_OF = {
    "wan": ((2, "gather"), (3, "ulysses"), (4, "gather"), (4, "ring"), (4, "pass-q")),  # 3 heads
    "magi": ((2, "gather"), (2, "ulysses"), (4, "ulysses"), (4, "ring"), (4, "pass-q")),  # 2 heads: U2xG2 on 4 ranks
}


def run(case: Case, blocks: int) -> Told:
    """In processes that this one forks."""

    def tell(transport: Any) -> Told | None:
        if case.ranks == 1:
            world = WORLDS[case.model](case.kv)
            if case.schedule == "nudged":
                nudge(world.model.network)
            return story(world, blocks)
        ranks = Ranks(transport, case.schedule)
        world = WORLDS[case.model](case.kv, ranks)
        if not ranks.leads:
            ranks.follow()
            return None
        told = story(world, blocks)
        ranks.end()
        return told

    told: Told = groups.run_processes(case.ranks, tell, deadline=groups.LIMIT)[0]
    return told


def nudge(network: torch.nn.Module) -> None:
    """A linear layer's weights, up by the last bit of their float32."""
    weight = next(module.weight for module in network.modules() if isinstance(module, torch.nn.Linear))
    weight.data = torch.nextafter(weight.data, torch.full_like(weight, torch.inf))


class Apart(NamedTuple):
    """Of two runs: the largest difference of latents; the share of codes that are equal, and how far one is off."""

    latents: float
    equal: float
    code: float

    @classmethod
    def of(cls, a: Told, b: Told) -> Apart:
        codes = np.abs(a.codes - b.codes)
        return cls(float(np.abs(a.latents - b.latents).max()), float((codes == 0).mean()), float(codes.max()))

    def within(self, pages: str, nudged: Apart) -> bool:
        if pages == "fp32":
            return self.latents <= 2e-5
        if pages == "int8":
            return self.latents <= 2e-3 and self.equal >= 0.999 and self.code <= 1
        return self.code <= 1 and 1 - self.equal <= 2 * (1 - nudged.equal)


PAGES = ("fp32", "int8", "int8-bf16")  # the last with products in bfloat16, where the CPU has them


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.twenty_blocks", description=__doc__)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--models", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=PAGES)
    options = parser.parse_args(arguments)
    groups.LIMIT, wrong, isa = 3600.0, 0, compiled.ISA
    print("model  pages      ranks  schedule  latents apart  codes equal  code apart")
    for model, pages in ((model, pages) for model in options.models for pages in options.pages):
        compiled.ISA = isa if pages == "int8-bf16" else min(isa, compiled.Isa.avx2)
        kv = pages.partition("-")[0]
        alone = run(Case(model, kv, 1, "alone"), options.blocks)
        nudged = Apart.of(run(Case(model, kv, 1, "nudged"), options.blocks), alone)
        for ranks, schedule in ((1, "nudged"), *SCHEDULES_OF[model]):
            case = Case(model, kv, ranks, schedule)
            apart = nudged if ranks == 1 else Apart.of(run(case, options.blocks), alone)
            good = ranks == 1 or apart.within(pages, nudged)
            wrong += not good
            line = f"{model:5}  {pages:9}  {ranks:5}  {schedule:8}  {apart.latents:13.1e}  {apart.equal:11.3%}"
            print(f"{line}  {apart.code:10.1e}{'' if good else '  TOO FAR'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
