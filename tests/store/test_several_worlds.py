"""One pass over several worlds of a store gives what one after another does, bit for bit, and all of it or nothing."""

import contextlib

import pytest
import torch

from inferix_kernels import Counters, OutOfPages, Part, Policy, Segment, TopK, make_plan
from inferix_kernels.store import table_view
from inferix_kernels.store.attention import BlockReads, Reads
from inferix_kernels.store.snapshot import load, save
from inferix_kernels.testing import poisoned_pool
from tests.store.injected import Injected, at_call, at_instruction
from tests.store.stores import (
    FRAME_TOKENS,
    HEAD_DIM,
    HEADS,
    PAGE_SIZE,
    add_block,
    add_blocks,
    contents,
    equal,
    free_slots,
    open_store,
)

FORMATS = ["fp32", "bf16", "int8", "i8f8", "fp8", "int4"]
TOKENS = 3 * FRAME_TOKENS  # of a block


def poison(pages):
    """NaN in every float, and the worst code in every code."""
    garbage = poisoned_pool(pages.format, pages.pages, HEADS, PAGE_SIZE, HEAD_DIM)
    for field, tensor in pages.tensors.items():
        tensor.view(torch.uint8).copy_(garbage.tensors[field].view(torch.uint8))


def inputs(blocks, seed, layers=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(blocks * TOKENS, 3 * HEADS * HEAD_DIM, generator=generator) for _ in range(layers)]


def turns(blocks, seed):
    """cos and sin, other ones for each token."""
    angles = torch.rand(blocks * TOKENS, HEAD_DIM // 2, generator=torch.Generator().manual_seed(seed))
    return torch.stack([angles.cos(), angles.sin()], -1)


def four_worlds(format, **options):
    """Worlds of several kinds, each with what one pass is to do for it: its part, its qkv by layer, its rotations.

    A fused clean pass, a fork that only denoises, another policy and age, and a first block, which freezes a mean.
    """
    store = open_store(format, frames=30, scratch_blocks=6, **options)
    for pages in (store.pools[format].pages, store.scratch):
        poison(pages)
    old, young, new = store.open(Policy(6)), store.open(Policy(9, sink=1)), store.open(Policy(6))
    add_blocks(old, 3)
    fork = old.fork()
    add_block(fork, 3, seed=70)
    add_block(young, 3, seed=80)
    parts = []
    for table, committed, noisy in ((old, True, True), (fork, False, True), (young, False, True), (new, True, False)):
        blocks = [table.open_block(3) for _ in range(committed + noisy)]
        parts.append(Part(table, blocks, blocks[0] if committed else None))
    sizes = [len(part.blocks) for part in parts]
    return store, parts, [inputs(n, 10 + i) for i, n in enumerate(sizes)], [turns(n, i) for i, n in enumerate(sizes)]


def one_after_another(parts, qkvs, ropes, **options):
    """What each world attends to, by layer."""
    outs = []
    for part, qkv, rope in zip(parts, qkvs, ropes):
        passed = part.table.plan(part.blocks, rope, part.commit, see=part.see, **options)
        outs.append([passed.attend(layer, qkv[layer], None, None) for layer in range(2)])
    return outs


def together(store, parts, qkvs, ropes, **options):
    passed = store.plan(parts, torch.cat(ropes), **options)
    sizes = [len(rope) for rope in ropes]
    layers = [passed.attend(layer, torch.cat([x[layer] for x in qkvs]), None, None).split(sizes) for layer in range(2)]
    return [list(outs) for outs in zip(*layers)]


def sealed(parts):
    """All that the worlds hold, once what was committed is part of the past."""
    for part in parts:
        if part.commit is not None:
            part.table.seal(part.commit)
    return [(contents(part.table), part.table.k_means) for part in parts]


def same(a, b):
    """Bit for bit, and no NaN."""
    return all(
        torch.equal(x, y) and x.isfinite().all() for one, two in zip(a, b, strict=True) for x, y in zip(one, two)
    )


def same_past(a, b):
    means = all(
        (x is None and y is None) or torch.equal(x, y) for (_, one), (_, two) in zip(a, b) for x, y in zip(one, two)
    )
    return means and all(equal(one, two) for (one, _), (two, _) in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("format", FORMATS)
def test_worlds_of_one_pass_are_what_they_are_one_after_another(format, backend):
    _, parts, qkvs, ropes = four_worlds(format, backend=backend)
    want = one_after_another(parts, qkvs, ropes)
    wanted = sealed(parts)
    store, parts, *given = four_worlds(format, backend=backend)
    assert same(together(store, parts, *given), want)
    got = sealed(parts)
    assert same_past(got, wanted)
    quantizes = store.freezes_mean
    assert [means[0] is not None for _, means in got] == [quantizes] * 4
    assert [part.table.next_frame for part in parts] == [12, 12, 3, 3]


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("bad", range(4))
def test_nothing_of_a_neighbour_is_read(format, bad):
    """One world's pages, and what it writes, are NaN: the others do not change."""
    _, parts, qkvs, ropes = four_worlds(format)
    want = one_after_another(parts, qkvs, ropes)
    wanted = sealed(parts)
    store, parts, qkvs, ropes = four_worlds(format)
    others = [i for i in range(4) if i != bad]
    shared = {id(slot) for i in others for slot in parts[i].table.state.slots.values()}
    for slot in parts[bad].table.state.slots.values():
        for layer in range(2) if id(slot) not in shared else ():
            poison(slot.pool.slot(layer, slot.index))
    qkvs[bad] = [torch.full_like(qkv, torch.nan) for qkv in qkvs[bad]]
    got = together(store, parts, qkvs, ropes)
    assert same([got[i] for i in others], [want[i] for i in others])
    assert all(out.isnan().all() for out in got[bad])
    past = sealed(parts)
    assert same_past([past[i] for i in others], [wanted[i] for i in others])


def test_each_world_chooses_its_own_best_pages():
    def worlds():
        store = open_store("int8", frames=18, scratch_blocks=2)
        parts = []
        for blocks, seed in ((2, 0), (1, 5)):
            table = store.open(Policy(9))
            for i in range(blocks):
                add_block(table, 3, seed + i)
            parts.append(Part(table, [table.open_block(3)]))
        return store, parts, [inputs(1, 1), inputs(1, 2)], [turns(1, 1), turns(1, 2)]

    top = TopK(pages=2, frames=2, queries=8)
    _, *given = worlds()
    want = one_after_another(*given, attention=top)
    assert not torch.equal(want[0][1], one_after_another(*given)[0][1])  # it is a choice
    assert same(together(*worlds(), attention=top), want)


def test_a_block_of_each_world_may_be_told_what_to_see():
    def worlds():
        store = open_store("int8", frames=18, scratch_blocks=2)
        tables = [store.open(Policy(9)) for _ in range(2)]
        for i, table in enumerate(tables):
            add_block(table, 3, seed=i)
        parts = [Part(table, [table.open_block(3)], see=[see]) for table, see in zip(tables, ([2, 0], []))]
        return store, parts, [inputs(1, 1), inputs(1, 2)], [turns(1, 1), turns(1, 2)]

    _, *given = worlds()
    assert same(together(*worlds()), one_after_another(*given))


def test_keys_and_values_that_are_ready_are_committed_in_each_world():
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randn(2 * TOKENS, HEADS, HEAD_DIM, generator=generator) for _ in range(2)] for _ in range(4)]

    def worlds():
        store = open_store("int8", frames=18, scratch_blocks=2)
        old, new = store.open(Policy(6)), store.open(Policy(6))
        add_block(old, 3)
        return store, [Part(table, [block], block) for table in (old, new) for block in [table.open_block(3)]]

    _, parts = worlds()
    for i, part in enumerate(parts):
        passed, own = part.table.plan(part.blocks, commit=part.commit), slice(i * TOKENS, (i + 1) * TOKENS)
        for layer in range(2):
            passed.append(layer, rows[layer][0][own], rows[layer][1][own])
    wanted = sealed(parts)
    store, parts = worlds()
    passed = store.plan(parts)
    for layer in range(2):
        passed.append(layer, *rows[layer])
    assert same_past(sealed(parts), wanted)


def test_worlds_with_and_without_a_mean_share_a_store_that_freezes_none(tmp_path):
    table = open_store(pools={"bf16": 3, "int8": 1}, frames=3).open(Policy(6))
    add_block(table, 3)
    save(table, tmp_path / "world")

    def worlds():
        store = open_store("bf16", frames=12, scratch_blocks=2)
        tables = [store.open(Policy(6)), load(store, tmp_path / "world")]
        assert [each.k_means[0] is None for each in tables] == [True, False] and not store.freezes_mean
        parts = [Part(table, [block], block) for table in tables for block in [table.open_block(3)]]
        return store, parts, [inputs(1, 1), inputs(1, 2)], [turns(1, 1), turns(1, 2)]

    _, parts, *given = worlds()
    want = one_after_another(parts, *given)
    wanted = sealed(parts)
    store, parts, *given = worlds()
    assert same(together(store, parts, *given), want) and same_past(sealed(parts), wanted)


def test_a_pass_refuses_to_run_once_any_of_its_worlds_was_edited():
    store, parts, qkvs, ropes = four_worlds("int8")
    passed = store.plan(parts, torch.cat(ropes))
    qkv = torch.cat([x[0] for x in qkvs])
    passed.attend(0, qkv, None, None)
    parts[2].table.forget([1])
    before = store.scratch.k.view(torch.uint8).clone()
    with pytest.raises(RuntimeError, match="planned before its table was edited: plan another one"):
        passed.attend(0, qkv, None, None)
    assert passed.stale and torch.equal(store.scratch.k.view(torch.uint8), before)


def test_a_pass_takes_room_for_all_of_its_worlds_or_for_none():
    store = open_store(frames=5, scratch_blocks=2)
    tables = [store.open(Policy(3)) for _ in range(2)]
    parts = [Part(table, [block], block) for table in tables for block in [table.open_block(3)]]
    with pytest.raises(OutOfPages, match=r"fp32 pool on the device: 6 frames .* 0 of 5 are held and 5 free"):
        store.plan(parts)
    assert free_slots(store) == {"fp32": 5} and not any(table.state.target for table in tables)
    with pytest.raises(RuntimeError, match="seal needs the oldest open block after a pass that committed it"):
        tables[0].seal(parts[0].commit)
    store.plan(parts[:1])
    assert free_slots(store) == {"fp32": 2}


def two_first_blocks():
    store = open_store("int8", frames=12, scratch_blocks=2, backend="reference")
    tables = [store.open(Policy(6)) for _ in range(2)]
    return store, [Part(table, [block], block) for table in tables for block in [table.open_block(3)]]


@pytest.mark.parametrize("how", ["before a call", "after a call", "an interruption"])
def test_a_pass_that_fails_anywhere_leaves_no_world_half_done(how):
    """Slots are taken, and mean keys frozen, in both worlds or in none; what was abandoned can be done again."""
    given = [inputs(1, 1), inputs(1, 2)], [turns(1, 1), turns(1, 2)]
    store, parts = two_first_blocks()
    together(store, parts, *given)
    wanted = sealed(parts)
    interrupted = how == "an interruption"
    for number in range(1, 10_000, 37 if interrupted else 1):
        store, parts = two_first_blocks()
        tables = [part.table for part in parts]
        injected = at_instruction(number) if interrupted else at_call(number, late=how == "after a call")
        with contextlib.suppress(Injected), injected as failure:
            together(store, parts, *given)
        if not failure.fired:
            break
        assert len({bool(table.state.target) for table in tables}) == 1
        assert len({table.k_means[-1] is not None for table in tables}) == 1
        assert free_slots(store) == {"int8": 6 if tables[0].state.target else 12}
        for part in parts:
            part.table.abandon(keep=part.commit)
        assert [table.k_means for table in tables] == [[None, None]] * 2
        together(store, parts, *given)
        assert same_past(sealed(parts), wanted), f"point {number}"
    assert number > 3


def test_states_are_replaced_in_all_worlds_or_in_none():
    store = open_store()
    tables = [store.open(Policy(6)) for _ in range(3)]
    before = [table.state for table in tables]
    after = [state._replace(next_frame=3) for state in before]
    outcomes = set()
    for number in range(1, 100):
        for table, state in zip(tables, before):
            table.state = state
        with contextlib.suppress(Injected), at_instruction(number, {table_view.__file__}) as failure:
            table_view.replace_states(list(zip(tables, after)))
        now = [table.state for table in tables]
        assert now in (before, after), f"point {number}"
        outcomes.add((failure.fired, now == after))
        if not failure.fired:
            break
    assert outcomes >= {(True, False), (False, True)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, b, other: [], "parts must be at least one world's, got none"),
        (lambda a, b, other: [a, a], "parts must be of different worlds, got one world twice"),
        (lambda a, b, other: [a, other], "parts must be of worlds of this store, got one of another"),
        (lambda a, b, other: [other], "parts must be of worlds of this store, got one of another"),
        (lambda a, b, other: a, r"parts must be a list of Part, got Part\(table="),
        (lambda a, b, other: [tuple(a)], "parts must be a list of Part, got "),
        (lambda a, b, other: (part for part in (a, b)), "parts must be a list of Part, got <generator"),
        (lambda a, b, other: [a, b._replace(blocks=b.blocks * 2)], "blocks must be different ones, got one twice"),
        (lambda a, b, other: [a, b._replace(blocks=[])], "blocks must be at least one open block, got none"),
        (lambda a, b, other: [a, b._replace(blocks=a.blocks)], r"blocks must be open in this table; frames 0\.\.2"),
        (lambda a, b, other: [a, b._replace(commit=a.blocks[0])], "commit must be the oldest open block and the first"),
        (lambda a, b, other: [a, b._replace(see=[[], []])], "see must be the frames of each of the 1 blocks, got 2"),
    ],
)
def test_parts_that_make_no_pass_are_refused(change, message):
    _, parts = two_first_blocks()
    store, (a, b) = two_first_blocks()
    with pytest.raises(ValueError, match=message):
        store.plan(change(a, b, parts[0]))


def test_sizes_that_do_not_fit_are_refused():
    store, parts = two_first_blocks()
    third = store.open(Policy(6))
    with pytest.raises(ValueError, match=r"blocks must be 6 frames at most in one pass, .* got 9: give the store more"):
        store.plan([*parts, Part(third, [third.open_block(3)])])
    with pytest.raises(ValueError, match=f"rope must have {2 * TOKENS} rows, one for each token .* got {TOKENS}"):
        store.plan(parts, turns(1, 0))
    with pytest.raises(ValueError, match=r"qkv must be \(Hq \+ 2H\) \* D wide with H=2 and D=16, got 64"):
        store.plan(parts, turns(2, 0)).attend(0, torch.zeros(2 * TOKENS, 64), None, None)
    passed = store.plan(parts, turns(2, 0))
    with pytest.raises(ValueError, match=f"qkv must have {2 * TOKENS} rows, one for each token .* got {TOKENS}"):
        passed.attend(0, inputs(1, 0)[0], None, None)
    with pytest.raises(ValueError, match=f"v must have {2 * TOKENS} rows, one for each token .* got 1"):
        passed.append(0, torch.zeros(2 * TOKENS, HEADS, HEAD_DIM), torch.zeros(1, HEADS, HEAD_DIM))


def test_a_part_of_a_plan_keeps_what_its_pages_wait_for():
    segments = [Segment(2, [4, 1], [8, 8], arrivals=[(-1, 0), (0, 1)]), Segment(3, [5], [8], arrivals=[(1, 2)])]
    plan = make_plan(segments)._replace(counters=Counters(2).values)
    reads = Reads(None, plan, (BlockReads(0, 2, 1, 1), BlockReads(1, 3, 0, 1)), (), None)
    rows, part = reads.part(1, 2)
    assert rows == slice(2, 5) and part.page_ids.tolist() == [5]
    assert part.arrivals.tolist() == [[1, 2]] and part.counters is plan.counters
