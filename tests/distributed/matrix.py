"""Every schedule on 1 to 8 ranks against one process: python -m tests.distributed.matrix

Ranks are threads that hand each other messages as late as the protocol allows (lazy.py), so a wait that is missing shows.
Two processes share the cases. The CPU's kernels are held to float32 products, as those with bfloat16 operands round
where a list of pages ends, which a schedule moves; `compiled` at its best is compared in test_schedules.py.
"""

import argparse
import itertools
import multiprocessing
import time
from functools import cache
from typing import NamedTuple

import torch

from inferix_kernels import compiled
from inferix_kernels.distributed import Gather, PassQ, Ring, run_ranks, shard_for
from tests.distributed.lazy import lazy
from tests.distributed.worlds import Story, bytes_sent, distance, store_of, tell, whole

STRATEGIES = {"ulysses": Gather, "gather": Gather, "ulysses x gather": Gather, "ring": Ring, "pass-q": PassQ}
RANKS = (1, 2, 3, 4, 8)
SHAPES = {
    "even": {"frame_tokens": 24},
    "ragged": {"frame_tokens": 21},
    "empty shard": {
        "frame_tokens": 10,
        "frames": 1,
        "blocks": 2,
        "fused": False,
    },  # a past of one frame, for all groups
    "one-token tail": {"frame_tokens": 17},
    "T < P": {"frame_tokens": 2, "frames": 1},
    "no past": {"frame_tokens": 21, "blocks": 1},
}
FORMATS = ("fp32", "bf16", "int8", "fp8")  # of the pools; with bf16 the network is too, and what is on the wire
HEADS = {"12 heads": (12, 12), "12 over 4": (12, 4), "heads % P": (5, 5)}
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-3}


class Case(NamedTuple):
    ranks: int
    schedule: str
    shape: str
    format: str
    heads: str

    @property
    def story(self):
        query_heads, heads = HEADS[self.heads]
        sizes = {"layers": 1, "blocks": 2, "query_heads": query_heads, "heads": heads, **SHAPES[self.shape]}
        return Story(self.format, **sizes, dtype=torch.bfloat16 if self.format == "bf16" else torch.float32)

    def shard(self, rank):
        heads = HEADS[self.heads][1]
        if self.schedule == "ulysses x gather":
            return shard_for("ulysses", rank, self.ranks, heads, head_parts=2)
        return shard_for(self.schedule, rank, self.ranks, heads)


def cases():
    """All but those that are the same as another one: one rank, and groups that are not there."""
    for each in itertools.product(RANKS, STRATEGIES, SHAPES, FORMATS, HEADS):
        case, heads = Case(*each), HEADS[each[-1]][1]
        if case.ranks == 1 and case.schedule != "gather":
            continue
        if case.schedule == "ulysses x gather" and (case.ranks < 4 or heads % 2):
            continue
        if case.schedule == "ulysses" and case.shard(0).heads == 1:
            continue
        yield case


@cache
def alone(story):
    return tell(story, store_of(story))


def check(case, transports=lazy):
    """Raises AssertionError, which names the case, unless it gives what one process does, and sends what it should."""
    story, one = case.story, alone(case.story)
    strategy = STRATEGIES[case.schedule]
    group = transports(case.ranks)
    told = run_ranks(
        group, lambda transport: tell(story, store_of(story, case.shard(transport.rank)), strategy(transport))
    )
    largest, mean = distance(whole(story, told), one.outs)
    error = largest if story.dtype == torch.float32 else mean
    assert error <= LIMITS[story.dtype], f"{case}: off by {error:.2e}"
    for transport, each in zip(group, told):
        want = bytes_sent(story, case.schedule, case.shard(transport.rank), each.passes)
        assert transport.sent == want, f"{case}: rank {transport.rank} sent {transport.sent} bytes, not {want}"
    return error


def float32_products():
    torch.set_num_threads(1)
    compiled.ISA = min(compiled.ISA, compiled.Isa.avx2)


def run(part):
    float32_products()
    return [check(case) for case in part]


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    began, every = time.monotonic(), list(cases())
    every.sort(key=lambda case: case[2:])  # so that few workers need the same one-process results
    parts = [every[i : i + 16] for i in range(0, len(every), 16)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        errors = [error for errors in pool.imap_unordered(run, parts) for error in errors]
    print(f"{len(errors)} cases in {time.monotonic() - began:.0f} s, the largest error {max(errors):.1e}")


if __name__ == "__main__":
    main()
