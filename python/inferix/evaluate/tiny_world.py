"""The tiny world in variants, made and judged: by its simulator, which knows the truth, and by metrics, which do not.

A variant is the shipped world with other pages, other layers, blocks of other lengths, or attention that reads less.
Its streams are those of `inferix.models.tiny.evaluate`: held-out rooms under the simulator's own actions and prompts.
tiny_studies.py runs them and prints tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inferix_kernels import PageTable, Pass, Policy
from inferix_kernels.store import Block, TopK

from ..media import VideoWriter
from ..models import load_model
from ..models.tiny import ADAPTER, PRESENTATION, TinyWorld
from ..models.tiny.measures import CHANGE_EVERY, CONTEXT, HELD_OUT, Truth, measure, true_video
from ..models.tiny.simulator import ACTIONS, THEMES, TIMES
from ..opening import open_decoder, open_store
from .drift import drift
from .judging import judge
from .metric import Metric
from .pair import compare
from .perceptual import PairMetric
from .report import Report, report
from .video import CHUNKS
from .weights import WeightsDir

PAST = 2 * ADAPTER.block_frames  # frames that a block sees before itself: the world's window of 9, less the block
SCALE = 2  # pixels of a video per pixel of the world: 192 x 192; what compares two videos costs by the pixel
# Of the simulator's measures, those that a table has: shares of frames, and dB.
TRUTH = ("player_once", "boats_once", "follows_moving", "near", "tiles_right", "theme_right", "psnr")


@dataclass(frozen=True)
class Variant:
    """The tiny world, made otherwise.

    Attributes:
        name: of it; names files.
        kv: format of the pages.
        older: (age, format) of pages past so many recent frames, see inferix_kernels.Policy; None: as the others.
        linear: what the inner linear layers are in; None: float32.
        block: frames of a block. It was trained with 3.
        past: frames before its own that a block may see.
        pages: of the past that are read, the best ones for each frame and head; a page is a frame. None: all.
        noise: added to the seed of all noise.
        simulator: no network at all, but the true frames: what a metric says of a video without a fault.
    """

    name: str
    kv: str = "fp32"
    older: tuple[int, str] | None = None
    linear: str | None = None
    block: int = ADAPTER.block_frames
    past: int = PAST
    pages: int | None = None
    noise: int = 0
    simulator: bool = False

    def __post_init__(self) -> None:
        if self.older is not None:  # JSON has lists alone
            object.__setattr__(self, "older", tuple(self.older))

    @property
    def trained(self) -> bool:
        """Is this what the network was trained for? Formats aside."""
        return self.block == ADAPTER.block_frames and self.past == PAST and self.pages is None


def of_blocks(model: TinyWorld, frames: int) -> TinyWorld:
    """The tiny world with blocks of so many frames.

    A frame is given every action since its block began. The network has learned tables for the first three only:
    those of shorter blocks are a part of them, and in longer ones a frame is told its last three actions alone.
    """
    network = model.network
    rows = frames * (len(ACTIONS) + 1)
    for table in (network.action, network.action_token):
        weight = table.weight.new_zeros(rows, table.weight.shape[1])
        known = table.weight[:rows]
        weight[: len(known)] = known
        table.weight = torch.nn.Parameter(weight, requires_grad=False)
        table.num_embeddings = rows
    network.config = dataclasses.replace(network.config, block_frames=frames)
    model.adapter = dataclasses.replace(ADAPTER, block_frames=frames)
    return model


class TopTable(PageTable):
    """A world whose blocks, while they are denoised, read the best pages of the past alone; clean passes read all."""

    pages = 0

    def plan(
        self,
        blocks: Sequence[Block],
        rope: Tensor | None = None,
        commit: Block | None = None,
        *more: Any,
        **options: Any,
    ) -> Pass:
        if commit is None:
            options["attention"] = TopK(self.pages, queries=self.store.frame_tokens)
        return super().plan(blocks, rope, commit, *more, **options)


class VariantWorld:
    """A variant's world, to be given frames and stepped block by block.

    Example:
        >>> world = VariantWorld(Variant("int4", kv="int4"), seed=0)
        >>> world.step(["none"] * 3, "desert night").shape
        (3, 96, 96, 3)
    """

    def __init__(self, variant: Variant, seed: int):
        model = load_model("tiny", linear=variant.linear)
        assert isinstance(model, TinyWorld)
        self.model = of_blocks(model, variant.block)
        if variant.pages is not None:  # a choice of pages is of one block a pass
            self.model.adapter = dataclasses.replace(self.model.adapter, fused=False)
        policy = Policy(variant.block + variant.past, format=variant.kv, older=variant.older)
        store = open_store(self.model, policy, 1, "auto", "auto")
        table = store.open(policy)
        if variant.pages is not None:
            table = TopTable(store, policy)
            table.pages = variant.pages
        self.decoder = open_decoder(self.model, table, seed + variant.noise)

    def observe(self, frames: np.ndarray, actions: Sequence[int | str], prompt: str) -> None:
        """Take given frames, whole blocks, as the past."""
        latents, size = self.model.encode(frames), self.model.adapter.block_frames
        for start in range(0, len(frames), size):
            conditioning = self.model.conditioning(prompt, actions[start : start + size])
            self.decoder.observe(latents[start : start + size], conditioning)

    def step(self, actions: Sequence[int | str], prompt: str) -> np.ndarray:
        """The next block, under as many actions as it has frames."""
        return self.model.decode(self.decoder.step(self.model.conditioning(prompt, actions)))


def truth_of(number: int, frames: int) -> tuple[Truth, Truth]:
    """The frames that stream `number` begins with, and what the simulator makes after them."""
    video = true_video(HELD_OUT + number, CONTEXT + frames, change_every=CHANGE_EVERY, start=CONTEXT)
    return video.part(0, CONTEXT), video.part(CONTEXT, CONTEXT + frames)


def stream(
    variant: Variant, number: int, frames: int, on_frames: Callable[[int], object] = lambda done: None
) -> Iterator[np.ndarray]:
    """Blocks of a variant's stream, uint8 [block, 96, 96, 3] each, until there are `frames` frames or a few more."""
    size = variant.block
    past, truth = truth_of(number, -(-frames // size) * size)
    if variant.simulator:
        on_frames(frames)
        yield truth.frames
        return
    prompts = [THEMES[theme] for theme in truth.themes @ [len(TIMES), 1]]
    world = VariantWorld(variant, HELD_OUT + number)
    world.observe(past.frames, past.actions.tolist(), prompts[0])
    for start in range(0, frames, size):
        yield world.step(truth.actions[start : start + size].tolist(), prompts[start])
        on_frames(min(size, frames - start))


def by_chunks(frames: np.ndarray, truth: Truth, number: int = CHUNKS) -> dict[str, list[float | None]]:
    """Each of the simulator's measures in TRUTH: its mean in each chunk; None where no frame had a say.

    Args:
        frames: uint8 [N, 96, 96, 3]; what is left over at their end counts nowhere.
        number: of chunks.
    """
    length = len(frames) // number
    scores: dict[str, list[float | None]] = {name: [] for name in TRUTH}
    for start in range(0, number * length, length):
        measured = measure(frames[start : start + length], truth.part(start, start + length))
        for name, found in scores.items():
            values = getattr(measured, name)
            said = values[~np.isnan(values)]
            found.append(float(said.mean()) if len(said) else None)
    return scores


def make(
    variant: Variant,
    number: int,
    frames: int,
    path: Path,
    metrics: Sequence[Metric],
    pair: Sequence[PairMetric],
    reference: Path | None,
    on_frames: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Make a stream, and what is found of it.

    Args:
        path: of the video, an MP4; metrics judge it as they judge any.
        metrics: of one video; pair: of it beside the reference, the video of another variant of the same stream.
    """
    made: list[np.ndarray] = []
    with VideoWriter(path, PRESENTATION.fps, ADAPTER.size, scale=SCALE) as video:
        for block in stream(variant, number, frames, on_frames):
            made.append(block[: frames - sum(len(each) for each in made)])
            video.write(made[-1])
    truth = by_chunks(np.concatenate(made), truth_of(number, frames)[1])
    nothing = WeightsDir(None)
    judged: Report = report([judge(path, metrics, nothing)], metrics, CHUNKS)["videos"][0]
    compared: dict[str, Any] = {}
    if reference is not None:
        each = compare(path, reference, pair)
        compared = {
            "scores": each.scores,
            "opening": each.opening,
            "parted": each.parted,
            "failed": each.failed,
            "seconds_per_frame": each.seconds_per_frame,
        }
    whole = {name: [value for value in scores if value is not None] for name, scores in truth.items()}
    return {
        "variant": dataclasses.asdict(variant),
        "stream": number,
        "frames": frames,
        "truth": truth,
        "truth_drift": {
            name: dataclasses.asdict(drift(scores))
            for name, scores in whole.items()
            if len(scores) == CHUNKS and scores[0] > 0
        },
        "scores": judged["scores"],
        "drift": judged["drift"],
        "whole": judged["whole"],
        "failed": judged["failed"],
        "pair": compared,
    }
