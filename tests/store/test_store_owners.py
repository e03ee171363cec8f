"""Who has a store's pages: several threads, worlds that are only dropped, plans while others move."""

import gc
import threading

import numpy as np
import pytest
import torch

from inferix import World
from inferix_kernels import KVStore, NotResident, OutOfPages, PageList, Policy
from inferix_kernels.store.copies import Copies
from inferix_kernels.store.turns import StreamTurns
from tests.store.stores import FRAME_TOKENS, add_block, add_blocks, contents, equal, free_slots, open_store, rope, run


def test_ten_thousand_forks_that_are_dropped_leave_nothing():
    store = open_store("int8", frames=9)
    table = store.open(Policy(6))
    add_blocks(table, 1)
    gc.disable()  # nothing waits for the garbage collector
    try:
        for i in range(10_000):
            fork = table.fork()
            if i % 50 == 0:
                add_block(fork, 3)
                fork.open_block(3)
            del fork
    finally:
        gc.enable()
    assert free_slots(store) == {"int8": 6} and len(store._tables) == 1


def test_a_world_that_is_dropped_gives_its_pages_back():
    world = World("tiny", seed=0, worlds=2)
    world.step(action="right", prompt="desert night")
    world.commit_pending()
    free = {format: len(pool.free) for format, pool in world.store.pools.items()}
    gc.disable()
    try:
        for _ in range(3):
            fork = world.fork()
            fork.step(action="left")
            fork.commit_pending()
            assert {format: len(pool.free) for format, pool in world.store.pools.items()} != free
            del fork
            assert {format: len(pool.free) for format, pool in world.store.pools.items()} == free
    finally:
        gc.enable()


def threads(*jobs):
    errors = []

    def caught(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=caught, args=(job,)) for job in jobs]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not errors


def test_worlds_of_one_store_in_several_threads_are_what_they_are_alone():
    def pair():
        one = World("tiny", seed=0, worlds=2)
        one.step(action="right", prompt="desert night")
        return one, one.fork(seed=7)

    def play(world, action, out):
        for _ in range(6):
            out.append(world.step(action=action))

    want, got = ([], []), ([], [])
    for world, action, out in zip(pair(), ("up", "left"), want):
        play(world, action, out)
    one, two = pair()
    threads(lambda: play(one, "up", got[0]), lambda: play(two, "left", got[1]))
    assert np.array_equal(np.concatenate(want[0]), np.concatenate(got[0]))
    assert np.array_equal(np.concatenate(want[1]), np.concatenate(got[1]))


def test_a_world_takes_one_call_at_a_time():
    world = World("tiny", seed=0)
    begun, go_on = threading.Event(), threading.Event()
    made, predict = [], world.model.predict

    def slow(*args):
        begun.set()
        go_on.wait()
        return predict(*args)

    world.model.predict = slow
    stepping = threading.Thread(target=lambda: made.append(world.step(action="right", prompt="desert night")))
    stepping.start()
    begun.wait()
    try:
        for call in (
            lambda: world.step(action="left"),
            world.fork,
            world.commit_pending,
            lambda: world.rewind(0),
            world.release,
        ):
            with pytest.raises(
                RuntimeError, match="another thread is at work on this world, which takes one call at a"
            ):
                call()
    finally:
        go_on.set()
        stepping.join()
    assert len(made[0]) == 3 and len(world.step(action="left")) == 3  # in turns it goes on


def test_on_a_gpu_a_threads_stream_waits_for_the_one_before(monkeypatch):
    class Stream:
        def __init__(self):
            self.waits = []

        def wait_stream(self, other):
            self.waits.append(other)

    streams, here = {}, threading.get_ident
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.setdefault(here(), Stream()))
    turns = StreamTurns(torch.device("cuda"))

    def use():
        with turns, turns:
            pass

    for _ in range(2):
        use()
    main = streams[here()]
    threads(use)
    (other,) = [stream for stream in streams.values() if stream is not main]
    use()
    assert other.waits == [main] and main.waits == [other]


# Nothing moves under a caller


def moving_store(frames=2, **pools):
    return KVStore(
        layers=1, heads=1, head_dim=8, frame_tokens=8, block_frames=1, pools={"fp32": frames, **pools},
        host={format: 4 for format in ("fp32", *pools)}, page_size=8, scratch_format="fp32",
    )  # fmt: skip


def add(table, value):
    block = table.open_block(1)
    table.plan([block], commit=block).append(0, *(torch.full((8, 1, 8), value),) * 2)
    table.seal(block)


def value_of(table, frame):
    return table.gather(0, [frame])[0].unique().item()


def test_a_prefetch_takes_no_slot_that_it_counts_on():
    store = moving_store()
    table, other = store.open(Policy()), store.open(Policy())
    for value in (1.0, 2.0):
        add(table, value)
    table.offload([0])
    store.sync_copies()
    add(other, 9.0)
    table.offload([1])  # on both sides until a boundary
    with pytest.raises(OutOfPages, match=r"fp32 pool on the device: 1 frames .* 2 of 2 are held"):
        table.prefetch([0, 1])
    assert table.cold == {0, 1} and value_of(table, 1) == 2.0
    other.release()
    table.prefetch([0, 1])
    store.sync_copies()
    assert (value_of(table, 0), value_of(table, 1)) == (1.0, 2.0)


def test_what_an_open_block_sees_stays_for_it_when_it_is_sent_away():
    store = moving_store()
    table, other = store.open(Policy()), store.open(Policy())
    for value in (1.0, 2.0):
        add(table, value)
    block = table.open_block(1)
    noisy = table.plan([block])
    table.offload([0])
    with pytest.raises(OutOfPages):
        table.plan([block], commit=block)
    with pytest.raises(OutOfPages):
        add(other, 99.0)
    pages = PageList(noisy.plan.page_ids[:2], noisy.plan.page_lens[:2])
    seen = store.gather(store.layers[0], pages, torch.float32)
    assert seen[0].flatten(1)[:, 0].tolist() == [1.0] * 8 + [2.0] * 8
    table.abandon()
    other.abandon()
    add(other, 99.0)
    with pytest.raises(NotResident, match=r"frames \[0\] are in host memory"):
        table.gather(0, [0])


def test_what_only_another_world_has_on_the_device_is_not_read():
    """It could go at any moment; fetching it costs nothing."""
    store = moving_store()
    table = store.open(Policy())
    add(table, 1.0)
    fork = table.fork()
    fork.offload([0])
    store.sync_copies()
    with pytest.raises(NotResident):
        fork.select([0])
    fork.prefetch([0])
    assert len(store.pools["fp32"].free) == 1
    table.release()
    assert value_of(fork, 0) == 1.0


def test_a_conversion_shares_only_what_it_holds():
    store = moving_store(3, bf16=2)
    table, other = store.open(Policy()), store.open(Policy(format="bf16"))
    for value in (1.0, 2.0):
        add(table, value)
    add(other, 9.0)
    fork = table.fork()
    fork.convert([0], "bf16")
    fork.offload([0])
    with pytest.raises(OutOfPages, match=r"bf16 pool on the device: 1 frames .* 2 of 2 are held"):
        table.convert([0, 1], "bf16")
    fork.release()
    with pytest.raises(OutOfPages):
        table.convert([0, 1], "bf16")
    table.convert([0], "bf16")
    assert (value_of(table, 0), value_of(table, 1), value_of(other, 0)) == (1.0, 2.0, 9.0)
    for each in (table, other):
        each.release()
    store.sync_copies()
    assert free_slots(store) == {"fp32": 3, "bf16": 2} and len(store.host["bf16"].free) == 4


def test_a_pass_refuses_to_run_once_its_table_was_edited():
    store = open_store("int8", frames=9)
    table = store.open(Policy(9))
    add_blocks(table, 1)
    block = table.open_block(3)
    noisy = table.plan([block], rope(3))
    run(noisy, 3 * FRAME_TOKENS)
    before = contents(table)
    table.rewrite(1, lambda layer, k, v: (2 * k, v))
    assert not equal(contents(table), before)
    with pytest.raises(RuntimeError, match="planned before its table was edited: plan another one"):
        run(noisy, 3 * FRAME_TOKENS)
    run(table.plan([block], rope(3)), 3 * FRAME_TOKENS)


def test_an_interrupted_copy_is_made_again(monkeypatch):
    store = moving_store()
    table = store.open(Policy())
    add(table, 5.0)

    def interrupted(self, pairs, to_host):
        raise KeyboardInterrupt

    for action in (table.offload, table.prefetch):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Copies, "start", interrupted)
            action([0])
        action([0])
        store.sync_copies()
    assert value_of(table, 0) == 5.0


def test_on_evict_is_called_once_and_only_where_nothing_can_fail():
    calls = []
    store = KVStore(
        layers=1, heads=1, head_dim=8, frame_tokens=8, block_frames=1, pools={"fp32": 6}, host={"fp32": 1}, page_size=8
    )
    table = store.open(Policy(window=2, archive=True, on_evict=lambda table, frame: calls.append(frame)))
    for value in (0.0, 1.0, 2.0):
        add(table, value)
    for _ in range(3):
        with pytest.raises(OutOfPages, match="in host memory"):
            table.open_block(1)
    assert calls == [0] and list(table.held) == [0, 1, 2] and not table.open_blocks


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda t: t.open_block(1),
        lambda t: t.rewind(1),
        lambda t: t.truncate(0),
        lambda t: t.rewind(2),
    ],
)
def test_on_evict_does_not_move_the_end_of_its_world(forbidden):
    store = KVStore(layers=1, heads=1, head_dim=8, frame_tokens=8, block_frames=1, pools={"fp32": 6}, page_size=8)
    table = store.open(Policy(window=2, on_evict=lambda table, frame: forbidden(table)))
    add(table, 0.0)
    add(table, 1.0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="on_evict must not open, seal or forget blocks"):
            table.open_block(1)
    assert list(table.held) == [0, 1] and table.next_frame == 2 and not table.open_blocks and not table.evicting
    assert value_of(table, 0) == 0.0 and value_of(table, 1) == 1.0


@pytest.mark.parametrize("seal", [False, True])
def test_a_boundary_without_room_for_what_ages_changes_nothing(seal):
    store = KVStore(
        layers=1, heads=1, head_dim=8, frame_tokens=8, block_frames=1, pools={"fp32": 9, "bf16": 2}, page_size=8
    )
    table = store.open(Policy(window=4 if seal else 3, older=(2, "bf16")))
    for value in (0.0, 1.0, 2.0):
        add(table, value)
    fork, other = table.fork(), store.open(Policy(format="bf16"))
    block = None
    if seal:
        block = table.open_block(1)
        table.open_block(1)
        table.plan([block], commit=block).append(0, *(torch.zeros(8, 1, 8),) * 2)
    while store.pools["bf16"].free:
        add(other, 9.0)
    before = list(table.held), list(table.open_blocks)
    with pytest.raises(OutOfPages, match="bf16 pool on the device"):
        table.seal(block) if seal else table.open_block(1)
    assert (list(table.held), table.open_blocks) == before
    other.release()
    fork.release()
    table.seal(block) if seal else table.open_block(1)


def test_a_pool_that_fits_nowhere_is_refused():
    sizes = {"layers": 30, "heads": 12, "head_dim": 128, "frame_tokens": 1560, "block_frames": 3}
    with pytest.raises(ValueError, match=r"pools\['int8'\] must be under 2\^31 pages .* got 99999999999 frames"):
        KVStore(**sizes, pools={"int8": 99_999_999_999})
    with pytest.raises(ValueError, match=r"host\['fp32'\] must fit in the memory of cpu, got 2500000 frames"):
        KVStore(**sizes, pools={"int8": 1}, host={"fp32": 2_500_000})
