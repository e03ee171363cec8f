"""A stock Wan transformer of diffusers, block by block over our store, makes the latents that our own loop makes."""

import dataclasses

import pytest
import torch

from inferix.models.wan import ADAPTERS, Wan
from inferix_kernels import KVStore, Policy
from inferix_kernels.integrations.diffusers import enable_block_cache
from tests.models.wan_golden import random_network, tiny_config
from tests.models.wan_theirs import Watched, theirs_like

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
SIZE, TEXT_LEN, BLOCKS = (48, 80), 24, 4
_FOUR = ADAPTERS["self-forcing"]
ADAPTER = dataclasses.replace(_FOUR, times=_FOUR.times[::2], timesteps=_FOUR.timesteps[::2])
# float32 code of both sides; flows and latents reach 9. What quantizes rounds a few numbers to the other side in one
# of the two: a step of int8 is a 127th of the largest number of a row, one of int4 a 7th of a group's.
BOUNDS = {"fp32": 2e-5, "int8": 2e-3, "int4": 2e-2}


@pytest.fixture(scope="module")
def network():
    return random_network(tiny_config())


@pytest.fixture
def transformer(network):
    return theirs_like(network)


def drawn(seed, frames=3, videos=1):
    return torch.randn(videos, 16, frames, 6, 10, generator=torch.Generator().manual_seed(seed))


def prompt(seed=1, videos=1):
    return torch.randn(videos, TEXT_LEN, 40, generator=torch.Generator().manual_seed(seed))


def frames_first(x):
    """[1, C, F, h, w] as our loop has it, [F, C, h, w]."""
    return x[0].transpose(0, 1)


def furthest(got, wanted):
    return (got.double() - wanted.double()).abs().max().item()


def ours(network, adapter, policy, prompts, noise, blocks=BLOCKS):
    """Clean latents of every block by our driver, and the loop."""
    model = Wan(network, dataclasses.replace(adapter, size=SIZE))
    store = KVStore(
        layers=model.layers, heads=model.heads, head_dim=model.head_dim, frame_tokens=model.frame_tokens,
        block_frames=3, pools={format: len(prompts) * n for format, n in policy.capacity(3 * blocks).items()},
    )  # fmt: skip
    told, *against = [model.conditioning_from(x[0]) for x in prompts]
    decoder = Watched(model, store.open(policy), torch.Generator(), *against, noise=map(frames_first, noise))
    made = [decoder.step(told) for _ in range(blocks)]
    decoder.commit_pending()
    return made, decoder


def few_steps(transformer, cache, adapter, text, noise, blocks=BLOCKS):
    """As a script over diffusers would have it: predict the clean block, add noise, again."""
    noise, made = iter(noise), []
    for _ in range(blocks):
        with torch.no_grad(), cache.block(frames=3):
            x = next(noise)
            for i, (level, t) in enumerate(zip(adapter.times, adapter.timesteps)):
                t = torch.full((len(x),), t, dtype=torch.float64)
                clean = x - level * transformer(x, timestep=t, encoder_hidden_states=text).sample
                if i + 1 < len(adapter.times):
                    x = (1 - adapter.times[i + 1]) * clean + adapter.times[i + 1] * next(noise)
            cache.commit(clean)
        made.append(clean)
    return made


def draws(adapter, blocks=BLOCKS, videos=1, seed=100):
    return [drawn(seed + i, videos=videos) for i in range(blocks * len(adapter.times))]


def past(cache, layer, frames):
    """What one world of a cache holds, and the same of any table: K and V."""
    return cache._branches["cond"].tables[0].gather(layer, frames)


@pytest.mark.parametrize("seq", [False, True], ids=["timestep-B", "timestep-B-seq"])
def test_one_block_over_everything_is_the_stock_model(transformer, seq):
    x, text, t = drawn(0, frames=4, videos=2), prompt(videos=2), torch.tensor([900.0, 400.0])
    t = t[:, None].expand(2, 4 * 15) if seq else t
    with torch.no_grad():
        wanted = transformer(x, timestep=t, encoder_hidden_states=text).sample
        cache = enable_block_cache(transformer, Policy(window=4, format="int8"), block_frames=4)
        with cache.block(frames=4):
            assert furthest(transformer(x, timestep=t, encoder_hidden_states=text).sample, wanted) < BOUNDS["fp32"]
            cache.abandon()
        cache.disable()
        assert torch.equal(transformer(x, timestep=t, encoder_hidden_states=text).sample, wanted)


@pytest.mark.parametrize(
    "policy, coarsest",
    [
        (Policy(format="fp32"), "fp32"),
        (Policy(window=6, sink=3, format="fp32"), "fp32"),
        (Policy(window=6, sink=3, format="int8"), "int8"),
        (Policy(window=9, sink=3, format="int8", sink_format="fp32", older=(6, "int4")), "int4"),
    ],
    ids=["all", "fp32", "int8", "mixed"],
)
def test_latents_are_those_of_our_own_loop(policy, coarsest, network, transformer):
    adapter = ADAPTER
    noise, text = draws(adapter), prompt()
    wanted, decoder = ours(network, adapter, policy, [text], noise)
    cache = enable_block_cache(transformer, policy, frames=3 * BLOCKS)
    made = few_steps(transformer, cache, adapter, text, noise)
    bound = BOUNDS[coarsest]
    assert [furthest(frames_first(x), y) < bound for x, y in zip(made, wanted)] == [True] * BLOCKS
    assert cache.held() == list(decoder.table.held) and cache.next_frame == 3 * BLOCKS
    for got, other in zip(past(cache, 1, cache.held()), decoder.table.gather(1, cache.held())):
        assert (got - other).norm() < bound * other.norm()  # few numbers differ by a step


def test_a_bounded_past_changes_what_is_made(network, transformer):
    """Or the comparison above would say nothing about windows and formats."""
    adapter, text = ADAPTER, prompt()
    noise, made = draws(adapter), []
    for policy in (Policy(format="fp32"), Policy(window=6, sink=3, format="fp32"), Policy(window=6, format="int4")):
        cache = enable_block_cache(transformer, policy, frames=3 * BLOCKS)
        made.append(few_steps(transformer, cache, adapter, text, noise)[-1])
        cache.disable()
    assert furthest(made[0], made[1]) > 0.01 and furthest(made[1], made[2]) > 0.01


def test_videos_side_by_side_are_made_as_one_by_one(transformer):
    adapter, text = ADAPTER, prompt(videos=2)
    noise = draws(adapter, blocks=3, videos=2)
    cache = enable_block_cache(transformer, Policy(window=6, format="int8"))
    both = few_steps(transformer, cache, adapter, text, noise, blocks=3)
    for i in range(2):
        cache.reset()
        one = few_steps(transformer, cache, adapter, text[i : i + 1], [x[i : i + 1] for x in noise], blocks=3)
        assert all(furthest(x[i : i + 1], y) < BOUNDS["int8"] for x, y in zip(both, one))


def test_a_stock_pipeline_guided_block_by_block(network, transformer):
    """WanPipeline, called once for each block: its cache_context names the branches of guidance."""
    steps, guidance, policy = 2, 5.0, Policy(window=6, sink=3, format="fp32")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    pipeline = diffusers.WanPipeline(None, None, None, scheduler, transformer)
    pipeline.set_progress_bar_config(disable=True)
    cache = enable_block_cache(transformer, policy)
    noise, texts, made = [drawn(i) for i in range(3)], [prompt(1), prompt(2)], []
    for x in noise:
        with cache.block(frames=3):
            made.append(
                pipeline(
                    prompt_embeds=texts[0], negative_prompt_embeds=texts[1], latents=x, height=SIZE[0], width=SIZE[1],
                    num_frames=9, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
                ).frames
            )  # fmt: skip
            cache.commit(made[-1])
    times, timesteps = scheduler.sigmas[:-1].tolist(), scheduler.timesteps.tolist()
    adapter = dataclasses.replace(
        ADAPTERS["wan-causal"], times=times, timesteps=timesteps, guidance=guidance, sampler="unipc"
    )
    wanted, decoder = ours(network, adapter, policy, texts, noise, blocks=3)
    # Guidance of 5 has nine times the rounding of a prediction, and a block stands on those before it.
    assert [furthest(frames_first(x), y) < 5e-4 for x, y in zip(made, wanted)] == [True] * 3
    assert cache.held("uncond") == list(decoder.tables[1].held) == list(range(9))


def test_given_frames_begin_a_video(network, transformer):
    """Clean latents of a start are committed without a noisy pass, the first block one frame long."""
    adapter, text = ADAPTER, prompt()
    start, noise = drawn(7, frames=1), draws(adapter, blocks=1)
    cache = enable_block_cache(transformer, Policy(window=6, format="fp32"))
    with cache.block(frames=1) as frames:
        cache.commit(start, encoder_hidden_states=text)
    made = few_steps(transformer, cache, adapter, text, noise, blocks=1)
    assert (frames, cache.next_frame) == (range(1), 4)

    model = Wan(network, dataclasses.replace(adapter, size=SIZE, first_block_frames=1))
    store = KVStore(layers=2, heads=3, head_dim=32, frame_tokens=15, block_frames=3, pools={"fp32": 6})
    decoder = Watched(model, store.open(Policy(window=6)), torch.Generator(), noise=map(frames_first, noise))
    condition = model.conditioning_from(text[0])
    decoder.observe(frames_first(start), condition)
    assert furthest(frames_first(made[0]), decoder.step(condition)) < BOUNDS["fp32"]


def test_a_half_precision_model_keeps_its_dtype(transformer):
    x, text, t = drawn(0), prompt(), torch.tensor([900.0])
    with torch.no_grad():
        wanted = transformer(x, timestep=t, encoder_hidden_states=text).sample
        transformer = transformer.to(torch.bfloat16)
        transformer.condition_embedder.timesteps_proj = diffusers.models.embeddings.Timesteps(64, True, 0)
        cache = enable_block_cache(transformer, Policy(window=6, format="bf16"))
        for block in range(2):
            with cache.block(frames=3):
                got = transformer(x.bfloat16(), timestep=t, encoder_hidden_states=text.bfloat16()).sample
                cache.commit(x)  # float32, as a scheduler leaves it
            if block == 0:
                assert got.dtype == torch.bfloat16
                assert (got - wanted).norm() < 0.02 * wanted.norm()  # of a model of two layers in bfloat16
