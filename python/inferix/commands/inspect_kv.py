"""`inferix inspect-kv`: what a model's keys and values are like, and what each format of pages costs it, as a JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from inferix_kernels import __version__
from inferix_kernels.files import atomic_write, require_writable
from inferix_kernels.layout import KV_FORMATS, scratch_format

from ..decode.decoder import Decoder
from ..inputs import conditioning_of
from ..kv_statistics import OUTLIER, Watched, thinned
from ..models import Model, load_model
from ..opening import check_seed, open_decoder, open_store, policy_for
from ..saved import fingerprint
from .configs import InspectKvConfig
from .controls import actions_from, begun_with, refuse_inputs
from .options import configured

TRIED = 4  # blocks over whose past every format is tried


@dataclass(frozen=True)
class InspectedKV:
    """What was measured.

    Attributes:
        path: the JSON.
        report: what it holds; docs/inspect-kv.md says what each number is.
    """

    path: Path
    report: Mapping[str, Any]


def inspect_kv(config: InspectKvConfig | None = None, /, **options: Any) -> InspectedKV:
    """Run a world and measure its keys and values: outlier channels, drift of the mean, error of each page format.

    Pictures are not made, so that a checkpoint needs no VAE, but for a model that begins with a picture.

    Args:
        config: what to run; without one, the defaults.
        options: fields of InspectKvConfig, in place of those of `config`.

    Raises:
        ValueError: an option is not what it must be, the file can not be written, or the model keeps no past.

    Example:
        >>> found = inferix.inspect_kv(model="tiny", seconds=0.4, out="kv.json")
        >>> found.report["layers"][0]["error"]["int8"]["attention"] < 0.02
        True
    """
    return _inspect(configured(InspectKvConfig, config, options))


def _inspect(config: InspectKvConfig, progress: bool = False) -> InspectedKV:
    path = require_writable(Path(config.out), "out")
    refuse_inputs(path, config)
    check_seed(config.seed)
    model = _model(config)
    adapter = model.adapter
    frames = max(2 * adapter.block_frames, math.ceil(config.seconds * model.presentation.fps / _pictures(model)))
    if threads := config.threads or model.presentation.threads:
        torch.set_num_threads(threads)
    precise = scratch_format(model.device, model.dtype)
    policy = policy_for(adapter, precise, config.window, config.sink, 0)
    store = open_store(model, policy, 1, config.backend, "exact")
    negative = None if adapter.guidance == 1 else model.conditioning(adapter.negative_prompt, [])
    decoder = open_decoder(model, store.open(policy), config.seed, negative)
    watched = Watched(decoder, [format for format in KV_FORMATS if format != precise])
    _run(config, decoder, watched, frames, progress)
    report = {
        "inferix": __version__,
        "model": adapter.name,
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "pages": precise,
        "page_size": store.page_size,
        "size": list(adapter.size),
        "frame_tokens": model.frame_tokens,
        "heads": model.heads,
        "head_dim": model.head_dim,
        "window": policy.window,
        "sink": policy.sink,
        "frames": decoder.frames,
        "outlier": OUTLIER,
        "drift_at": thinned(range(1, len(watched.layers[0].drift) + 1)),
        "layers": [layer.report() for layer in watched.layers],
    }
    with atomic_write(path, "out") as part:
        part.write_text(json.dumps(report, separators=(",", ":")) + "\n")
    return InspectedKV(path, report)


def run(config: InspectKvConfig) -> int:
    found = _inspect(config, progress=True)
    report, size = found.report, found.path.stat().st_size
    print(f"{found.path}: {report['frames']} frames of {report['model']}, {size / 1024:.1f} KiB")
    layers = report["layers"]
    for format in layers[0]["error"]:
        worst = max(range(len(layers)), key=lambda i: layers[i]["error"][format]["attention"])
        error = layers[worst]["error"][format]
        print(
            f"  {format}: worst layer {worst}: keys {error['keys']:.2%}, values {error['values']:.2%}, "
            f"attention {error['attention']:.2%}"
        )
    return 0


def _model(config: InspectKvConfig) -> Model:
    model = load_model(config.model, **config.arguments("model"))
    adapter = model.adapter
    if adapter.at_once:
        raise ValueError(f"model: {adapter.name} makes a video at once and keeps no past: it has no pages")
    return begun_with(model, config.image)


def _run(config: InspectKvConfig, decoder: Decoder, watched: Watched, frames: int, progress: bool) -> None:
    model = decoder.model
    adapter, prompt = model.adapter, config.prompt
    if prompt is None:
        prompt = model.presentation.example_prompts[0]
    actions = actions_from(config.actions, adapter, config.seed) if adapter.actions else None
    blocks = math.ceil(frames / adapter.block_frames) + adapter.stages  # until a pipeline has committed as many
    tried = {round(blocks * (i + 1) / TRIED) - 1 for i in range(TRIED)}
    steps = track(range(blocks), f"{adapter.name} world", console=Console(stderr=True), disable=not progress)
    for i in steps:
        chosen = [] if actions is None else [next(actions) for _ in range(adapter.block_frames)]
        watched.step(conditioning_of(model, chosen, prompt), trying=i in tried)


def _pictures(model: Model) -> int:
    """Of the video, per latent frame."""
    return max(model.presentation.pictures, model.pictures_of(2) - model.pictures_of(1))
