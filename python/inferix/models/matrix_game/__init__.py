"""Matrix-Game 2: a world with a keyboard and a camera, that begins with a picture."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inferix_kernels._check import check_device

from ...decode.contract import BlockInput, Model
from ..linears import check_linear
from ..wan import Wan, find_checkpoint, load_network
from ..wan.image import has_image_encoder, load_image_encoder
from ..wan.network import CrossCache
from ..wan.vae import has_vae, load_vae
from .adapters import ADAPTERS, CONTROLS, FOLDERS, PRESENTATIONS, named
from .checkpoint import matrix_game_network
from .network import REACH, ActionBlock, ActionConditioning, MatrixGameConfig, MatrixGameNetwork, placed

__all__ = ["ADAPTERS", "MatrixGame", "MatrixGameConfig", "MatrixGameNetwork", "load"]

# Latent frames of the picture's video that are encoded: the VAE looks back on at most 29, so that the grey that follows
# the picture looks the same to it from there on.
ENCODED = 32


class MatrixGame(Wan):
    """A Matrix-Game network as the decode loop sees it. A world begins with a picture: see `with_picture`.

    Args and attributes as `inferix.models.wan.Wan` has them.
    """

    network: MatrixGameNetwork
    cross: CrossCache | None = None  # of the picture, once there is one

    @torch.inference_mode()
    def with_picture(self, picture: np.ndarray | None) -> Model:
        if picture is None:
            raise ValueError(f"image must be given: {self.adapter.name} is conditioned on the picture it begins with")
        other = self.conditioned(*self.seen(picture, ENCODED))
        other.begun_with = hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()[:16]
        return other

    def conditioned(self, channels: Tensor, tokens: Tensor | None) -> MatrixGame:
        """The same model, conditioned on what a picture was made into.

        Args:
            channels: [frames, 20, h, w]: the mask and the latents of a video that begins with it; the last frame's are
                those of all later ones too.
            tokens: [n, image_dim] of CLIP.
        """
        assert tokens is not None
        other = copy.copy(self)
        other.concat_latents, other.cross = channels, self.network.picture_cache(tokens)
        return other

    @torch.inference_mode()
    def conditioning(self, prompt: str, actions: Sequence[int | str]) -> ActionConditioning:
        if prompt:
            raise ValueError(f"prompt must be empty: {self.adapter.name} takes no words, got {prompt!r}")
        if self.cross is None:
            raise ValueError(f"image: {self.adapter.name} is conditioned on its first picture: see with_picture")
        told = CONTROLS[self.adapter.name].told([named(self.adapter, action) for action in actions])
        keyboard, mouse = (None if x is None else x.to(self.device) for x in told)
        assert keyboard is not None
        return self._of(ActionBlock(keyboard, mouse))

    def _of(self, own: ActionBlock) -> ActionConditioning:
        assert self.cross is not None
        shared = {field.name: getattr(self.cross, field.name) for field in dataclasses.fields(self.cross)}
        return ActionConditioning(**shared, own=own)

    def placed(
        self, conditioning: ActionConditioning, first: int, before: Sequence[ActionConditioning]
    ) -> ActionConditioning:
        window = self.adapter.window
        assert window is not None
        needed = max(window - self.adapter.block_frames, REACH)  # frames of the past, for attention or as they are told
        blocks = -(-needed // self.adapter.block_frames)
        return placed(conditioning, first, [each.own for each in before[-blocks:]], window)

    def carried(self, conditioning: ActionConditioning) -> dict[str, Any]:
        own = conditioning.own
        kept = {f"{layer} {part}": tuple(x.cpu() for x in kv) for (layer, part), kv in own.kept.items()}
        return {"keyboard": own.keyboard.cpu(), "mouse": None if own.mouse is None else own.mouse.cpu(), "kept": kept}

    def resumed(self, carried: dict[str, Any]) -> ActionConditioning:
        mouse, config = carried["mouse"], self.network.config
        parts = ("mouse", "keyboard") if config.mouse else ("keyboard",)
        kept = {
            (layer, part): tuple(x.to(self.device, self.dtype) for x in carried["kept"][f"{layer} {part}"])
            for layer in range(config.action_layers)
            for part in parts
        }
        keyboard = carried["keyboard"].to(self.device)
        if keyboard.shape[1:] != (config.keyboard,) or any(len(kv) != 2 for kv in kept.values()):
            raise ValueError("carried must be what was done in a block")
        return self._of(ActionBlock(keyboard, None if mouse is None else mouse.to(self.device), kept))

    def prepare(self, prompt: str) -> None:
        """There is nothing to prepare."""

    def channels(self, block: BlockInput) -> Tensor:
        assert self.concat_latents is not None
        frames = torch.arange(block.conditioning.first, block.conditioning.first + len(block.x))
        given = self.concat_latents[frames.clamp(max=len(self.concat_latents) - 1).to(self.concat_latents.device)]
        return torch.cat([block.x, given.to(block.x)], 1)


def load(
    weights: str | Path | None = None,
    name: str = "matrix-game-2",
    *,
    size: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    linear: str | None = None,
) -> MatrixGame:
    """A Matrix-Game 2 from its checkpoint.

    Args:
        weights: a folder with the network and, beside it, the VAE and CLIP: as it is published, with the networks in
            folders of their own, or in diffusers' layout. Or the network's file alone, beside them.
        size: pixels (height, width); by default what the model was trained at.
        device: by default a GPU, if there is one.
        dtype: of the products; by default float32 on the CPU and bfloat16 elsewhere.
        linear: as for `inferix.models.wan.load`. Action modules stay as they are.

    Raises:
        ValueError: something is missing, damaged or of another architecture; says what.
    """
    check_linear(linear, dtype)
    adapter = ADAPTERS[name] if size is None else dataclasses.replace(ADAPTERS[name], size=size)
    folder = Path(weights) if weights is not None else None
    inner = folder / FOLDERS[name] if folder is not None and (folder / FOLDERS[name]).is_dir() else weights
    path = find_checkpoint(inner)
    folder = path.parent if folder is None or folder.is_file() else folder
    device = check_device("device", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" and linear != "bf16" else torch.bfloat16)
    build = functools.partial(matrix_game_network, name=name)
    network = load_network(path, build=build, row=name, dtype=dtype, device=device, linear=linear)
    assert isinstance(network, MatrixGameNetwork)
    vae = functools.cache(lambda: load_vae(folder, device)) if has_vae(folder) else None
    return MatrixGame(
        network,
        adapter,
        open_video=None if vae is None else lambda: vae().open(),
        encode_video=None if vae is None else lambda frames: vae().encode(frames),
        encode_start=None if vae is None else lambda picture, frames: vae().encode_start(picture, frames),
        look=(lambda picture: load_image_encoder(folder)(picture)) if has_image_encoder(folder) else None,
        presentation=PRESENTATIONS[name],
    )
