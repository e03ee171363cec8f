"""Pictures from latents, block by block: the Wan VAEs of diffusers, with their cache kept from one block to the next.

Wan2.1's has 16 channels and a stride of 8. That of Wan2.2's 5B model has 48 and a stride of 16: it works on tiles of
2 x 2 pixels, and a shortcut goes past each of its levels. LightVAE (github.com/ModelTC/LightX2V) is the former with a
quarter of the channels, under the same names. Much smaller ones of another architecture are in tiny_vae.py; what all
share, in video.py.

Source: names and numbers of wan/modules/vae2_2.py of github.com/Wan-Video/Wan2.2, as NVlabs/LongLive (7860ad9) has it.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inferix_kernels._install import require

from .containers import pretrained, read_tensors, reading, shape_of
from .tiny_vae import MARK, tiny_vae
from .video import VideoVAE

PUBLISHED = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
# Means of the latents' channels of Wan2.2's 5B model, and then their standard deviations.
# fmt: off
LATENTS22 = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on
SIZES22: dict[str, Any] = {
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
SIZES22 |= {"is_residual": True, "latents_mean": LATENTS22[:48], "latents_std": LATENTS22[48:]}
# Wan2.2's names of the tensors in a level -> diffusers', applied in this order.
LEVEL = r"^(encoder\.down|decoder\.up)samples\.(\d+)\.(?:down|up)samples"
NAMES22 = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (LEVEL + r"\.(\d+)\.residual\.0\.", r"\1_blocks.\2.resnets.\3.norm1."),
        (LEVEL + r"\.(\d+)\.residual\.2\.", r"\1_blocks.\2.resnets.\3.conv1."),
        (LEVEL + r"\.(\d+)\.residual\.3\.", r"\1_blocks.\2.resnets.\3.norm2."),
        (LEVEL + r"\.(\d+)\.residual\.6\.", r"\1_blocks.\2.resnets.\3.conv2."),
        (LEVEL + r"\.(\d+)\.shortcut\.", r"\1_blocks.\2.resnets.\3.conv_shortcut."),
        (LEVEL + r"\.\d+\.(resample\.1|time_conv)\.", r"\1_blocks.\2.\1sampler.\3."),
        (r"\.(?:encoder|decoder)\.(down|up)sampler\.", r".\1sampler."),
    )
]


def has_vae(folder: Path) -> bool:
    return (folder / "vae").is_dir() or any((folder / name).exists() for name in PUBLISHED)


def load_vae(folder: Path, device: torch.device | str = "cpu") -> VideoVAE:
    """The VAE in a folder: vae/ (diffusers' layout) or the file that Wan published.

    Raises:
        ImportError: diffusers is not installed; names the extra.
        ValueError: the folder holds both files; or as `read_vae`.
    """
    if not (folder / "vae").is_dir():
        first, *more = [folder / name for name in PUBLISHED if (folder / name).exists()]
        if more:
            raise ValueError(f"weights: {folder} holds two VAEs, {' and '.join(PUBLISHED)}: name one with vae")
        return read_vae(first, device, "weights")
    # Without accelerate it is read whole in any case; said so, diffusers does not warn of it.
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    return _opened(pretrained(_diffusers("weights"), folder / "vae", "a VAE", **options), folder / "vae", device)


def read_vae(path: Path, device: torch.device | str = "cpu", argument: str = "vae") -> VideoVAE:
    """The VAE in a file: those that Wan published, LightVAE, TAEHV's for Wan 2.1 or LightTAE, by the tensors in it.

    Args:
        argument: that errors name.

    Raises:
        ImportError: diffusers, which Wan's and LightVAE need, is not installed; names the extra.
        ValueError: it is none of these; says what it lacks.
    """
    tensors, _ = read_tensors(path, argument=argument)
    if MARK in tensors:
        return tiny_vae(tensors, path, device, argument)
    # diffusers' defaults are Wan2.1's sizes, but for the width.
    width = shape_of(tensors, "encoder.conv1.weight", (5,), str(path), "Wan VAE", argument)[0]
    sizes: dict[str, Any] = {"base_dim": width}
    renamed: dict[str, Tensor] = {}
    if any(re.match(LEVEL, name) for name in tensors):
        deepest = shape_of(tensors, "decoder.conv1.weight", (5,), str(path), "Wan VAE", argument)[0]
        sizes |= SIZES22 | {"decoder_base_dim": deepest // 4}  # the last of dim_mult
        renamed = {_name22(name): x for name, x in tensors.items() if re.match(LEVEL, name)}
        tensors = {name: x for name, x in tensors.items() if not re.match(LEVEL, name)}
    kind = _diffusers(argument)
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with reading(path, "a Wan VAE", argument):
        model = kind(**sizes)
        model.load_state_dict(convert_wan_vae_to_diffusers(tensors) | renamed)
    return _opened(model, path, device)


def _name22(name: str) -> str:
    """diffusers' name of a tensor in a level of Wan2.2's VAE."""
    for pattern, replacement in NAMES22:
        name = pattern.sub(replacement, name)
    return name


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
        self.channels, self.stride = model.config["z_dim"], model.config.get("scale_factor_spatial", 8)
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
        made = torch.cat(pictures, 2)
        if tile := self.model.config.get("patch_size"):
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            made = unpatchify(made, tile)
        return made[0].transpose(0, 1)
