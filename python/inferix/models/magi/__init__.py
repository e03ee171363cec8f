"""MAGI-1: chunks of six latent frames, up to four of them in flight at four levels of noise."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from inferix_kernels._check import check_device

from ...decode.contract import Adapter, BlockInput, Model, PagedAttend, PictureStream, Presentation
from .adapters import PRESENTATION, SCHEDULES, adapter_for, config_for, scheduled
from .captions import Captions, load_captions
from .checkpoint import find_weights, load_network
from .network import CrossCache, MagiConfig, MagiNetwork, rope_table
from .schedule import CAPTION, DROPPED, NULL, MagiSchedule
from .text import CaptionEncoder, find_encoder

__all__ = ["SCHEDULES", "Magi", "MagiConfig", "MagiNetwork", "MagiSchedule", "adapter_for", "config_for"]

LATENT_STRIDE = 8  # pixels of the video per pixel of the latent, in each direction


class VideoDecoder(Protocol):
    """One world's decoder. Each chunk is decoded by itself; latents are as the network has them, times 0.18215."""

    def __call__(self, latents: Tensor) -> np.ndarray:
        """[frames, 16, height / 8, width / 8] -> uint8 [4 * frames, height, width, 3]."""


class Codec(Protocol):
    """What `--decoder module:name` names: called with the model's folder, it gives this."""

    def open(self) -> VideoDecoder:
        """A decoder for one world."""

    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 [n, height, width, 3] -> latents [frames, 16, height / 8, width / 8]: one picture gives one frame, and
        four pictures give one. Only for videos that begin with given pictures."""


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What a prompt becomes.

    Attributes:
        embedding: [n, caption_dim] of the prompt, without padding.
        caches: by how many chunks are to come after one, which a caption may say; made when asked for.
    """

    embedding: Tensor
    caches: dict[int, CrossCache] = dataclasses.field(default_factory=dict)


class Magi(Model):
    """A MAGI network as the pipeline sees it.

    Args:
        network: its dtype is that of the products; latents stay float32 (float64 for a float64 network).
        adapter: adapter.size says how large its pictures are.
        schedule: how chunks are denoised.
        text: encodes prompts; without it only `conditioning_from` works.
        captions: special rows that go before a caption.
        open_video: opens a decoder for one world; without it latents come out, a quarter as many as pictures.
        encode_video: uint8 [n, height, width, 3] -> latents [frames, channels, h, w].
    """

    network: MagiNetwork

    def __init__(
        self,
        network: MagiNetwork,
        adapter: Adapter,
        schedule: MagiSchedule,
        text: Callable[[str], Tensor] | None = None,
        captions: Captions = Captions(),
        open_video: Callable[[], VideoDecoder] | None = None,
        encode_video: Callable[[np.ndarray], Tensor] | None = None,
        presentation: Presentation = PRESENTATION,
    ):
        config, step = network.config, LATENT_STRIDE * network.config.patch
        if any(side < 1 or side % step for side in adapter.size):
            raise ValueError(f"size must be multiples of {step} pixels, got {adapter.size}")
        if open_video is None:
            fps = presentation.fps // presentation.pictures  # what is shown are latents
            presentation = dataclasses.replace(presentation, fps=fps, pictures=1)
        self.network, self.adapter, self.schedule = network.eval().requires_grad_(False), adapter, schedule
        self.presentation = presentation
        self.text, self.captions, self.open_video, self.encode_video = text, captions, open_video, encode_video
        self.layers, self.heads, self.head_dim = config.layers, config.kv_heads, config.head_dim
        height, width = (side // LATENT_STRIDE for side in adapter.size)
        self.grid = height // config.patch, width // config.patch
        self.frame_tokens = self.grid[0] * self.grid[1]
        self.latent_shape = (config.channels, height, width)
        self.device, self.dtype = network.x_embedder.weight.device, network.dtype
        # Most forwards of a stage are over the same frames.
        self._rope = functools.lru_cache(4)(lambda frames: rope_table(frames, self.grid, self._bands, self.device))
        self._null: dict[str, CrossCache] = {}
        self._conditionings: dict[str, Conditioning] = {}

    @functools.cached_property
    def _bands(self) -> Tensor:
        """Of the rotary embedding, on the host."""
        return self.network.rope.bands.cpu()

    def rope(self, frames: Sequence[int]) -> Tensor:
        return self._rope(tuple(frames))

    @torch.inference_mode()
    def conditioning(self, prompt: str, actions: Sequence[int | str]) -> Conditioning:
        if actions:
            raise ValueError(f"actions must be none: {self.adapter.name} is steered by words alone, got {actions!r}")
        made = self._conditionings.get(prompt)
        if made is None:
            if self.text is None:
                raise ValueError(
                    f"prompt: the weights of {self.adapter.name} have no text encoder next to them: its folder needs "
                    "text_encoder/ and tokenizer/ (T5 v1.1 XXL), or t5_pretrained/t5-v1_1-xxl as MAGI-1 has it"
                )
            made = self.conditioning_from(self.text(prompt))
            self._conditionings = {prompt: made}  # the last prompt alone: 110 MB for 4.5B
        return made

    def conditioning_from(self, embedding: Tensor) -> Conditioning:
        """The same from a prompt's embedding [tokens, caption_dim]."""
        return Conditioning(embedding.to(self.device))

    @torch.inference_mode()
    def variants(self, conditioning: Conditioning, remaining: int | None) -> Mapping[str, CrossCache]:
        """Under the names that MagiSchedule knows: under the caption, the null caption, and without one."""
        if not self._null:
            null = self.network.cross_cache(self.captions.negative(self.network.null_rows()))
            self._null = {NULL: null, DROPPED: dataclasses.replace(null, dropped=True)}
        caches, key = conditioning.caches, self.captions.key(remaining)
        if key not in caches:
            rows = self.captions.positive(conditioning.embedding, remaining)
            caches[key] = self.network.cross_cache(rows[: self.network.config.caption_len])
        return {CAPTION: caches[key], **self._null}

    def predict(self, inputs: Sequence[BlockInput], attend: PagedAttend, stride: float | None = None) -> list[Tensor]:
        blocks, times, crosses = zip(*((block.x, block.t, block.conditioning) for block in inputs))
        velocities = self.network(blocks, torch.stack(times), crosses, attend, stride, self.shard)
        if velocities is None:
            return [x[:0] for x in blocks]
        return [velocity.to(x.dtype) for velocity, x in zip(velocities, blocks)]

    def encode(self, frames: np.ndarray) -> Tensor:
        height, width = self.adapter.size
        if frames.dtype != np.uint8 or frames.shape[1:] != (height, width, 3):
            raise ValueError(f"frames must be uint8 [n, {height}, {width}, 3], got {frames.dtype} {list(frames.shape)}")
        if self.encode_video is None:
            raise ValueError(f"frames: this {self.adapter.name} has no VAE to encode them; see `decoder`")
        return self.encode_video(frames)

    @property
    def query_heads(self) -> int:
        return self.network.config.heads

    @property
    def only_latents(self) -> bool:
        """There is no decoder: a world's pictures are its latents, and `presentation` counts those."""
        return self.open_video is None

    def pictures_of(self, latents: int) -> int:
        return self.presentation.pictures * latents

    def stream(self) -> PictureStream:
        return PictureStream((lambda latents: latents.cpu().numpy()) if self.open_video is None else self.open_video())


def load(
    weights: str | Path | None = None,
    name: str = "magi-4.5b",
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    shortcut: str | None = None,
    stages: int | None = None,
    fp8: str = "keep",
    special_tokens: Sequence[str] | None = None,
    negative: bool = False,
    decoder: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    prompt_cache: str | Path | None = None,
) -> Magi:
    """A model of SCHEDULES from its checkpoint.

    Args:
        weights: MAGI-1's folder: the shards, or inference_weight*/ with them; and, for prompts, the T5 encoder
            (see text.FOLDERS) and special_tokens.npz. Or the index or the file alone.
        size: pixels (height, width); by default what the configs say.
        steps, shortcut, stages: see MagiSchedule; by default as the configs have it. A multiple of 4, or 12.
        fp8: "keep" or "dequantize"; see checkpoint.load_network.
        special_tokens, negative: rows that go before captions; see captions.load_captions.
        decoder: "module:name" of a callable that is given the folder and gives a Codec, as diffusers has no such VAE.
            Without it latents come out.
        device: by default a GPU, if there is one.
        dtype: of the products; by default float32 on the CPU and bfloat16 elsewhere.
        prompt_cache: folder for caption embeddings; by default ~/.cache/inferix/prompts, if that can be used.

    Raises:
        ValueError: something is missing, damaged or of another architecture; says what.
    """
    schedule = scheduled(name, steps, shortcut, stages)
    adapter = adapter_for(name, schedule, size)
    path = find_weights(weights, name)
    folder = path.parent.parent if path.parent.name.startswith("inference_weight") else path.parent
    captions, codec = (
        load_captions(folder, special_tokens, negative),
        None if decoder is None else _codec(decoder, folder),
    )
    device = check_device("device", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    network = load_network(path, name, fp8=fp8, dtype=dtype, device=device, backend=backend)
    encoder = find_encoder(folder)
    text = None if encoder is None else CaptionEncoder(encoder, network.config.caption_len, prompt_cache)
    return Magi(
        network,
        adapter,
        schedule,
        text,
        captions,
        open_video=None if codec is None else codec.open,
        encode_video=None if codec is None or not hasattr(codec, "encode") else codec.encode,
    )


def _codec(spec: str, folder: Path) -> Codec:
    module, _, name = spec.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"decoder must be module:name of something importable, got {spec!r} ({error})") from None
    codec: Codec = make(folder)
    return codec
