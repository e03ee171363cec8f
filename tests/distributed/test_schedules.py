"""Schedules against one process: a slice of matrix.py, and what is not in it."""

from functools import partial

import pytest
import torch

from inferix_kernels import Policy, compiled
from inferix_kernels.distributed import Gather, PassQ, PeerLost, Ring, run_ranks, shard_for
from inferix_kernels.distributed.sharding import Sizes, layer_sent, ring_sent
from inferix_kernels.store.memory import page_bytes
from tests.distributed.lazy import lazy
from tests.distributed.matrix import SPLITS, STRATEGIES, Case, alone, cases, check, processes
from tests.distributed.worlds import Story, distance, store_of, tell, whole

SLICE = [*cases()][7::149]
# Another world's fork, a rewind, three blocks in flight, two worlds in one pass, frames seen by name, a captured place.
EVENTS = Story("int8", layers=1, blocks=4, events=True)
EVENTFUL = [("ulysses", 4, 2), ("ring", 3, 1), ("pass-q", 4, 2), ("arrivals", 4, 2)]


@pytest.fixture
def float32_products(monkeypatch):
    """Kernels with bfloat16 operands round where a list of pages ends, which a schedule moves."""
    monkeypatch.setattr(compiled, "ISA", min(compiled.ISA, compiled.Isa.avx2))


def told_by_ranks(story, schedule, size, parts):
    def rank(transport):
        shard = shard_for(SPLITS.get(schedule, schedule), transport.rank, size, story.heads, parts)
        return tell(story, store_of(story, shard), STRATEGIES[schedule](transport))

    return run_ranks(lazy(size), rank)


@pytest.mark.parametrize("case", SLICE, ids=lambda case: "-".join(map(str, case)))
def test_a_slice_of_the_matrix(case, float32_products):
    check(case)


@pytest.mark.parametrize("schedule", ["ring", "arrivals"])
def test_over_gloo(schedule, float32_products):
    check(Case(2, schedule, "ragged", "int8", "12 over 4"), processes)


@pytest.mark.parametrize("split", EVENTFUL, ids=str)
def test_forks_rewinds_and_blocks_in_flight(split, float32_products):
    told, one = told_by_ranks(EVENTS, *split), alone(EVENTS)
    assert distance(whole(EVENTS, [each.outs for each in told]), one.outs)[0] <= 2e-5
    frames, mean = [*one.table.held], one.table.k_means[0]
    k, v = one.table.gather(0, frames)
    for rank, each in enumerate(told):
        shard = each.table.store.shard
        heads = slice(shard.head_rank * k.shape[1] // shard.heads, (shard.head_rank + 1) * k.shape[1] // shard.heads)
        torch.testing.assert_close(each.table.k_means[0], mean, rtol=1e-6, atol=1e-6)
        assert [*each.table.held] == frames
        for i, frame in enumerate(frames):
            if not each.table.state.slots[frame].own:
                continue
            tokens = slice(i * EVENTS.frame_tokens, (i + 1) * EVENTS.frame_tokens)
            for mine, all_heads in zip(each.table.gather(0, [frame]), (k, v)):
                # Means are sums in another order where a rank has other heads, and a code may be the next one then.
                theirs = all_heads[tokens, heads]
                off, step = (mine - theirs).abs(), theirs.abs().max() / 127
                assert (off > 1e-5).float().mean() <= 1e-3 and off.max() <= 1.01 * step, f"{frame} on rank {rank}"


@pytest.mark.parametrize("split", [("ring", 4, 2), ("ring, arrivals", 2, 1)], ids=str)
def test_buffers_give_the_same(split, float32_products):
    story = Story("int8", layers=1, buffers=True)
    told = told_by_ranks(story, *split)
    assert distance(whole(story, [each.outs for each in told]), alone(story._replace(buffers=False)).outs)[0] <= 2e-5


def test_the_fastest_kernels_differ_by_what_they_round():
    """bfloat16 products, where a CPU multiplies these, round the softmax's weights against the largest so far."""
    story = Story("int8", layers=1)
    told = told_by_ranks(story, "ulysses", 2, None)
    assert distance(whole(story, [each.outs for each in told]), tell(story, store_of(story)).outs)[1] <= 3e-3


@pytest.mark.parametrize(
    "strategy", [Gather, Ring, PassQ, partial(Gather, arrivals=True), partial(Ring, arrivals=True)]
)
def test_keys_that_are_ready_and_queries_that_come_later(strategy, float32_products):
    """Pass.append and Pass.read: queries that `begin` was not given."""
    story = Story("int8", layers=1)

    def play(store, attention=None):
        table, random = store.open(Policy(4)), torch.Generator().manual_seed(0)
        options, outs = {} if attention is None else {"attention": attention}, []
        for _ in range(3):
            block = table.open_block(2)
            passed = table.plan([block], commit=block, **options)
            q, k, v = torch.randn(3, 42, 4, 16, generator=random)
            mine = [store.shard.own(x, 21) for x in (q, k, v)]
            passed.append(0, *mine[1:])
            outs += [passed.read(0, q).flatten(1).clone() for q in (mine[0], 2 * mine[0])]
            table.seal(block)
        return outs

    schedule = {Gather: "ulysses", Ring: "ring", PassQ: "pass-q"}[getattr(strategy, "func", strategy)]
    told = run_ranks(lazy(2), lambda t: play(store_of(story, shard_for(schedule, t.rank, 2, story.heads)), strategy(t)))
    assert distance(whole(story, told), play(store_of(story)))[0] <= 2e-5


@pytest.mark.parametrize("split", [("arrivals", 4, 2), ("ring, arrivals", 3, 1)], ids=str)
def test_a_rank_that_fails_ends_attention_that_waits_for_its_pages(split):
    """It has said that it makes the same pass, and then sends nothing."""
    schedule, size, parts = split

    def rank(transport):
        store = store_of(Story(), shard_for(SPLITS[schedule], transport.rank, size, 4, parts))
        table = store.open(Policy())
        noisy = table.plan([table.open_block(2)], attention=STRATEGIES[schedule](transport))
        qkv = store.shard.own(torch.zeros(42, 3 * 4 * 16), 21)
        noisy.attend(0, qkv, None, None)
        if transport.rank == 1:
            raise OSError("gone")
        with pytest.raises(PeerLost, match=r"rank 1 was lost in (Gather: keys|Ring: .*), layer 1, .*OSError: gone"):
            noisy.attend(1, qkv, None, None)

    with pytest.raises(OSError, match="gone"):
        run_ranks(lazy(size), rank)


@pytest.mark.parametrize("strategy", [Gather, Ring])
def test_arrivals_are_refused_where_attention_waits_for_no_pages(strategy):
    def rank(transport):
        shard = shard_for("ring" if strategy is Ring else "gather", transport.rank, 2, 4)
        table = store_of(Story(), shard, backend="triton").open(Policy())
        table.plan([table.open_block(2)], attention=strategy(transport, arrivals=True))

    with pytest.raises(
        ValueError, match=r"^arrivals must be False but on a CPU .* got True on cpu with backend triton"
    ):
        run_ranks(lazy(2), rank)


def test_arrivals_are_refused_where_one_call_would_read_too_many_pools():
    formats = ("fp32", "bf16", "fp16", "int8", "fp8", "int4", "i8f8")

    def rank(transport):
        shard = shard_for("gather", transport.rank, 2, 4)
        store = store_of(Story(), shard, pools=dict.fromkeys(formats, 2))
        table = store.open(Policy())
        table.plan([table.open_block(2)], attention=Gather(transport, arrivals=True))

    with pytest.raises(ValueError, match=r"^arrivals must be False where one call would read over 8 pools, .* for 9"):
        run_ranks(lazy(2), rank)


def test_bytes_do_not_grow_with_the_past_but_in_a_ring():
    sizes = Sizes(3, 1560, 12, 12, (128, 128), 2, 2)
    pages = {format: 25 * page_bytes(format, 12, 64, 128) for format in ("int8", "bf16")}
    for schedule in ("ulysses", "gather"):
        shard = shard_for(schedule, 0, 4, 12)
        assert layer_sent(schedule, shard, sizes, ()) == layer_sent(schedule, shard, sizes)
    ring = shard_for("ring", 0, 4, 12)
    assert layer_sent("ring", ring, sizes, [9 * pages["bf16"]] * 4) > layer_sent(
        "ring", ring, sizes, [pages["bf16"]] * 4
    )
    of = {format: ring_sent(ring, [5 * each] * 4) for format, each in pages.items()}
    assert of["int8"] <= 0.53 * of["bf16"]


def test_a_slot_of_another_rank_is_not_taken_for_scratch():
    """Rank 0 holds two of five slots, the others one: the page id of slot 4 is that of scratch on those."""
    story = Story("fp32", frames=1, blocks=7, window=2, layers=1, frame_tokens=8)

    def rank(transport):
        shard = shard_for("ring", transport.rank, transport.size, story.heads)
        return tell(story, store_of(story, shard, pools={"fp32": 5}), Ring(transport)).outs

    told = run_ranks(lazy(4), rank)
    assert distance(whole(story, told), alone(story).outs)[0] <= 2e-5
