"""Every schedule on 1 to 8 ranks against one process: python -m tests.distributed.matrix

Ranks are threads that hand each other messages as late as the protocol allows (lazy.py), so a wait that is missing
shows. Two processes share the cases; some are made by processes over gloo besides. The CPU's kernels are held to
float32 products: those with bfloat16 operands round weights where a list of pages ends, which a schedule moves.
"""

import argparse
import itertools
import multiprocessing
import time
from functools import cache, partial
from typing import NamedTuple

import torch

from inferix_kernels import compiled
from inferix_kernels.distributed import Gather, PassQ, Ring, run_ranks, shard_for
from tests.distributed.groups import run_processes
from tests.distributed.lazy import lazy
from tests.distributed.worlds import Story, bytes_sent, distance, store_of, tell, whole

STRATEGIES = {
    **{"ulysses": Gather, "gather": Gather, "ulysses x gather": Gather, "ring": Ring, "pass-q": PassQ},
    "arrivals": partial(Gather, arrivals=True),  # U, U x G or G, as heads divide
    "ring, arrivals": partial(Ring, arrivals=True),
}
SPLITS = {"arrivals": "ulysses", "ring, arrivals": "ring"}  # by shard_for's name, where it is another one
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
        return shard_for(self.split, rank, self.ranks, heads)

    @property
    def split(self):
        return SPLITS.get(self.schedule, self.schedule)


def cases():
    """All but those that are the same as another one: one rank, and groups that are not there. Pages of any format land
    in the same way: two are enough."""
    for each in itertools.product(RANKS, STRATEGIES, SHAPES, FORMATS, HEADS):
        case, heads = Case(*each), HEADS[each[-1]][1]
        if case.ranks == 1 and case.schedule != "gather":
            continue
        if case.schedule == "ulysses x gather" and (case.ranks < 4 or heads % 2):
            continue
        if case.schedule == "ulysses" and case.shard(0).heads == 1:
            continue
        if case.schedule == "ring, arrivals" and case.format not in ("bf16", "int8"):
            continue
        yield case


@cache
def alone(story):
    return tell(story, store_of(story))


def one_rank(case, transport):
    """What a rank of it makes; bytes that it sent, and should have."""
    shard = case.shard(transport.rank)
    told = tell(case.story, store_of(case.story, shard), STRATEGIES[case.schedule](transport))
    return told.outs, transport.sent, bytes_sent(case.story, case.split, shard, told.passes)


def threads(size, function):
    return run_ranks(lazy(size), function)


def processes(size, function):
    """Over gloo; what they return is sent as arrays, since a process that has ended shares no memory."""

    def as_arrays(transport):
        outs, *bytes = function(transport)
        return [None if out is None else out.float().numpy() for out in outs], *bytes

    made = run_processes(size, as_arrays)
    return [([None if out is None else torch.from_numpy(out) for out in outs], *bytes) for outs, *bytes in made]


def check(case, ranks=threads):
    """Raises AssertionError, which names the case, unless it gives what one process does, and sends what it should.

    Args:
        ranks: (how many, function of a transport) -> what each rank returns.
    """
    made = ranks(case.ranks, lambda transport: one_rank(case, transport))
    largest, mean = distance(whole(case.story, [outs for outs, *_ in made]), alone(case.story).outs)
    error = largest if case.story.dtype == torch.float32 else mean
    assert error <= LIMITS[case.story.dtype], f"{case}: off by {error:.2e}"
    for rank, (_, sent, want) in enumerate(made):
        assert sent == want, f"{case}: rank {rank} sent {sent} bytes, not {want}"
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
    float32_products()
    over_gloo = [check(case, processes) for case in every if case.ranks in (2, 3) and case.shape == "ragged"]
    every.sort(key=lambda case: case[2:])  # so that few workers need the same one-process results
    parts = [every[i : i + 16] for i in range(0, len(every), 16)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        errors = [error for errors in pool.imap_unordered(run, parts) for error in errors]
    seconds, largest = time.monotonic() - began, max([*errors, *over_gloo])
    print(f"{len(errors)} cases, {len(over_gloo)} of them over gloo too, {seconds:.0f} s, largest error {largest:.1e}")


if __name__ == "__main__":
    main()
