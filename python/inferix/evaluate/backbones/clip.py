"""CLIP's image encoder, and LAION's aesthetic head on it.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021); openai/CLIP
clip/model.py. OpenAI's files are TorchScript archives in float16; here they are computed in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .load import State, filled, read
from .vit import Block, quick_gelu


class ClipImage(nn.Module):
    """CLIP's image encoder: pixels [B, 3, S, S], normalized, to embeddings [B, out]."""

    def __init__(self, width: int, layers: int, patch: int, out: int, size: int = 224, heads: int = 0) -> None:
        super().__init__()
        grid = size // patch
        self.patch_embed = nn.Conv2d(3, width, patch, patch, bias=False)
        self.cls_token = nn.Parameter(torch.empty(width))
        self.pos_embed = nn.Parameter(torch.empty(grid * grid + 1, width))
        self.norm_pre = nn.LayerNorm(width)
        heads = heads or width // 64
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, 1e-5, quick_gelu) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, out))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(tokens), 1, -1), tokens], dim=1)
        x = self.norm_pre(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0]) @ self.proj


_RENAMED = (  # OpenAI's names, in the order in which they are looked for
    ("conv1.", "patch_embed."),
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("transformer.resblocks.", "blocks."),
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj.", "attn.proj."),
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)


def image_half(state: State) -> State:
    """Of OpenAI's tensors those of the image encoder, under the names of `ClipImage`."""
    found: State = {}
    for name, tensor in state.items():
        if name.startswith("visual."):
            name = name.removeprefix("visual.")
            for theirs, ours in _RENAMED:
                name = name.replace(theirs, ours)
            found[name] = tensor
    return found


def load(path: Path, holds: str, width: int, layers: int, patch: int, out: int) -> nn.Module:
    """CLIP's image encoder from OpenAI's file. Raises ValueError: it holds another network."""
    return filled(lambda: ClipImage(width, layers, patch, out), image_half(read(path, torchscript=True)), path, holds)


def vit_l_14(path: Path) -> nn.Module:
    """CLIP ViT-L/14: to [B, 768]."""
    return load(path, "CLIP ViT-L/14", 1024, 24, 14, 768)


def vit_b_32(path: Path) -> nn.Module:
    """CLIP ViT-B/32: to [B, 512]."""
    return load(path, "CLIP ViT-B/32", 768, 12, 32, 512)


def aesthetic_head(path: Path) -> nn.Module:
    """LAION's linear head on normalized embeddings of CLIP ViT-L/14: [B, 768] to [B, 1], about 1 to 10."""
    return filled(lambda: nn.Linear(768, 1), read(path), path, "LAION's aesthetic head for CLIP ViT-L/14")
