"""The KV store against a model of it: a slice of `make soak`, and every operation made to fail at every point."""

import contextlib
import random

import pytest
import torch

from inferix_kernels import Policy
from tests.store.injected import Injected, at_call, at_instruction
from tests.store.store_model import PAIRS, STORE_SEAMS, LateStore, follow, mix
from tests.store.store_play import Play


@pytest.mark.parametrize("seed", range(len(PAIRS)))
def test_random_steps_give_what_the_model_holds(seed):
    play = Play(random.Random(seed), PAIRS[seed], failures=20, instructions=True)
    for _ in range(200):
        play.step()
    play.end()
    assert play.counts["done"] > 50 and play.counts["frames read"] > 100


# Each operation, made to fail at each call of a seam and at each point where Python looks for signals, in turn


def committed(table, frames, seed):
    block = table.open_block(frames)
    append(table.plan([block], commit=block), frames, seed)
    return block


def append(made, frames, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in range(2):
        made.append(layer, *(torch.randn(frames * 11, 1, 4, generator=generator) for _ in range(2)))


def video(policy, blocks=3):
    store = LateStore(
        layers=2, heads=1, head_dim=4, frame_tokens=11, block_frames=2, pools={"int8": 12, "int4": 6}, page_size=8,
        host={"int8": 8, "int4": 4}, scratch_blocks=3, scratch_format="fp32", backend="compiled",
    )  # fmt: skip
    table = store.open(policy)
    for seed in range(blocks):
        table.seal(committed(table, 2, seed))
    return store, table


def fused(table):
    """Two open blocks, of which the first is committed: sealing it turns the page."""
    committed(table, 2, 7)
    table.open_block(2)


def away(table):
    table.offload([1, 2])
    table.store.sync_copies()


# Of the points for interruptions, which are hundreds. Inside the ops there are none, as they are compiled; random steps
# here and in `make soak` are interrupted inside the reference's too.
STRIDE = 5
OPERATIONS = {
    # name: (policy, what comes before, the operation)
    "open_block": (Policy(window=4), None, lambda t: t.open_block(2)),
    "open_block, sink follows": (Policy(window=4, sink=1, on_evict=follow), None, lambda t: t.open_block(2)),
    "open_block, archive": (Policy(window=4, archive=True), None, lambda t: t.open_block(2)),
    "open_block, older": (Policy(window=8, older=(3, "int4")), None, lambda t: t.open_block(2)),
    "seal, sink follows": (Policy(window=4, sink=1, on_evict=follow), fused, lambda t: t.seal(t.open_blocks[0])),
    "seal, archive": (Policy(window=4, archive=True), fused, lambda t: t.seal(t.open_blocks[0])),
    "plan": (Policy(), lambda t: t.open_block(2), lambda t: t.plan(t.open_blocks, commit=t.open_blocks[0])),
    "append": (
        Policy(),
        lambda t: committed(t, 2, 7),
        lambda t: append(t.plan(t.open_blocks, commit=t.open_blocks[0]), 2, 7),
    ),
    "convert": (Policy(), None, lambda t: t.convert([1, 3], "int4")),
    "rewrite": (Policy(), None, lambda t: t.rewrite(2, mix)),
    "offload": (Policy(), None, lambda t: t.offload([1, 2])),
    "prefetch": (Policy(), away, lambda t: t.prefetch([1, 2])),
    "fork": (Policy(), None, lambda t: t.fork().release()),
    "rewind": (Policy(), None, lambda t: t.rewind(3)),
    "abandon": (Policy(), fused, lambda t: t.abandon()),
    "release": (Policy(), None, lambda t: t.release()),
}


def shown(table):
    """All that can be seen of a world and its store, contents too, once copies have landed."""
    table.store.copies.land()
    frames = [frame for frame in table.held if table.state.slot(frame) is not None]
    return (
        {frame: extent.format for frame, extent in table.held.items()},
        *(table.cold, table.pinned, table.next_frame, [block.frames for block in table.open_blocks]),
        [mean if mean is None else mean.tolist() for mean in table.k_means],
        [[x.tolist() for x in table.gather(layer, frames)] for layer in range(2)] if frames else None,
        bool(table.state.target),
        {format: len(pool.free) for format, pool in table.store.pools.items()},
    )


def empty(store):
    store.sync_copies()
    pools = {"int8": 12, "int4": 6}, {"int8": 8, "int4": 4}
    return all(
        {format: len(pool.free) for format, pool in have.items()} == want
        for have, want in zip((store.pools, store.host), pools)
    )


@pytest.mark.parametrize("how", ["before a call", "after a call", "an interruption"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_fails_anywhere_was_made_or_was_not(name, how):
    policy, prepare, operation = OPERATIONS[name]

    def fresh():
        store, table = video(policy)
        if prepare:
            prepare(table)
        return store, table

    store, table = fresh()
    before = shown(table)
    operation(table)
    after = shown(table)
    assert before != after or name in ("append", "fork", "plan")
    interrupted = how == "an interruption"
    for number in range(1, 10_000, STRIDE if interrupted else 1):
        store, table = fresh()
        injected = at_instruction(number) if interrupted else at_call(number, STORE_SEAMS, how == "after a call")
        with contextlib.suppress(Injected), injected as failure:
            operation(table)
        if not failure.fired:
            break
        now = shown(table)
        assert now in (before, after), f"point {number}"
        if now == before:  # it can be made after all
            operation(table)
            assert shown(table) == after
        table.release()
        assert empty(store)
        assert store.turn.acquire(blocking=False)
        store.turn.release()
    assert number > 3 or not interrupted
