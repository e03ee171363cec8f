"""Opens a world to be steered: for a page, in the worker's process, or for this terminal."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..world import World

UNDO_SECONDS = 15.0


def open_world(
    model: str,
    *,
    undo_seconds: float | None,
    worlds: int,
    threads: int | None = None,
    image: str | Path | None = None,
    parallel: str = "auto",
    **options: Any,
) -> World:
    """A world with room for forks and to rewind; in a process that torchrun has started, one rank's of it.

    Args:
        model: its name in `inferix.models.MODELS`.
        undo_seconds: how far; None: UNDO_SECONDS, but nothing for a model that would have to keep the state of a VAE,
            gigabytes, for every block.
        worlds: that the store has room for.
        threads: of the CPU; None: what suits the model.
        image: file of the picture that the world begins with, of a model that is conditioned on one.
        parallel: how processes that torchrun has started share it; see inferix.ranks.
        options: of World (kv, window, sink, seed, backend: all of them) and of the model's loader.

    Raises:
        ValueError: an argument is not what it must be, or the model can't be steered.
    """
    # Only here: the process of the page names this function and opens no world, so it needs no torch.
    import torch

    from ..models import load_model
    from ..ranks import join
    from ..world import World
    from .controls import begun_with

    of_world = inspect.signature(World).parameters.keys() - {"model", "weights", "linear", "ranks"}
    settings = {name: options.pop(name) for name in of_world & options.keys()}
    with contextlib.ExitStack() as until_open:  # what goes wrong until then ends all ranks
        ranks = join(options.get("device"), parallel)
        if ranks is not None:
            until_open.push(ranks)
        loaded = load_model(model, **options)
        adapter = loaded.adapter
        if adapter.at_once or adapter.stages:
            how = (
                "its video at once"
                if adapter.at_once
                else "several blocks at a time, the next ones begun before one is shown,"
            )
            raise ValueError(f"model: {model} makes {how} and can't be steered: use `inferix generate`")
        loaded = begun_with(loaded, image)
        if wanted := threads or loaded.presentation.threads:
            torch.set_num_threads(wanted)
        if undo_seconds is None:
            undo_seconds = 0 if loaded.stream().looks_back else UNDO_SECONDS
        blocks = -(-round(undo_seconds * loaded.presentation.fps) // adapter.block_frames)
        world = World(loaded, undo=blocks * adapter.block_frames, worlds=worlds, ranks=ranks, **settings)
        until_open.pop_all()
    return world
