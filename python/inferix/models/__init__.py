"""The models that can be run, by name. What each of them brings is declared in inferix.decode.contract."""

from __future__ import annotations

import importlib
import inspect
import itertools
from typing import Any

from ..decode.contract import Adapter, Model, PictureStream, Presentation

__all__ = ["MODELS", "Adapter", "Model", "PictureStream", "Presentation", "blocks_for", "load_model", "whole_start"]


def whole_start(model: Model, pictures: int) -> int:
    """The most of so many given pictures that `World.observe` takes as the beginning: whole blocks of latents or, where
    the first frames of a block may be given, whole latents."""
    adapter = model.adapter
    if model.schedule is not None and model.schedule.partly_given:
        return pictures if pictures == 1 else pictures - pictures % model.presentation.pictures
    end, following, whole = 0, adapter.frames(first=True), 0
    while model.pictures_of(end + following) <= pictures:
        end, following = end + following, adapter.block_frames
        whole = model.pictures_of(end)
    return whole


def blocks_for(model: Model, pictures: int) -> int:
    """The blocks that so many pictures take, at the beginning of a video."""
    return next(n for n in itertools.count(1) if model.pictures_of(n * model.adapter.block_frames) >= pictures)


_WAN, _MAGI, _MATRIX_GAME = "inferix.models.wan", "inferix.models.magi", "inferix.models.matrix_game"
# name -> module with load(weights, name, **options) -> Model
MODELS = {
    "tiny": "inferix.models.tiny",
    "self-forcing": _WAN,
    "self-forcing-framewise": _WAN,
    "self-forcing-first-frame": _WAN,
    "causvid": _WAN,
    "longlive": _WAN,
    "longlive-infinity": _WAN,
    "longlive-2": _WAN,
    "longlive-2-i2v": _WAN,
    "infinity-rope": _WAN,
    "krea-realtime": _WAN,
    "krea-realtime-first-frame": _WAN,
    "rolling-forcing": _WAN,
    "reward-forcing": _WAN,
    "causal-forcing": _WAN,
    "causal-forcing-framewise": _WAN,
    "causal-forcing-framewise-2step": _WAN,
    "causal-forcing-framewise-1step": _WAN,
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
    "matrix-game-2": _MATRIX_GAME,
    "matrix-game-2-gta": _MATRIX_GAME,
    "matrix-game-2-templerun": _MATRIX_GAME,
}


def load_model(name: str, weights: str | None = None, **options: Any) -> Model:
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
    model: Model = load(weights, name, **given)
    return model
