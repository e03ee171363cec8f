"""What decoding asks of a model: all of it is declared here, with the defaults of what a model may leave out.

A model is a network and data. `Adapter` says how its blocks are sampled, `Presentation` how its videos are shown, and
a `Model` maps noisy blocks to predictions. What is special about one with several blocks in flight lies in its
`Schedule`. Long because it is the manual of models: almost half of it is docstrings.

The way of a prompt has one name for each thing: prompt (text) -> embedding (of the text encoder) -> conditioning (what
the network attends to, or adds) -> cross-attention.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from inferix_kernels.distributed.tokens import WholeFrames

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from inferix_kernels.store import Attention

    from .own_branch import OwnBranch


# How the past is computed again under a new prompt. "bidirectional": in one forward, all frames of the window seeing
# each other; the sink is among them while the window still reaches it, and stays as it is later. "block-causal": block
# by block, each seeing the sink, which stays as it is, and the blocks before it.
RECACHES = ("bidirectional", "block-causal")

# How a new rollout begins. "restarted": its first latent is encoded again, from the last picture that it gave, and the
# pictures begin anew with it (CausVid). "encoded": the same, and the pictures go on. "kept": the world's very first
# latent takes its place, and the pictures go on (both Krea's).
ROLLOUTS = ("restarted", "encoded", "kept")


@dataclasses.dataclass(frozen=True)
class Shots:
    """How a video of several shots is made: a prompt that begins with `cut` begins another one with its block. The
    first `sink` frames of the newest shot are pinned once they are clean, in the place of those of the shot before it,
    and take their room from the window. Source: multi_shot_sink, multi_shot_rope_offset of github.com/NVlabs/LongLive
    (7860ad9).

    Attributes:
        cut: what the prompt of a shot's first block begins with; blocks after it have the rest of that prompt.
        offset: frames by which rotary time jumps where a shot begins.
    """

    cut: str
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How a model is sampled.

    Attributes:
        name: as given to --model.
        block_frames: latent frames denoised together.
        first_block_frames: the same for the first block of a world; 0: as `block_frames`.
        times: noise levels of a block's denoising steps, descending from 1: x = (1 - t) x0 + t noise.
        timesteps: the network's input at each of `times`; empty: `times`.
        first_times, first_timesteps: the same for a block without a past, which has more to invent. Empty: as others'.
        prediction: what the network returns: "x0" or "flow" (x0 = x - t flow).
        sampler: how a block gets from one level to the next: "renoise" (few-step models), "euler" or "unipc"; see
            inferix.decode.samplers.
        guidance: scale of classifier-free guidance (arXiv:2207.12598): negative + scale * (prediction - negative). 1:
            none, and half the work.
        negative_prompt: of the negative prediction.
        context_time: the network's timestep in the clean pass. The block itself is not noised again.
        fused: run a block's clean pass in one forward with the next block's first step.
        window, sink: frames a block sees; see inferix_kernels.Policy.
        rollout, overlap: after `rollout` frames begin again at frame 0 with the last `overlap` frames as the past,
            whose keys and values are computed anew, block by block (CausVid's long videos). None: one rollout without
            end.
        rollout_begins: what the first latent of the overlap is in a new rollout, one of ROLLOUTS.
        recache: how the keys and values of the window are computed again when the prompt changes, one of RECACHES; "":
            they are not.
        past_bias, time, on_evict: how a block reads the past, and what is done with a frame before it leaves the
            window; see inferix_kernels.Policy.
        moving_sink: on_evict rewrites the sink, by little each time. So the sink is held in working precision, that of
            scratch, whatever the format of other frames, which would round such changes off; and nothing that left
            the window can be taken back.
        shots: of a model whose videos may have several; None: a video is one shot.
        stages: of a model with a `Schedule`: blocks in flight, each a stage ahead of the next. 0: one block at a time.
        size: pixels (height, width).
        actions: names of what can be done each frame, the first being nothing; empty if a model takes none.
        together: several actions may be done in one frame, named "forward+left".
        words: a world is given a prompt.
        picture: a world is conditioned on the picture that it begins with: `Model.with_picture`.
    """

    name: str
    block_frames: int
    times: tuple[float, ...]
    timesteps: tuple[float, ...] = ()
    first_block_frames: int = 0
    first_times: tuple[float, ...] = ()
    first_timesteps: tuple[float, ...] = ()
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
    rollout_begins: str = "restarted"
    recache: str = ""
    past_bias: float = 0.0
    time: str = "absolute"
    on_evict: Callable[[Any, int], None] | None = None
    moving_sink: bool = False
    shots: Shots | None = None
    stages: int = 0
    size: tuple[int, int] = (480, 832)
    actions: tuple[str, ...] = ()
    together: bool = False
    words: bool = True
    picture: bool = False

    def __post_init__(self) -> None:
        if self.recache not in ("", *RECACHES):
            raise ValueError(f'recache must be "" or one of {", ".join(RECACHES)}, got {self.recache!r}')
        if self.rollout_begins not in ROLLOUTS:
            raise ValueError(f"rollout_begins must be one of {', '.join(ROLLOUTS)}, got {self.rollout_begins!r}")
        if self.rollout is not None:
            if self.overlap % self.block_frames:
                raise ValueError(f"overlap must be whole blocks of {self.block_frames} frames, got {self.overlap}")
            if self.overlap >= self.rollout:
                raise ValueError(f"overlap must be less than the rollout of {self.rollout} frames, got {self.overlap}")

    @property
    def at_once(self) -> bool:
        """A block sees nothing before it, so that a video is one block: a bidirectional model."""
        return self.window == self.block_frames and not self.sink

    def steps(self, first: bool) -> list[tuple[float, float]]:
        """(noise level, timestep of the network) of every step of a block; `first`: it has no past."""
        times, timesteps = self.times, self.timesteps
        if first and self.first_times:
            times, timesteps = self.first_times, self.first_timesteps
        return list(zip(times, timesteps or times, strict=True))

    def done(self, action: str) -> tuple[str, ...]:
        """The actions that a name stands for: itself or, `together`, those joined with +.

        Raises:
            ValueError: the model does not know it.
        """
        names = tuple(action.split("+")) if self.together else (action,)
        if any(name not in self.actions for name in names):
            several = " (or several of them, joined with +)" if self.together else ""
            raise ValueError(f"action must be one of {', '.join(self.actions)}{several}, got {action!r}")
        return names

    def frames(self, first: bool) -> int:
        """Latent frames of a block; `first`: it is the first of its world."""
        return self.first_block_frames if first and self.first_block_frames else self.block_frames


@dataclasses.dataclass(frozen=True)
class Presentation:
    """How a model's videos are shown: by the page, the terminal and the command line. Nothing is sampled by it.

    Attributes:
        fps: pictures per second at the world's own pace.
        pictures: per latent frame, where they are as many for each.
        scale: edge of the square that each pixel becomes in a video, unless asked for otherwise.
        live: made in real time and small. Its pictures are kept to be measured; a video of any other model is written
            with a journal next to it, so that what was made before a kill need not be made again.
        threads: CPU threads that serve it best; None: all cores.
        keys: keyboard key -> action.
        example_prompts: show what may be said; the first is the default.
    """

    fps: int = 16
    pictures: int = 1
    scale: int = 1
    live: bool = False
    threads: int | None = None
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    example_prompts: tuple[str, ...] = ("",)


# (layer, packed qkv [T, ...], norm_q, norm_k, eps) -> [T, Hq * D] or None: inferix_kernels.Pass.attend
PagedAttend = Callable[..., "Tensor | None"]


@dataclasses.dataclass(frozen=True)
class BlockInput:
    """One block as a network sees it in one forward.

    Attributes:
        x: [frames, *latent_shape], noisy or clean.
        t: its timestep, as the network takes it: 0-d float64 on the model's device. [frames] where a block begins with
            given frames, which are clean (`Model.first_latents`).
        conditioning: as `Model.conditioning` or `Model.variants` made it.
        predict: False if only its keys and values are wanted.
    """

    x: Tensor
    t: Tensor
    conditioning: Any
    predict: bool = True


def first_predicted(inputs: Sequence[BlockInput]) -> int:
    """Index of the first input whose prediction is wanted; of the last one, if none is. A network need not compute what
    comes before it."""
    return next((i for i, block in enumerate(inputs) if block.predict), len(inputs) - 1)


class PictureStream:
    """Pictures of one world, block by block. This class decodes every block by itself; one that looks back on earlier
    blocks overrides everything below.

    Attributes:
        looks_back: pictures depend on the blocks before theirs.
    """

    looks_back = False

    def __init__(self, decode_block: Callable[[Tensor], np.ndarray]):
        self._decode_block = decode_block

    def __call__(self, latents: Tensor) -> np.ndarray:
        """The next block's latents [frames, *latent_shape] -> uint8 [pictures, height, width, 3]."""
        return self._decode_block(latents)

    def fork(self) -> PictureStream:
        """Another stream that goes on from here."""
        return self

    def restart(self, latents: Tensor) -> Tensor:
        """Begin anew with the latents decoded last, which begin a new rollout; returns them as it has them there."""
        return latents

    def state(self) -> dict[str, Any] | None:
        """What it keeps of earlier blocks, as plain values and tensors in host memory."""
        return None

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from this `state`. Raises KeyError, TypeError or AttributeError if it is none."""


class Model(abc.ABC):
    """A network that denoises blocks of latent frames, and what surrounds it: text encoder, VAE.

    Several threads may use one model, each for a world of its own: what a model keeps between calls (the last prompt, a
    VAE's state) is either replaced as a whole or guarded by a lock.

    Attributes:
        adapter: how it is sampled.
        presentation: how its videos are shown.
        layers, heads, head_dim: of the keys and values it caches.
        query_heads: of which several may read one of these heads (GQA).
        frame_tokens: tokens per latent frame.
        latent_shape: of one frame.
        dtype: of the q, k and v that it gives `attend`.
        device: where the network runs, and the store with its keys and values.
        network: a torch.nn.Module, watched if a block is not finite, and known again by its weights; None: neither.
        linear: what the network's 8-bit linear layers are in, "int8" or "fp8"; None: its loader made none.
        schedule: of a model with several blocks in flight; None: one block at a time, as `adapter` says.
        only_latents: there is no VAE: a world's pictures are its latents.
        begun_with: digest of the picture that conditions it (`with_picture`); None: none does.
        shard, attention, branch: whose tokens of each frame this process computes, how their queries attend, and of a
            guided world in which prediction; see `on_rank`.
        first_latents: [n, *latent_shape] that the first block of a world begins with, clean in each of its steps, from
            `with_picture`; None: it is all noise.
    """

    adapter: Adapter
    presentation: Presentation = Presentation()
    layers: int
    heads: int
    head_dim: int
    frame_tokens: int
    latent_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    network: torch.nn.Module | None = None
    linear: str | None = None
    schedule: Schedule | None = None
    begun_with: str | None = None
    shard: WholeFrames = WholeFrames()
    attention: Attention | None = None  # to all that is seen, in this process
    branch: OwnBranch | None = None
    first_latents: Tensor | None = None

    @property
    def query_heads(self) -> int:
        return self.heads

    @property
    def only_latents(self) -> bool:
        return False

    @abc.abstractmethod
    def rope(self, frames: Sequence[int]) -> Tensor:
        """[len(frames) * frame_tokens, R / 2, 2] float32 (cos, sin) for these global frame indices."""

    @abc.abstractmethod
    def conditioning(self, prompt: str, actions: Sequence[int | str]) -> Any:
        """What steers one block. Raises ValueError for a prompt or an action it does not know."""

    def begins_shot(self, conditioning: Any) -> bool:
        """Does a block under this conditioning begin another shot? See `Adapter.shots`."""
        return False

    def turn_back(self, frames: int) -> Tensor:
        """[R / 2, 2] (cos, sin) of the rotation that takes queries back by so many frames in time; see Policy.time."""
        import torch

        (cos, sin), (cos_0, sin_0) = (self.rope([frame])[0].unbind(-1) for frame in (frames, 0))
        return torch.stack([cos * cos_0 + sin * sin_0, cos * sin_0 - sin * cos_0], -1)

    @abc.abstractmethod
    def predict(
        self, inputs: Sequence[BlockInput], attend: PagedAttend, stride: float | None = None
    ) -> Sequence[Tensor]:
        """One forward of the network.

        On a GPU it sends nothing there and reads nothing back: it waits for nothing, and can be captured.

        Args:
            inputs: the blocks, oldest first.
            attend: does the self-attention of all their tokens, and sees to the cache.
            stride: `Forward.stride`.

        Returns:
            A prediction per input, [frames, *latent_shape]; [0, *latent_shape] may stand for one that was not asked
            for, or for all if `attend` ended the pass.
        """

    @abc.abstractmethod
    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 [frames, height, width, 3] -> latents [frames, *latent_shape]."""

    @abc.abstractmethod
    def stream(self) -> PictureStream:
        """The pictures of one world."""

    def placed(self, conditioning: Any, first: int, before: Sequence[Any]) -> Any:
        """A conditioning where its block stands, for a network that looks back on more than `attend` keeps.

        Args:
            first: index of the block's first frame.
            before: the conditionings of blocks before it, oldest first, as this method returned them: of those that
                the window still holds, at least.
        """
        return conditioning

    def carried(self, conditioning: Any) -> Any:
        """What a later block needs of a block's conditioning, as plain values and tensors in host memory; None:
        nothing. It is saved with a world."""
        return None

    def resumed(self, carried: Any) -> Any:
        """The conditioning of an earlier block, for `placed`, from what `carried` returned.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is nothing that `carried` returned.
        """
        return None

    def with_picture(self, picture: np.ndarray | None) -> Model:
        """The same model for worlds that begin with this picture, uint8 [height, width, 3]; see `Adapter.picture`.

        Raises:
            ValueError: it is none that the model can begin with, or the model is conditioned on none.
        """
        raise ValueError(f"image: {self.adapter.name} is conditioned on no picture")

    def variants(self, conditioning: Any, remaining: int | None) -> Mapping[str, Any]:
        """The conditionings that a schedule chooses from for each segment, by name (`Segment.conditioning`).

        Args:
            remaining: blocks to come after this one; None: without end.
        """
        return {"": conditioning}

    def prepare(self, prompt: str) -> None:
        """Make a prompt quick to use, ahead of its block and on any thread. Raises ValueError as `conditioning`."""
        self.conditioning(prompt, self.adapter.actions[:1] * self.adapter.block_frames)

    def pictures_of(self, latents: int) -> int:
        """Pictures that so many latent frames stand for, from the beginning on: `encode` makes them of these, a stream
        gives these for them."""
        return latents

    def on_rank(self, shard: WholeFrames, attention: Attention, branch: OwnBranch | None = None) -> Model:
        """The same model in one of several processes that make a world together. It computes one rank's tokens of each
        frame: what `attend` is given, and returns, is of those. Latents and predictions are whole on every rank."""
        other = copy.copy(self)
        other.shard, other.attention, other.branch = shard, attention, branch
        return other

    def for_video(self, frames: int, picture: np.ndarray | None = None) -> Model:
        """The same model for a video of so many pictures, made at once.

        Args:
            picture: uint8 [height, width, 3], how the video begins; image-to-video models need it.

        Raises:
            ValueError: the model does not make videos at once.
        """
        raise ValueError(f"for_video: {self.adapter.name} makes a video block by block, of any length")

    def measures(self, frames: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
        """Shares in [0, 1] that can be read off a video [n, height, width, 3] alone; may be empty."""
        return {}


@dataclasses.dataclass(frozen=True)
class Segment:
    """One block in one forward of a schedule. Its queries share one list of pages.

    Attributes:
        block: its index in the world.
        step: how many denoising steps it has made; all of them: it is clean.
        t: its timestep, as the network takes it.
        lookback: blocks it attends to, its own included: committed ones, and those of this forward.
        lookahead: blocks after its own that it attends to as well, of those of this forward.
        sink: it sees the sink, however far back that lies.
        conditioning: the name of one of `Model.variants`.
        weight: of its prediction in what moves the block.
        copy: a second segment of a block of this forward, behind the others and out of their sight.
    """

    block: int
    step: int
    t: float
    lookback: int
    conditioning: str = ""
    weight: float = 1.0
    copy: bool = False
    lookahead: int = 0
    sink: bool = True


@dataclasses.dataclass(frozen=True)
class Forward:
    """Segments that share one forward, oldest block first.

    Attributes:
        commit: the first segment's keys and values become the past.
        apart: each segment is alone in the world: at frame 0, and attending to itself.
        stride: another input of a network that was distilled to steps of several sizes.
    """

    segments: tuple[Segment, ...]
    commit: bool = False
    apart: bool = False
    stride: float | None = None

    def needed(self) -> Forward | None:
        """The same without what no one waits for; None if that is all of it."""
        if self.apart:
            kept = tuple(segment for segment in self.segments if segment.weight)
            return dataclasses.replace(self, segments=kept) if kept else None
        return self if self.commit or any(segment.weight for segment in self.segments) else None


class Schedule(Protocol):
    """How the blocks in flight are denoised.

    Attributes:
        stages: blocks in flight at most; stage_steps: denoising steps until the next block may begin.
        partly_given: the first frames of a block may be given, and the others are made around them.
    """

    @property
    def stages(self) -> int: ...

    @property
    def stage_steps(self) -> int: ...

    @property
    def partly_given(self) -> bool: ...

    def forwards(self, flight: Sequence[tuple[int, int]], clean: int | None) -> Sequence[Forward]:
        """The forwards of one step, of which one commits `clean` if there is a clean block to commit.

        Args:
            flight: (block, steps it has made) of the blocks in flight, oldest first.
        """

    def clean_pass(self, block: int) -> Forward:
        """The clean pass of a block by itself."""

    def advance(self, step: int, x: Tensor, predicted: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        """A block after its step number `step`. `noise` draws so many frames."""
