"""How a block reads what it sees: a bias on the past, and time counted anew for each block."""

import math

import pytest
import torch
import torch.nn.functional as F

from inferix_kernels import KVStore, PassBuffers, Policy, TopK
from inferix_kernels.reference.qkv import rotate
from inferix_kernels.store import Part
from inferix_kernels.store.snapshot import load, save
from tests.store.stores import FRAME_TOKENS, HEAD_DIM, HEADS, open_store, rope, run

WIDTH = HEADS * HEAD_DIM
TOKENS = 3 * FRAME_TOKENS


def rope_at(places, tokens=FRAME_TOKENS):
    """[len(places) * tokens, R / 2, 2]: twelve of the sixteen channels turn with time, the others not at all."""
    rates = torch.cat([10.0 ** -torch.arange(6, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)])
    angles = torch.tensor(places, dtype=torch.float64).repeat_interleave(tokens)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()], -1).float()


def turn_back(frames):
    return rope_at([-frames], 1)[0]


def store_of(format="fp32", **options):
    return open_store(format, frames=12, layers=1, turn_back=turn_back, **options)


def qkv_of(frames, generator):
    return torch.randn(frames * FRAME_TOKENS, 3 * WIDTH, generator=generator)


def heads(x):
    return x.unflatten(1, (HEADS, HEAD_DIM)).transpose(0, 1)


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_a_bias_on_the_past_leaves_sink_and_block_alone(backend):
    policy = Policy(window=6, sink=1, past_bias=math.log(0.3))
    table = store_of(backend=backend).open(policy)
    for _ in range(3):
        run(*pass_of(table), layers=1)
    table.seal(table.open_blocks[0])
    block = table.open_block(3)
    past = table.past(block)
    qkv = qkv_of(3, torch.Generator().manual_seed(5))
    got = table.plan([block], rope(3)).attend(0, qkv, None, None)
    k, v = table.gather(0, past)
    q, own_k, own_v = (heads(part) for part in qkv.chunk(3, 1))
    keys, values = (torch.cat([x.transpose(0, 1), own], 1) for x, own in ((k, own_k), (v, own_v)))
    weights = [1.0 if frame < 1 else 0.3 for frame in past] + [1.0] * 3
    bias = torch.tensor(weights).log().repeat_interleave(FRAME_TOKENS)
    wanted = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias[None]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)
    # The clean pass reads the past as it is.
    clean = table.plan([block], rope(3), commit=block).attend(0, qkv, None, None)
    plain = F.scaled_dot_product_attention(q, keys, values).transpose(0, 1).flatten(1)
    torch.testing.assert_close(clean, plain, atol=2e-5, rtol=0)
    assert (clean - got).abs().max() > 0.01


def pass_of(table):
    """A clean pass over the next block, and its tokens; the block before it is sealed."""
    if table.open_blocks:
        table.seal(table.open_blocks[0])
    block = table.open_block(3)
    return table.plan([block], rope_at(list(block.frames)), commit=block), TOKENS


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "with a clean pass"])
@pytest.mark.parametrize("format, bound", [("fp32", 2e-5), ("int8", 0.05)])
@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_time_is_counted_anew_without_a_key_rewritten(backend, format, bound, fused):
    """As if keys were kept unrotated, and rotated to their places in what the block sees whenever they are read."""
    policy, generator = Policy(window=6, sink=2, time="relative"), torch.Generator().manual_seed(1)
    store = store_of(format, backend=backend)
    table, raw = store.open(policy), {}
    for turn in range(5):
        block = table.open_block(3)
        qkv = qkv_of(3, generator)
        clean = table.plan([block], rope_at(list(block.frames)), commit=block)
        clean.attend(0, qkv, None, None)
        if fused and turn == 4:
            noisy = table.open_block(3)
            both = qkv_of(6, generator)
            both[:TOKENS] = qkv
            passed = table.plan([block, noisy], rope_at([*block.frames, *noisy.frames]), commit=block)
            got, mine = passed.attend(0, both, None, None)[TOKENS:], both[TOKENS:]
        _, k, v = (part.unflatten(1, (HEADS, -1)).split(FRAME_TOKENS) for part in qkv.chunk(3, 1))
        raw |= dict(zip(block.frames, zip(k, v)))
        table.seal(block)
    if not fused:
        noisy, mine = table.open_block(3), qkv_of(3, generator)
        got = table.plan([noisy], rope_at(list(noisy.frames))).attend(0, mine, None, None)
    q, own_k, own_v = (part.unflatten(1, (HEADS, -1)) for part in mine.chunk(3, 1))
    seen = [0, 1, 12, 13, 14]
    assert table.past(noisy) == seen
    keys, values = (torch.cat([*(raw[f][i] for f in seen), own]) for i, own in ((0, own_k), (1, own_v)))
    places = rope_at(list(range(8)))
    keys, q = rotate(keys, places, True), rotate(q, places[-TOKENS:], True)
    wanted = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, keys, values))).transpose(0, 1).flatten(1)
    torch.testing.assert_close(got, wanted, atol=bound, rtol=0)
    absolute = store.open(Policy(window=6, sink=2))
    absolute.state = table.state
    assert (
        absolute.plan([noisy], rope_at(list(noisy.frames))).attend(0, mine, None, None) - wanted
    ).abs().max() > bound


def test_worlds_that_read_in_their_own_ways_share_a_pass():
    """Each gets what it gets alone."""
    policies = [Policy(window=6, sink=2), Policy(window=6, sink=2, time="relative"), Policy(window=6, past_bias=-1.0)]
    store = open_store("fp32", frames=40, layers=1, turn_back=turn_back, scratch_blocks=3)
    tables = [store.open(policy) for policy in policies]
    for table in tables:
        for _ in range(4):
            run(*pass_of(table), layers=1, seed=table.next_frame)
        table.seal(table.open_blocks[0])
    qkv = [qkv_of(3, torch.Generator().manual_seed(i)) for i in range(3)]
    blocks = [table.open_block(3) for table in tables]
    alone = [
        table.plan([block], rope_at(list(block.frames))).attend(0, x, None, None)
        for table, block, x in zip(tables, blocks, qkv)
    ]
    parts = [Part(table, [block]) for table, block in zip(tables, blocks)]
    together = store.plan(parts, rope_at([frame for block in blocks for frame in block.frames]))
    got = together.attend(0, torch.cat(qkv), None, None).split(TOKENS)
    for one, other in zip(got, alone):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "policy", [Policy(window=6, sink=1, time="relative"), Policy(window=6, sink=1, past_bias=-1.0)]
)
def test_in_kept_memory_it_reads_the_same_and_is_not_replayed(policy):
    """A sink of one frame: lists are filled up to whole blocks."""
    outs, kinds = [], []
    for buffers in (None, PassBuffers(padded=True)):
        table = store_of().open(policy)
        for turn in range(4):
            block = table.open_block(3)
            places, qkv = rope_at(list(block.frames)), qkv_of(3, torch.Generator().manual_seed(turn))
            for commit in (None, block):
                passed = table.plan([block], places, commit=commit, buffers=buffers)
                kinds.append(passed.prepare())
                outs.append(passed.attend(0, qkv, None, None).clone())
            table.seal(block)
    assert all(torch.equal(own, kept) for own, kept in zip(outs[:8], outs[8:], strict=True))
    first_noisy, last_noisy = kinds[8], kinds[-2]
    assert kinds[:8] == [None] * 8 and first_noisy is not None and last_noisy is None


def test_a_snapshot_keeps_how_a_world_reads(tmp_path):
    table = store_of().open(Policy(window=6, sink=1, past_bias=-0.5, time="relative"))
    save(table, tmp_path / "w")
    assert load(store_of(), tmp_path / "w").policy == table.policy


@pytest.mark.parametrize(
    "do, message",
    [
        (lambda: Policy(past_bias=math.inf), "past_bias must be finite in float32, got inf"),
        (lambda: Policy(past_bias=math.nan), "past_bias must be finite in float32, got nan"),
        (lambda: Policy(past_bias=-1e39), "past_bias must be finite in float32, got -1e\\+39"),
        (lambda: Policy(past_bias=10**400), "past_bias must be finite in float32, got 1000"),
        (lambda: Policy(past_bias="0"), "past_bias must be a number, got '0'"),
        (lambda: Policy(time="sideways"), "time must be one of absolute, relative, got 'sideways'"),
        (
            lambda: after_a_gap(open_store(frames=12, layers=1)),
            "turn_back must be given to the store for a policy with time='relative'",
        ),
        (lambda: after_a_gap(store_of(), attention=TopK(pages=1)), "TopK needs a policy without past_bias and with"),
        (
            lambda: after_a_gap(store_of()).read(0, torch.zeros(TOKENS, HEADS, HEAD_DIM)),
            "q must be in the 2 variants of Pass.turned, got",
        ),
    ],
)
def test_bad_input_says_what_it_must_be(do, message):
    with pytest.raises(ValueError, match=message):
        do()


def after_a_gap(store: KVStore, **options):
    table = store.open(Policy(window=6, sink=1, time="relative"))
    for _ in range(3):
        block = table.open_block(3)
        run(table.plan([block], rope_at(list(block.frames)), commit=block), TOKENS, layers=1)
        table.seal(block)
    block = table.open_block(3)
    return table.plan([block], rope_at(list(block.frames)), **options)
