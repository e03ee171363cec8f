"""The parallel family: what is counted and compared, and who writes under torchrun."""

import argparse

import pytest

from benchmarks import parallel
from benchmarks.harness import launched
from benchmarks.harness.measure import Settings
from benchmarks.harness.messages import Posted, Silent, Waited, replay
from benchmarks.shapes import find_shape
from inferix_kernels.distributed import in_process_group, run_ranks
from inferix_kernels.distributed.agreement import DIGESTS
from tests.distributed.groups import run_processes

CHECKED = Settings(rounds=0)


def rows(ranks, settings=CHECKED):
    smoke = find_shape("smoke")
    return run_ranks(in_process_group(ranks), lambda t: parallel.rows_of(settings, smoke, "int8", t))[0]


def test_every_way_of_the_planner_is_right_and_sends_the_bytes_of_its_formula():
    found = rows(4)
    assert [row.contender for row in found if "arrivals" not in row.contender] == [
        *("ours-G", "ours-R", "ours-Q", "ours-U2xG2", "ours-U2xR2", "ours-U2xQ2")
    ]
    assert {row.status for row in found} == {"ok"}, [row.note for row in found]


def test_other_bytes_than_the_formulas_are_wrong(monkeypatch):
    monkeypatch.setattr(parallel, "layer_sent", lambda *_: 1000)
    assert all(row.status == "wrong" and f"bytes, not {2 * 1000 + DIGESTS}" in row.note for row in rows(2))


def test_one_rank_that_is_wrong_is_named(monkeypatch):
    forward = parallel.World.forward

    def off(world, *args):
        made = forward(world, *args)
        return made * 1.1 if world.transport.rank == 1 and world.way is not None and made is not None else made

    monkeypatch.setattr(parallel.World, "forward", off)
    assert all(row.note.startswith("rank 1 is off by") and "rank 0" not in row.note for row in rows(2))


def test_messages_are_replayed_as_they_were_posted():
    def rank(transport):
        silent, peer = Silent(transport), 1 - transport.rank
        log = [Posted([(peer, 8)], []), Posted([], [(peer, 8)]), Waited(1), Waited(0), Posted([(peer, 4)], [(peer, 4)])]
        replay(silent, log)()
        assert silent.log == log and silent.stop() == log
        replay(silent, log)()
        assert silent.log is None
        replay(transport, [*log, Waited(2)])()
        return transport.sent

    assert run_ranks(in_process_group(2), rank) == [12, 12]


def test_ranks_that_ask_silence_whether_they_agree_do():
    shape = find_shape("smoke")

    def rank(transport):
        for way in parallel.ways(shape, 2, "cpu"):
            world = parallel.World(shape, "bf16", way, transport, transport.device)
            sent = transport.sent
            world.forward(world.alone, world.qkv)
            assert transport.sent == sent
            assert next(step for step in world.log if isinstance(step, Posted)).sends == [(1 - transport.rank, DIGESTS)]

    run_ranks(in_process_group(2), rank)


def test_processes_find_what_threads_do():
    smoke = find_shape("smoke")
    one, other = run_processes(2, lambda transport: parallel.rows_of(CHECKED, smoke, "bf16", transport))
    assert one == other and {row.status for row in one} == {"ok"}, [row.note for row in one]


@pytest.mark.parametrize("rank", [0, 1])
def test_under_torchrun_rank_0_writes_what_all_measure(monkeypatch, rank):
    args = argparse.Namespace(families=["linear"], json="a.json", record=True, plot=None, github=None)
    launched.rank_0_writes(args)
    assert args.record
    monkeypatch.setattr(launched, "rank", lambda: rank)
    with pytest.raises(ValueError, match=r"^family must be parallel under torchrun, got linear"):
        launched.rank_0_writes(args)
    args.families = ["parallel"]
    monkeypatch.setattr(launched, "silence", lambda: None)
    launched.rank_0_writes(args)
    assert (args.json, args.record) == (("a.json", True) if rank == 0 else (None, False))
