"""Pictures from latents, block by block: the Wan VAE of diffusers, with its cache kept from one block to the next.

The decoder is causal in time: the first latent frame of a world gives one picture, every other four, and what it needs
of earlier frames is the input of its convolutions. Keeping that for each world, a block is decoded as it comes, and the
video is the one that decoding everything at once would give.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inferix_kernels._install import require

from ...decode.contract import PictureStream
from ...finite import to_bytes
from .containers import pretrained, read_tensors, reading, shape_of

PUBLISHED = "Wan2.1_VAE.pth"
PICTURES = 4  # per latent frame after the first


def _pictures_of(latents: int) -> int:
    """That so many latents give where a stream begins with them."""
    return 1 + PICTURES * (latents - 1)


def has_vae(folder: Path) -> bool:
    return (folder / "vae").is_dir() or (folder / PUBLISHED).exists()


def load_vae(folder: Path, device: torch.device | str = "cpu") -> VAE:
    """The VAE in a folder: vae/ (diffusers' layout) or the file that Wan published.

    Raises:
        ImportError: diffusers is not installed; names the extra.
    """
    kind = require("diffusers", "wan", "weights: the VAE").AutoencoderKLWan
    if (folder / "vae").is_dir():
        # Without accelerate it is read whole in any case; said so, diffusers does not warn of it.
        options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
        model = pretrained(kind, folder / "vae", "a VAE", **options)
    else:
        model = _published_vae(folder / PUBLISHED, kind)
    model = model.eval().requires_grad_(False).to(device)
    with reading(folder, "that of a VAE"):
        return VAE(model)


def _published_vae(path: Path, kind: Any) -> Any:
    """diffusers' model from the file that Wan published: its defaults are Wan2.1's sizes, but for the width."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    tensors, _ = read_tensors(path)
    width = shape_of(tensors, "encoder.conv1.weight", (5,), str(path), "Wan VAE")[0]
    with reading(path, "a Wan VAE"):
        model = kind(base_dim=width)
        model.load_state_dict(convert_wan_vae_to_diffusers(tensors))
    return model


class VAE:
    """One VAE for all worlds; `open` gives each its own stream. Any thread may use it: diffusers' model keeps the state
    of an encoding in itself, so encodings take turns; streams have their own.

    Anything with diffusers' `decoder(x, feat_cache=, feat_idx=, first_chunk=)` and `encode` will do.
    """

    def __init__(self, model: Any):
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

    def open(self, overlap: int = 0, goes_on: bool = False) -> VideoStream:
        """One world's stream.

        Args:
            overlap: latent frames that `restart` is given, where it is more than a block.
            goes_on: the pictures go on where a new rollout begins.
        """
        return VideoStream(self, overlap, goes_on)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 [1 + 4 k, height, width, 3] -> latents [1 + k, channels, height / 8, width / 8] float32."""
        if (len(frames) - 1) % PICTURES:
            raise ValueError(f"frames must be 1 + {PICTURES} k for the VAE to encode, got {len(frames)}")
        pictures = torch.tensor(frames).permute(3, 0, 1, 2)[None]
        return self.encode_pictures(pictures.to(self.model.device, self.model.dtype) / 127.5 - 1)

    @torch.inference_mode()
    def encode_start(self, picture: np.ndarray, frames: int) -> Tensor:
        """Latents [frames, ...] of a video that begins with a picture, uint8 [height, width, 3], and then is grey."""
        pictures = torch.zeros(1, 3, 1 + PICTURES * (frames - 1), *picture.shape[:2])
        pictures[0, :, 0] = torch.tensor(picture).permute(2, 0, 1) / 127.5 - 1
        return self.encode_pictures(pictures.to(self.model.device, self.model.dtype))

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """[1, 3, pictures, height, width] in [-1, 1] -> latents [frames, channels, h, w] float32."""
        with self.turn:
            encoded = self.model.encode(pictures).latent_dist.mode()
        latents = (encoded - self.mean) / self.std
        return latents[0].transpose(0, 1).float()


class VideoStream(PictureStream):
    """One world's pictures. Call it with each block's latents in turn."""

    looks_back = True

    def __init__(self, vae: VAE, overlap: int = 0, goes_on: bool = False):
        self.vae, self.overlap, self.goes_on = vae, overlap, goes_on
        self._reset()

    def _reset(self) -> None:
        # One entry per convolution that looks back in time; as many as the model counts for itself.
        with self.vae.turn:
            self.vae.model.clear_cache()
            self._cache: list[Any] = [None] * len(self.vae.model._feat_map)
        self._first = True
        self._tail: Tensor | None = None  # the last pictures, for `restart`

    def fork(self) -> VideoStream:
        """Another stream that goes on from here. What is kept of the past is replaced, never changed."""
        other = copy.copy(self)
        other._cache = list(self._cache)
        return other

    def state(self) -> dict[str, Any]:
        """All of it, as plain values and tensors in host memory; `restore` takes it back."""
        cache = [x.cpu() if isinstance(x, Tensor) else x for x in self._cache]
        return {"cache": cache, "first": self._first, "tail": None if self._tail is None else self._tail.cpu()}

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is None:
            raise TypeError("no state of a stream that looks back")
        device = self.vae.mean.device
        if not isinstance(state["cache"], list) or len(state["cache"]) != len(self._cache):
            raise TypeError(f"cache must have {len(self._cache)} entries")
        self._cache = [x.to(device) if isinstance(x, Tensor) else x for x in state["cache"]]
        self._first = state["first"]
        self._tail = None if state["tail"] is None else state["tail"].to(device)

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> np.ndarray:
        """[frames, channels, h, w] -> uint8 [pictures, 8 h, 8 w, 3]."""
        pictures = self._decode(latents)
        shown = pictures if self._tail is None else torch.cat([self._tail, pictures], 2)
        self._tail = shown[:, :, -_pictures_of(max(self.overlap, len(latents))) :].clone()
        return to_bytes(pictures[0].permute(1, 2, 3, 0))

    @torch.inference_mode()
    def restart(self, latents: Tensor) -> Tensor:
        """Begin anew with the latents decoded last; returns them as a rollout that begins there has them.

        A stream's first latent stands for one picture, not four, so the first of these is encoded again, from the last
        picture that it gave. The others stay. The pictures of the overlap have been shown and are not given again.

        Raises:
            ValueError: these are more latents than the last block's and `VAE.open` was told of no such overlap.

        Source: the long-video script of github.com/tianweiy/CausVid. Where the pictures go on, that of
        github.com/krea-ai/realtime-video.
        """
        assert self._tail is not None
        if (wanted := _pictures_of(len(latents))) > self._tail.shape[2]:
            raise ValueError(f"overlap must be {len(latents)} latents of VAE.open, got {self.overlap}")
        first = self.vae.encode_pictures(self._tail[:, :, -wanted][:, :, None]).to(latents)
        begun = torch.cat([first, latents[1:]])
        if self.goes_on:
            return begun
        self._reset()
        self._tail = self._decode(begun)
        return begun

    def _decode(self, latents: Tensor) -> Tensor:
        """[1, 3, pictures, height, width] in [-1, 1]."""
        vae = self.vae
        z = latents.transpose(0, 1)[None].to(vae.mean) * vae.std + vae.mean
        x, pictures = vae.model.post_quant_conv(z), []
        for i in range(x.shape[2]):
            frame = x[:, :, i : i + 1]
            pictures.append(vae.model.decoder(frame, feat_cache=self._cache, feat_idx=[0], first_chunk=self._first))
            self._first = False
        made = torch.cat(pictures, 2)
        return made.clamp(-1, 1) + 0 * made  # what is infinite must not look like white: it becomes NaN
