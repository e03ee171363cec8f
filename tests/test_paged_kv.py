"""The store's bookkeeping: which frames a block sees, what is freed when, and that nothing half-done becomes past."""

import pytest
import torch

from inferix_kernels.paged_kv import KVStore, OutOfPages, PageTable, Policy

HEADS, HEAD_DIM, FRAME_TOKENS, PAGE_SIZE = 2, 16, 21, 8  # 21 tokens: three pages, the last one partly valid


def open_store(format="fp32", frames=6, block_frames=3, layers=2, **options):
    return KVStore(
        layers=layers, heads=HEADS, head_dim=HEAD_DIM, frame_tokens=FRAME_TOKENS, frames=frames,
        block_frames=block_frames, format=format, page_size=PAGE_SIZE, **options,
    )  # fmt: skip


def rope(frames):
    return torch.tensor([1.0, 0.0]).expand(frames * FRAME_TOKENS, HEAD_DIM // 2, 2).contiguous()


def run(passed, tokens, layers=2, seed=0):
    """All layers of one pass over random q, k, v: what each attended to."""
    generator = torch.Generator().manual_seed(seed)
    outs = []
    for layer in range(layers):
        qkv = torch.randn(tokens, 3 * HEADS * HEAD_DIM, generator=generator)
        outs.append(passed.attend(layer, qkv, None, None))
    return outs


def add_block(table: PageTable, frames: int, seed: int = 0):
    block = table.open_block(frames)
    outs = run(table.plan([block], rope(frames), commit=block), frames * FRAME_TOKENS, seed=seed)
    table.seal(block)
    return outs


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
        [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5], [0, 4, 5, 6]],
    ),
}


@pytest.mark.parametrize("variant", SELF_FORCING)
def test_blocks_see_the_frames_that_self_forcing_keeps(variant):
    window, sink, frames, expected = SELF_FORCING[variant]
    store = open_store(frames=window + sink, block_frames=frames)
    table = store.open(Policy(window, sink))
    for wanted in expected:
        block = table.open_block(frames)
        pages = table.past(block)
        seen = [frame for frame, held in table.held.items() if held in pages]
        assert [*seen, *block.frames] == list(wanted)
        run(table.plan([block], rope(frames), commit=block), frames * FRAME_TOKENS)
        table.seal(block)
        assert len(table.held) <= window + sink
        assert len(store.free) + sum(map(len, table.held.values())) == store.num_pages


@pytest.mark.parametrize("format, bound", [("fp32", 0.0), ("bf16", 2**-8), ("int8", 0.02)])
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
    assert (mean is None) == (format != "int8")
    # bf16 rounds to 8 bits; int8 to half a step of amax / 127, with amax under 4 for this data.
    assert (k - (want_k if mean is None else want_k - want_k.mean(0))).abs().max() <= bound * 4
    assert (v - want_v).abs().max() <= bound * 4


def test_the_past_of_a_layer_does_not_leak_into_another():
    table = open_store().open(Policy(6))
    add_block(table, 3, seed=1)
    assert not torch.equal(table.gather(0, [0])[0], table.gather(1, [0])[0])


def test_garbage_in_free_pages_and_scratch_is_never_seen():
    def video(poison):
        store = open_store()
        if poison:
            for pages in (*store.layers, store.scratch):
                pages.k.fill_(torch.nan)
                pages.v.fill_(torch.nan)
        table = store.open(Policy(6))
        return [out for seed in range(4) for out in add_block(table, 3, seed)]

    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(video(False), video(True)))


def test_the_fused_clean_pass_equals_the_separate_one_bit_for_bit():
    def second_block(format, fused):
        table = open_store(format, frames=9).open(Policy(9))
        add_block(table, 3, seed=1)
        owed = table.open_block(3)
        generator = torch.Generator().manual_seed(2)
        qkv = [torch.randn(6 * FRAME_TOKENS, 3 * HEADS * HEAD_DIM, generator=generator) for _ in range(2)]
        half = 3 * FRAME_TOKENS
        if fused:
            block = table.open_block(3)
            both = table.plan([owed, block], rope(6), commit=owed)
            outs = [both.attend(layer, qkv[layer], None, None)[half:] for layer in range(2)]
            table.seal(owed)
        else:
            clean = table.plan([owed], rope(3), commit=owed)
            for layer in range(2):
                clean.attend(layer, qkv[layer][:half], None, None)
            table.seal(owed)
            block = table.open_block(3)
            noisy = table.plan([block], rope(3))
            outs = [noisy.attend(layer, qkv[layer][half:], None, None) for layer in range(2)]
        return outs

    for format in ("fp32", "bf16", "int8"):
        assert all(torch.equal(a, b) for a, b in zip(second_block(format, True), second_block(format, False)))


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
    free = len(store.free)
    block = table.open_block(3)
    table.plan([block], rope(3), commit=block)
    table.abandon()
    assert len(store.free) == free and table.next_frame == 3 and list(table.held) == [0, 1, 2]
    add_block(table, 3)
    assert list(table.held) == [0, 1, 2, 3, 4, 5]


def test_release_gives_everything_back():
    store = open_store()
    table = store.open(Policy(6))
    add_block(table, 3)
    table.release()
    assert sorted(store.free) == list(range(store.num_pages))


def test_a_full_store_refuses_and_changes_nothing():
    store = open_store(frames=3)
    one, two = store.open(Policy(3)), store.open(Policy(3))
    add_block(one, 3)
    block = two.open_block(3)
    with pytest.raises(OutOfPages, match="9 pages needed for 3 frames, 0 of 9 are free"):
        two.plan([block], rope(3), commit=block)
    assert list(one.held) == [0, 1, 2] and not two.held


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Policy(0), "window must be at least 1 frame, got 0"),
        (lambda: Policy(3, -1), "sink must be 0 or more frames, got -1"),
        (lambda: open_store().open(Policy(2)), "window must be at least one block of 3 frames.* got 2"),
        (lambda: open_store(frames=0), "frames must be at least 1, got 0"),
        (lambda: open_store("fp7"), "format must be one of fp32, bf16, int8, got 'fp7'"),
        (lambda: open_store(scratch_format="int8"), "noise is never quantized"),
        (lambda: open_store().open(Policy(6)).open_block(4), "frames must be 1 to 3, got 4"),
    ],
)
def test_bad_input_says_what_it_must_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
