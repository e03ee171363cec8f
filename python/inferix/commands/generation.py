"""One video asked for: everything is checked before the first frame is made, then it is made and written."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
from pathlib import Path

import numpy as np
import torch

from inferix_kernels._check import check_device
from inferix_kernels.files import destination, open_locked, require_writable

from ..media import LatentWriter, VideoWriter, read_picture, read_video
from ..media.journal import Journal, journal_path, refuse_unfinished
from ..media.output_file import partial_path
from ..models import MODELS, Model, blocks_for, load_model, whole_start
from ..profile import profiling
from ..ranks import Ranks
from ..world import World
from .configs import GenerateConfig
from .controls import Prompts, actions_from, refuse_inputs
from .maker import Maker


class Generation:
    """A video that a config asks for. When this is opened nothing has been written, and all that is to be can be.

    Args:
        ranks: the processes that make it together, of which the first one runs and the others follow.

    Attributes:
        total: frames that were asked for.
        frames: that were made.
        video: the file, once `run` has begun it.
        journal: of the run; None for a live world.
    """

    def __init__(self, config: GenerateConfig, ranks: Ranks | None = None):
        self.config = config
        if config.device is not None and check_device("device", config.device).type not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {config.device!r}")
        model = load_model(config.model, **config.arguments("model"))
        adapter, presentation = model.adapter, model.presentation
        if config.resume and model.presentation.live:
            raise ValueError(
                f"resume: the {adapter.name} world is made in real time and keeps no journal to resume from"
            )
        self.total = round(config.seconds * presentation.fps)
        if self.total < 1:
            raise ValueError(f"seconds must be at least one frame, 1/{presentation.fps}, got {config.seconds:g}")
        if ranks is None or ranks.leads:  # who writes
            _check_outputs(config, model)
        given = _given(config, model, self.total)
        self.digest = None if given is None else hashlib.sha256(given.tobytes()).hexdigest()
        if adapter.at_once:
            model, given = model.for_video(self.total, None if given is None else given[0]), None
        elif adapter.picture:
            model, given = model.with_picture(None if given is None else given[0]), None
        self.given = given
        # A pipeline begins no block that nobody will see.
        blocks = blocks_for(model, self.total) if adapter.stages else None
        self.world = World(model, blocks=blocks, ranks=ranks, **config.arguments("world"))
        if threads := config.threads or presentation.threads:
            torch.set_num_threads(threads)
        self.prompts = _prompts(config, model)
        self.actions = actions_from(config.actions, adapter, config.seed) if adapter.actions else None
        self.video: VideoWriter | LatentWriter | None = None
        self.journal: Journal | None = None

    @property
    def frames(self) -> int:
        return 0 if self.video is None else self.video.frames

    def run(self, progress: bool = False) -> bool:
        """Make and write the video; False if Ctrl-C ended it at the last whole block. A second Ctrl-C
        ends it once pictures on their way are written, a third at once.

        Args:
            progress: draw a bar on the terminal.
        """
        self.journal, whole = None if self.world.model.presentation.live else self._open_journal(), False
        folder, title = self.config.profile, f"{self.config.model}: {self.config.out}"
        level, looked_at = "block" if folder is None else "layer", self.config.profile_torch
        profiled = profiling(level, folder, title=title, torch_blocks=looked_at)
        try:
            with (
                profiled
            ):  # the video is whole before the profile, which is what an error or Ctrl-C may cost, is written
                with self._writer() as self.video:
                    self.maker = Maker(self.world, self.actions, self.prompts, self.total, self.video, self.journal)
                    with contextlib.suppress(KeyboardInterrupt):  # the second Ctrl-C: the video ends here
                        self.maker.run(self.given, progress)
                whole = self.frames == self.total
        finally:  # once the video is closed: until then the journal is all there is
            if self.journal is not None:
                self.journal.close(done=whole or not self.journal.count)
        return whole

    def _writer(self) -> VideoWriter | LatentWriter:
        config, model = self.config, self.world.model
        if model.only_latents:
            return LatentWriter(config.out, self.total, model.latent_shape, argument="out")
        scale = model.presentation.scale if config.scale is None else config.scale
        return VideoWriter(config.out, model.presentation.fps, model.adapter.size, scale=scale, argument="out")

    def _open_journal(self) -> Journal:
        config, adapter = self.config, self.world.model.adapter
        settings = {
            "model": adapter.name,
            "weights": _absolute(config.weights),
            "lora": config.lora,
            "vae": _absolute(config.vae),
            "size": adapter.size,
            "seed": config.seed,
            "kv": config.kv,
            "window": config.window,
            "sink": config.sink,
            "backend": config.backend,
            "precision": config.precision,
            "linear": config.linear,
            "steps": config.steps,
            "guidance": config.guidance,
            "negative_prompt": config.negative_prompt,
            "image": _absolute(config.image),
            "video": _absolute(config.video),
            "what --image or --video shows (its SHA-256)": self.digest,  # the name in journals, also earlier ones
            "seconds": config.seconds if adapter.stages else None,
            "stages": config.stages,
            "fp8": config.fp8,
            "decoder": config.decoder,
            "special_tokens": config.special_tokens,
            "prompts": self.prompts.starts,
        }
        path = journal_path(Path(config.out), "out")
        return Journal(path, self.world.model.latent_shape, settings, config.resume, argument="out")


def _absolute(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _prompts(config: GenerateConfig, model: Model) -> Prompts:
    """Every word of them is checked before the first frame is made."""
    adapter = model.adapter
    prompts = Prompts(((0.0, model.presentation.example_prompts[0] if config.prompt is None else config.prompt),))
    if config.prompt_file is not None:
        prompts = Prompts.read(config.prompt_file, "prompt_file")
    if adapter.at_once and len(prompts.starts) > 1:
        raise ValueError(f"prompt_file must hold one prompt for {adapter.name}, which makes a video at once")
    for _, prompt in prompts.starts:
        try:
            model.conditioning(prompt, [adapter.actions[0]] * adapter.block_frames if adapter.actions else [])
        except ValueError as error:
            raise error if config.prompt_file is None else ValueError(f"prompt_file: {error}") from None
    return prompts


def _outputs(config: GenerateConfig, model: Model) -> list[Path]:
    """Every file that may be written."""
    out = Path(config.out)
    if not out.name:
        raise ValueError(f"out must be the name of a file, got {str(config.out)!r}")
    latents = model.only_latents
    if not latents and out.suffix.lower() != ".mp4":
        raise ValueError(f"out must end in .mp4, got {str(out)!r}")
    video = out.with_suffix(".npy") if latents else out
    sheet = [] if latents else [out.with_suffix(".png")]
    journal = [] if model.presentation.live else [journal_path(out, "out")]
    return [video, partial_path(destination(video, "out")), out.with_suffix(".json"), *sheet, *journal]


def _check_outputs(config: GenerateConfig, model: Model) -> None:
    """All that is to be written can be, each to a file of its own, and none of it is what the video is made from."""
    written: dict[Path, Path] = {}
    for path in _outputs(config, model):
        place = require_writable(path, "out").resolve()
        if (other := written.setdefault(place, path)) is not path:
            raise ValueError(f"out: {str(other)!r} and {str(path)!r} must be two files, got links to one")
        refuse_inputs(path, config)
    journal = journal_path(Path(config.out), "out")
    if journal.exists() and not model.presentation.live:
        with open_locked(journal, "out", config.out):  # no other run is at it
            if not config.resume:
                refuse_unfinished(journal, "out")


def _given(config: GenerateConfig, model: Model, total: int) -> np.ndarray | None:
    """What the video begins with; of a clip the longest start that makes whole blocks."""
    adapter = model.adapter
    for option in ("image", "video"):
        alone = adapter.actions or adapter.picture
        if getattr(config, option) is not None and alone and not (adapter.picture and option == "image"):
            what = " and ".join(
                ["a picture"] * adapter.picture + ["words"] * adapter.words + ["actions"] * bool(adapter.actions)
            )
            raise ValueError(f"{option} must not be given: {adapter.name} begins with {what} alone")
    if config.image is not None:
        picture = read_picture(config.image, adapter.size, "image")
        if not adapter.at_once and not adapter.picture and not whole_start(model, 1):
            raise ValueError(f"image: {adapter.name} begins with several pictures{_beginning_with_one(config)}")
        return picture
    if config.video is not None:
        if adapter.at_once:
            raise ValueError(f"video must not be given: {adapter.name} makes a video at once, from no past")
        clip = read_video(config.video, adapter.size, model.presentation.fps, total, "video")
        if not (most := whole_start(model, len(clip))):
            least = next(n for n in itertools.count(len(clip)) if whole_start(model, n))
            raise ValueError(f"video: {adapter.name} goes on from at least {least} pictures, got {len(clip)}")
        return clip[:most]
    return None


def _beginning_with_one(config: GenerateConfig) -> str:
    """Names the models of the same family that take one picture."""
    rows = getattr(importlib.import_module(MODELS[config.model]), "ADAPTERS", {})
    names = [name for name, row in rows.items() if (row.frames(first=True) == 1 or row.picture) and not row.at_once]
    return f": {', '.join(names)} take one picture" if names else ""
