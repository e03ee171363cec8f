"""Rotary positions that begin at any frame: diffusers' WanRotaryPosEmbed always begins at frame 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._dispatch import Unsupported

ROPE_BASE = 10_000.0  # diffusers' default, which WanTransformer3DModel never changes and does not keep
CHECKED = 8  # positions


class OffsetRotaryPosEmbed(nn.Module):
    """In place of the `rope` of a WanTransformer3DModel.

    Args:
        stock: the WanRotaryPosEmbed; stays here, untouched.

    Attributes:
        first: index of the first frame of what the transformer is given.

    Raises:
        Unsupported: `stock` turns by other angles than Wan's.

    Example:
        >>> from diffusers import WanTransformer3DModel
        >>> from inferix_kernels.integrations.diffusers import OffsetRotaryPosEmbed
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "ffn_dim": 32, "text_dim": 8}
        >>> rope = OffsetRotaryPosEmbed(WanTransformer3DModel(**sizes).rope)
        >>> rope.first = 30
        >>> cos, sin = rope(torch.randn(1, 16, 3, 4, 4))  # of frames 30, 31 and 32
        >>> list(cos.shape)
        [1, 12, 1, 16]
    """

    def __init__(self, stock: Any):
        super().__init__()
        self.stock, self.first = stock, 0
        self._widths: tuple[int, int, int] = (stock.t_dim, stock.h_dim, stock.w_dim)
        self._patch: tuple[int, int, int] = stock.patch_size
        own = self._rates(CHECKED).cos().repeat_interleave(2, -1)
        theirs = stock.freqs_cos[:CHECKED].double().cpu()
        if theirs.shape != own.shape or not torch.allclose(theirs, own, atol=1e-2):  # they may be in bfloat16
            raise Unsupported(f"rope: angles must be those of Wan, to base {ROPE_BASE:g}, got others")

    def _rates(self, positions: int) -> Tensor:
        """Angles [positions, D / 2] float64, as if time, row and column were all the position."""
        rates = [ROPE_BASE ** (-torch.arange(0, n, 2, dtype=torch.float64) / n) for n in self._widths]
        return torch.arange(positions, dtype=torch.float64)[:, None] * torch.cat(rates)

    def table(self, frames: int, height: int, width: int, device: torch.device) -> Tensor:
        """[frames * rows * columns, D / 2, 2] float32, the cos and sin of every token of `frames` frames from `first`
        on; height and width are the latents'. Angles are float64, so there is no frame at which they end."""
        rows, columns = height // self._patch[1], width // self._patch[2]
        axes = torch.meshgrid(
            torch.arange(self.first, self.first + frames), torch.arange(rows), torch.arange(columns), indexing="ij"
        )
        one = self._rates(2)[1].split([n // 2 for n in self._widths])
        angles = torch.cat([at.double()[..., None] * rate for at, rate in zip(axes, one)], -1).flatten(0, 2)
        return torch.stack([angles.cos(), angles.sin()], -1).float().to(device)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [B, C, F, height, width] -> cos and sin, each [1, tokens, 1, D], every number twice."""
        _, _, frames, height, width = hidden_states.shape
        table = self.table(frames, height, width, hidden_states.device)
        cos, sin = table.repeat_interleave(2, 1)[None, :, None].unbind(-1)
        return cos, sin
