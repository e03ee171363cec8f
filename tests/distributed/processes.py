"""What is tested over processes, from a process that has no other thread: what is forked beside one may find a lock
that nobody will open.

`python -m tests.distributed.processes`
"""

import sys

from tests.distributed import faults, test_transport
from tests.distributed.groups import run_processes


def exchanges() -> None:
    for size in (1, 3, 8):
        test_transport.test_blob_s_goes_to_rank_s_whatever_the_sizes_are(run_processes, size)
    for in_place in (False, True):
        test_transport.test_everybody_gets_each_ranks_blob(run_processes, 3, in_place)
    test_transport.test_messages_arrive_in_the_order_in_which_they_were_posted(run_processes)
    test_transport.test_a_ring_goes_round(run_processes)


if __name__ == "__main__":
    exchanges()
    print("exchanges: as between threads", flush=True)
    count = str(len(faults.PLANTED))  # one of each kind
    sys.exit(faults.main(["--count", count, "--at-once", count]))
