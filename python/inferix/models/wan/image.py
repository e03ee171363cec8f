"""What an image-to-video network gets of its first picture: the tokens of CLIP's image tower, from transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inferix_kernels._install import require

from .containers import check_floating, count_layers, pretrained, read_tensors, reading, shape_of, shown

# Wan's own file: the tower of OpenCLIP's ViT-H/14, with a text tower that nothing needs.
PUBLISHED = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
HEAD_DIM = 80  # of ViT-H: the one size that no tensor's shape shows
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pictures
LAYER = r"^visual\.transformer\.(\d+)\."
NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^visual\.cls_embedding$", "embeddings.class_embedding"),
        (r"^visual\.patch_embedding\.", "embeddings.patch_embedding."),
        (r"^visual\.pos_embedding$", "embeddings.position_embedding.weight"),
        (r"^visual\.pre_norm\.", "pre_layrnorm."),
        (r"^visual\.post_norm\.", "post_layernorm."),
        (LAYER + r"norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
        (LAYER + r"attn\.to_qkv\.", r"encoder.layers.\1.self_attn.to_qkv."),
        (LAYER + r"attn\.proj\.", r"encoder.layers.\1.self_attn.out_proj."),
        (LAYER + r"mlp\.0\.", r"encoder.layers.\1.mlp.fc1."),
        (LAYER + r"mlp\.2\.", r"encoder.layers.\1.mlp.fc2."),
    )
]


def has_image_encoder(folder: Path) -> bool:
    return (folder / "image_encoder").is_dir() or (folder / PUBLISHED).exists()


def load_image_encoder(folder: Path) -> ImageEncoder:
    """The tower in a folder: image_encoder/ (diffusers' layout) or in the file that Wan published.

    Raises:
        ImportError: transformers is not installed; names the extra.
        ValueError: the file is damaged or holds something else; says what.
    """
    transformers = require("transformers", "wan", "weights: the image encoder")
    if (folder / "image_encoder").is_dir():
        model = pretrained(transformers.CLIPVisionModel, folder / "image_encoder", "a CLIP tower", dtype=torch.float32)
    else:
        model = _published_tower(folder / PUBLISHED)
    return ImageEncoder(model.eval().requires_grad_(False))


class ImageEncoder:
    """Picture -> tokens of the tower's last layer but one, [1 + patches, width] float32."""

    def __init__(self, model: Any):
        self.model = model

    @torch.inference_mode()
    def __call__(self, picture: np.ndarray) -> Tensor:
        """uint8 [height, width, 3]; whatever its shape, it becomes the square that the tower looks at."""
        side = self.model.config.image_size
        x = torch.tensor(picture).permute(2, 0, 1)[None] / 255
        x = F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)
        x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
        tokens: Tensor = self.model(x, output_hidden_states=True).hidden_states[-2][0]
        return tokens


def _published_tower(path: Path) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tensors, _ = read_tensors(path)
    visual = {name: x for name, x in tensors.items() if name.startswith("visual.") and name != "visual.head"}
    source = str(path)

    def shape(name: str, dims: int) -> torch.Size:
        return shape_of(visual, f"visual.{name}", (dims,), source, "CLIP image tower")

    with reading(path, "a CLIP image tower"):
        patch, places = shape("patch_embedding.weight", 4), shape("pos_embedding", 3)[1]
        config = CLIPVisionConfig(
            hidden_size=patch[0],
            intermediate_size=shape("transformer.0.mlp.0.weight", 2)[0],
            num_hidden_layers=count_layers(visual, "visual.transformer.", source),
            num_attention_heads=patch[0] // HEAD_DIM,
            patch_size=patch[-1],
            image_size=math.isqrt(places - 1) * patch[-1],
            hidden_act="gelu",
        )
        check_floating(visual, visual, source)
        return _filled(CLIPVisionModel(config), visual, source)


def _filled(model: Any, visual: Mapping[str, Tensor], source: str) -> Any:
    state = _renamed(visual)
    wanted = {name: x for name, x in model.state_dict().items() if not name.endswith("position_ids")}
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"weights: {source} is no CLIP image tower: missing {shown(missing)}, unexpected {shown(unexpected)}"
        )
    model.load_state_dict({name: state[name].float().view_as(x) for name, x in wanted.items()}, strict=False)
    return model


def _renamed(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under transformers' names: q, k and v apart."""
    state: dict[str, Tensor] = {}
    for name, tensor in visual.items():
        for pattern, replacement in NAMES:
            name = pattern.sub(replacement, name)
        if ".to_qkv." in name:
            state |= {name.replace("to_qkv", f"{part}_proj"): x for part, x in zip("qkv", tensor.chunk(3))}
        else:
            state[name] = tensor
    return state
