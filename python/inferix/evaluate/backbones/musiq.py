"""MUSIQ: the quality of one image, from patches of it at three scales.

Ke et al., "MUSIQ: Multi-scale Image Quality Transformer" (2021). The weights are pyiqa's, and so are the details
where it departs from the paper (0.1.16, pyiqa/archs/musiq_arch.py and pyiqa/data/multiscale_trans_util.py): resizing is
bicubic without antialiasing, and convolutions are standardized by the unbiased deviation of their weights. pyiqa masks
padding patches out of attention; here there are none.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .load import State, filled, read
from .vit import Block

PATCH = 32  # pixels of a patch's side
GRID = 10  # positions are hashed to GRID x GRID
SCALES = (224, 384)  # the longer side of the first two scales; the third is the image itself


def same_padded(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """[B, C, H, W] with zeros around it, so that a window gives ceil(side / stride) values; more of them at the end."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = (math.ceil(side / stride) - 1) * stride + kernel - side
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class StandardizedConv(nn.Conv2d):
    """A convolution without bias, "same" padding, whose weights are standardized for each output channel."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(same_padded(x, self.kernel_size[0], self.stride[0]), weight, None, self.stride)


class Bottleneck(nn.Module):
    """A residual block of three convolutions: [B, inputs, H, W] to [B, outputs, H, W]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.gn1 = StandardizedConv(inputs, inputs, 1), nn.GroupNorm(32, inputs, eps=1e-4)
        self.conv2, self.gn2 = StandardizedConv(inputs, inputs, 3), nn.GroupNorm(32, inputs, eps=1e-4)
        self.conv3, self.gn3 = StandardizedConv(inputs, outputs, 1), nn.GroupNorm(32, outputs, eps=1e-4)
        self.conv_proj, self.gn_proj = StandardizedConv(inputs, outputs, 1), nn.GroupNorm(32, outputs, eps=1e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        return F.relu(self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x)))


def hashed_positions(rows: int, columns: int) -> torch.Tensor:
    """Indices [rows * columns] into the GRID x GRID table of positions: the nearest, as torch's `nearest` rounds."""
    steps = torch.arange(GRID, dtype=torch.float32)[None, None]
    row, column = (F.interpolate(steps, side, mode="nearest")[0, 0].long() for side in (rows, columns))
    return (row[:, None] * GRID + column[None, :]).flatten()


class Musiq(nn.Module):
    """Images [B, 3, H, W] of 0 to 1 to scores [B]: 0 to 100 under the weights trained on SPAQ."""

    def __init__(self, width: int = 384, layers: int = 14, heads: int = 6, hidden: int = 1152) -> None:
        super().__init__()
        self.conv_root, self.gn_root = StandardizedConv(3, 64, 7, 2), nn.GroupNorm(32, 64, eps=1e-6)
        self.block1 = Bottleneck(64, 256)
        self.embedding = nn.Linear(256 * (PATCH // 4) ** 2, width)
        self.position = nn.Parameter(torch.empty(GRID * GRID, width))
        self.scale = nn.Parameter(torch.empty(len(SCALES) + 1, width))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, 1e-6) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 1)

    def tokens(self, image: torch.Tensor, scale: int) -> torch.Tensor:
        """[B, N, width]: the patches of one scale's image [B, 3, H, W], from -1 to 1."""
        rows, columns = (math.ceil(side / PATCH) for side in image.shape[2:])
        patches = F.unfold(same_padded(image, PATCH, PATCH), PATCH, stride=PATCH)  # [B, 3 * PATCH * PATCH, N]
        x = patches.transpose(1, 2).reshape(-1, 3, PATCH, PATCH)
        x = F.relu(self.gn_root(self.conv_root(x)))
        x = self.block1(F.max_pool2d(same_padded(x, 3, 2), 3, 2))
        x = self.embedding(x.permute(0, 2, 3, 1).reshape(len(image), rows * columns, -1))
        return x + self.position[hashed_positions(rows, columns).to(x.device)] + self.scale[scale]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = 2 * images - 1
        height, width = images.shape[2:]
        parts = []
        for scale, longer in enumerate(SCALES):
            ratio = longer / max(height, width)
            size = (round(height * ratio), round(width * ratio))
            parts.append(self.tokens(F.interpolate(images, size, mode="bicubic", align_corners=False), scale))
        parts.append(self.tokens(images, len(SCALES)))
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), *parts], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))[:, 0]


_RENAMED = (  # pyiqa's names
    ("transformer_encoder.posembed_input.position_emb", "position"),
    ("transformer_encoder.scaleembed_input.scale_emb", "scale"),
    ("transformer_encoder.cls", "cls_token"),
    ("transformer_encoder.encoder_norm.", "norm."),
    ("transformer_encoder.transformer.encoderblock_", "blocks."),
    (".attention.out.", ".attn.proj."),
)


def renamed(state: State) -> State:
    """pyiqa's tensors under the names of `Musiq`; q, k and v of a block become one matrix."""
    found: State = {}
    for name, tensor in state.items():
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        found[name] = tensor.flatten(0, -2) if name == "position" else tensor
    for name in [name for name in found if ".attention.query." in name]:
        parts = [found.pop(name.replace("query", part), None) for part in ("query", "key", "value")]
        found[name.replace("attention.query", "attn.qkv")] = torch.cat([part for part in parts if part is not None])
    return found


def load(path: Path) -> nn.Module:
    """MUSIQ with one output, as trained on SPAQ. Raises ValueError: the file holds another network."""
    return filled(Musiq, renamed(read(path)), path, "MUSIQ with one output")
