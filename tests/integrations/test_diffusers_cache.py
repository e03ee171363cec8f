"""The container that makes a stock Wan transformer go block by block: what it refuses, forgets and gives back."""

import numpy as np
import pytest
import torch

from inferix_kernels import Policy, Unsupported
from inferix_kernels.integrations.diffusers import BlockCache, CacheLayer, OffsetRotaryPosEmbed, enable_block_cache
from tests.house.test_docstrings import follow
from tests.integrations.tiny_wan import POLICY, TEXT, call, latents, make_block, tiny

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed  # noqa: E402


@pytest.fixture
def transformer():
    return tiny()


@pytest.fixture
def cache(transformer):
    return enable_block_cache(transformer, POLICY)


def test_the_examples_run():
    for thing in (enable_block_cache, BlockCache, CacheLayer, OffsetRotaryPosEmbed):
        follow(thing)


def test_disabled_the_transformer_is_what_it_was(transformer):
    transformer.set_attention_backend("native")
    wanted, processors, rope = call(transformer), transformer.attn_processors, transformer.rope
    for _ in range(2):
        cache = enable_block_cache(transformer, POLICY)
        kinds = {type(x) for x in transformer.attn_processors.values()}
        assert WanAttnProcessor in kinds and len(kinds) == 2  # cross-attention keeps its own
        make_block(cache, 1)
        cache.disable()
        assert transformer.attn_processors == processors and transformer.rope is rope
        assert torch.equal(call(transformer), wanted)
        assert not transformer._diffusers_hook.hooks and cache.nbytes == 0
    with pytest.raises(RuntimeError, match="disabled already"):
        cache.disable()
    with pytest.raises(RuntimeError, match="this cache is disabled: call enable_block_cache again"), cache.block(3):
        pass


@pytest.mark.parametrize(
    "change, error, said",
    [
        (lambda: torch.nn.Linear(2, 2), ValueError, "transformer must be diffusers' WanTransformer3DModel, got Linear"),
        (lambda: torch.compile(tiny()), ValueError, "WanTransformer3DModel, got OptimizedModule"),
        (lambda: enable_block_cache(model := tiny(), POLICY) and model, ValueError, "must have no block cache yet"),
        (lambda: with_other(tiny(), "processor"), ValueError, "must have its stock attention processors .* got Other"),
        (lambda: with_other(tiny(), "rope"), ValueError, "must have its stock .* and rope, got Other"),
        (lambda: with_other(tiny(), "theta"), Unsupported, "rope: angles must be those of Wan, to base 10000"),
        (lambda: tiny(patch_size=(3, 2, 2)), Unsupported, r"patch_size must be 1 in time, got \(3, 2, 2\)"),
    ],
)
def test_what_is_no_stock_transformer_is_refused(change, error, said):
    with pytest.raises(error, match=said):
        enable_block_cache(change(), POLICY)


def with_other(transformer, part):
    class Other(torch.nn.Module):
        pass

    if part == "processor":
        transformer.blocks[1].attn1.set_processor(Other())
    else:
        theta = WanRotaryPosEmbed(24, (1, 2, 2), 64, theta=256.0)
        transformer.rope = theta if part == "theta" else Other()
    return transformer


@pytest.mark.parametrize(
    "policy, options, said",
    [
        ("int8", {}, "policy must be an inferix_kernels.Policy, got str"),
        (Policy(window=6), {}, "format must be named in the policy"),
        (Policy(format="int8"), {}, "frames must be given for a policy without a window"),
        (Policy(window=2, format="int8"), {}, "policy must have a window of at least block_frames=3, got 2"),
        (Policy(window=6, format="int8", archive=True), {}, "policy must not archive"),
        (POLICY, {"block_frames": 0}, "block_frames must be at least 1, got 0"),
    ],
)
def test_arguments_are_checked_before_anything_is_changed(policy, options, said, transformer):
    with pytest.raises(ValueError, match=said):
        enable_block_cache(transformer, policy, **options)
    assert {type(x) for x in transformer.attn_processors.values()} == {WanAttnProcessor}


def test_calls_that_do_not_fit_the_block_are_one_line(cache, transformer):
    with pytest.raises(RuntimeError, match=r"no block is open: call the transformer inside `with cache\.block\("):
        call(transformer)
    with pytest.raises(RuntimeError, match="commit needs an open block"):
        cache.commit(latents())
    for frames, said in ((4, "block_frames=3, got 4"), (0, "got 0"), (1.5, "whole number")):
        with pytest.raises(ValueError, match=said), cache.block(frames):
            pass
    make_block(cache, 1)
    with pytest.raises(RuntimeError, match="a block is open already"), cache.block(3), cache.block(3):
        pass
    with pytest.raises(ValueError, match="must have the 3 frames of the open block, got 2"), cache.block(3):
        call(transformer, latents(frames=2))
    with pytest.raises(ValueError, match=r"as in the first call, .*height=4.*got .*height=8"), cache.block(3):
        call(transformer, latents(height=8))
    with (
        pytest.raises(ValueError, match=r"must be \[B, C, frames, height, width\], got \[16, 3, 4, 6\]"),
        cache.block(3),
    ):
        cache.commit(latents()[0], encoder_hidden_states=TEXT)
    with pytest.raises(RuntimeError, match="committed already"), cache.block(3):
        cache.commit(latents(), encoder_hidden_states=TEXT)
        call(transformer)
    with pytest.raises(RuntimeError, match="no call of the transformer is under way"):
        cache.get(0).get()
    for edit in (cache.disable, cache.reset):
        with pytest.raises(RuntimeError, match="needs the open block to be left first"), cache.block(np.int64(3)):
            edit()
    with pytest.raises(RuntimeError, match="requires a gradient"), cache.block(3):
        transformer(latents(), timestep=torch.tensor([9.0]), encoder_hidden_states=TEXT)
    assert (cache.next_frame, cache.held()) == (3, [0, 1, 2])  # whatever was raised, blocks were forgotten


def test_every_branch_that_is_used_is_committed(cache, transformer):
    with pytest.raises(RuntimeError, match="the transformer was not called in this block"), cache.block(3):
        pass
    with pytest.raises(RuntimeError, match=r"'cond' was not committed: call cache\.commit"), cache.block(3):
        call(transformer)
    with cache.block(3):
        call(transformer)
        cache.abandon()  # which says so
    assert cache.next_frame == 0

    def both():
        call(transformer)  # outside of any context: "cond"
        with transformer.cache_context("uncond"):
            call(transformer, latents(2))

    with cache.block(3):
        both()
        cache.commit(latents())
    with cache.block(3):
        both()
        for name in ("cond", "uncond"):
            with transformer.cache_context(name):
                cache.commit(latents())
    with cache.block(3):
        both()
        with transformer.cache_context("uncond"):
            cache.commit(latents())
        cache.commit(latents())  # the rest
    with pytest.raises(RuntimeError, match="'uncond' was not committed"), cache.block(3):
        both()
        with transformer.cache_context("cond"):
            cache.commit(latents())
    with pytest.raises(RuntimeError, match="'uncond' was not used in this block"), cache.block(3):
        call(transformer)
        cache.commit(latents())
    late = transformer.cache_context("late")
    with pytest.raises(RuntimeError, match="'late' is new: it must be used in every block"), cache.block(3), late:
        call(transformer)
    assert cache.next_frame == 9 and cache.held("cond") == cache.held("uncond") and cache.held("late") == []
    cache.reset()
    with pytest.raises(ValueError, match=r"as in the first call, .*height=4.*got .*height=8"), cache.block(3):
        call(transformer)
        with transformer.cache_context("uncond"):
            call(transformer, latents(height=8))


def test_a_block_that_fails_was_never_there(cache, transformer):
    wanted = [make_block(cache, seed) for seed in range(5)]
    cache.reset()
    got = []
    for seed in range(5):
        with pytest.raises(KeyboardInterrupt), cache.block(3):
            call(transformer, latents(77))
            cache.commit(latents(77))
            raise KeyboardInterrupt
        got.append(make_block(cache, seed))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_layers_that_another_hook_skips_are_noticed(cache, transformer):
    with pytest.raises(Unsupported, match="enable_cache: caches that skip layers"), cache.block(3):
        transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        call(transformer)
    transformer.disable_cache()
    block = transformer.blocks[1]
    block.forward = lambda x, *others: x
    with pytest.raises(RuntimeError, match=r"commit: layers \[1\] were not run"), cache.block(3):
        cache.commit(latents(), encoder_hidden_states=TEXT)
    assert cache.next_frame == 0


def test_what_another_tool_replaced_since_is_left_alone(cache, transformer):
    attention = transformer.blocks[1].attn1
    ours, other = attention.processor, WanAttnProcessor()
    attention.set_processor(other)
    with pytest.raises(RuntimeError, match=r"disable: blocks.1.attn1.processor was replaced since by another tool"):
        cache.disable()
    assert attention.processor is other and type(transformer.rope) is not WanRotaryPosEmbed
    attention.set_processor(ours)
    cache.disable()


def test_sizes_of_the_next_video_are_free(cache):
    assert isinstance(cache, BlockCache) and cache.nbytes == 0
    make_block(cache, 0)
    small = cache.nbytes
    cache.clear()
    with cache.block(2):
        cache.commit(latents(frames=2, height=80), encoder_hidden_states=TEXT)
    assert cache.nbytes > small and cache.next_frame == 2
