"""What every transport does: threads of one process, as fast as memory, throttled, as late as can be; and processes,
over which `tests/distributed/processes.py` calls the same functions."""

import threading
import time

import pytest
import torch

from inferix_kernels.distributed import Message, PeerLost, in_process_group, run_ranks
from tests.distributed.lazy import POISON, lazy

THREADS = {
    "in process": in_process_group,
    "throttled": lambda size, **options: in_process_group(size, gigabytes_per_second=0.1, latency=1e-4, **options),
    "lazy": lazy,
}


@pytest.fixture(params=THREADS)
def threads(request):
    """Makes the transports of so many ranks that are threads."""
    return THREADS[request.param]


@pytest.fixture
def run(threads):
    """What a function of a transport returns on each of so many ranks."""
    return lambda size, function: run_ranks(threads(size), function)


def blob(size: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def empty(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_blob_s_goes_to_rank_s_whatever_the_sizes_are(run, size):
    def sizes(a, b):
        return (7 * a + 3 * b) % 5 * 1000  # some are empty

    def exchange(transport):
        me = transport.rank
        sends = [blob(sizes(me, s), 100 * me + s) for s in range(size)]
        receives = [empty(sizes(r, me)) for r in range(size)]
        transport.all_to_all(sends, receives).wait()
        assert all(torch.equal(receives[r], blob(sizes(r, me), 100 * r + me)) for r in range(size))
        return transport.sent

    sent = run(size, exchange)
    assert sent == [sum(sizes(me, s) for s in range(size) if s != me) for me in range(size)]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_everybody_gets_each_ranks_blob(run, size, in_place):
    def gather(transport):
        receives = [empty(1000 * r) for r in range(size)]
        mine = receives[transport.rank] if in_place else empty(1000 * transport.rank)
        mine.copy_(blob(len(mine), transport.rank))
        transport.all_gather(mine, receives).wait()
        return all(torch.equal(receives[r], blob(1000 * r, r)) for r in range(size))

    assert all(run(size, gather))


def test_messages_arrive_in_the_order_in_which_they_were_posted(run):
    """Whatever their sizes, and whichever ticket is waited for first."""
    sizes = [50_000, 1, 3000, 2]

    def exchange(transport):
        other, received = 1 - transport.rank, [empty(size) for size in sizes]
        tickets = [
            transport.post(
                [Message(other, blob(sizes[i], i + 10 * transport.rank)) for i in pair],
                [Message(other, received[i]) for i in pair],
            )
            for pair in ((0, 1), (2, 3))
        ]
        for ticket in tickets[:: 1 if transport.rank else -1]:
            ticket.wait()
            ticket.wait()  # free
        return all(torch.equal(x, blob(size, i + 10 * other)) for i, (x, size) in enumerate(zip(received, sizes)))

    assert all(run(2, exchange))


def test_a_ring_goes_round(run):
    def ring(transport):
        size, held = transport.size, [blob(4096, transport.rank), empty(4096)]
        before, after = (transport.rank - 1) % size, (transport.rank + 1) % size
        for hop in range(1, size):
            transport.at(f"hop {hop}", 0, 0)
            ticket = transport.post([Message(after, held[0])], [Message(before, held[1])])
            ticket.wait()
            held.reverse()
            assert torch.equal(held[0], blob(4096, (transport.rank - hop) % size))
        return transport.sent

    assert run(4, ring) == [3 * 4096] * 4


def test_a_group_can_be_used_again(threads):
    def gather(transport):
        receives = [empty(8) for _ in range(transport.size)]
        transport.all_gather(blob(8, transport.rank), receives).wait()
        return [x.tolist() for x in receives]

    transports = threads(3)
    assert run_ranks(transports, gather) == run_ranks(transports, gather)


def test_a_rank_that_posts_nothing_is_named_with_what_was_waited_for(threads):
    def one_is_absent(transport):
        if transport.rank == 1:
            return None
        transport.at("ring hop 3 of 7", 12, 41)
        ticket = transport.post([], [Message(1, empty(8))])
        transport.at("something later", 0, 0)
        with pytest.raises(PeerLost) as caught:
            ticket.wait(0.05)
        return caught.value

    _, _, error = run_ranks(threads(3), one_is_absent)
    assert (error.ranks, error.op, error.layer, error.block) == ((1,), "ring hop 3 of 7", 12, 41)
    assert error.waited >= 0.05 and "rank 1 was lost in ring hop 3 of 7, layer 12, block 41" in str(error)


def test_an_exception_of_one_rank_ends_the_others_waits_with_its_message(threads):
    others = {}

    def one_raises(transport):
        if transport.rank == 2:
            raise KeyError("a page that is not there")
        with pytest.raises(PeerLost) as caught:
            transport.post([], [Message((transport.rank + 1) % 2, empty(8))]).wait()
        others[transport.rank] = caught.value

    with pytest.raises(KeyError, match="a page that is not there"):
        run_ranks(threads(3), one_raises)
    assert {rank: error.ranks for rank, error in others.items()} == {0: (2,), 1: (2,)}
    assert all(error.reason == "KeyError: 'a page that is not there'" for error in others.values())


def test_sizes_that_differ_end_both_sides(threads):
    def differ(transport):
        other = 1 - transport.rank
        sends = [Message(1, empty(8))] if transport.rank == 0 else []
        receives = [Message(0, empty(9))] if transport.rank == 1 else []
        assert other >= 0
        transport.post(sends, receives).wait()

    said = "as many bytes on both sides, got 8 on rank 0, which sends it, and 9 on rank 1"
    with pytest.raises((ValueError, PeerLost), match=said):
        run_ranks(threads(2), differ)


GOOD = empty(8)


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda t: t.post([Message(2, GOOD)], []),
            r"sends\[0\].peer must be another rank of 0 to 1, .* got 2 on rank 0",
        ),
        (lambda t: t.post([Message("1", GOOD)], []), r"sends\[0\].peer must be another rank .* got '1' on rank 0"),
        (lambda t: t.post([Message(True, GOOD)], []), r"sends\[0\].peer must be another rank .* got True on rank 0"),
        (lambda t: t.post([(1, GOOD)], []), r"sends\[0\] must be a Message, got tuple on rank 0"),
        (lambda t: t.post([], [Message(0, GOOD)]), r"receives\[0\].peer must be another rank .* got 0 on rank 0"),
        (lambda t: t.post([Message(1, GOOD)] * 3, []), r"sends\[2\].peer must be .* 2 times at most, got 1 on rank 0"),
        (lambda t: t.post([Message(1, GOOD.float())], []), r"sends\[0\].blob must be uint8, got float32 on rank 0"),
        (lambda t: t.post([Message(1, b"x")], []), r"sends\[0\].blob must be uint8, got bytes on rank 0"),
        (
            lambda t: t.post([Message(1, GOOD[::2])], []),
            r"sends\[0\].blob must be \[bytes\], contiguous, got \[4\] with",
        ),
        (
            lambda t: t.post([Message(1, GOOD.view(2, 4))], []),
            r"sends\[0\].blob must be \[bytes\], contiguous, got \[2, 4",
        ),
        (lambda t: t.post([Message(1, GOOD.to("meta"))], []), r"sends\[0\].blob must be on cpu, got meta on rank 0"),
        (lambda t: t.all_to_all([GOOD], [GOOD, GOOD]), r"sends must be a blob for each of 2 ranks, got 1 on rank 0"),
        (
            lambda t: t.all_to_all([GOOD] * 2, [GOOD[:3]] * 2),
            r"receives\[0\] must be of 8 bytes like .*, got 3 on rank 0",
        ),
        (lambda t: t.all_gather(GOOD, [GOOD] * 3), r"receives must be a blob for each of 2 ranks, got 3 on rank 0"),
        (lambda t: t.all_gather(GOOD.int(), [GOOD] * 2), r"send must be uint8, got int32 on rank 0"),
        (
            lambda t: t.post([], [Message(1, empty(1))]).wait(-1),
            "deadline must be a positive number of seconds, got -1",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_sent(threads, call, said):
    transport = threads(2)[0]
    with pytest.raises((TypeError, ValueError), match=said):
        call(transport)
    assert transport.sent == 0


@pytest.mark.parametrize(
    "options, said",
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 2, "gigabytes_per_second": 0}, "gigabytes_per_second must be a finite number above 0, got 0"),
        ({"size": 2, "latency": -1.0}, "latency must be a finite number not below 0, got -1.0"),
        ({"size": 2, "latency": "1 ms"}, "latency must be a finite number not below 0, got '1 ms'"),
        ({"size": 2, "deadline": 0}, "deadline must be a positive number of seconds, got 0"),
        ({"size": 2, "device": "nowhere"}, "device must be a device that is there, got 'nowhere'"),
    ],
)
def test_groups_that_can_not_be_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        in_process_group(**options)


def test_a_throttled_link_takes_what_it_would_take():
    """At least, that is: two messages of a rank go one after another, those of two ranks together."""

    def exchange(transport):
        others = [r for r in range(3) if r != transport.rank]
        began = time.monotonic()
        transport.post(
            [Message(other, empty(500_000)) for other in others], [Message(other, empty(500_000)) for other in others]
        ).wait()
        return time.monotonic() - began

    took = run_ranks(in_process_group(3, gigabytes_per_second=0.05, latency=0.01), exchange)
    assert min(took) >= 2 * 500_000 / 0.05e9 + 0.01


def test_what_lies_in_a_groups_links_ends_with_it():
    def gather(transport):
        transport.all_gather(empty(8), [empty(8) for _ in range(4)]).wait()

    before = set(threading.enumerate())
    transports = in_process_group(4)
    run_ranks(transports, gather)
    links = set(threading.enumerate()) - before
    assert len(links) == 4
    del transports
    for link in links:
        link.join(20)
    assert not any(link.is_alive() for link in links)


def test_a_lazy_transport_moves_nothing_before_its_wait_and_shows_what_is_read_too_early():
    posted = threading.Barrier(2)

    def exchange(transport):
        mine, theirs = blob(8, transport.rank), blob(8, 9)
        ticket = transport.post([Message(1 - transport.rank, mine)], [Message(1 - transport.rank, theirs)])
        posted.wait()
        early = theirs.clone()
        assert transport.unwaited == [ticket]
        mine += 1  # scribbled on before its wait
        posted.wait()
        ticket.wait()
        return early.eq(POISON).all(), torch.equal(theirs, blob(8, 1 - transport.rank) + 1), transport.unwaited

    assert run_ranks(lazy(2), exchange) == [(True, True, [])] * 2
