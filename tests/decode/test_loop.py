"""The decode loop: block by block over pages equals everything at once, in every way of running the clean pass."""

import dataclasses

import numpy as np
import pytest
import torch

from inferix.decode.contract import BlockInput
from inferix.models.tiny import ADAPTER, TinyWorld
from inferix.models.tiny.model import TinyConfig, TinyWorldModel
from inferix.models.tiny.train import DenseAttend
from inferix.world import World

SMALL = TinyConfig(dim=32, layers=2, heads=2, head_dim=16, ffn=48)


def small_world(fused=True, kv="fp32", seed=0, window=12, sink=0, steps=2, **options):
    torch.manual_seed(0)
    model = TinyWorld(TinyWorldModel(SMALL))
    model.adapter = dataclasses.replace(ADAPTER, fused=fused, times=(1.0, 0.7, 0.4)[:steps], first_times=())
    return World(model, kv=kv, seed=seed, window=window, sink=sink, **options)


def play(world, blocks, prompts=("desert day",)):
    generator = np.random.default_rng(5)
    steps = ((generator.integers(0, 5, 3).tolist(), prompts[i % len(prompts)]) for i in range(blocks))
    return [world.decoder.step(world._condition(actions, prompt)) for actions, prompt in steps]


def test_paged_blocks_equal_the_dense_forward_that_training_uses():
    """Given the same blocks, the last prediction over pages is the one that training computes in one go."""
    world = small_world()
    config, network = SMALL, world.model.network
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, config.block_tokens, config.patch, generator=generator).clamp(-1, 1)
    actions = torch.randint(0, 5, (1, 4, 3), generator=generator)
    themes = torch.tensor([[[0, 1], [0, 1], [2, 0], [2, 0]]])
    order = [0, 1, 2, 3]  # clean blocks 0, 1, 2 and noisy block 3
    times = torch.tensor([[0.0, 0.0, 0.0, 0.7]])
    with torch.inference_mode():
        cross = network.prompt_cache(themes[:, order])
        dense = network(x, times, actions, cross, DenseAttend(config, 3, [3]), predict=slice(3, None))
        conditions = [
            world.model.conditioning(("meadow night", "glacier day")[i // 2], actions[0, i].tolist()) for i in range(4)
        ]
        for i in range(3):
            world.decoder.observe(x[0, i].unflatten(0, (3, -1)), conditions[i])
        block = world.table.open_block(3)
        noisy = world.table.plan([block], world.model.rope(block.frames))
        given = BlockInput(x[0, 3].unflatten(0, (3, -1)), torch.tensor(0.7).double(), conditions[3])
        paged = world.model.predict([given], noisy.attend)[-1]
    # Same sums in another order, float32: 1e-5 of values about 1.
    assert torch.allclose(paged.flatten(0, 1), dense[0, 0].clamp(-1, 1), atol=2e-5)
    assert dense.abs().max() > 0.1


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_fused_and_separate_clean_passes_make_the_same_video(kv):
    fused, separate = (play(small_world(fused, kv, window=6, sink=1), 5) for fused in (True, False))
    # The forward of two blocks multiplies larger matrices, which sums in another order: not bit for bit.
    bound = 2e-5 if kv == "fp32" else 2e-2  # a rounding of a key may flip: one step of bf16 or int8
    assert all(torch.allclose(a, b, atol=bound) for a, b in zip(fused, separate))


def test_the_past_matters_and_the_window_bounds_it():
    long, short = (play(small_world(window=window), 4) for window in (12, 3))
    assert torch.equal(long[0], short[0])
    assert (long[3] - short[3]).abs().max() > 1e-4


def test_a_prompt_takes_effect_with_its_block():
    same, changed = (
        play(small_world(), 4, prompts) for prompts in (["desert day"], ["desert day"] * 2 + ["meadow day"])
    )
    assert all(torch.equal(a, b) for a, b in zip(same[:2], changed[:2]))
    assert not torch.equal(same[2], changed[2])


def test_one_seed_makes_one_world():
    a, b, c = (play(small_world(seed=seed), 2) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a[0], c[0])


def test_int8_pages_stay_close_to_fp32():
    exact, quantized = (play(small_world(kv=kv), 3) for kv in ("fp32", "int8"))
    assert torch.equal(exact[0], quantized[0])  # nothing cached yet
    assert 0 < (exact[2] - quantized[2]).abs().max() < 0.05


def test_a_world_goes_on_after_a_block_that_failed():
    calm, shaken = small_world(), small_world()
    first = calm.step(action="up", prompt="desert day")
    assert np.array_equal(first, shaken.step(action="up", prompt="desert day"))
    state = shaken.decoder.generator.get_state()
    predict = shaken.model.predict

    def fail(*args):
        raise KeyboardInterrupt

    shaken.model.predict = fail
    with pytest.raises(KeyboardInterrupt):
        shaken.step(action="left")
    shaken.model.predict = predict
    shaken.decoder.generator.set_state(state)
    assert np.array_equal(calm.step(action="left"), shaken.step(action="left"))
    assert calm.frames == shaken.frames == 6


@pytest.mark.parametrize(
    "do, message",
    [
        (lambda: small_world(kv="fp7"), "kv must be one of fp32, fp16, bf16, int8, i8f8, fp8, int4, got 'fp7'"),
        (lambda: small_world(window=2), "window must be at least the 3 frames of one block.* got 2"),
        (lambda: small_world(window=-1), "window must be at least 1 frame, got -1"),
        (lambda: small_world(window="9"), "window must be a whole number of frames, got '9'"),
        (lambda: small_world(window=3.5), "window must be a whole number of frames, got 3.5"),
        (lambda: small_world(undo=2.5), "undo must be a whole number of frames, got 2.5"),
        (lambda: small_world(seed="x"), "seed must be a whole number from 0 .* got 'x'"),
        (lambda: small_world(seed=True), "seed must be a whole number from 0 .* got True"),
        (lambda: small_world(seed=1.5), "seed must be a whole number from 0 .* got 1.5"),
        (lambda: small_world(seed=-1), "seed must be a whole number from 0 .* got -1"),
        (lambda: small_world().fork(seed=2**64), "seed must be a whole number from 0 .* got 18446744073709551616"),
        (lambda: small_world(worlds="2"), "worlds must be at least 1, got '2'"),
        (lambda: small_world().step(action="up", prompt=5), "prompt must be words, got 5"),
        (
            lambda: small_world().step(["up"] * 3, "desert day", action="down"),
            r"step needs actions or one action, got both: \['up', 'up', 'up'\] and 'down'",
        ),
        (lambda: World("giant"), "model must be one of tiny, .* got 'giant'"),
        (lambda: small_world().step(action="up"), "prompt must be given with the first block"),
        (lambda: small_world().step(prompt="desert day"), "step needs actions"),
        (
            lambda: small_world().step(action="up", prompt="desert day", recache=True),
            "recache must not be asked for: each block of tiny was made under actions of its own",
        ),
        (lambda: small_world().step(["up"], "desert day"), "actions must be 3, one per frame, got 1"),
        (
            lambda: small_world().step(action="jump", prompt="desert day"),
            "action must be one of none, up, .* got 'jump'",
        ),
        (lambda: small_world().step(action="up", prompt="purple day"), "unknown word 'purple'"),
        (lambda: small_world().observe(np.zeros((2, 96, 96, 3), np.uint8), [0, 0], "desert"), "multiple of 3"),
        (
            lambda: small_world().observe(np.zeros((3, 9, 9, 3), np.uint8), [0] * 3, "desert"),
            r"frames must be uint8 \[n, 96",
        ),
    ],
)
def test_bad_input_says_what_it_must_be(do, message):
    with pytest.raises(ValueError, match=message):
        do()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_a_fork_that_does_the_same_makes_the_same_and_does_not_disturb(fused, kv):
    alone = play(small_world(fused, kv, window=6), 6)
    world = small_world(fused, kv, window=6, worlds=3)
    first = play(world, 3)
    fork, other = world.fork(), world.fork(seed=7)
    differs = play(other, 2, ("glacier night",))
    ours, theirs = play(world, 2), play(fork, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert not torch.equal(ours[0], differs[0])
    assert all(torch.equal(a, b) for a, b in zip(first, alone))
    for each in (world, fork, other):
        each.release()
    assert {format: len(pool.free) for format, pool in world.store.pools.items()} == {kv: 18}


def test_a_rewound_world_stands_where_it_stood():
    # Not fused: a forward of two blocks sums in another order than one of a single block.
    world, straight = (small_world(False, "int8", window=6, undo=6) for _ in range(2))
    play(world, 5)
    play(straight, 3)
    world.rewind(6)
    assert world.frames == straight.frames == 9
    world.decoder.generator.manual_seed(1)
    straight.decoder.generator.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(play(world, 2), play(straight, 2)))


@pytest.mark.parametrize("undo, sizes", [(0, "0, 3"), (9, "0, 3, 6, 9, 12")])
@pytest.mark.parametrize("settled", [False, True])
def test_whole_blocks_are_taken_back_or_nothing(settled, undo, sizes):
    world, straight = (small_world(True, "int8", window=6, undo=undo) for _ in range(2))
    for each in (world, straight):
        play(each, 6)
        if settled:
            each.commit_pending()
    for frames in (1, 2, 4, 7, 15, 18, 21, -3):
        with pytest.raises(ValueError, match=f"frames must be one of {sizes}, whole blocks .* got {frames}: World"):
            world.rewind(frames)
    assert world.frames == 18 and world.undo == int(sizes.split()[-1])
    world.rewind(0)
    assert all(torch.equal(a, b) for a, b in zip(play(world, 2), play(straight, 2)))


def test_what_a_world_says_can_be_taken_back_can_be():
    for size in small_world_of_six().rewinds:
        world = small_world_of_six()
        world.rewind(size)
        assert world.frames == 18 - size
        play(world, 1)
        assert world.frames == 21 - size


def small_world_of_six():
    world = small_world(window=6, undo=6)
    play(world, 6)
    return world


@pytest.mark.parametrize("seed", [7.0, "7", -1, 2**64])
def test_a_reset_that_is_refused_changes_nothing(seed):
    world, straight = (small_world(window=6) for _ in range(2))
    play(world, 2)
    play(straight, 2)
    with pytest.raises(ValueError, match="seed must be a whole number from 0"):
        world.reset(seed)
    assert all(torch.equal(a, b) for a, b in zip(play(world, 2), play(straight, 2)))


@pytest.mark.parametrize("settled", [False, True])
def test_a_released_world_can_not_go_on_but_begin_again(settled):
    world = small_world(window=6)
    first = world.step(action="up", prompt="desert day")
    if settled:
        world.commit_pending()
    world.release()
    for name, do in {
        "step": lambda: world.step(action="up"),
        "observe": lambda: world.observe(first, ["up"] * 3),
        "fork": world.fork,
    }.items():
        with pytest.raises(RuntimeError, match=f"{name}: this world was released, .* can't go on"):
            do()
    world.reset(0)
    assert np.array_equal(world.step(action="up", prompt="desert day"), first)


def test_a_loop_does_not_grow_with_the_blocks_it_has_made():
    """A world may run for days: whatever it keeps is bounded by its window."""
    world = small_world(window=6, sink=3)
    sizes = []
    for _ in range(3):
        for _ in range(4):
            world.step(action="up", prompt="desert day")
        assert world.denoising == world.decoder.seconds > 0
        sizes.append({name: len(x) for name, x in vars(world.decoder).items() if hasattr(x, "__len__")})
    assert sizes[0] == sizes[1] == sizes[2]
