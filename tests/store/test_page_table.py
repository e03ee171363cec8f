"""What one does with a past: forks, rewinding, fetching, rewriting, waiting in host memory."""

import pytest
import torch

from inferix_kernels import NotResident, OutOfPages, Policy, TopK
from inferix_kernels.store import attention as strategies
from tests.store.stores import (
    FRAME_TOKENS,
    HEAD_DIM,
    HEADS,
    add_block,
    add_blocks,
    contents,
    equal,
    free_slots,
    mixed_store,
    open_store,
    rope,
    run,
)

# Several open blocks


def test_a_block_of_a_pass_reads_what_earlier_blocks_of_it_write():
    """Four open blocks in one forward, seen by choice, equal one block after another, each committed."""
    store = open_store(frames=12, scratch_blocks=4)
    straight, together = store.open(Policy()), open_store(frames=12, scratch_blocks=4).open(Policy())
    seen, tokens = [[], range(3), range(6), [3, 4, 5, 8]], 3 * FRAME_TOKENS
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(4 * tokens, 3 * HEADS * HEAD_DIM, generator=generator)
    wanted = []
    for i in range(4):
        block = straight.open_block(3)
        passed = straight.plan([block], rope(3), commit=block, see=[seen[i]])
        wanted.append(passed.attend(0, qkv[i * tokens : (i + 1) * tokens], None, None))
        straight.seal(block)
    blocks = [together.open_block(3) for _ in range(4)]
    got = together.plan(blocks, rope(12), see=seen).attend(0, qkv, None, None)
    assert torch.allclose(got, torch.cat(wanted), atol=1e-6)
    with pytest.raises(RuntimeError, match="4 blocks are open, and scratch holds no more"):
        together.open_block(3)
    with pytest.raises(KeyError, match=r"frames must be held .* got \[6, 7, 8\]"):
        together.plan(blocks[3:], rope(3), see=[[6, 7, 8]])


def test_a_dropped_block_leaves_the_others_as_they_are():
    store = open_store(frames=6, scratch_blocks=3)
    table = store.open(Policy(6))
    first, second, third = (table.open_block(3) for _ in range(3))
    table.plan([first], rope(3), commit=first)
    table.drop(third)
    again = table.open_block(3)
    assert again.frames == third.frames and table.state.target
    table.drop(first)
    assert free_slots(store) == {"fp32": 6} and table.open_blocks == [second, again]
    table.abandon(keep=[second])
    assert table.open_blocks == [second]


def test_the_window_is_counted_from_where_it_is_told():
    table = open_store(frames=9, scratch_blocks=4).open(Policy(6))
    add_block(table, 3)
    blocks = [table.open_block(3) for _ in range(3)]
    run(table.plan(blocks[:1], rope(3), commit=blocks[0]), 3 * FRAME_TOKENS)
    table.seal(blocks[0], horizon=12)  # as the newest block sees it; the oldest, which ends at 9, would see frame 3
    assert list(table.held) == []


# Forks, rewinding, pins, rewriting


def test_a_thousand_forks_cost_no_pages_and_keep_the_past_alive():
    store = open_store(frames=21)
    table = store.open(Policy(18, 3))
    add_blocks(table, 7)
    before, free = contents(table), free_slots(store)
    forks = [table.fork() for _ in range(1000)]
    assert free_slots(store) == free
    table.release()
    assert free_slots(store) == free and equal(contents(forks[-1]), before)
    for fork in forks:
        fork.release()
    assert free_slots(store) == {"fp32": 21}


def test_forks_go_their_own_ways():
    store = open_store("int8", frames=18)
    table = store.open(Policy(9))
    add_blocks(table, 2)
    fork = table.fork()
    alone = open_store("int8", frames=9).open(Policy(9))
    add_blocks(alone, 2)
    mine, theirs = add_block(table, 3, seed=10), add_block(fork, 3, seed=11)
    assert not torch.equal(mine[0], theirs[0])
    assert all(torch.equal(a, b) for a, b in zip(theirs, add_block(alone, 3, seed=11)))
    assert equal(contents(fork), contents(alone))


def test_rewinding_and_going_on_gives_the_same_video():
    store = open_store("int8", frames=12)
    table = store.open(Policy(6, undo=6))
    add_blocks(table, 3)
    first = add_blocks(table, 2)
    table.rewind(6)
    assert table.next_frame == 9 and max(table.held) == 8
    assert all(torch.equal(a, b) for one, two in zip(first, add_blocks(table, 2)) for a, b in zip(one, two))


def test_rewinding_to_nothing_frees_the_mean_too():
    table = open_store("int8").open(Policy(6))
    add_block(table, 3, seed=1)
    table.rewind(3)
    assert not table.held and table.next_frame == 0 and not table.can_fuse
    fresh = open_store("int8").open(Policy(6))
    assert all(torch.equal(a, b) for a, b in zip(add_block(table, 3, seed=5), add_block(fresh, 3, seed=5)))


def test_a_first_clean_pass_that_fails_half_way_freezes_nothing():
    """Otherwise the next pass could be fused, while its later layers have no mean yet."""
    table = open_store("int8").open(Policy(6))
    block = table.open_block(3)
    clean = table.plan([block], rope(3), commit=block)
    clean.attend(0, torch.randn(3 * FRAME_TOKENS, 3 * HEADS * HEAD_DIM), None, None)  # and not layer 1
    table.abandon(keep=block)
    assert not table.can_fuse and table.k_means == [None, None]
    run(table.plan([block], rope(3), commit=block), 3 * FRAME_TOKENS, seed=5)
    table.seal(block)
    fresh = open_store("int8").open(Policy(6))
    add_block(fresh, 3, seed=5)
    assert equal(contents(table), contents(fresh)) and table.can_fuse


def test_pinned_frames_stay_and_are_seen():
    table = open_store(frames=9).open(Policy(6))
    add_blocks(table, 1)
    table.pin([1])
    add_blocks(table, 3)
    block = table.open_block(3)
    assert table.past(block) == [1, 9, 10, 11]
    table.abandon()
    table.unpin([1])
    add_block(table, 3)
    assert 1 not in table.held


def test_pinned_frames_behind_the_window_take_their_room_from_it():
    """As many frames are held and seen as the store has room for, and the way back is as short as what is held."""
    table = open_store(frames=8, block_frames=2).open(Policy(window=6, sink=2, pins_in_window=True, undo=0))
    add_blocks(table, 2, frames=2)
    table.pin([2, 3])
    add_blocks(table, 2, frames=2)
    block = table.open_block(2)
    assert table.past(block) == [0, 1, 2, 3, 6, 7]  # 4 and 5 made room
    table.abandon()
    assert not table.gone(8) and table.gone(6) == [4, 5]
    add_blocks(table, 4, frames=2)
    assert list(table.held) == [0, 1, 2, 3, 12, 13, 14, 15]
    table.unpin([2, 3])
    table.pin([14, 15])  # still in the window, where they take no room from it
    block = table.open_block(2)
    assert table.past(block) == [0, 1, 12, 13, 14, 15]


def test_a_policy_may_pin_what_leaves_the_window():
    """The last two even frames that left stay, and are seen."""

    def keep_even(table, leaving):
        if leaving % 2 == 0:
            table.pin([leaving])
            if len(table.pinned) > 2:
                table.unpin([min(table.pinned)])

    table = open_store(frames=12).open(Policy(6, on_evict=keep_even))
    add_blocks(table, 4)
    assert table.past(table.open_block(3)) == [6, 8, 9, 10, 11]
    table.abandon()
    add_blocks(table, 1)
    assert list(table.held) == [6, 8, 9, 10, 11, 12, 13, 14]


def test_a_rewritten_sink_follows_what_leaves_the_window_and_forks_keep_theirs():
    def follow(table, leaving):
        def mix(layer, k, v):
            old_k, old_v = table.gather(layer, [leaving])
            return 0.9 * k + 0.1 * old_k, 0.9 * v + 0.1 * old_v

        table.rewrite(0, mix, sink=True)

    table = open_store(frames=12).open(Policy(3, sink=1, on_evict=follow))
    add_blocks(table, 1)
    k, _ = table.gather(1, [0, 1, 2])
    sink, first, second = k.split(FRAME_TOKENS)
    fork = table.fork()
    table.open_block(3)  # frames 1 and 2 leave the window
    assert torch.allclose(table.gather(1, [0])[0], 0.9 * (0.9 * sink + 0.1 * first) + 0.1 * second, atol=1e-6)
    assert torch.equal(fork.gather(1, [0])[0], sink)
    with pytest.raises(ValueError, match="rewrite: frames below 1 are the sink and protected"):
        fork.rewrite(0, lambda layer, k, v: (k, v))
    with pytest.raises(ValueError, match="convert: frames below 1 are the sink and protected"):
        fork.convert([0], "fp32")


def test_a_rewrite_that_fails_changes_nothing():
    store = open_store(frames=9)
    table = store.open(Policy(6))
    add_block(table, 3)
    before, free = contents(table), free_slots(store)

    def fail(layer, k, v):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        table.rewrite(1, fail)
    assert equal(contents(table), before) and free_slots(store) == free


# Fetching


def test_fetched_pages_are_those_of_the_frames_named():
    store = mixed_store()
    table = store.open(Policy(9, format="int8"))
    add_blocks(table, 3)
    table.convert([4], "int4")
    for where, frames in (
        (table.select(range(2, 6)), [2, 3, 4, 5]),
        (table.select([7, 0, 4]), [7, 0, 4]),
    ):
        assert torch.equal(where.ids, table.select(frames).ids)
        assert where.lens.tolist() == [8, 8, 5] * len(frames)
        assert len(set(where.ids.tolist())) == len(where.ids)


def test_a_block_can_be_told_what_to_see():
    def attended(see):
        table = open_store(frames=12).open(Policy(12))
        add_blocks(table, 3)
        block = table.open_block(3)
        passed = table.plan([block], rope(3), see=see)
        return len(passed.plan.page_ids), run(passed, 3 * FRAME_TOKENS)

    (some, a), (all_, b), (same, c) = attended([[1, 5]]), attended(None), attended([list(range(9))])
    assert (some, all_, same) == (15, 36, 36)
    assert torch.equal(b[0], c[0]) and not torch.equal(a[0], b[0])


# Host memory


def test_a_block_may_attend_to_the_best_pages_of_its_past(monkeypatch):
    """Runs of 8 queries and each head choose 2 pages of 2 of 6 past frames; the block's own 9 pages are always seen."""
    table = open_store("int8").open(Policy(window=9))
    add_blocks(table, 2)
    block = table.open_block(3)
    plans, attention = [], strategies.paged_attention

    def watched(q, pools, plan, **options):
        plans.append(plan)
        return attention(q, pools, plan, **options)

    monkeypatch.setattr(strategies, "paged_attention", watched)
    dense = run(table.plan([block], rope(3)), 63)
    everything = run(table.plan([block], rope(3), attention=TopK(pages=100, queries=8)), 63)
    for got, want in zip(everything, dense):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    plans.clear()
    few = table.plan([block], rope(3), attention=TopK(pages=2, frames=2, queries=8))
    sparse = run(few, 63)
    assert len(plans) == 2 and few.plan.page_indptr.tolist() == [0, 27]
    past, own = few.plan.page_ids.tolist()[:18], few.plan.page_ids.tolist()[18:]
    for plan in plans:
        assert plan.q_indptr.tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 63]
        lists = plan.page_ids.view(8 * HEADS, 11).tolist()
        assert all(pages[2:] == own and set(pages[:2]) < set(past) for pages in lists)
        assert len({tuple(pages) for pages in lists}) > 1  # every run and head for itself
    assert not torch.equal(plans[0].page_ids, plans[1].page_ids)  # and every layer
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(sparse, dense))
    with pytest.raises(ValueError, match="TopK needs a pass over one block of each world, got 2 blocks of one"):
        table.plan([block, table.open_block(3)], rope(6), attention=TopK(pages=2))


def test_frames_wait_in_host_memory_and_come_back_bit_for_bit():
    store = mixed_store()
    table = store.open(Policy(format="int8"))
    add_blocks(table, 3)
    table.convert([1], "int4")
    before, free = contents(table), free_slots(store)
    table.offload([0, 1])
    assert equal(contents(table), before)  # readable until the next block
    block = table.open_block(3)
    assert free_slots(store) == {"int8": free["int8"] + 1, "int4": free["int4"] + 1, "bf16": 2}
    with pytest.raises(NotResident, match=r"frames \[0, 1\] are in host memory: call prefetch\(\[0, 1\]\) before"):
        table.plan([block], rope(3), see=[[0, 1, 2]])
    with pytest.raises(NotResident):
        table.gather(0, [1])
    table.abandon()
    table.prefetch([0, 1])
    with pytest.raises(NotResident):
        table.select([0])  # under way
    table.open_block(3)
    assert equal(contents(table), before)


def test_an_archiving_world_forgets_nothing():
    store = open_store("int8", frames=9, host={"int8": 30})
    table = store.open(Policy(6, archive=True))
    plain = open_store("int8", frames=9).open(Policy(6))
    for ours, theirs in zip(add_blocks(table, 6), add_blocks(plain, 6)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert list(table.held) == list(range(18)) and table.cold == set(range(12))
    table.prefetch([1])
    block = table.open_block(3)
    passed = table.plan([block], rope(3), see=[[1, 15, 16, 17]])
    assert all(out.isfinite().all() for out in run(passed, 3 * FRAME_TOKENS))


def test_a_frame_that_a_fork_still_reads_stays_on_the_device():
    store = open_store("int8", frames=9, host={"int8": 9})
    table = store.open(Policy())
    add_blocks(table, 1)
    fork = table.fork()
    before = contents(fork)
    table.offload([0, 1, 2])
    table.open_block(3)
    assert equal(contents(fork), before) and free_slots(store) == {"int8": 6}
    fork.release()
    table.abandon()
    table.open_block(3)
    assert free_slots(store) == {"int8": 9}
    with pytest.raises(NotResident):
        table.gather(0, [0])


@pytest.mark.parametrize("way_back", [False, True])
def test_a_conversion_that_a_fork_sent_away_is_made_again(way_back):
    store = mixed_store()
    table = store.open(Policy(9, format="int8"))
    add_blocks(table, 1)
    fork = table.fork()
    fork.convert([1], "int4")
    want = fork.gather(1, [1])
    fork.offload([1])
    store.sync_copies()
    if way_back:
        fork.prefetch([1])
    table.convert([1], "int4")
    assert equal([table.gather(1, [1])], [want])
    if not way_back:
        fork.prefetch([1])
    store.sync_copies()
    assert equal([fork.gather(1, [1])], [want])
    for each in (fork, table):
        each.release()
    store.sync_copies()
    assert free_slots(store) == {"int8": 9, "int4": 9, "bf16": 2}


def test_full_host_memory_refuses_and_changes_nothing():
    store = open_store("int8", frames=9, host={"int8": 2})
    table = store.open(Policy(9))
    add_blocks(table, 1)
    with pytest.raises(OutOfPages, match=r"int8 pool in host memory: 3 frames .* 0 of 2 are held and 2 free"):
        table.offload([0, 1, 2])
    assert not table.cold and len(store.host["int8"].free) == 2
    table.offload([0, 1])
    assert len(store.host["int8"].free) == 0


def test_frames_that_are_not_held_or_named_twice_are_refused():
    table = open_store().open(Policy(6))
    add_block(table, 3)
    with pytest.raises(KeyError, match=r"frames must be held \(now \[0, 1, 2\]\), got \[3\]"):
        table.select([2, 3])
    with pytest.raises(ValueError, match=r"frames must be named once, got \[1\] again"):
        table.select([1, 0, 1])
    add_blocks(table, 3)
    with pytest.raises(ValueError, match=r"frames \[.*\] have left the window, which frame 6 would see"):
        table.rewind(6)
    table.open_block(3)
    with pytest.raises(RuntimeError, match="rewind needs all blocks sealed or abandoned"):
        table.rewind(1)
