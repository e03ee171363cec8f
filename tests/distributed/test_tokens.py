"""Tokens of a frame cut among ranks: networks of each family compute what one process does."""

from itertools import chain

import pytest
import torch
import torch.nn.functional as F

from inferix.models.tiny.model import TinyConfig, TinyWorldModel
from inferix_kernels.distributed import TokenShard, WholeFrames, in_process_group, run_ranks
from inferix_kernels.distributed.wire import rows_of
from tests.models import magi_folder
from tests.models.wan_golden import random_network, tiny_config

FRAMES = (3, 2)  # of two blocks


def dense(heads, kv_heads, shard, tokens):
    """Attention over all rows of the forward, from and to a rank's own."""

    def attend(layer, qkv, norm_q, norm_k, eps=1e-6, **options):
        rows = qkv.flatten(0, -2).unflatten(0, (-1, cuts_of(shard, tokens)))
        q, k, v = (
            shard.whole(rows, tokens).flatten(0, 1).unflatten(-1, (heads + 2 * kv_heads, -1)).movedim(1, 0)
        ).split([heads, kv_heads, kv_heads])
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=heads > kv_heads)[0]
        own = shard.own(out.transpose(0, 1).flatten(1).unflatten(0, (-1, tokens)))
        return own.reshape(*qkv.shape[:-1], -1)

    return attend


def cuts_of(shard, tokens):
    """How many tokens of a frame are this rank's."""
    return shard.own(torch.empty(tokens, 1)).shape[0]


def tiny():
    torch.manual_seed(0)
    network = TinyWorldModel(TinyConfig(layers=2)).requires_grad_(False)
    generator, tokens = torch.Generator().manual_seed(1), network.config.frame_tokens
    x = torch.randn(1, 2, 3 * tokens, network.config.patch, generator=generator)
    actions = torch.randint(0, 5, (1, 2, 3), generator=generator)
    cross, times = network.prompt_cache(torch.tensor([[[0, 0], [1, 1]]])), torch.tensor([[0.0, 0.5]])
    return lambda shard: network(x, times, actions, cross, dense(4, 4, shard, tokens), shard=shard)


def wan():
    network = random_network(tiny_config()).requires_grad_(False)
    config, generator = network.config, torch.Generator().manual_seed(1)
    blocks = [torch.randn(frames, config.channels_in, 6, 10, generator=generator) for frames in FRAMES]
    crosses = [network.cross_cache(torch.randn(n, config.text_dim, generator=generator)) for n in (4, 9)]
    times, heads = torch.tensor([999.0] * 3 + [0.0] * 2), config.heads
    return lambda shard: network(blocks, times, crosses, dense(heads, heads, shard, 15), 0, shard)


def magi(frames=FRAMES):
    network = magi_folder.random_network(magi_folder.tiny_config()).requires_grad_(False)
    config, generator = network.config, torch.Generator().manual_seed(1)
    blocks = [torch.randn(n, config.channels, 6, 10, generator=generator) for n in frames]
    crosses = [network.cross_cache(torch.randn(n, config.caption_dim, generator=generator)) for n in (4, 9)]
    times, heads = torch.tensor([0.2, 0.9]), (config.heads, config.kv_heads)
    return lambda shard: torch.cat(network(blocks, times, crosses, dense(*heads, shard, 15), shard=shard))


def magi_of_even_blocks():
    return magi(frames=(2, 2))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", [tiny, wan, magi, magi_of_even_blocks])
def test_networks_cut_among_ranks_are_the_network(case, ranks):
    run = case()
    expected = run(WholeFrames())
    made = run_ranks(in_process_group(ranks), lambda transport: run(TokenShard(transport)))
    assert all(torch.equal(made[0], other) for other in made[1:])
    assert (made[0] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("tokens", "ranks"), [(10, 4), (8, 8), (3, 8), (1, 3), (0, 2), (1560, 7)])
def test_a_frame_is_cut_evenly_and_put_together_again(tokens, ranks):
    rows = [rows_of(tokens, ranks, rank) for rank in range(ranks)]
    assert [*chain(*rows)] == [*range(tokens)]
    assert {len(each) for each in rows} <= {tokens // ranks, -(-tokens // ranks)}
    x = torch.randn(2, 3, tokens, 5)

    def there_and_back(transport):
        shard = TokenShard(transport)
        own = shard.own(x)
        assert own.shape[-2] == len(rows[transport.rank])
        return shard.whole(own, tokens), transport.sent

    made, sent = zip(*run_ranks(in_process_group(ranks), there_and_back))
    assert all(torch.equal(each, x) for each in made)
    assert sum(sent) == (ranks - 1) * x.numel() * x.element_size()


def test_tokens_of_another_rank_are_refused():
    transport = in_process_group(2)[0]
    with pytest.raises(ValueError, match=r"x must have 5 tokens of each frame, those of rank 0 of 10, got 4"):
        TokenShard(transport).whole(torch.randn(3, 4, 8), 10)
