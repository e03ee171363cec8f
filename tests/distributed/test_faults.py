"""Which rank is said to be lost; the whole is `python -m tests.distributed.faults`."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from inferix_kernels.distributed import PeerLost, ProcessGroupTransport
from inferix_kernels.distributed.faults import MISSED, FailureDetector, Loss, Status, Where, _host, _process
from tests.distributed.faults import PLANTED, draw

ROOT = Path(__file__).parents[2]


def test_over_processes_bytes_arrive_and_of_every_kind_of_fault_the_right_rank_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.processes"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exchanges: as between threads" in done.stdout
    assert "world: an exception of one rank ends all" in done.stdout
    assert done.stdout.count(" 1 faults, 0 hangs, 0 wrong") == len(PLANTED)


def test_the_same_seed_draws_the_same_faults():
    assert draw(30, 5, list(PLANTED)) == draw(30, 5, list(PLANTED)) != draw(30, 6, list(PLANTED))


def detectors(size, store=None, **options):
    """Of ranks in one process, begun."""
    store = store if store is not None else dist.HashStore()
    made = [FailureDetector(store, rank, size, 20.0, **options) for rank in range(size)]
    starts = [threading.Thread(target=detector.start) for detector in made]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    return made


def each(function, things):
    threads = [threading.Thread(target=function, args=(thing,)) for thing in things]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


def test_what_one_rank_finds_all_know_and_their_waits_end():
    ended = [threading.Event() for _ in range(3)]
    store = dist.HashStore()
    made = [FailureDetector(store, rank, 3, 20.0, on_loss=ended[rank].set) for rank in range(3)]
    each(FailureDetector.start, made)
    made[1].tell(Loss((1,), "it raised ValueError: no such page"))
    assert ended[0].wait(20) and ended[2].wait(20)
    assert made[0].loss == made[2].loss == ((1,), "it raised ValueError: no such page")
    made[0].tell(Loss((2,), "something else"))  # the first is what counts
    error = made[0].lost(Where("ring hop 1 of 2", 3, 4), [2], 0.0, broken=True)
    assert error.ranks == (1,) and (error.op, error.layer, error.block) == ("ring hop 1 of 2", 3, 4)
    each(lambda detector: detector.close(orderly=False), made)


def test_a_rank_that_does_not_come_is_named():
    store = dist.HashStore()
    store.set("x", "")
    with pytest.raises(PeerLost, match=r"^ranks 1, 2 were lost in the group's beginning, after 0.1 s: it has not come"):
        FailureDetector(store, 0, 3, 0.1).start()


def test_ranks_that_leave_in_order_lose_nobody():
    made = detectors(3)
    each(lambda detector: detector.close(orderly=True), made)
    assert [detector.loss for detector in made] == [None] * 3
    assert not any(detector._thread.is_alive() for detector in made)


def test_one_store_serves_one_group_after_another():
    store = dist.HashStore()
    for size in (3, 2):
        made = detectors(size, store)
        each(lambda detector: detector.close(orderly=True), made)
        assert [detector.loss for detector in made] == [None] * size


def status(**fields):
    return Status(1, "", 0, "", **fields)


@pytest.mark.parametrize(
    "waits, left, missed, lost",
    [
        ([(1,), (2,), (3,), ()], (), (), (3,)),  # the end of a chain
        ([(1, 2), (), (), ()], (), (), (1, 2)),
        ([(1,), (2,), (3,), (1,)], (), (), (1, 2, 3)),  # a circle
        ([(1,), (2,), (0,), ()], (), (), (1, 2)),
        ([(1,), (2,), (3,), ()], (), (1, 3), (1, 3)),  # heartbeats are missing
        ([(1,), (0, 2), (), ()], (), (2,), (2,)),
        ([(2,), (), (), ()], (2,), (), (2,)),
        ([(1,), (2, 3), (), ()], (3,), (2,), (2,)),
    ],
)
def test_of_a_wait_that_met_its_deadline_the_end_of_the_chain_is_blamed(waits, left, missed, lost):
    detector = FailureDetector(dist.HashStore(), 0, 4, 1.0)  # which does not live: what it has heard is given
    detector._statuses = [status(waits=waits[r], left=int(r in left)) for r in range(4)]
    detector._thread = threading.current_thread()
    detector._missed = [MISSED if r in missed else MISSED - 1 for r in range(4)]
    assert sorted(detector._blamed(waits[0]).ranks) == list(lost)


def test_a_process_that_has_ended_is_seen_and_one_that_has_its_number_is_not_taken_for_it():
    detector = FailureDetector(dist.HashStore(), 0, 4, 1.0)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine, its = _process(os.getpid()), _process(child.pid)
    detector._statuses = [
        Status(1, _host(), os.getpid(), mine.started),
        Status(1, _host(), child.pid, its.started),
        Status(1, _host(), os.getpid(), "another time"),
        Status(1, "another machine", child.pid, its.started),
    ]
    assert detector._gone() == [2]
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert detector._gone() == [1, 2]
    child.wait()
    assert detector._gone() == [1, 2]
    assert detector._ended([1, 2]) == ((1, 2), "its process has ended")
    detector._statuses[1] = detector._statuses[1]._replace(left=1)
    assert detector._ended([1]) is None  # it may


class Failing(dist.Store):
    """A store that is lost with the process that it was in."""

    def __init__(self):
        super().__init__()
        self.store, self.fails = dist.HashStore(), False

    def clone(self):
        return self

    def __getattribute__(self, name):
        if name in ("set", "get", "multi_get", "has_extended_api", "add", "wait", "check"):
            if self.fails:
                raise dist.DistNetworkError("the connection was closed")
            return getattr(self.store, name)
        return super().__getattribute__(name)


def test_without_its_store_a_rank_names_whom_it_waited_for_and_closes_at_once():
    store = Failing()
    made = detectors(2, store)
    store.fails = True
    with made[0]._changed:
        assert made[0]._changed.wait_for(lambda: made[0]._store is None, 20)
    assert made[0].lost(Where(), [1], 0.0, broken=False).ranks == (1,)
    each(lambda detector: detector.close(orderly=True), made)


def test_a_heartbeat_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda error: None)

    def late():
        raise OSError("no more files")

    [detector] = detectors(1, late=late)
    detector._thread.join(20)
    assert detector.loss == ((0,), "its heartbeat failed: OSError: no more files")
    with pytest.raises(PeerLost, match="its heartbeat failed: OSError: no more files"):
        detector.close(orderly=True)


def test_messages_that_the_host_does_not_wait_for_have_a_deadline_too():
    late = [[], []]
    store = dist.HashStore()
    made = [FailureDetector(store, rank, 2, 20.0, late=lambda rank=rank: late[rank]) for rank in range(2)]
    each(FailureDetector.start, made)
    late[0] = [1]
    with made[1]._changed:
        assert made[1]._changed.wait_for(lambda: made[1].loss, 20)
    assert made[0].loss == made[1].loss == ((1,), "its process lives, but it has not posted its side")
    each(lambda detector: detector.close(orderly=False), made)


@pytest.fixture
def world():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_must_be_there_and_have_the_devices_backend(world):
    with pytest.raises(ValueError, match="group must have this process among its ranks, got one of others"):
        ProcessGroupTransport(dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ValueError, match="device must be of type cpu or cuda, got meta on rank 0"):
        ProcessGroupTransport(device="meta")
    with pytest.raises(ValueError, match="deadline must be a positive number of seconds, got 0"):
        ProcessGroupTransport(deadline=0)
    with pytest.raises(ValueError, match="device must be a device that is there, got 'nowhere'"):
        ProcessGroupTransport(device="nowhere")


def test_a_group_of_another_backend_is_refused(world, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:mpi,cuda:nccl")
    with pytest.raises(ValueError, match="group must have the backend gloo for cpu, got mpi on rank 0"):
        ProcessGroupTransport()


def test_there_must_be_a_group():
    with pytest.raises(ValueError, match=r"group must be a process group, got None before torch\.distributed was init"):
        ProcessGroupTransport()
