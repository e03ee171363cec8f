"""What all VAEs of Wan's latents share: the pictures of a world, block by block, and latents of given pictures.

The decoder is causal in time: the first latent frame of a world gives one picture, every other four, and what it needs
of earlier frames is a tensor for each layer that looks back. Keeping these for each world, a block is decoded as it
comes, and the video is the one that decoding everything at once would give.
"""

from __future__ import annotations

import abc
import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...decode.contract import PictureStream
from ...finite import to_bytes

PICTURES = 4  # per latent frame after the first


def _pictures_of(latents: int) -> int:
    """That so many latents give where a stream begins with them."""
    return 1 + PICTURES * (latents - 1)


class VideoVAE(abc.ABC):
    """One VAE for all worlds; `open` gives each its own stream. Any thread may use it.

    Args:
        device, dtype: of its weights.

    Attributes:
        channels: of its latents.
        stride: pixels per pixel of the latent, in each direction.
    """

    channels, stride = 16, 8

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    @abc.abstractmethod
    def begin(self) -> list[Any]:
        """The memory of a stream that begins: None for each layer that looks back, the first of which always has
        something to remember."""

    @abc.abstractmethod
    def decode(self, latents: Tensor, memory: list[Any]) -> Tensor:
        """The next latents [frames, channels, h, w] -> [pictures, 3, height, width], about in [-1, 1]. Entries of
        `memory` are replaced; the tensors in it are never changed."""

    @abc.abstractmethod
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """[1 + 4 k, 3, height, width] in [-1, 1] -> latents [1 + k, channels, h, w] float32."""

    def open(self, overlap: int = 0, goes_on: bool = False) -> VideoStream:
        """One world's stream.

        Args:
            overlap: latent frames that `restart` is given, where it is more than a block.
            goes_on: the pictures go on where a new rollout begins.
        """
        return VideoStream(self, overlap, goes_on)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 [1 + 4 k, height, width, 3] -> latents [1 + k, channels, h, w] float32."""
        if (len(frames) - 1) % PICTURES:
            raise ValueError(f"frames must be 1 + {PICTURES} k for the VAE to encode, got {len(frames)}")
        pictures = torch.tensor(frames).permute(0, 3, 1, 2)
        return self.encode_pictures(pictures.to(self.device, self.dtype) / 127.5 - 1)

    @torch.inference_mode()
    def encode_start(self, picture: np.ndarray, frames: int) -> Tensor:
        """Latents [frames, ...] of a video that begins with a picture, uint8 [height, width, 3], and then is grey."""
        pictures = torch.zeros(1 + PICTURES * (frames - 1), 3, *picture.shape[:2])
        pictures[0] = torch.tensor(picture).permute(2, 0, 1) / 127.5 - 1
        return self.encode_pictures(pictures.to(self.device, self.dtype))


class VideoStream(PictureStream):
    """One world's pictures. Call it with each block's latents in turn."""

    looks_back = True

    def __init__(self, vae: VideoVAE, overlap: int = 0, goes_on: bool = False):
        self.vae, self.overlap, self.goes_on = vae, overlap, goes_on
        self._memory = vae.begin()
        self._tail: Tensor | None = None  # the last pictures, for `restart`

    def fork(self) -> VideoStream:
        """Another stream that goes on from here. What is kept of the past is replaced, never changed."""
        other = copy.copy(self)
        other._memory = list(self._memory)
        return other

    def state(self) -> dict[str, Any]:
        """All of it, as plain values and tensors in host memory; `restore` takes it back."""
        memory = [x.cpu() if isinstance(x, Tensor) else x for x in self._memory]
        return {"cache": memory, "tail": None if self._tail is None else self._tail.cpu()}

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is None:
            raise TypeError("no state of a stream that looks back")
        device = self.vae.device
        if not isinstance(state["cache"], list) or len(state["cache"]) != len(self._memory):
            raise TypeError(f"cache must have {len(self._memory)} entries")
        tail = state["tail"]
        if tail is not None and tail.ndim == 5:  # as earlier versions saved it: [1, 3, pictures, height, width]
            tail = tail[0].transpose(0, 1)
        self._memory = [x.to(device) if isinstance(x, Tensor) else x for x in state["cache"]]
        self._tail = None if tail is None else tail.to(device)

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> np.ndarray:
        """[frames, channels, h, w] -> uint8 [pictures, height, width, 3]; none of no frames, as a pipeline fills."""
        if not len(latents):
            height, width = (self.vae.stride * side for side in latents.shape[2:])
            return np.empty((0, height, width, 3), np.uint8)
        pictures = self._decode(latents)
        shown = pictures if self._tail is None else torch.cat([self._tail, pictures])
        self._tail = shown[-_pictures_of(max(self.overlap, len(latents))) :].clone()
        return to_bytes(pictures.permute(0, 2, 3, 1))

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
        if (wanted := _pictures_of(len(latents))) > len(self._tail):
            raise ValueError(f"overlap must be {len(latents)} latents of VAE.open, got {self.overlap}")
        first = self.vae.encode_pictures(self._tail[-wanted][None].to(self.vae.dtype)).to(latents)
        begun = torch.cat([first, latents[1:]])
        if self.goes_on:
            return begun
        self._memory = self.vae.begin()
        self._tail = self._decode(begun)
        return begun

    def _decode(self, latents: Tensor) -> Tensor:
        """[pictures, 3, height, width] float32 in [-1, 1]."""
        memory = list(self._memory)
        made = self.vae.decode(latents, memory).float()
        self._memory = memory  # only now: a stream whose block could not be decoded is where it was
        return made.clamp(-1, 1) + 0 * made  # what is infinite must not look like white: it becomes NaN
