"""One layer of the cache of a stock Wan transformer, under our processor, others' and compiled ones."""

import pytest
import torch

from inferix_kernels import Policy
from inferix_kernels.integrations.diffusers import CacheLayer, enable_block_cache
from tests.integrations.bytes import Allocations
from tests.integrations.tiny_wan import POLICY, TEXT, call, latents, make_block, tiny

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
from diffusers.models.transformers.transformer_wan import WanAttnProcessor


@pytest.fixture
def transformer():
    return tiny()


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
