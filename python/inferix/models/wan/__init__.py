"""Wan2.1, made causal: Self Forcing, CausVid, LongLive, Causal-Forcing and what differs from them by a table entry. And
Wan2.1 itself, their teacher, which makes a video at once: a block without a past.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from inferix_kernels._check import check_device

from ...decode.contract import Adapter, BlockInput, Model, PagedAttend, PictureStream, Presentation, first_predicted
from ...decode.rolling import RollingSchedule
from ..linears import check_linear, linear_of
from .adapters import ADAPTERS, PARTS, WAN21, customised, latents_of, presentation_of
from .checkpoint import find_checkpoint, load_network
from .image import has_image_encoder, load_image_encoder
from .lora import Lora, find_lora
from .network import CrossCache, WanConfig, WanNetwork, rope_table
from .text import PromptEncoder, has_encoder
from .vae import has_vae, load_vae, read_vae
from .video import PICTURES, VideoVAE

__all__ = ["ADAPTERS", "PARTS", "Wan", "WanConfig", "WanNetwork", "load"]

SHOWN = 3  # rows named in an error
MASK = PICTURES  # channels that say, of each picture that a latent frame stands for, whether it is given


class TextEncoder(Protocol):
    def __call__(self, prompt: str) -> Tensor:
        """[tokens, text_dim] embedding of a prompt, without padding."""


class Wan(Model):
    """A Wan network as the decode loop sees it.

    Args:
        network: its dtype is that of the products; latents stay float32 (float64 for a float64 network).
        adapter: how it is sampled; adapter.size says how large its pictures are.
        text: encodes prompts; without it only `conditioning_from` works.
        open_video: opens a VAE for one world; without it only latents come out.
        encode_video: uint8 [n, height, width, 3] -> latents [frames, channels, h, w].
        encode_start: (uint8 [height, width, 3], frames) -> latents of a video that begins with this picture and is grey
            after it, [frames, channels, h, w]; image-to-video networks take them as further channels of the noise.
        look: uint8 [height, width, 3] -> [tokens, image_dim], if the network also attends to the picture.
    """

    network: WanNetwork
    tokens: Tensor | None = None  # of the picture a video begins with, once `for_video` was given one
    concat_latents: Tensor | None = None  # [frames, mask and latent channels, h, w]: channels after the noisy latents'

    def __init__(
        self,
        network: WanNetwork,
        adapter: Adapter,
        text: TextEncoder | None = None,
        open_video: Callable[[], PictureStream] | None = None,
        encode_video: Callable[[np.ndarray], Tensor] | None = None,
        encode_start: Callable[[np.ndarray, int], Tensor] | None = None,
        look: Callable[[np.ndarray], Tensor] | None = None,
        presentation: Presentation | None = None,
    ):
        config, (channels, stride) = network.config, latents_of(adapter)
        step = [stride * side for side in config.patch]
        if any(side < 1 or side % unit for side, unit in zip(adapter.size, step)):
            raise ValueError(f"size must be multiples of {step[0]} x {step[1]} pixels, got {adapter.size}")
        if config.channels_out != channels:
            raise ValueError(
                f"weights: head.head.weight gives latents of {config.channels_out} channels, those of {adapter.name} "
                f"have {channels}{_rows_of(config.channels_out)}"
            )
        more = config.channels_in - config.channels_out  # of images concatenated to the latents, a whole video of them
        if more not in ((0, MASK + config.channels_out) if adapter.at_once or adapter.picture else (0,)):
            raise ValueError(
                f"weights: this network takes {config.channels_in} channels and gives {config.channels_out}, which "
                f"{adapter.name} can't be: image-to-video networks, of {MASK + 2 * WAN21.channels} channels, are "
                "run as wan-i2v-480p and wan-i2v-720p"
            )
        self.network, self.adapter = network.eval().requires_grad_(False), adapter
        self.presentation = presentation or presentation_of(adapter)
        self.text, self.open_video, self.encode_video = text, open_video, encode_video
        self.encode_start, self.look, self.needs_picture = encode_start, look, bool(more)
        self.layers, self.heads, self.head_dim = config.layers, config.heads, config.head_dim
        height, width = (side // stride for side in adapter.size)
        self.grid = height // config.patch[0], width // config.patch[1]
        self.frame_tokens = self.grid[0] * self.grid[1]
        self.latent_shape = (config.channels_out, height, width)
        self.device, self.dtype = network.head.modulation.device, network.dtype
        self.linear = linear_of(network)
        self.schedule = RollingSchedule(adapter) if adapter.stages else None
        self._conditionings: dict[str, CrossCache] = {}

    def rope(self, frames: Sequence[int]) -> Tensor:
        # The kernels take float32; a float64 network, which only tests have, gets what it needs to be exact.
        dtype = torch.promote_types(self.network.dtype, torch.float32)
        return rope_table(frames, self.grid, self.head_dim, dtype, self.device)

    def begins_shot(self, conditioning: CrossCache) -> bool:
        return conditioning.begins_shot

    @torch.inference_mode()
    def for_video(self, frames: int, picture: np.ndarray | None = None) -> Model:
        """The model for a video of so many pictures, made at once; `picture`, uint8 [height, width, 3], begins it."""
        adapter = self.adapter
        if not adapter.at_once:
            return super().for_video(frames, picture)  # which refuses
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        if (picture is not None) != self.needs_picture:
            wanted = "be given: this network is conditioned on the first picture"
            raise ValueError(f"image must {wanted if self.needs_picture else 'not be given: this network takes none'}")
        count = 1 - (1 - frames) // PICTURES
        other = copy.copy(self)
        other.adapter, other._conditionings = dataclasses.replace(adapter, block_frames=count, window=count), {}
        if picture is not None:
            other.concat_latents, other.tokens = self.seen(picture, count)
        return other

    @torch.inference_mode()
    def with_picture(self, picture: np.ndarray | None) -> Model:
        if not self.adapter.picture:
            return super().with_picture(picture)  # which refuses
        if picture is None:
            raise ValueError(f"image must be given: videos of {self.adapter.name} begin with a picture")
        picture = self._checked(picture)
        other = copy.copy(self)
        other.first_latents = self.encode(picture[None]).to(self.device)
        other.begun_with = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
        return other

    def _checked(self, picture: np.ndarray) -> np.ndarray:
        picture = np.ascontiguousarray(picture)  # torch takes no negative strides
        if picture.dtype != np.uint8 or picture.shape != (*self.adapter.size, 3):
            wanted = [*self.adapter.size, 3]
            raise ValueError(f"image must be uint8 {wanted}, got {picture.dtype} {list(picture.shape)}")
        return picture

    def seen(self, picture: np.ndarray, frames: int) -> tuple[Tensor, Tensor | None]:
        """What the network is given of a picture that a video of so many latent frames begins with: further channels of
        each frame, [frames, MASK + channels, h, w], and the tokens of CLIP, if it takes them."""
        adapter, takes_tokens = self.adapter, bool(self.network.config.image_dim)
        picture = self._checked(picture)
        if self.encode_start is None or (takes_tokens and self.look is None):
            raise ValueError(
                f"image: the weights of {adapter.name} need a VAE next to them and, to look at it, image_encoder/ "
                "or the file that Wan published"
            )
        latents = self.encode_start(picture, frames).to(self.device)
        given = torch.zeros(frames, MASK, *latents.shape[2:]).to(latents)
        given[0] = 1
        tokens = self.look(picture).to(self.device) if self.look and takes_tokens else None
        return torch.cat([given, latents], 1), tokens

    @torch.inference_mode()
    def conditioning(self, prompt: str, actions: Sequence[int | str]) -> CrossCache:
        """The prompt's cross-attention keys and values, computed once per prompt. Wan takes no actions."""
        if actions:
            raise ValueError(f"actions must be none: {self.adapter.name} is steered by words alone, got {actions!r}")
        made = self._conditionings.get(prompt)
        if made is None:
            shots = self.adapter.shots
            made = self.conditioning_from(self.embed(prompt), shots is not None and prompt.startswith(shots.cut))
            self._conditionings = {prompt: made}  # the last prompt alone: 190 MB for 1.3B
        return made

    def prepare(self, prompt: str) -> None:
        """The embedding is in the encoder's cache from now on."""
        self.embed(prompt)

    def embed(self, prompt: str) -> Tensor:
        """A prompt's embedding [tokens, text_dim]."""
        if self.text is None:
            raise ValueError(
                f"prompt: the weights of {self.adapter.name} have no text encoder next to them: its folder needs "
                "text_encoder/ and tokenizer/, or the files that Wan published"
            )
        return self.text(prompt)

    @torch.inference_mode()
    def conditioning_from(self, embedding: Tensor, begins_shot: bool = False) -> CrossCache:
        """The same from a prompt's embedding [tokens, text_dim]."""
        if self.needs_picture and self.concat_latents is None:
            raise ValueError(f"image: {self.adapter.name} is conditioned on the first picture: see for_video")
        if self.adapter.picture and self.first_latents is None:
            raise ValueError(f"image: videos of {self.adapter.name} begin with a picture: see with_picture")
        made = self.network.cross_cache(embedding.to(self.device), self.tokens)
        return dataclasses.replace(made, begins_shot=begins_shot)

    def predict(self, inputs: Sequence[BlockInput], attend: PagedAttend, stride: float | None = None) -> list[Tensor]:
        blocks = [self.channels(block) for block in inputs]
        timesteps = torch.cat([block.t.expand(len(block.x)) for block in inputs])
        first, dtype = first_predicted(inputs), blocks[-1].dtype
        sizes = [0] * first + [len(x) for x in blocks[first:]]
        crosses = [block.conditioning for block in inputs]
        flow = self.network(blocks, timesteps, crosses, attend, first, self.shard)
        if flow is None:
            return [block.x[:0] for block in inputs]
        return list(flow.to(dtype).split(sizes))

    def channels(self, block: BlockInput) -> Tensor:
        """A block's latents with what else an image-to-video network is given of each frame."""
        given = self.concat_latents
        return block.x if given is None else torch.cat([block.x, given.to(block.x)], 1)

    def encode(self, frames: np.ndarray) -> Tensor:
        height, width = self.adapter.size
        if frames.dtype != np.uint8 or frames.shape[1:] != (height, width, 3):
            raise ValueError(f"frames must be uint8 [n, {height}, {width}, 3], got {frames.dtype} {list(frames.shape)}")
        if self.encode_video is None:
            raise ValueError(f"frames: this {self.adapter.name} has no VAE to encode them")
        return self.encode_video(frames)

    def pictures_of(self, latents: int) -> int:
        """The first latent frame stands for one picture, every other for four."""
        return max(0, 1 + PICTURES * (latents - 1))

    def stream(self) -> PictureStream:
        if self.open_video is None:
            raise ValueError(
                f"weights of {self.adapter.name} have no VAE next to them to make pictures: its folder needs vae/, or "
                "the file that Wan published"
            )
        return self.open_video()


def _rows_of(channels: int) -> str:
    """The rows whose latents have so many channels, for an error."""
    names = [name for name, adapter in ADAPTERS.items() if latents_of(adapter).channels == channels]
    return f": {' and '.join(names)} have so many" if 0 < len(names) <= SHOWN else ""


def load(
    weights: str | Path | None = None,
    name: str = "self-forcing",
    *,
    size: tuple[int, int] | None = None,
    lora: Lora = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    linear: str | None = None,
    prompt_cache: str | Path | None = None,
    vae: str | Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    overlap: int | None = None,
) -> Wan:
    """A model of ADAPTERS from its checkpoint.

    Args:
        weights: a folder with the network and, to encode prompts and make pictures, text_encoder/, tokenizer/ and
            vae/ or the files that Wan published; its *lora* file is merged. Or the network's file alone.
        size: pixels (height, width); by default what the model was trained at.
        lora: other low-rank updates: a file, or PEFT's folder; one or several. "FILE=0.8": at that strength.
        device: by default a GPU, if there is one.
        dtype: of the products; by default float32 on the CPU and bfloat16 elsewhere.
        linear: "int8" or "fp8" keeps the weights of the inner linear layers in 8 bits (WanNetwork.FULL_PRECISION names
            the others) and multiplies in 8 bits; "bf16" is dtype=torch.bfloat16. None: as the checkpoint has them.
        prompt_cache: folder for prompt embeddings; by default text.CACHE, if that can be used.
        vae: file of another VAE than the one beside the network: LightVAE, taew2_1.pth of TAEHV, LightTAE.
        steps, guidance, negative_prompt: of a model that was not distilled to a few steps; by default the adapter's.
        overlap: latent frames, whole blocks, of a model that begins new rollouts; by default the adapter's.

    Raises:
        ValueError: something is missing, damaged or of another architecture; says what.
    """
    check_linear(linear, dtype)
    adapter = customised(ADAPTERS[name], size, steps, guidance, negative_prompt, overlap)
    path = find_checkpoint(weights)
    folder = path.parent if weights is None or Path(weights).is_file() else Path(weights)
    if lora is None and weights is not None and Path(weights).is_dir():
        lora = find_lora(weights)
    device = check_device("device", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" and linear != "bf16" else torch.bfloat16)
    network = load_network(path, PARTS[name], row=name, lora=lora, dtype=dtype, device=device, linear=linear)
    text = PromptEncoder(folder, network.config.text_len, prompt_cache) if has_encoder(folder) else None
    return Wan(
        network,
        adapter,
        text,
        **_pictures(vae, folder, device, adapter),
        look=(lambda picture: load_image_encoder(folder)(picture)) if has_image_encoder(folder) else None,
    )


def _pictures(vae: str | Path | None, folder: Path, device: torch.device, adapter: Adapter) -> dict[str, Any]:
    """Wan's arguments open_video, encode_video and encode_start, over a VAE that is opened when it is first needed."""
    if vae is None and not has_vae(folder):
        return {}

    @functools.cache
    def open_vae() -> VideoVAE:
        opened = load_vae(folder, device) if vae is None else read_vae(Path(vae), device)
        if opened.channels != (channels := latents_of(adapter).channels):
            raise ValueError(
                f"{'weights' if vae is None else 'vae'}: {vae or folder} holds a VAE of latents of {opened.channels} "
                f"channels, those of {adapter.name} have {channels}"
            )
        return opened

    return {
        "open_video": lambda: open_vae().open(adapter.overlap, goes_on=adapter.rollout_begins != "restarted"),
        "encode_video": lambda frames: open_vae().encode(frames),
        "encode_start": lambda picture, frames: open_vae().encode_start(picture, frames),
    }
