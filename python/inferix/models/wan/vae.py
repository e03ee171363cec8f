"""Pictures from latents, block by block: the Wan VAE of diffusers, with its cache kept from one block to the next.

LightVAE (github.com/ModelTC/LightX2V) is the same network with a quarter of the channels, under the same names. Much
smaller ones of another architecture are in tiny_vae.py; what all share, in video.py.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inferix_kernels._install import require

from .containers import pretrained, read_tensors, reading, shape_of
from .tiny_vae import MARK, tiny_vae
from .video import VideoVAE

PUBLISHED = "Wan2.1_VAE.pth"


def has_vae(folder: Path) -> bool:
    return (folder / "vae").is_dir() or (folder / PUBLISHED).exists()


def load_vae(folder: Path, device: torch.device | str = "cpu") -> VideoVAE:
    """The VAE in a folder: vae/ (diffusers' layout) or the file that Wan published.

    Raises:
        ImportError: diffusers is not installed; names the extra.
    """
    if not (folder / "vae").is_dir():
        return read_vae(folder / PUBLISHED, device, "weights")
    # Without accelerate it is read whole in any case; said so, diffusers does not warn of it.
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    return _opened(pretrained(_diffusers("weights"), folder / "vae", "a VAE", **options), folder / "vae", device)


def read_vae(path: Path, device: torch.device | str = "cpu", argument: str = "vae") -> VideoVAE:
    """The VAE in a file: the one that Wan published, LightVAE, TAEHV's for Wan 2.1 or LightTAE, by the tensors in it.

    Args:
        argument: that errors name.

    Raises:
        ImportError: diffusers, which the first two need, is not installed; names the extra.
        ValueError: it is none of these; says what it lacks.
    """
    tensors, _ = read_tensors(path, argument=argument)
    if MARK in tensors:
        return tiny_vae(tensors, path, device, argument)
    # diffusers' defaults are Wan2.1's sizes, but for the width.
    width = shape_of(tensors, "encoder.conv1.weight", (5,), str(path), "Wan VAE", argument)[0]
    kind = _diffusers(argument)
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with reading(path, "a Wan VAE", argument):
        model = kind(base_dim=width)
        model.load_state_dict(convert_wan_vae_to_diffusers(tensors))
    return _opened(model, path, device)


def _diffusers(argument: str) -> Any:
    return require("diffusers", "wan", f"{argument}: the VAE").AutoencoderKLWan


def _opened(model: Any, path: Path, device: torch.device | str) -> VAE:
    model = model.eval().requires_grad_(False).to(device)
    with reading(path, "that of a VAE"):
        return VAE(model)


class VAE(VideoVAE):
    """Wan's. diffusers' model keeps the state of an encoding in itself, so these take turns; streams have their own.

    Anything with diffusers' `decoder(x, feat_cache=, feat_idx=, first_chunk=)` and `encode` will do.
    """

    def __init__(self, model: Any):
        super().__init__(model.device, model.dtype)
        self.model, self.turn = model, threading.Lock()
        mean, std = (torch.tensor(model.config[f"latents_{name}"], dtype=torch.float32) for name in ("mean", "std"))
        size = (model.config["z_dim"],)
        if (
            mean.shape != size
            or std.shape != size
            or not mean.isfinite().all()
            or not (std.isfinite() & (std > 0)).all()
        ):
            raise ValueError(f"latents_mean and latents_std must be {size[0]} numbers each, those of std positive")
        self.mean, self.std = (x.view(1, -1, 1, 1, 1).to(model.device, model.dtype) for x in (mean, std))

    def begin(self) -> list[Any]:
        with self.turn:  # as many as the model counts for itself
            self.model.clear_cache()
            return [None] * len(self.model._feat_map)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        with self.turn:
            encoded = self.model.encode(pictures.transpose(0, 1)[None]).latent_dist.mode()
        return ((encoded - self.mean) / self.std)[0].transpose(0, 1).float()

    def decode(self, latents: Tensor, memory: list[Any]) -> Tensor:
        z = latents.transpose(0, 1)[None].to(self.mean) * self.std + self.mean
        x, pictures = self.model.post_quant_conv(z), []
        for i in range(x.shape[2]):
            frame, first = x[:, :, i : i + 1], memory[0] is None
            pictures.append(self.model.decoder(frame, feat_cache=memory, feat_idx=[0], first_chunk=first))
        return torch.cat(pictures, 2)[0].transpose(0, 1)
