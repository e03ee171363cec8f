"""What the decode loop asks of a model, and the table of models it can run.

A model adapter is data, not a pipeline class: an `Adapter` says how blocks are denoised and what they see; a
`BlockModel` turns noisy blocks into clean predictions. The loop in `inferix.loop` does the rest for all of them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How a model is sampled.

    Attributes:
        name: as given to --model.
        block_frames: latent frames denoised together.
        first_block_frames: the same for the first block of a world; 0: as `block_frames`.
        times: noise levels of a block's denoising steps, descending from 1: x = (1 - t) x0 + t noise.
        timesteps: what the network is told at each of `times`; empty: `times`.
        first_times: `times` for a block without a past, which has more to invent. Empty: as `times`.
        prediction: what the network returns: "x0" or "flow" (x0 = x - t flow).
        sampler: how a block gets from one level to the next: "renoise" (few-step models), "euler" or "unipc"; see
            inferix.samplers.
        guidance: of the prediction away from what the network says under `negative_prompt`, times the way from there
            (classifier-free guidance, arXiv:2207.12598). 1: none, and half the work.
        negative_prompt: see `guidance`.
        context_time: what the network is told in the clean pass. The block itself is not noised again.
        fused: run a block's clean pass in one forward with the next block's first step.
        window, sink: frames a block sees; see inferix_kernels.Policy.
        rollout, overlap: after `rollout` frames begin again at frame 0 with the last `overlap` frames as the past,
            whose keys and values are computed anew (CausVid's long videos). None: one rollout without end.
        recache: when the prompt changes, compute the keys and values of the window again under the new one (LongLive).
        stages: of a model that runs in a pipeline (inferix.pipeline) by a schedule of its own: blocks in flight, each a
            stage ahead of the next. 0: one block at a time (inferix.loop).
        pictures: per latent frame, where they are as many for each.
        fps: frames per second at the world's own pace.
        size: pixels (height, width).
        scale: edge of the square that each pixel becomes in a video, unless asked for otherwise.
        live: made in real time and small. Its frames are kept to be measured; a video of any other model is written
            with a journal beside it, so that what was made before a kill need not be made again.
        threads: CPU threads that serve it best; None: all cores.
        actions: names of what can be done each frame, the first being nothing; empty if a model takes none.
        keys: keyboard key -> action.
        example_prompts: show what may be said; the first is the default.
    """

    name: str
    block_frames: int
    times: tuple[float, ...]
    timesteps: tuple[float, ...] = ()
    first_block_frames: int = 0
    first_times: tuple[float, ...] = ()
    prediction: str = "x0"
    sampler: str = "renoise"
    guidance: float = 1.0
    negative_prompt: str = ""
    context_time: float = 0.0
    fused: bool = True
    window: int | None = None
    sink: int = 0
    rollout: int | None = None
    overlap: int = 0
    recache: bool = False
    stages: int = 0
    pictures: int = 1
    fps: int = 16
    size: tuple[int, int] = (480, 832)
    scale: int = 1
    live: bool = False
    threads: int | None = None
    actions: tuple[str, ...] = ()
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    example_prompts: tuple[str, ...] = ("",)

    @property
    def at_once(self) -> bool:
        """A block sees nothing before it, so that a video is one block: a bidirectional model."""
        return self.window == self.block_frames and not self.sink

    def schedule(self, first: bool) -> list[tuple[float, float]]:
        """(noise level, what the network is told) of every step of a block; `first`: it has no past."""
        if first and self.first_times:
            return [(t, t) for t in self.first_times]
        return list(zip(self.times, self.timesteps or self.times, strict=True))

    def frames(self, first: bool) -> int:
        """Latent frames of a block; `first`: it is the first of its world."""
        return self.first_block_frames if first and self.first_block_frames else self.block_frames


# (layer, packed qkv [T, ...], norm_q, norm_k, eps) -> [T, Hq * D] or None: inferix_kernels.Pass.attend
PagedAttend = Callable[..., "Tensor | None"]


class BlockModel(Protocol):
    """A network that denoises blocks of latent frames.

    Several threads may use one model, each for a world of its own: what a model keeps between calls (the last prompt, a
    VAE's state) is either replaced as a whole or guarded by a lock.

    Attributes:
        layers, heads, head_dim: of the keys and values it caches.
        frame_tokens: tokens per latent frame.
        latent_shape: of one frame.
        dtype: of the q, k and v that it gives `attend`.
    """

    adapter: Adapter
    layers: int
    heads: int
    head_dim: int
    frame_tokens: int
    latent_shape: tuple[int, ...]
    dtype: torch.dtype

    def rope(self, frames: Sequence[int]) -> Tensor:
        """[len(frames) * frame_tokens, R / 2, 2] float32 (cos, sin) for these global frame indices."""

    def condition(self, prompt: str, actions: Sequence[int | str]) -> Any:
        """What steers one block. Raises ValueError for a prompt or an action it does not know."""

    def predict(
        self, blocks: Sequence[Tensor], times: Sequence[float], conditions: Sequence[Any], attend: PagedAttend
    ) -> Tensor:
        """Prediction for the last of `blocks` ([frames, *latent_shape] each); empty if `attend` ended the pass."""

    def for_video(self, frames: int, picture: np.ndarray | None = None) -> BlockModel:
        """Only if adapter.at_once: the same model for a video of so many frames, one block.

        `picture`, uint8 [height, width, 3], is how the video begins; image-to-video models need it.
        """

    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 [frames, height, width, 3] -> latents [frames, *latent_shape]."""

    def pictures_of(self, latents: int) -> int:
        """Pictures that `encode` makes so many latent frames of, from the beginning on. Left out: as many."""

    def stream(self) -> Callable[[Tensor], np.ndarray]:
        """A decoder for one world: latents [frames, *latent_shape] by block -> uint8 [pictures, height, width, 3].

        It may keep what it needs of earlier blocks, and then has a method `fork` that returns another such decoder. A
        method `restart` is what Decoder.restart asks for.
        """

    def measures(self, frames: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
        """Shares in [0, 1] that can be read off a video [n, height, width, 3] alone; may be empty."""


def whole_start(model: BlockModel, pictures: int) -> int:
    """The most of so many given pictures that `World.observe` takes as the beginning: whole blocks of latents, or, of a
    model with several blocks in flight, whole latents."""
    adapter, pictures_of = model.adapter, getattr(model, "pictures_of", lambda latents: latents)
    if adapter.stages:
        return pictures if pictures == 1 else pictures - pictures % adapter.pictures
    end, following, whole = 0, adapter.frames(first=True), 0
    while pictures_of(end + following) <= pictures:
        end, following = end + following, adapter.block_frames
        whole = pictures_of(end)
    return whole


_WAN, _MAGI = "inferix.models.wan", "inferix.models.magi"
# name -> module with load(weights, name, **options) -> BlockModel, or pipeline.PipelinedModel if it has `stages`
MODELS = {
    "tiny": "inferix.models.tiny",
    "self-forcing": _WAN,
    "self-forcing-framewise": _WAN,
    "self-forcing-first-frame": _WAN,
    "causvid": _WAN,
    "longlive": _WAN,
    "wan-t2v": _WAN,
    "wan-i2v-480p": _WAN,
    "wan-i2v-720p": _WAN,
    "wan-causal": _WAN,
    "magi-4.5b": _MAGI,
    "magi-4.5b-distill": _MAGI,
    "magi-4.5b-distill-quant": _MAGI,
    "magi-24b": _MAGI,
    "magi-24b-distill": _MAGI,
    "magi-24b-distill-quant": _MAGI,
}


def load_model(name: str, weights: str | None = None, **options: Any) -> BlockModel:
    """The model called `name`, from its checkpoint or, if it ships with one, from that.

    Args:
        options: what else the model's module takes; None is its default.

    Example:
        >>> from inferix.models import load_model
        >>> model = load_model("tiny")
        >>> model.adapter.block_frames, model.adapter.actions
        (3, ('none', 'up', 'left', 'down', 'right'))
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    given = {option: value for option, value in options.items() if value is not None}
    load = importlib.import_module(MODELS[name]).load
    taken = inspect.signature(load).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        for option in given:
            if option not in taken:
                raise ValueError(f"{option} must not be given: {name} has no such option")
    model: BlockModel = load(weights, name, **given)
    return model
