"""From a checkpoint's tensors to the network that they are of. Another model's are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..wan.checkpoint import config_of
from ..wan.containers import count_layers, shape_of
from .adapters import CONTROLS
from .network import PICTURES, REACH, MatrixGameConfig, MatrixGameNetwork

HEAD_DIM = 64  # of an action module: what no tensor's shape shows


def matrix_game_network(
    tensors: Mapping[str, Tensor], hints: Mapping[str, Any], source: str, name: str = "matrix-game-2"
) -> MatrixGameNetwork:
    """The network of a checkpoint's tensors, without its weights.

    Raises:
        ValueError: they are another model's; says what differs.
    """
    controls = CONTROLS[name]
    modules = sorted({int(key.split(".")[1]) for key in tensors if ".action_model." in key})
    if not modules:
        raise ValueError(f"weights: {source}: {name} must have action modules, got none: another model's weights")

    def shape(key: str) -> tuple[int, ...]:
        return tuple(shape_of(tensors, f"blocks.0.action_model.{key}", (2,), source, "Matrix-Game transformer"))

    keyboard = shape("keyboard_embed.0.weight")[1]
    base, width = config_of(tensors, hints, source), shape("mouse_attn_q.weight")[0]
    mouse_weight = "mouse_mlp.0.weight"
    has_mouse = f"blocks.0.action_model.{mouse_weight}" in tensors
    mouse = (shape(mouse_weight)[1] - base.dim) // (PICTURES * REACH) if has_mouse else 0
    wanted = (len(controls.keyboard), 2 if controls.camera else 0)
    if (keyboard, mouse) != wanted:
        raise ValueError(
            f"weights: {source}: {name} must have {wanted[0]} keys and {wanted[1]} mouse channels, got {keyboard} and "
            f"{mouse}: weights of another Matrix-Game"
        )
    layers = count_layers(tensors, "blocks.", source)
    if modules != list(range(len(modules))) or len(modules) == layers:
        raise ValueError(
            f"weights: {source}: action modules must be in the first layers and not in the last one, as in the "
            f"distilled models, got them in {modules} of {layers}"
        )
    return MatrixGameNetwork(
        MatrixGameConfig(
            **dataclasses.asdict(base),
            action_layers=len(modules),
            keyboard=keyboard,
            mouse=mouse,
            key_dim=shape("keyboard_embed.0.weight")[0],
            action_dim=width,
            action_heads=hints.get("action_heads") or max(1, width // HEAD_DIM),
        )
    )
