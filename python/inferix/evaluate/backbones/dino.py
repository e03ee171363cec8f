"""DINO: a vision transformer for images of any size.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021); facebookresearch/dino
vision_transformer.py at 7c446df.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .load import filled, read
from .vit import Block


class _Patches(nn.Module):
    """Pixels [B, 3, H, W] to patches [B, width, H // patch, W // patch]; what is left over at the edges is dropped."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.proj(pixels)


class Dino(nn.Module):
    """Pixels [B, 3, H, W], normalized, to embeddings [B, width]: the class token behind the last norm."""

    def __init__(self, width: int = 768, layers: int = 12, heads: int = 12, patch: int = 16, size: int = 224) -> None:
        super().__init__()
        self.patch_embed = _Patches(width, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, 1e-6) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings [1, 1 + height * width, C] of a grid of patches: the trained ones, interpolated.

        The published code scales by (side + 0.1) / trained side, and the network was used so: a resize to the same
        size gives other numbers.
        """
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side = math.isqrt(grid.shape[1])
        if (height, width) == (side, side):
            return self.pos_embed
        grid = grid.transpose(1, 2).reshape(1, -1, side, side)
        scale = ((height + 0.1) / side, (width + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(pixels)
        tokens = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        x = x + self.positions(*patches.shape[2:])
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def load(path: Path) -> nn.Module:
    """DINO ViT-B/16. Raises ValueError: the file holds another network."""
    return filled(Dino, read(path), path, "DINO ViT-B/16")
