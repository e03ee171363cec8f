"""Pictures from Wan 2.1's latents by a network of 11 million weights: TAEHV, and LightTAE, which has its shape.

Both are two chains of 2D convolutions. Time is in three kinds of layers: `Recall` also sees what it saw a time step
earlier, `Pool` makes one step of several, `Grow` several of one. A decoder gives four pictures for every latent, of
which the first three of a video are dropped, as Wan's first latent is one picture. An encoder takes pictures four by
four, the last one repeated to fill its four.

Source: taehv.py of github.com/madebyollin/taehv (1f14a56), whose names for tensors these are (taew2_1.pth), and
lightx2v/models/video_encoders/hf/wan/vae_tiny.py of github.com/ModelTC/LightX2V (f8aee98) for LightTAE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .containers import check_floating, shown
from .video import PICTURES, VideoVAE

MARK = "decoder.1.weight"  # no other VAE of Wan's latents has a tensor of this name
LIGHT = "lighttae"  # in the name of a file: of latents that are not normalised
CHANNELS, ENCODER, DECODER = 16, (64, 64, 64, 64), (256, 128, 64, 64)  # of latents; after each change of size
RECALLS = 3  # between two changes of the picture's size
# Of each channel of Wan 2.1's latents; TAEHV takes and gives what the network denoises, (z - mean) / std.
# fmt: off
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


def conv(channels_in: int, channels_out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **options)


class Recall(nn.Module):
    """A residual block over the picture and the one a time step earlier."""

    def __init__(self, channels: int):
        super().__init__()
        rest = (nn.ReLU(), conv(channels, channels))
        self.conv = nn.Sequential(conv(2 * channels, channels), *rest, nn.ReLU(), conv(channels, channels))

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        """[steps, channels, h, w]; `before`: the step before these, [1, channels, h, w]."""
        before = torch.zeros_like(x[:1]) if before is None else before
        earlier = torch.cat([before, x[:-1]])
        return torch.relu(self.conv(torch.cat([x, earlier], 1)) + x)


class Pool(nn.Module):
    """`steps` time steps become one."""

    def __init__(self, channels: int, steps: int):
        super().__init__()
        self.steps, self.conv = steps, nn.Conv2d(channels * steps, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x.unflatten(0, (-1, self.steps)).flatten(1, 2))
        return made


class Grow(nn.Module):
    """One time step becomes `steps`."""

    def __init__(self, channels: int, steps: int):
        super().__init__()
        self.steps, self.conv = steps, nn.Conv2d(channels, channels * steps, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x)
        return made.unflatten(1, (self.steps, -1)).flatten(0, 1)


class Soft(nn.Module):
    """Keeps latents between -3 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class TinyNetwork(nn.Module):
    """Encoder and decoder; submodules are numbered as in the published files.

    Args:
        encoder, decoder: channels; of another size than the published one for tests and benchmarks.
    """

    def __init__(self, encoder: Sequence[int] = ENCODER, decoder: Sequence[int] = DECODER):
        super().__init__()
        layers: list[nn.Module] = [conv(3, encoder[0]), nn.ReLU()]
        for channels, following, steps in zip(encoder, encoder[1:], (2, 2, 1)):
            layers += [Pool(channels, steps), conv(channels, following, stride=2, bias=False)]
            layers += [Recall(following) for _ in range(RECALLS)]
        self.encoder = nn.Sequential(*layers, conv(encoder[-1], CHANNELS))
        layers = [Soft(), conv(CHANNELS, decoder[0]), nn.ReLU()]
        for channels, following, steps in zip(decoder, decoder[1:], (1, 2, 2)):
            layers += [Recall(channels) for _ in range(RECALLS)]
            layers += [nn.Upsample(scale_factor=2), Grow(channels, steps), conv(channels, following, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), conv(decoder[-1], 3))


def remembered(chain: nn.Sequential) -> list[Tensor | None]:
    """The memory of a chain that begins."""
    return [None] * sum(isinstance(layer, Recall) for layer in chain)


def run(chain: nn.Sequential, x: Tensor, memory: list[Any]) -> Tensor:
    """The next time steps [steps, channels, h, w] through a chain; entries of `memory` are replaced."""
    recalls = 0
    for layer in chain:
        if isinstance(layer, Recall):
            x, memory[recalls] = layer(x, memory[recalls]), x[-1:]
            recalls += 1
        else:
            x = layer(x)
    return x


class TinyVAE(VideoVAE):
    """TAEHV for Wan 2.1, or LightTAE.

    Args:
        normalised: latents are as the denoising network has them; else as Wan's VAE has them inside.
    """

    def __init__(self, network: TinyNetwork, normalised: bool = True):
        weight = network.decoder[1].weight
        assert isinstance(weight, Tensor)
        super().__init__(weight.device, weight.dtype)
        self.network = network.eval().requires_grad_(False)
        mean, std = (torch.tensor(x).view(-1, 1, 1).to(self.device) for x in (MEAN, STD))
        self.mean, self.std = (torch.zeros_like(mean), torch.ones_like(std)) if normalised else (mean, std)

    def begin(self) -> list[Any]:
        return remembered(self.network.decoder)

    def decode(self, latents: Tensor, memory: list[Any]) -> Tensor:
        pictures = []
        for latent in (latents.to(self.device, torch.float32) * self.std + self.mean).to(self.dtype).split(1):
            first = memory[0] is None
            made = run(self.network.decoder, latent, memory)
            pictures.append(made[-1:] if first else made)
        return torch.cat(pictures) * 2 - 1

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        x = (pictures + 1) / 2
        x = torch.cat([x, x[-1:].expand(-len(x) % PICTURES, -1, -1, -1)])
        memory = remembered(self.network.encoder)
        latents = torch.cat([run(self.network.encoder, four, memory) for four in x.split(PICTURES)])
        return (latents.float() - self.mean) / self.std


def tiny_vae(
    tensors: Mapping[str, Tensor], path: Path, device: torch.device | str = "cpu", argument: str = "vae"
) -> TinyVAE:
    """The VAE of a file's tensors, in float32 on a CPU and, as its author runs it, in float16 elsewhere.

    LightTAE's names and shapes are those of TAEHV, but its latents are scaled otherwise, so that the name of the file
    says which it is, here as in LightX2V.

    Args:
        argument: that errors name.

    Raises:
        ValueError: a tensor is missing, one too many, or of another shape: of a VAE for other latents, say. Names it.
    """
    with torch.device("meta"):
        network = TinyNetwork()
    wanted, given = network.state_dict(), dict(tensors)
    for name in wanted.keys() & given.keys():  # a file may hold more steps of a Grow; ours are the last ones
        if name.endswith("conv.weight") and given[name].ndim == 4 and len(given[name]) % len(wanted[name]) == 0:
            given[name] = given[name][-len(wanted[name]) :]
    if names := sorted(wanted.keys() ^ given.keys()):
        which = "it has no" if names[0] in wanted else "it also has"
        raise ValueError(f"{argument}: {path} is no tiny VAE of Wan 2.1's latents: {which} {shown(names)}")
    for name, x in wanted.items():
        if x.shape != given[name].shape:
            shapes = f"must be {list(x.shape)}, got {list(given[name].shape)}"
            raise ValueError(f"{argument}: {path} is no tiny VAE of Wan 2.1's latents: {name} {shapes}")
    check_floating(given, wanted, str(path), argument)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    network.load_state_dict({name: given[name].to(device, dtype) for name in wanted}, assign=True)
    return TinyVAE(network, LIGHT not in path.name.lower())
