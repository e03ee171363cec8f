"""What is tested over processes, from a process that has no other thread: what is forked beside one may find a lock
that nobody will open.

`python -m tests.distributed.processes`
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from inferix.ranks import Ranks
from inferix_kernels.distributed import PeerLost, ProcessGroupTransport
from tests.distributed import faults, test_transport
from tests.distributed.groups import ENDED, LIMIT, Group, run_processes
from tests.distributed.test_world import walking


def exchanges() -> None:
    for size in (1, 3, 8):
        test_transport.test_blob_s_goes_to_rank_s_whatever_the_sizes_are(run_processes, size)
    for in_place in (False, True):
        test_transport.test_everybody_gets_each_ranks_blob(run_processes, 3, in_place)
    test_transport.test_messages_arrive_in_the_order_in_which_they_were_posted(run_processes)
    test_transport.test_a_ring_goes_round(run_processes)


def survivors() -> None:
    """After a loss, those that are left go on in a new group."""

    def work(rank: int, send: Callable[[Any], None]) -> None:
        store = dist.distributed_c10d._get_default_store()
        try:
            with ProcessGroupTransport() as transport:
                if rank == 1:
                    os._exit(1)
                transport.post([], [test_transport.Message(1, torch.empty(1, dtype=torch.uint8))]).wait()
        except PeerLost as lost:
            left = [r for r in range(3) if r not in lost.ranks]
        dist.destroy_process_group()
        store = dist.PrefixStore("again", store)
        dist.init_process_group("gloo", store=store, rank=left.index(rank), world_size=len(left))
        received = [torch.empty(1, dtype=torch.uint8) for _ in left]
        with ProcessGroupTransport() as transport:
            transport.all_gather(torch.tensor([rank], dtype=torch.uint8), received).wait()
        send([int(x) for x in received])

    group, found = Group(3, work), {}
    while group.open and (came := group.receive(LIMIT)):
        found |= {rank: said for rank, said in came if said is not ENDED}
        if len(found) == 2:
            break
    group.close()
    assert found == {0: [0, 2], 2: [0, 2]}, found


def world() -> None:
    """A rank that raises an exception in the middle of a block ends the others, long before a wait's deadline."""

    def work(rank, send):
        try:
            with ProcessGroupTransport(deadline=1e5) as transport:
                group = Ranks(transport, "gather")
                made = walking(group)
                if group.leads:
                    made.step(prompt="fog")
                made.model.network.blocks[1].forward = None
                group.follow()
        except Exception as error:
            send((type(error).__name__, str(error)))

    group, said = Group(2, work), {}
    try:
        while group.open:
            came = group.receive(LIMIT)
            assert came, "a rank hangs"
            said |= {rank: each for rank, each in came if each is not ENDED}
    finally:
        group.close()
    error = "step failed on rank 1: TypeError: 'NoneType' object is not callable"
    assert said[1] == ("RuntimeError", error)
    assert said[0][0] == "PeerLost" and said[0][1].startswith("rank 1 was lost in Gather: ")
    assert said[0][1].endswith(f"it raised RuntimeError: {error}")


if __name__ == "__main__":
    exchanges()
    survivors()
    print("exchanges: as between threads; after a loss, in a new group", flush=True)
    world()
    print("world: an exception of one rank ends all", flush=True)
    count = str(len(faults.PLANTED))  # one of each kind
    sys.exit(faults.main(["--count", count, "--at-once", count]))
