"""Wan worlds: rollouts, re-caching, given frames, taking up a run, positions without end. Pictures are stand-ins."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from inferix.decode.contract import RECACHES, PictureStream
from inferix.decode.sequential import SequentialDecoder
from inferix.models import load_model
from inferix.models.wan import ADAPTERS, Wan
from inferix.models.wan.network import rope_table
from inferix.world import World
from inferix_kernels import OutOfPages, Policy
from inferix_kernels.reference.qkv import normalise, rotate
from tests.models.wan_golden import DenseTable, Replay, random_network, table_for, tiny_config

SIZE = (48, 80)


class Pictures(PictureStream):
    """A stand-in for a VAE: one picture per latent frame, and a note of what it was given."""

    def __init__(self):
        self.seen = 0

    def __call__(self, latents):
        self.seen += len(latents)
        flat = latents[:, :3].clamp(-1, 1) * 127.5 + 127.5
        return flat.repeat_interleave(8, 2).repeat_interleave(8, 3).permute(0, 2, 3, 1).to(torch.uint8).numpy()


def text(prompt):
    generator = torch.Generator().manual_seed(sum(prompt.encode()))
    return torch.randn(5, 40, generator=generator)


def encode(frames):
    return torch.from_numpy(frames[:, ::8, ::8].mean(-1)).float().div(127.5).sub(1)[:, None].repeat(1, 16, 1, 1)


def wan(name="self-forcing", **changes):
    adapter = dataclasses.replace(ADAPTERS[name], size=SIZE, **changes)
    return Wan(random_network(tiny_config()), adapter, text, Pictures, encode)


def play(world, prompts, replayed=()):
    blocks = []
    for i, prompt in enumerate(prompts):
        if i < len(replayed):
            world.replay(replayed[i], prompt=prompt)
        else:
            world.step(prompt=prompt)
        blocks.append(world.latents)
    return blocks


@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["self-forcing", "causvid", "longlive"])
def test_a_run_is_taken_up_bit_for_bit(name, kv):
    """Blocks that are replayed cost one forward, and what follows is what would have followed."""
    changes = {"rollout": 6} if name == "causvid" else {"window": 5, "sink": 1 if name != "longlive" else 3}
    prompts = ["fog", "fog", "rain", "rain", "rain", "snow"]
    whole = play(World(wan(name, **changes), kv=kv), prompts)
    calls = []
    model = wan(name, **changes)
    predict = model.predict
    model.predict = lambda *args: calls.append(1) or predict(*args)
    again = play(World(model, kv=kv), prompts, replayed=whole[:4])
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    per_block = len(model.adapter.times) + 1
    assert len(calls) < 6 * per_block  # fewer forwards than making them
    assert not torch.equal(whole[4], play(World(wan(name, **changes), kv=kv, seed=1), prompts)[4])


def test_a_new_rollout_begins_with_the_overlap():
    """CausVid: after `rollout` frames, frame 0 again, the last frames as the past, nothing else remembered."""
    model = wan("causvid", rollout=9)
    decoder = SequentialDecoder(model, table_for(model, Policy(window=21)), torch.Generator().manual_seed(0))
    condition = model.conditioning("fog", [])
    blocks = [decoder.step(condition) for _ in range(3)]
    decoder.restart = lambda latents: latents + 1  # a VAE would encode the first frame again
    state = decoder.generator.get_state()
    blocks.append(decoder.step(condition))
    assert decoder.frames == 12 and decoder.recent[-1].block.frames == range(3, 6)
    fresh = SequentialDecoder(model, table_for(model, Policy(window=21)), torch.Generator())
    fresh.generator.set_state(state)
    fresh.observe(blocks[2] + 1, condition)
    assert torch.equal(fresh.step(condition), blocks[3])


def test_a_new_prompt_recaches_block_by_block_as_longlives_pull_request_does():
    """Number 21: one forward over the last window + sink frames, in which row j of the keys is the sink's for the first
    frames and is made anew after those, and a block sees the rows up to its own end.
    """
    model, window, sink = wan("longlive", window=9, sink=3), 9, 3
    network, tokens = model.network.double(), model.frame_tokens
    fog, rain = model.conditioning_from(text("fog").double()), model.conditioning_from(text("rain").double())
    table = DenseTable(model, Policy(window, sink))
    draws = (noise.double() for noise in torch.randn(99, 3, *model.latent_shape).unbind())
    decoder = Replay(model, table, draws)
    frames = torch.cat([decoder.step(fog) for _ in range(7)])[-(window + sink) :]  # 9 .. 20 of 0 .. 20
    decoder.commit_pending()
    kept = [table.gather(layer, range(sink)) for layer in range(2)]
    before = table.gather(1, range(12, 21))
    decoder.recache(rain, "block-causal")
    rows, made = torch.arange(len(frames) * tokens), []
    mask = rows < ((rows // (3 * tokens) + 1) * 3 * tokens)[:, None]
    rope = model.rope(range(9, 21))

    def attend(layer, qkv, norm_q, norm_k, eps):
        q, k, v = (part.unflatten(1, (model.heads, -1)) for part in normed(qkv, norm_q, norm_k, eps))
        q, k = rotate(q, rope, True), rotate(k, rope, True)
        made.append((k[sink * tokens :], v[sink * tokens :]))
        k, v = (torch.cat([old, new]) for old, new in zip(kept[layer], made[-1]))
        out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask)
        return out.transpose(0, 1).flatten(1)

    with torch.inference_mode():
        network([frames], torch.zeros(len(frames)), [rain], attend)
    for layer in range(2):
        for got, wanted in zip(table.gather(layer, range(12, 21)), made[layer]):
            assert (got - wanted).abs().max() < 1e-12
        for got, wanted in zip(table.gather(layer, range(sink)), kept[layer]):
            assert torch.equal(got, wanted)
    assert decoder.frames == 21 and (table.gather(1, range(12, 21))[1] - before[1]).abs().max() > 0.1


def normed(qkv, norm_q, norm_k, eps):
    q, k, v = qkv.chunk(3, 1)
    return normalise(q, norm_q, None, eps), normalise(k, norm_k, None, eps), v


def test_a_recached_world_goes_on_as_one_that_was_told_so():
    model, policy = wan("longlive", window=6, sink=3), Policy(window=6, sink=3)
    fog, rain = model.conditioning_from(text("fog")), model.conditioning_from(text("rain"))
    decoder = SequentialDecoder(model, table_for(model, policy), torch.Generator().manual_seed(0))
    blocks = [decoder.step(fog) for _ in range(6)]  # frames 0..17
    decoder.recache(rain, "block-causal")
    oracle = SequentialDecoder(model, table_for(model, policy), torch.Generator())
    oracle.generator.set_state(decoder.generator.get_state())
    oracle.observe(blocks[0], fog)
    oracle.table.state = oracle.table.state._replace(next_frame=12)
    for block in blocks[4:]:
        oracle.observe(block, rain)
    # The clean passes of the sink and of the last block ran alone here and fused there: sums in another order.
    assert torch.allclose(decoder.step(rain), oracle.step(rain), atol=2e-5)
    assert decoder.frames == 21 and list(decoder.table.held) == [0, 1, 2, 15, 16, 17]


def test_recaching_is_the_adapters_choice():
    prompts = ["fog"] * 4 + ["rain"] * 2
    kept, *others = (play(World(wan("longlive", recache=how), kv="fp32"), prompts) for how in ("", *RECACHES))
    for i, recached in enumerate(others):
        assert all(torch.equal(a, b) for a, b in zip(kept[:4], recached[:4]))
        assert not torch.allclose(kept[4], recached[4], atol=1e-3)
        assert not torch.allclose(others[i - 1][4], recached[4], atol=1e-3)


def test_recaching_can_be_asked_for_by_name():
    """Step by step, by the name of either way; True is the adapter's."""
    told = {}
    for asked in (None, True, False, *RECACHES):
        world = World(wan("longlive", window=6, sink=3), kv="fp32")
        play(world, ["fog"] * 3)
        world.step(prompt="rain", recache=asked)
        told[asked] = world.latents
    assert torch.equal(told[None], told["bidirectional"]) and torch.equal(told[True], told["bidirectional"])
    assert len({x.sum().item() for x in told.values()}) == 3
    world = World(wan("self-forcing", window=6), kv="fp32")
    play(world, ["fog"] * 3)
    before = dict(world.table.held)
    for asked, said in (
        ("bidirectional", "recache must be True, False or block-causal: self-forcing is not one that"),
        ("sideways", "recache must be True, False or one of bidirectional, block-causal, got 'sideways'"),
    ):
        with pytest.raises(ValueError, match=said):
            world.step(prompt="rain", recache=asked)
    assert world.table.held == before and world.prompt == "fog"


def test_a_window_that_scratch_does_not_hold_is_not_recached_in_one_forward():
    model = wan("longlive", window=6, sink=3)
    decoder = SequentialDecoder(model, table_for(model, Policy(window=6, sink=3)), torch.Generator().manual_seed(0))
    fog = model.conditioning("fog", [])
    for _ in range(3):
        decoder.step(fog)
    pending, held = decoder.pending, dict(decoder.table.held)
    with pytest.raises(OutOfPages, match="scratch: a block of 9 frames was asked for, and it holds 6"):
        decoder.recache(fog, "bidirectional")
    assert decoder.pending is pending and decoder.table.held == held


def longlive(**options):
    return World(wan("longlive", window=6, sink=3), kv="int8", **options)


def test_without_room_to_recache_nothing_changes():
    """A fork that reads the same past keeps it from going, in a store with room for one world."""
    world, straight = longlive(), longlive()
    for each in (world, straight):
        play(each, ["fog"] * 5)
    fork = world.fork()
    held, pending = dict(world.table.held), world.decoder.pending
    with pytest.raises(OutOfPages, match=r"int8 pool on the device: 6 frames .* asked for"):
        world.step(prompt="rain")
    assert world.table.held == held and world.decoder.pending is pending and world.prompt == "fog"
    fork.release()
    assert all(torch.equal(a, b) for a, b in zip(play(world, ["rain"] * 2), play(straight, ["rain"] * 2)))


def test_a_recache_that_breaks_off_says_that_the_world_is_lost():
    world = longlive(worlds=2)
    play(world, ["fog"] * 5)

    def fail(*args):
        raise KeyboardInterrupt

    predict, world.model.predict = world.model.predict, fail
    with pytest.raises(KeyboardInterrupt):
        world.step(prompt="rain")
    world.model.predict = predict
    with pytest.raises(RuntimeError, match="step: this world was released, or lost as it was recached"):
        world.step(prompt="rain")
    assert [len(pool.free) for pool in world.store.pools.values()] == [18]
    world.reset(0)
    assert torch.equal(play(world, ["fog"])[0], play(longlive(), ["fog"])[0])


@pytest.mark.parametrize("reading", [{"past_bias": -1.2}, {"time": "relative"}])
def test_how_the_past_is_read_is_the_adapters_choice_or_the_worlds(reading):
    prompts, sizes = ["fog"] * 5, {"window": 5, "sink": 1}
    plain = play(World(wan(**sizes), kv="fp32"), prompts)
    chosen = [World(wan(**sizes, **reading), kv="fp32"), World(wan(**sizes), kv="fp32", **reading)]
    first, second = (play(world, prompts) for world in chosen)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(plain[0], first[0]) and not torch.allclose(plain[4], first[4], atol=1e-3)


def test_what_leaves_the_window_is_shown_to_on_evict():
    gone = []
    world = World(
        wan(), kv="fp32", window=6, sink=1, on_evict=lambda table, frame: gone.append((frame, table.next_frame))
    )
    play(world, ["fog"] * 4)
    assert gone == [(1, 6), (2, 6), (3, 9), (4, 9), (5, 9)]
    adapter_too = World(wan(on_evict=lambda table, frame: gone.clear()), kv="fp32", window=6)
    play(adapter_too, ["fog"] * 3)
    assert not gone


def test_a_first_block_of_one_frame_may_be_a_given_picture():
    model = wan("self-forcing-first-frame")
    world = World(model, kv="fp32")
    assert [len(block) for block in play(world, ["fog"] * 3)] == [1, 3, 3]
    picture = np.random.default_rng(0).integers(0, 255, (1, *SIZE, 3), dtype=np.uint8)
    world = World(model, kv="fp32")
    world.observe(picture, prompt="fog")
    block = play(world, [None])[0]
    assert len(block) == 3 and world.frames == 4 and world.pictures.stream.seen == 4
    # As by the loop itself, from the picture's latents.
    decoder = SequentialDecoder(model, table_for(model, Policy(window=21)), torch.Generator().manual_seed(0))
    decoder.observe(encode(picture), model.conditioning("fog", []))
    assert torch.allclose(decoder.step(model.conditioning("fog", [])), block, atol=2e-5)


@pytest.mark.parametrize("name", ["self-forcing", "self-forcing-framewise"])
def test_a_video_is_continued_from_given_frames(name):
    """Caching given blocks and then making one equals having made them."""
    model = wan(name)
    made = World(model, kv="fp32")
    blocks = play(made, ["fog"] * 4)
    continued = World(model, kv="fp32")
    for block in blocks[:3]:
        continued.decoder.observe(block, model.conditioning("fog", []))
    for _ in range(3 * len(model.adapter.times)):
        continued.decoder._noise(3 if name == "self-forcing" else 1)
    # The last clean pass ran alone here and fused there: sums in another order.
    assert torch.allclose(play(continued, ["fog"])[0], blocks[3], atol=2e-5)


def test_positions_have_no_end():
    table = rope_table([0, 1023, 1024, 500_000], (3, 5), 32, torch.float64).view(4, 3, 5, 16, 2)
    # 12 of 32 channels turn with the frame, 10 with the row, 10 with the column.
    for frame, index in ((2, 1024), (3, 500_000)):
        angle = index * 10_000.0 ** (-2 * 4 / 12)
        assert table[frame, 1, 2, 4].tolist() == pytest.approx([np.cos(angle), np.sin(angle)], abs=1e-9)
    assert table[1, 2, 3, 6].tolist() == pytest.approx([np.cos(2.0), np.sin(2.0)])
    assert table[1, 2, 3, 11].tolist() == pytest.approx([np.cos(3.0), np.sin(3.0)])


def test_far_from_the_start_a_world_is_the_same():
    """Only differences of positions matter, so a world that begins at frame 3000 is the one that begins at 0."""
    finals = []
    for start in (0, 3000):
        model = wan()
        model.network.double()
        table = DenseTable(model, Policy(window=6))
        table.next_frame = start
        generator = torch.Generator().manual_seed(0)
        draws = (torch.randn(3, *model.latent_shape, generator=generator) for _ in range(99))
        decoder = Replay(model, table, draws)
        condition = model.conditioning_from(text("fog"))
        finals.append(torch.cat([decoder.step(condition) for _ in range(3)]))
    assert (finals[0] - finals[1]).abs().max() < 1e-9


def test_prompts_of_two_blocks_in_one_pass_stay_apart():
    """Fused, the clean block keeps its own prompt while the next one already has another."""
    finals = [play(World(wan(fused=fused), kv="fp32"), ["fog", "rain", "snow"]) for fused in (True, False)]
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(*finals))


def test_bfloat16_runs():
    model = Wan(random_network(tiny_config(), dtype=torch.bfloat16), wan().adapter, text, Pictures)
    exact, rough = (play(World(m, kv="bf16"), ["fog"] * 3) for m in (wan(), model))
    difference = (torch.cat(exact) - torch.cat(rough)).abs()
    assert 1e-3 < difference.mean() < 0.1  # bf16 keeps 8 bits; values reach 6


MEMORY = """
import resource
from tests.models.test_wan_world import World, play, wan
world = World(wan(), kv="int8", window=6, sink=3)
for blocks in (10, 90):
    play(world, ["fog"] * blocks)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_video():
    command = [sys.executable, "-c", MEMORY]
    root = Path(__file__).parents[2]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    after_10, after_100 = map(int, output.split())
    assert after_100 < 1.02 * after_10


@pytest.mark.parametrize(
    "do, message",
    [
        (lambda: wan().conditioning("fog", ["up"]), "actions must be none: self-forcing is steered by words alone"),
        (lambda: wan("longlive", recache=True), 'recache must be "" or one of bidirectional, block-causal, got True'),
        (lambda: wan("causvid", rollout_begins="again"), "rollout_begins must be one of restarted, .* got 'again'"),
        (
            lambda: World(wan("wan-t2v", guidance=1.0), time="relative"),
            "time must not be given: wan-t2v makes a video at",
        ),
        (lambda: World(wan(), time="soon"), "time must be one of absolute, relative, got 'soon'"),
        (lambda: wan("causvid", overlap=4), "overlap must be whole blocks of 3 frames, got 4"),
        (lambda: wan("causvid", overlap=21), "overlap must be less than the rollout of 21 frames, got 21"),
        (lambda: load_model("longlive", "x", overlap=3), "overlap must not be given: longlive is one rollout without"),
        (
            lambda: Wan(random_network(tiny_config()), ADAPTERS["causvid"]).conditioning("fog", []),
            "no text encoder next to",
        ),
        (lambda: Wan(random_network(tiny_config()), ADAPTERS["causvid"]).stream(), "have no VAE next to them"),
        (
            lambda: Wan(random_network(tiny_config()), dataclasses.replace(ADAPTERS["causvid"], size=(50, 80))),
            r"size must be multiples of 16 x 16 pixels, got \(50, 80\)",
        ),
        (
            lambda: Wan(random_network(tiny_config(channels_in=36)), ADAPTERS["causvid"]),
            "takes 36 channels and gives 16",
        ),
        (
            lambda: Wan(random_network(tiny_config(channels_in=48, channels_out=48)), ADAPTERS["longlive"]),
            "weights: head.head.weight gives latents of 48 channels, those of longlive have 16",
        ),
        (lambda: wan().network.cross_cache(torch.zeros(25, 40)), r"text must be \[<= 24, 40\], got \[25, 40\]"),
        (
            lambda: wan().network.cross_cache(torch.zeros(2, 40), torch.zeros(1, 2)),
            "image must be None: this is a text-to-vi",
        ),
        (
            lambda: wan().network([torch.zeros(1, 16, 5, 8)], torch.zeros(1), [], print),
            "blocks must be .* multiple of 2",
        ),
        (lambda: World(wan(), kv="fp32").step(), "prompt must be given with the first block"),
        (lambda: World(wan(), kv="fp32").observe(np.zeros((4, *SIZE, 3), np.uint8), prompt="a"), "whole blocks of lat"),
        (
            lambda: World(wan(), kv="fp32").observe(np.zeros((4, 8, 8, 3), np.uint8), prompt="a"),
            r"uint8 \[n, 48, 80, 3",
        ),
        (lambda: load_model("tiny", size=(48, 80)), "size: the tiny world has one size"),
    ],
)
def test_bad_input_says_what_it_must_be(do, message):
    with pytest.raises(ValueError, match=message):
        do()
