"""Undistilled Wan: many steps, two branches of guidance, a video at once or block by block; against diffusers."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from inferix.decode.contract import PictureStream
from inferix.decode.samplers import SAMPLERS
from inferix.decode.sequential import SequentialDecoder
from inferix.models.wan import ADAPTERS, Wan
from inferix.models.wan.adapters import customised
from inferix.world import World
from inferix_kernels import Policy
from tests.models.wan_golden import DenseTable, random_network, table_for, tiny_config
from tests.models.wan_theirs import Watched, theirs_like

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
SIZE, TEXT_LEN, STEPS, GUIDANCE = (48, 80), 24, 6, 5.0


def scheduler_of(sampler, shift=5.0):
    if sampler == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def adapter_for(sampler, name="wan-t2v", **changes):
    """The table that diffusers' scheduler draws up, which ends elsewhere than Wan's own."""
    scheduler = scheduler_of(sampler)
    scheduler.set_timesteps(STEPS)
    times, timesteps = scheduler.sigmas[:-1].tolist(), scheduler.timesteps.tolist()
    frames = {"block_frames": 3, "window": 3} if name != "wan-causal" else {}
    changes = {"times": times, "timesteps": timesteps, "guidance": GUIDANCE, "sampler": sampler} | frames | changes
    return dataclasses.replace(ADAPTERS[name], size=SIZE, **changes)


def prompts(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    texts = torch.zeros(2, TEXT_LEN, 40)
    texts[0, :9], texts[1, :4] = torch.randn(9, 40, generator=generator), torch.randn(4, 40, generator=generator)
    return texts.to(dtype)


def noise(frames=3, seed=2):
    return torch.randn(frames, 16, 6, 10, generator=torch.Generator().manual_seed(seed))


def furthest(got, wanted):
    return (got.double() - wanted.double()).abs().max().item()


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_guided_steps_are_those_of_the_pipeline_of_diffusers(sampler):
    """WanPipeline itself, in float32, and ours over pages: the latents of every step."""
    network, (told, against) = random_network(tiny_config()), prompts()
    pipeline = diffusers.WanPipeline(None, None, None, scheduler_of(sampler), theirs_like(network))
    pipeline.set_progress_bar_config(disable=True)
    wanted = []
    pipeline(
        prompt_embeds=told[None],
        negative_prompt_embeds=against[None],
        height=SIZE[0],
        width=SIZE[1],
        num_frames=9,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise().transpose(0, 1)[None],
        output_type="latent",
        callback_on_step_end=lambda _, i, t, kept: wanted.append(kept["latents"][0].transpose(0, 1)) or {},
    )
    model = Wan(network, adapter_for(sampler))
    table = table_for(model, Policy(window=3), backend="compiled")
    decoder = Watched(model, table, torch.Generator(), model.conditioning_from(against), noise=[noise()])
    decoder.seen.append(decoder.step(model.conditioning_from(told)))
    assert len(decoder.seen) == len(wanted) == STEPS
    # Five times the difference of two predictions has nine times their rounding; the latents reach 9.
    assert all(furthest(got, x) < 2e-5 for got, x in zip(decoder.seen, wanted))
    assert not table.held  # nothing was committed


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_guided_steps_in_float64(sampler, monkeypatch):
    """The loop of the pipeline over dense attention, all in float64: what diffusers casts to float32 stays as it is."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    network, (told, against) = random_network(tiny_config()).double(), prompts(torch.float64)
    theirs, scheduler = theirs_like(network), scheduler_of(sampler)
    scheduler.set_timesteps(STEPS)
    x, wanted = noise().double().transpose(0, 1)[None], []
    with torch.inference_mode():
        for t in scheduler.timesteps:
            flow, other = (theirs(x, t[None], text[None], return_dict=False)[0] for text in (told, against))
            x = scheduler.step(other + GUIDANCE * (flow - other), t, x, return_dict=False)[0]
            wanted.append(x[0].transpose(0, 1))
    model = Wan(network, adapter_for(sampler))
    decoder = Watched(
        model, DenseTable(model), torch.Generator(), model.conditioning_from(against), noise=[noise().double()]
    )
    decoder.seen.append(decoder.step(model.conditioning_from(told)))
    bound = 1e-12 if sampler == "unipc" else 1e-6  # diffusers' Euler subtracts one level from the next in float32
    assert all(furthest(got, x) < bound for got, x in zip(decoder.seen, wanted, strict=True))


def causal(fused=True, **changes):
    return adapter_for("unipc", "wan-causal", fused=fused, **changes)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_a_causal_teacher_has_two_pasts(fused):
    """By hand: every prediction and every clean pass twice, over two tables, and the scheduler of diffusers."""
    network, texts = random_network(tiny_config()).double(), prompts(torch.float64)
    model = Wan(network, causal(fused))
    draws = [noise(seed=seed).double() for seed in (2, 3, 4)]
    decoder = Watched(
        model, DenseTable(model, Policy(window=6)), torch.Generator(), model.conditioning_from(texts[1]), noise=draws
    )
    got = [decoder.step(model.conditioning_from(texts[0])) for _ in range(3)]
    tables, crosses = (
        [DenseTable(model, Policy(window=6)) for _ in texts],
        [network.cross_cache(text) for text in texts],
    )
    for x, clean in zip(draws, got):
        scheduler = scheduler_of("unipc")
        scheduler.set_timesteps(STEPS)
        blocks = [table.open_block(3) for table in tables]
        for t in [*scheduler.timesteps, None]:
            flows = []
            for table, block, cross in zip(tables, blocks, crosses):
                one = table.plan([block], model.rope(block.frames), commit=block if t is None else None)
                with torch.inference_mode():
                    told = torch.zeros(3) if t is None else t.expand(3)
                    flows.append(network([x], told, [cross], one.attend))
            if t is not None:
                x = scheduler.step(flows[1] + GUIDANCE * (flows[0] - flows[1]), t, x, return_dict=False)[0]
        for table, block in zip(tables, blocks):
            table.seal(block)
        assert furthest(clean, x) < 1e-6
    decoder.commit_pending()
    for branch, table in zip(decoder.branches, tables):
        for ours, by_hand in zip(branch.table.gather(1, range(3, 9)), table.gather(1, range(3, 9))):
            assert furthest(ours, by_hand) < 1e-6
    assert furthest(*(branch.table.gather(1, range(6, 9))[1] for branch in decoder.branches)) > 0.1


def text(prompt):
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(sum(prompt.encode())))


class Pictures(PictureStream):
    def __init__(self):
        pass

    def __call__(self, latents):
        return np.zeros((1, *SIZE, 3), np.uint8)


def world(adapter, network=None, **options):
    return World(Wan(network or random_network(tiny_config()), adapter, text, Pictures), **options)


def play(world, prompts, replayed=()):
    blocks = []
    for i, prompt in enumerate(prompts):
        if i < len(replayed):
            world.replay(replayed[i], prompt=prompt)
        else:
            world.step(prompt=prompt)
        blocks.append(world.latents)
    return blocks


def test_guided_away_from_the_same_words_is_not_guided():
    prompts = ["fog", "fog", "fog"]
    guided = play(world(causal(guidance=7.0, negative_prompt="fog"), kv="fp32"), prompts)
    plain = play(world(causal(guidance=1.0), kv="fp32"), prompts)
    assert all(torch.equal(a, b) for a, b in zip(guided, plain))
    other = play(world(causal(guidance=7.0), kv="fp32"), prompts)
    assert furthest(other[0], plain[0]) > 0.1


@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_a_guided_run_is_taken_up_and_forked_bit_for_bit(kv):
    """Over stores that are exactly full: in both branches the window has moved on."""
    prompts = ["fog", "fog", "rain", "rain", "snow"]
    whole = play(world(causal(), kv=kv, window=6), prompts)
    again = world(causal(), kv=kv, window=6, worlds=2)
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], play(again, prompts[:3], replayed=whole[:3])))
    other = again.fork()
    for one in (again, other):
        assert all(torch.equal(a, b) for a, b in zip(whole[3:], play(one, prompts[3:]), strict=True))


@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "made"])
def test_a_guided_world_goes_on_after_a_block_that_failed_between_its_branches(replayed):
    prompts = ["fog", "fog", "rain"]
    whole = play(world(causal(), kv="fp32"), prompts)
    again = world(causal(), kv="fp32")
    play(again, prompts[:1])
    state, predict, calls = again.decoder.generator.get_state(), again.model.predict, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:  # one branch has committed its pending block, the other has not
            raise KeyboardInterrupt
        return predict(*args)

    again.model.predict = fail
    with pytest.raises(KeyboardInterrupt):
        play(again, prompts[1:2])
    again.model.predict = predict
    again.decoder.generator.set_state(state)
    rest = play(again, prompts[1:], replayed=whole[1:2] if replayed else ())
    # Settled apart from the block's first step in one branch: sums in another order, nine times over.
    assert all(furthest(a, b) < 1e-4 for a, b in zip(whole[1:], rest, strict=True))
    assert all(branch.table.next_frame == 6 for branch in again.decoder.branches)


def test_a_guided_world_is_rewound():
    prompts = ["fog", "fog", "rain", "rain"]
    whole = play(world(causal(fused=False), window=6), prompts)
    again = world(causal(fused=False), window=6, undo=3)
    play(again, prompts[:2])
    state = again.decoder.generator.get_state()
    play(again, ["hail", "snow"])
    again.decoder.rewind(6)
    again.decoder.generator.set_state(state)
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], play(again, prompts[2:]), strict=True))


def test_the_published_tables():
    """50 steps at shift 5, from u = 0.999, told in whole numbers: what wan/utils/fm_solvers_unipc.py draws up."""
    adapter = ADAPTERS["wan-t2v"]
    assert len(adapter.times) == 50 and adapter.guidance == 5 and adapter.at_once
    for i, level, told in zip(range(50), adapter.times, adapter.timesteps):
        u = 0.999 * (1 - i / 50)
        assert level == pytest.approx(5 * u / (1 + 4 * u), abs=1e-7) and told == math.floor(1000 * 5 * u / (1 + 4 * u))
    assert [len(ADAPTERS[f"wan-i2v-{size}p"].times) for size in (480, 720)] == [40, 40]
    few = customised(adapter, steps=4, guidance=1.0, negative_prompt="blur")
    assert (len(few.times), few.guidance, few.negative_prompt, few.block_frames) == (4, 1.0, "blur", 21)
    for sampler in SAMPLERS:  # the first step to the next level leaves a block that is all clean as it is
        assert (
            furthest(
                SAMPLERS[sampler]((1.0, 0.5), lambda: torch.ones(2))(0, torch.ones(2), torch.ones(2)), torch.ones(2)
            )
            < 1e-6
        )


@pytest.mark.parametrize(
    "do, message",
    [
        (lambda: customised(ADAPTERS["causvid"], steps=9), "steps: causvid was distilled, to 3 steps unguided"),
        (lambda: customised(ADAPTERS["longlive"], guidance=5.0), "guidance: longlive was distilled"),
        (lambda: customised(ADAPTERS["wan-t2v"], steps=0), "steps must be at least 1, got 0"),
        (lambda: world(adapter_for("euler"), window=9), "window must not be given: wan-t2v makes a video at"),
        (lambda: play(world(adapter_for("euler")), ["fog"] * 2), "step: wan-t2v has made its video, at once"),
        (lambda: world(adapter_for("euler")).observe(np.zeros((9, *SIZE, 3), np.uint8), prompt="fog"), "from no past"),
        (
            lambda: SequentialDecoder(world(causal()).model, None, None),
            "negative_conditioning must be a conditioning: the guidance of wan-causal is 5",
        ),
        (
            lambda: Wan(random_network(tiny_config()), adapter_for("euler")).for_video(0),
            "frames must be at least 1, got 0",
        ),
        (lambda: Wan(random_network(tiny_config()), causal()).for_video(9), "wan-causal makes a video block by block"),
        (
            lambda: Wan(random_network(tiny_config()), adapter_for("euler")).for_video(
                9, np.zeros((*SIZE, 3), np.uint8)
            ),
            "image must not be given: this network takes none",
        ),
    ],
)
def test_bad_input_says_what_it_must_be(do, message):
    with pytest.raises(ValueError, match=message):
        do()
