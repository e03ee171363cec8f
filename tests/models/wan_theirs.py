"""diffusers' Wan transformer with the weights of ours, and our loop with given noise, to be compared."""

import torch

from inferix.decode.sequential import SequentialDecoder
from inferix.models.wan.names import canonical
from tests.models.wan_golden import published


class Float64Sinusoids(torch.nn.Module):
    """In place of diffusers': theirs are float32, 3e-5 off at t = 1000."""

    def forward(self, timesteps):
        angles = timesteps.double()[:, None] * 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
        return torch.cat([angles.cos(), angles.sin()], 1)


def theirs_like(network):
    """diffusers' transformer with the weights of ours."""
    from diffusers import WanTransformer3DModel

    config = network.config
    model = WanTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.channels_in,
        out_channels=config.channels_out,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn,
        num_layers=config.layers,
        image_dim=config.image_dim or None,
        added_kv_proj_dim=config.dim if config.image_dim else None,
    )
    drawn, state = published(network), model.state_dict()
    keys = list(state)
    names = canonical({name: torch.tensor(i) for i, name in enumerate(keys)}, "diffusers")
    model.load_state_dict({keys[int(i)]: drawn[name].view_as(state[keys[int(i)]]) for name, i in names.items()})
    model.condition_embedder.timesteps_proj = Float64Sinusoids()
    return model.to(network.dtype).eval()


class Watched(SequentialDecoder):
    """Notes the latents after every step; begins with given noise."""

    def __init__(self, *args, noise):
        super().__init__(*args)
        self.noise, self.seen = iter(noise), []

    def _noise(self, frames):
        return next(self.noise)

    def _sampler(self, levels, frames):
        sampler = super()._sampler(levels, frames)

        def noting(*args):
            self.seen.append(sampler(*args))
            return self.seen[-1]

        return noting
