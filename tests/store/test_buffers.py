"""Passes that take over the memory of those before them: the same results, at the same addresses."""

import numpy as np
import pytest
import torch

from inferix_kernels import PassBuffers, Policy
from inferix_kernels.store import TopK
from inferix_kernels.store.page_lists import Packed
from tests.store.stores import FRAME_TOKENS, HEAD_DIM, HEADS, add_block, add_blocks, contents, equal, open_store, rope


def attended(passed, tokens, seed):
    """Of all layers, each copied before the next one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(tokens, 3 * HEADS * HEAD_DIM, generator=generator) for _ in range(2)]
    return [passed.attend(layer, qkv, None, None).clone() for layer, qkv in enumerate(drawn)]


def play(table, blocks, buffers):
    """Noisy passes and a clean one for each block, a fused pass of two blocks at the end."""
    outs = []
    for i in range(blocks):
        block = table.open_block(3)
        noisy = table.plan([block], rope(3), buffers=buffers)
        outs += [attended(noisy, 3 * FRAME_TOKENS, seed) for seed in (i, 50 + i)]
        clean = table.plan([block], rope(3), commit=block, buffers=buffers)
        outs.append(attended(clean, 3 * FRAME_TOKENS, 99 + i))
        table.seal(block)
    first, second = table.open_block(3), table.open_block(3)
    both = table.plan([first, second], rope(6), commit=first, buffers=buffers)
    return [*outs, attended(both, 6 * FRAME_TOKENS, 7)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("format", ["fp32", "int8"])
@pytest.mark.parametrize("sink", [0, 2])
def test_a_pass_in_kept_memory_is_the_pass_in_memory_of_its_own(format, padded, sink):
    tables = [open_store(format, frames=14).open(Policy(window=6, sink=sink)) for _ in range(2)]
    own, kept = (play(table, 4, buffers) for table, buffers in zip(tables, (None, PassBuffers(padded))))
    assert all(torch.equal(a, b) for x, y in zip(own, kept, strict=True) for a, b in zip(x, y, strict=True))
    assert equal(contents(tables[0]), contents(tables[1]))


def addresses(passed):
    outs = attended(passed, 3 * FRAME_TOKENS, 0)
    read = passed.read(0, torch.zeros(3 * FRAME_TOKENS, HEADS, HEAD_DIM))
    assert len(outs) == 2
    return [x.data_ptr() for x in (*passed.plan[:4], read)]


def test_a_window_that_grows_to_a_whole_block_stays_in_its_place():
    table, buffers = open_store(frames=14).open(Policy(window=9)), PassBuffers(padded=True)
    add_blocks(table, 1, frames=1)
    places, lengths, kinds = [], [], []
    for _ in range(2):  # reads 1 + 3 frames, then 2 + 3
        block = table.open_block(3)
        passed = table.plan([block], rope(3), buffers=buffers)
        places.append(addresses(passed))
        lengths.append((len(passed.plan.page_ids), int((passed.plan.page_lens > 0).sum())))
        kinds.append(passed.prepare())
        table.abandon()
        add_block(table, 1)
    assert places[0] == places[1] and kinds[0] == kinds[1]
    assert lengths == [(18, 12), (18, 15)]  # three pages a frame, three frames a block
    add_block(table, 2)
    block = table.open_block(3)
    assert table.plan([block], rope(3), buffers=buffers).prepare() != kinds[0]


def test_what_attend_returns_is_kept_only_where_memory_is_the_passes_own():
    table = open_store().open(Policy(window=6))
    block = table.open_block(3)
    qkv = [torch.randn(3 * FRAME_TOKENS, 3 * HEADS * HEAD_DIM) for _ in range(2)]
    own = table.plan([block])
    first, second = (own.attend(layer, x, None, None) for layer, x in enumerate(qkv))
    assert first.data_ptr() != second.data_ptr()
    kept = table.plan([block], buffers=PassBuffers())
    again = [kept.attend(layer, x, None, None) for layer, x in enumerate(qkv)]
    assert again[0].data_ptr() == again[1].data_ptr() and torch.equal(again[1], second)
    out = torch.zeros(3 * FRAME_TOKENS, HEADS, HEAD_DIM)
    assert kept.attend(0, qkv[0], None, None, out=out).data_ptr() == out.data_ptr() and torch.equal(
        out.flatten(1), first
    )


def test_the_last_pass_of_a_place_alone_may_run():
    table, buffers = open_store().open(Policy(window=6)), PassBuffers()
    block = table.open_block(3)
    first = table.plan([block], buffers=buffers)
    clean = table.plan([block], commit=block, buffers=buffers)  # of another kind: another place
    assert not first.stale
    second = table.plan([block], buffers=buffers)
    assert first.stale and not second.stale and not clean.stale
    qkv = torch.randn(3 * FRAME_TOKENS, 3 * HEADS * HEAD_DIM)
    for call in (lambda: first.attend(0, qkv, None, None), first.prepare):
        with pytest.raises(
            RuntimeError, match=r"^this pass was planned before another one in the same buffers: plan it"
        ):
            call()
    second.attend(0, qkv, None, None)


def test_buffers_of_another_store_are_refused_and_nothing_has_changed():
    buffers, table = PassBuffers(), open_store().open(Policy(window=6))
    table.plan([table.open_block(3)], buffers=buffers)
    other = open_store().open(Policy(window=6))
    block = other.open_block(3)
    with pytest.raises(
        ValueError, match=r"^buffers must be of one store, got those of passes of another one: make new"
    ):
        other.plan([block], commit=block, buffers=buffers)
    assert not other.state.target and all(len(pool.free) == pool.frames for pool in other.store.pools.values())


def test_passes_that_a_graph_can_not_replay_say_so():
    table, buffers = open_store("int8").open(Policy(window=6)), PassBuffers()
    block = table.open_block(3)
    assert table.plan([block]).prepare() is None  # memory of its own
    assert table.plan([block], buffers=buffers, attention=TopK(pages=4)).prepare() is None
    clean = table.plan([block], rope(3), commit=block, buffers=buffers)
    assert clean.prepare() is None  # it freezes the mean keys
    attended(clean, 3 * FRAME_TOKENS, 0)
    before = table.plan([block], rope(3), buffers=buffers).prepare()
    assert before is not None and clean.prepare() is not None
    table.seal(block)
    assert table.plan([table.open_block(3)], rope(3), buffers=buffers).prepare() != before


def test_mean_keys_of_a_new_past_come_to_where_the_old_ones_lay():
    store, buffers = open_store("int8", frames=14), PassBuffers()
    places, means = [], []
    for seed in range(2):
        table = store.open(Policy(window=6))
        add_block(table, 3, seed=seed)
        block = table.open_block(3)
        passed = table.plan([block], rope(3), buffers=buffers)
        passed.prepare()
        (share,) = passed._shares
        places.append([share.k_mean(layer).data_ptr() for layer in range(2)])
        means.append([share.k_mean(layer).clone() for layer in range(2)])
        assert all(torch.equal(mean, wanted) for mean, wanted in zip(means[-1], table.k_means))
        table.release()
    assert places[0] == places[1] and not torch.equal(means[0][0], means[1][0])


def test_kept_memory_can_be_written_in_every_mode_of_torch():
    table, buffers = open_store("int8").open(Policy(window=6)), PassBuffers()
    block = table.open_block(3)
    with torch.inference_mode():
        table.plan([block], rope(3), buffers=buffers)
    table.plan([block], rope(3), buffers=buffers)


def test_packed_lists_keep_their_places():
    packed = Packed([3, 40, 2], torch.device("cpu"))
    lists = [np.arange(n, dtype=np.int32) for n in (2, 40, 2)]
    first = packed.write(lists)
    assert [x.tolist() for x in first] == [x.tolist() for x in lists]
    again = packed.write([x + 5 for x in lists])
    assert [x.data_ptr() for x in again] == [x.data_ptr() for x in first] and first[1].tolist() == [*range(5, 45)]
    assert [x.data_ptr() - first[0].data_ptr() for x in first] == [0, 128, 384]
