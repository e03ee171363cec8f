"""The store's bookkeeping: which frames a block sees, what is freed when, and that nothing half-done becomes past."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from inferix_kernels import (
    KVPages,
    KVStore,
    OutOfPages,
    PageList,
    Policy,
    kv_append,
    make_plan,
    paged_attention,
)
from inferix_kernels.store import storage
from inferix_kernels.store.snapshot import load, save
from inferix_kernels.testing import clustered_keys_and_values, poisoned_pool
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
    mixed_store,
    open_store,
    rope,
    run,
)

# Frames in the cache while each block is processed, block included: measured from the cache of Self-Forcing
# (github.com/guandeh17/Self-Forcing, commit 33593df) with these settings.
SELF_FORCING = {
    "local6_sink1": (5, 1, 3, [[0, 1, 2], range(6), [0, *range(4, 9)], [0, *range(7, 12)], [0, *range(10, 15)]]),
    "local4_sink1": (3, 1, 3, [[0, 1, 2], [0, 3, 4, 5], [0, 6, 7, 8], [0, 9, 10, 11], [0, 12, 13, 14]]),
    "local6_sink0": (6, 0, 3, [[0, 1, 2], range(6), range(3, 9), range(6, 12), range(9, 15)]),
    "framewise_local4_sink1": (
        3,
        1,
        1,
        [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5], [0, 4, 5, 6], [0, 5, 6, 7]],
    ),
}


@pytest.mark.parametrize("variant", SELF_FORCING)
def test_blocks_see_the_frames_that_self_forcing_keeps(variant):
    window, sink, frames, expected = SELF_FORCING[variant]
    store = open_store(frames=window + sink, block_frames=frames)
    table = store.open(Policy(window, sink))
    for wanted in expected:
        block = table.open_block(frames)
        passed = table.plan([block], rope(frames), commit=block)
        assert [*table.past(block), *block.frames] == list(wanted)
        assert len(passed.plan.page_ids) == len(wanted) * store.pages_per_frame  # and nothing else is read
        run(passed, frames * FRAME_TOKENS)
        table.seal(block)
        assert len(table.held) <= window + sink
        assert len(store.pools["fp32"].free) + len(table.held) == window + sink


@pytest.mark.parametrize(
    "format, bound", [("fp32", 0.0), ("fp16", 2**-11), ("bf16", 2**-8), ("int8", 0.02), ("i8f8", 0.07), ("int4", 0.3)]
)
def test_committed_frames_read_back_what_the_clean_pass_wrote(format, bound):
    table = open_store(format).open(Policy(6))
    block = table.open_block(3)
    clean = table.plan([block], rope(3), commit=block)
    generator = torch.Generator().manual_seed(3)
    tokens = 3 * FRAME_TOKENS
    qkv = torch.randn(tokens, 3 * HEADS * HEAD_DIM, generator=generator)
    for layer in range(2):
        clean.attend(layer, qkv, None, None)
    table.seal(block)
    k, v = table.gather(0, range(3))
    mean = table.k_means[0]
    want_k, want_v = qkv.unflatten(1, (3, HEADS, HEAD_DIM))[:, 1], qkv.unflatten(1, (3, HEADS, HEAD_DIM))[:, 2]
    assert (mean is None) == (format in ("fp32", "fp16", "bf16"))
    # Half a step of the format, for values under 4: 8 bits of mantissa, amax / 127, 1/16 of e4m3, range / 15.
    assert (k - (want_k if mean is None else want_k - want_k.mean(0))).abs().max() <= bound * 4
    assert (v - want_v).abs().max() <= bound * 4


def test_scratch_then_commit_equals_overwriting_in_place_exactly():
    """The published way: every pass writes the block's slots of one cache. In float64 the difference is 0."""
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(4, 3, 8, 4, dtype=torch.float64, generator=generator) for _ in range(3))  # block, pass, L, D

    def attend(q, k, v):
        return (q @ k.mT * 0.5).softmax(-1) @ v

    in_place_k, in_place_v, committed_k, committed_v = (torch.zeros(0, 4, dtype=torch.float64) for _ in range(4))
    for block in range(4):
        in_place_k, in_place_v = (torch.cat([x, torch.zeros(8, 4)]) for x in (in_place_k, in_place_v))
        for i in range(3):
            in_place_k[-8:], in_place_v[-8:] = k[block, i], v[block, i]
            ours = attend(q[block, i], torch.cat([committed_k, k[block, i]]), torch.cat([committed_v, v[block, i]]))
            assert torch.equal(attend(q[block, i], in_place_k, in_place_v), ours)
        committed_k, committed_v = torch.cat([committed_k, k[block, 2]]), torch.cat([committed_v, v[block, 2]])


def test_the_past_of_a_layer_does_not_leak_into_another():
    table = open_store().open(Policy(6))
    add_block(table, 3, seed=1)
    assert not torch.equal(table.gather(0, [0])[0], table.gather(1, [0])[0])


@pytest.mark.parametrize("format", ["fp32", "int8", "i8f8", "int4"])
def test_garbage_in_free_pages_and_scratch_is_never_seen(format):
    def video(poison):
        store = open_store(format)
        if poison:
            for pages in (store.pools[format].pages, store.scratch):
                garbage = poisoned_pool(pages.format, pages.pages, HEADS, PAGE_SIZE, HEAD_DIM)
                for tensor, bad in zip(pages.tensors.values(), garbage.tensors.values()):
                    tensor.view(torch.uint8).copy_(bad.view(torch.uint8))
        table = store.open(Policy(6))
        return [out for seed in range(4) for out in add_block(table, 3, seed)]

    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(video(False), video(True)))


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "i8f8", "fp8", "int4"])
def test_the_fused_clean_pass_equals_the_separate_one_bit_for_bit(format):
    def second_block(fused):
        table = open_store(format, frames=9).open(Policy(9))
        add_block(table, 3, seed=1)
        pending = table.open_block(3)
        generator = torch.Generator().manual_seed(2)
        qkv = [torch.randn(6 * FRAME_TOKENS, 3 * HEADS * HEAD_DIM, generator=generator) for _ in range(2)]
        half = 3 * FRAME_TOKENS
        if fused:
            block = table.open_block(3)
            both = table.plan([pending, block], rope(6), commit=pending)
            outs = [both.attend(layer, qkv[layer], None, None)[half:] for layer in range(2)]
            table.seal(pending)
        else:
            clean = table.plan([pending], rope(3), commit=pending)
            for layer in range(2):
                clean.attend(layer, qkv[layer][:half], None, None)
            table.seal(pending)
            block = table.open_block(3)
            noisy = table.plan([block], rope(3))
            outs = [noisy.attend(layer, qkv[layer][half:], None, None) for layer in range(2)]
        return outs

    assert all(torch.equal(a, b) for a, b in zip(second_block(True), second_block(False)))


def test_the_first_clean_pass_of_a_quantizing_world_is_separate():
    table = open_store("int8").open(Policy(6))
    first, second = table.open_block(3), table.open_block(3)
    assert not table.can_fuse
    with pytest.raises(ValueError, match="first clean pass is separate"):
        table.plan([first, second], rope(6), commit=first)


def test_a_pass_that_predicts_nothing_ends_after_the_last_keys():
    table = open_store().open(Policy(6))
    block = table.open_block(3)
    outs = run(table.plan([block], rope(3), commit=block, predict=False), 3 * FRAME_TOKENS)
    assert outs[0] is not None and outs[1] is None


def test_an_abandoned_block_was_never_there():
    store = open_store(frames=6)
    table = store.open(Policy(6))
    add_block(table, 3)
    free = free_slots(store)
    block = table.open_block(3)
    table.plan([block], rope(3), commit=block)
    table.abandon()
    assert free_slots(store) == free and table.next_frame == 3 and list(table.held) == [0, 1, 2]
    add_block(table, 3)
    assert list(table.held) == [0, 1, 2, 3, 4, 5]


def test_release_gives_everything_back():
    store = open_store()
    table = store.open(Policy(6))
    add_blocks(table, 2)
    table.release()
    assert free_slots(store) == {"fp32": 6}


def test_a_full_store_refuses_and_changes_nothing():
    store = open_store(frames=4)
    one, two = store.open(Policy(3)), store.open(Policy(3))
    add_block(one, 3)
    block = two.open_block(3)
    bytes_ = 3 * store.pools["fp32"].frame_bytes
    asked = rf"fp32 pool on the device: 3 frames \({bytes_:,} bytes\) asked for, 3 of 4 are held and 1 free"
    with pytest.raises(OutOfPages, match=asked):
        two.plan([block], rope(3), commit=block)
    assert list(one.held) == [0, 1, 2] and not two.held and free_slots(store) == {"fp32": 1}


# Formats by place


def test_formats_follow_the_policy_and_the_pools_hold_just_what_it_needs():
    policy = Policy(window=9, sink=2, format="int8", sink_format="bf16", older=(6, "int4"))
    assert policy.capacity() == {"bf16": 2, "int8": 6, "int4": 3}
    store = open_store(pools=policy.capacity())
    table = store.open(policy)
    for _ in range(6):
        block = table.open_block(3)
        held = {frame: extent.format for frame, extent in table.held.items()}
        assert held == {frame: policy.format_of(frame, block.end) for frame in table.past(block)}
        run(table.plan([block], rope(3), commit=block), 3 * FRAME_TOKENS)
        table.seal(block)
    assert sum(free_slots(store).values()) == 0  # the capacity is what is needed, no more


def test_the_capacity_is_counted_frame_by_frame_whatever_the_sizes():
    ages, names = (None, (1, "int4"), (4, "int4"), (4, "int8"), (99, "int4")), (None, "bf16", "int4")
    sizes = itertools.product((None, 1, 3, 9), (0, 1, 2, 5, 20), names, ages, (0, 4), (None, 0, 1, 7, 30))
    for window, sink, sink_format, older, undo, frames in sizes:
        if window is None and frames is None:
            continue
        policy = Policy(window, sink, "int8", sink_format, older, undo)
        length = frames if window is None else window + undo + sink
        length = length if frames is None else min(length, frames)
        want = Counter(policy.format_of(frame, length) for frame in range(length))
        assert list(policy.capacity(frames).items()) == list(want.items())
    huge = Policy(window=99_999_999_999, sink=10**12, format="int8", sink_format="bf16", older=(9, "int4"))
    assert huge.capacity() == {"bf16": 10**12, "int4": 99_999_999_999 - 9, "int8": 9}


def test_converted_frames_read_as_if_committed_so_and_forks_share_the_conversion():
    store = mixed_store()
    table = store.open(Policy(9, format="int8"))
    add_blocks(table, 2)
    before, fork = contents(table), table.fork()
    table.convert([0, 1], "int4")
    assert store.pools["int4"].frames - len(store.pools["int4"].free) == 2
    assert equal(contents(fork), before)  # the fork keeps its own format
    fork.convert([1, 2], "int4")
    assert store.pools["int4"].frames - len(store.pools["int4"].free) == 3  # frame 1 is shared
    assert table.held[1] is fork.held[1] and equal([table.gather(0, [1])], [fork.gather(0, [1])])
    k, _ = table.gather(0, [0, 1])
    error = (k - before[0][0][: len(k)]).norm() / k.norm()
    assert 0.005 < error < 0.1
    table.release()
    fork.release()
    assert free_slots(store) == {"int8": 9, "int4": 9, "bf16": 2}


def test_a_conversion_that_fails_leaves_nothing_to_share(monkeypatch):
    store = mixed_store()
    table = store.open(Policy(9, format="int8"))
    add_blocks(table, 1)
    fork, free = table.fork(), free_slots(store)

    def fail(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "kv_commit", fail)
        with pytest.raises(KeyboardInterrupt):
            table.convert([0, 1], "int4")
    assert free_slots(store) == free
    before = contents(table)[0][0]
    fork.convert([0, 1], "int4")
    assert (contents(fork)[0][0] - before).norm() / before.norm() < 0.1
    table.release()
    fork.release()
    assert free_slots(store) == {"int8": 9, "int4": 9, "bf16": 2}


ERRORS = {"int8": 0.01, "i8f8": 0.01, "fp8": 0.01, "int4": 0.04}  # rel-L2 of the output; e4m3 alone is off by 2-3%


@pytest.mark.parametrize("format", ERRORS)
def test_attention_over_quantized_pages_stays_within_its_budget(format):
    tokens, size = 4096, 64
    q, k, v = clustered_keys_and_values(tokens, 64, 1, 128)
    where = PageList.of(range(tokens // size), [size] * (tokens // size))
    plan = make_plan([(len(q), where.ids.tolist(), where.lens.tolist())])

    def attend(format, mean):
        pages = KVPages.empty(format, tokens // size, 1, size, 128)
        kv_append(k - mean, v, pages, where)
        return paged_attention(q, [pages], plan)[0]

    none = torch.zeros(1, 128)
    exact = attend("fp32", none)
    errors = [(attend(format, mean) - exact).norm() / exact.norm() for mean in (k[:192].mean(0), none)]
    assert errors[0] <= ERRORS[format]
    assert errors[0] <= errors[1] * 1.05  # a mean never hurts


# Latent rows (MLA)


@pytest.mark.parametrize("format", ["fp32", "bf16", "latent8"])
def test_latent_rows_are_stored_and_read_back(format):
    store = KVStore(
        layers=2, heads=1, head_dim=(48, 16), frame_tokens=21, block_frames=2, pools={format: 4}, page_size=8
    )
    table = store.open(Policy(4))
    block = table.open_block(2)
    passed = table.plan([block], commit=block)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(42, 1, 64, generator=generator).split([48, 16], -1) for _ in range(2)]
    for layer, (latent, rotary) in enumerate(rows):
        passed.append(layer, latent, rotary)
    table.seal(block)
    for layer, (latent, rotary) in enumerate(rows):
        got = table.gather(layer, [0, 1])
        assert (got[0] - latent).abs().max() <= {"fp32": 0, "bf16": 0.02, "latent8": 0.02}[format]
        assert (got[1] - rotary).abs().max() <= {"fp32": 0, "bf16": 0.02, "latent8": 0.02}[format]
    assert table.k_means == [None, None]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Policy(0), "window must be at least 1 frame, got 0"),
        (lambda: Policy("9"), "window must be a whole number of frames, got '9'"),
        (lambda: Policy(9, sink=None), "sink must be a whole number of frames, got None"),
        (lambda: Policy(9, undo=2.5), "undo must be a whole number of frames, got 2.5"),
        (lambda: open_store(layers="2"), "layers must be a whole number, got '2'"),
        (lambda: Policy(3, -1), "sink must be 0 or more frames, got -1"),
        (lambda: Policy(3, older=(0, "int4")), "older must begin after at least 1 frame, got 0"),
        (lambda: Policy(3, older=("9", "int4")), "older must begin after at least 1 frame, got '9'"),
        (lambda: Policy(3, older=9), r"older must be \(frames, format\), got 9"),
        (lambda: Policy(3, format=8), "format must be the name of a format, got 8"),
        (lambda: Policy(3, archive=1), "archive must be True or False, got 1"),
        (lambda: Policy(3, on_evict=1), r"on_evict must be a function of \(table, frame\), got 1"),
        (lambda: open_store(head_dim=(16,)), r"head_dim must be one width, or those of keys and values, got \(16,\)"),
        (lambda: open_store(head_dim=16.0), "head_dim must be a whole number, got 16.0"),
        (lambda: open_store(layers=True), "layers must be a whole number, got True"),
        (lambda: open_store(frame_tokens=1 << 40), r"frame_tokens must be under 2\^31, .* got 1099511627776"),
        (lambda: Policy(True), "window must be a whole number of frames, got True"),
        (lambda: Policy(3, format="int8").capacity(-1), "frames must be at least 0, got -1"),
        (lambda: Policy(format="int8").capacity(), "frames must be given for a policy without a window"),
        (lambda: open_store().open(Policy(2)), "window must be at least one block of 3 frames.* got 2"),
        (lambda: open_store().open(Policy(6, format="int8")), r"format 'int8' has no pool in this store \(fp32\)"),
        (lambda: open_store().open(Policy(6, archive=True)), "archive needs host memory"),
        (lambda: open_store(frames=0), r"pools\['fp32'\] must be at least 1, got 0"),
        (lambda: open_store(pools={}), "pools must name at least one format, got none"),
        (lambda: open_store("fp7"), "format must be one of fp32, .*, got 'fp7'"),
        (lambda: open_store(scratch_format="int8"), "noise is never quantized"),
        (lambda: open_store().open(Policy(6)).open_block(7), "frames must be 1 to 6, got 7"),
        (lambda: open_store().open(Policy(6)).rewind(1), "frames must be 0 to 0, as many as there are, got 1"),
    ],
)
def test_bad_input_says_what_it_must_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("head_dim", [np.int64(16), (np.int64(16), np.int32(8))])
def test_numpys_whole_numbers_are_python_ones(head_dim, tmp_path):
    store = open_store(
        layers=np.int64(2), pools={"int8": np.int64(4)}, head_dim=head_dim, frame_tokens=np.int16(21), block_frames=1
    )
    assert store.freezes_mean == isinstance(store.head_dim, int)
    table = store.open(Policy(np.int64(3), sink=np.uint8(1), older=(np.int64(2), "int8")))
    assert repr(table.policy) == repr(Policy(3, 1, format="int8", older=(2, "int8")))
    save(table, tmp_path / "w")  # as JSON, which takes no others
    assert load(store, tmp_path / "w").policy == table.policy
