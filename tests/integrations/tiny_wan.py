"""A stock Wan transformer of diffusers, tiny and random, and calls of it."""

import torch

from inferix_kernels import Policy

POLICY = Policy(window=6, sink=3, format="int8")
SIZES = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 32, "text_dim": 8}


def tiny(**changes):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(**{**SIZES, "freq_dim": 16, **changes}).eval()


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
