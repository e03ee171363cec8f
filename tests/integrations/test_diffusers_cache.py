"""The container that makes a stock Wan transformer go block by block: what it refuses, forgets and gives back."""

import numpy as np
import pytest
import torch

from inferix_kernels import Policy, Unsupported
from inferix_kernels.integrations.diffusers import BlockCache, CacheLayer, OffsetRotaryPosEmbed, enable_block_cache
from tests.house.test_docstrings import follow
from tests.integrations.bytes import Allocations

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed  # noqa: E402

POLICY = Policy(window=6, sink=3, format="int8")
SIZES = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 32, "text_dim": 8}


def tiny(**changes):
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(**{**SIZES, "freq_dim": 16, **changes}).eval()


@pytest.fixture
def transformer():
    return tiny()


@pytest.fixture
def cache(transformer):
    return enable_block_cache(transformer, POLICY)


def latents(seed=0, frames=3, height=4):
    return torch.randn(1, 16, frames, height, 6, generator=torch.Generator().manual_seed(seed))


TEXT = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def call(transformer, x=None, t=900.0):
    return transformer(latents() if x is None else x, timestep=torch.tensor([t]), encoder_hidden_states=TEXT).sample


def make_block(cache, seed):
    with cache.block(frames=3):
        flow = call(cache.transformer, latents(seed))
        cache.commit(latents(seed) - flow)
    return flow


def test_the_examples_run():
    for thing in (enable_block_cache, BlockCache, OffsetRotaryPosEmbed):
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


class DenseProcessor(WanAttnProcessor):
    """Stock attention over what a layer of the container holds: the pattern of diffusers' own containers."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        x = hidden_states
        query, key, value = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        query, key, value = (y.unflatten(2, (attn.heads, -1)) for y in (query, key, value))
        cos, sin = (y[..., ::2] for y in rotary_emb)

        def turned(y):
            a, b = y[..., ::2], y[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

        self.layer.update(turned(key), value)
        keys, values = self.layer.get()
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(*(y.transpose(1, 2) for y in (turned(query), keys, values)))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("format, bound", [("fp32", 1e-6), ("int8", 1e-3)])
def test_the_container_serves_processors_of_others(format, bound):
    flows = []
    for own in (True, False):
        cache = enable_block_cache(tiny(), Policy(window=6, sink=3, format=format))
        if not own:
            for i, block in enumerate(cache.transformer.blocks):
                block.attn1.set_processor(DenseProcessor(cache.get(i)))
        flows.append([make_block(cache, seed) for seed in range(4)])
    assert all((a - b).abs().max() < bound for a, b in zip(*flows))


def test_frames_beyond_the_stock_table_have_positions():
    """WanRotaryPosEmbed ends at rope_max_seq_len."""
    short, long = (enable_block_cache(tiny(rope_max_seq_len=n), POLICY) for n in (16, 64))
    for seed in range(6):  # 18 frames
        assert torch.equal(make_block(short, seed), make_block(long, seed))
    stock = tiny(rope_max_seq_len=64).rope
    long._rope.first = 5
    for got, other in zip(long._rope(latents(frames=3)), stock(latents(frames=8))):
        assert got.shape == (1, 3 * 6, 1, 24) and (got - other[:, 5 * 6 :]).abs().max() < 1e-6


def test_fused_projections_are_used(transformer):
    cache = enable_block_cache(transformer, POLICY)
    wanted = [make_block(cache, seed) for seed in range(2)]
    cache.reset()
    for block in transformer.blocks:
        block.attn1.fuse_projections()
    assert all((make_block(cache, seed) - x).abs().max() < 1e-5 for seed, x in enumerate(wanted))


def test_compiled_blocks_do_the_same():
    """One graph for all layers, blocks and passes."""
    from torch._dynamo.testing import CompileCounter

    cache = enable_block_cache(tiny(num_layers=4), Policy(window=6, format="fp32"))
    wanted = [make_block(cache, seed) for seed in range(2)]
    cache.reset()
    counter = CompileCounter()
    cache.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert all((make_block(cache, seed) - x).abs().max() < 1e-5 for seed, x in enumerate(wanted))
    assert counter.frame_count == 1


def test_attention_copies_nothing_of_the_past(transformer, monkeypatch):
    cache, counts, attend = enable_block_cache(transformer, Policy(window=24, format="int8")), [], CacheLayer.attend

    def counted(*arguments):
        with Allocations() as made:
            out = attend(*arguments)
        counts.append(made.nbytes)
        return out

    for seed in range(7):
        with cache.block(frames=3):
            cache.commit(latents(seed), encoder_hidden_states=TEXT)
    assert len(cache.held()) == 21
    monkeypatch.setattr(CacheLayer, "attend", counted)
    with cache.block(frames=3):
        call(transformer)
        tables = [branch.store.pools["int8"].layers[0] for branch in cache._branches.values()]
        call(transformer)
        cache.abandon()
    queries = 3 * 6 * 48 * 4  # bytes: tokens, channels of two heads, float32
    assert len(counts) == 4 and max(counts) < 4 * queries < tables[0].nbytes / 10


def test_sizes_of_the_next_video_are_free(cache):
    assert isinstance(cache, BlockCache) and cache.nbytes == 0
    make_block(cache, 0)
    small = cache.nbytes
    cache.clear()
    with cache.block(2):
        cache.commit(latents(frames=2, height=80), encoder_hidden_states=TEXT)
    assert cache.nbytes > small and cache.next_frame == 2
