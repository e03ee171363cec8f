"""AMT-S: the frame between two frames.

Li et al., "AMT: All-Pairs Multi-Field Transforms for Efficient Frame Interpolation" (2023); MCG-NKU/AMT
networks/AMT-S.py and networks/blocks, as VBench carries them. Here for the middle of two frames only.

Flow is coarse to fine, at 1/8, 1/4, 1/2 and 1 of the frame. At the first three a decoder proposes flow to both frames,
looks up how well the frames correlate there, and a small network corrects it. The last decoder gives three pairs of
flow, mask and residual, whose warped frames are merged.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .load import filled, read

CHANNELS = (20, 32, 44, 56)
SKIP = 20  # channels that a residual block treats by themselves
FLOWS = 3  # pairs of flow that are merged
LEVELS, RADIUS = 4, 3  # of the lookup: halvings of the correlations, and how far it reaches
LEAST = 16 * 2**LEVELS // 2  # pixels of a side, so that the coarsest correlations have two of them


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """[B, C, H, W] at `factor` of its size, bilinear."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def warped(image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] read at each pixel's place plus flow [B, 2, H, W], (x, y) in pixels; beyond the edge, the edge."""
    height, width = flow.shape[2:]
    x = torch.linspace(-1, 1, width, device=flow.device) + flow[:, 0] / ((width - 1) / 2)
    y = torch.linspace(-1, 1, height, device=flow.device)[:, None] + flow[:, 1] / ((height - 1) / 2)
    return F.grid_sample(image, torch.stack([x, y], -1), padding_mode="border", align_corners=True)


def conv_prelu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution and PReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.PReLU(outputs))


class Bottleneck(nn.Module):
    """A residual block of the features that are correlated; instance norms have no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs // 4, 1)
        self.conv2 = nn.Conv2d(outputs // 4, outputs // 4, 3, stride, 1)
        self.conv3 = nn.Conv2d(outputs // 4, outputs, 1)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride)) if stride > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for conv in (self.conv1, self.conv2, self.conv3):
            y = F.relu(F.instance_norm(conv(y)))
        return F.relu((x if self.downsample is None else F.instance_norm(self.downsample(x))) + y)


class Features(nn.Module):
    """[B, 3, H, W] to [B, 84, H/8, W/8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, 2, 3)
        self.layer1 = nn.Sequential(Bottleneck(32, 32, 1), Bottleneck(32, 32, 1))
        self.layer2 = nn.Sequential(Bottleneck(32, 64, 2), Bottleneck(64, 64, 1))
        self.layer3 = nn.Sequential(Bottleneck(64, 96, 2), Bottleneck(96, 96, 1))
        self.conv2 = nn.Conv2d(96, 84, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.instance_norm(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class Encoder(nn.Module):
    """[B, 3, H, W] to context at 1/2, 1/4, 1/8 and 1/16."""

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for level, outputs in enumerate(CHANNELS, 1):
            self.add_module(
                f"pyramid{level}", nn.Sequential(conv_prelu(inputs, outputs, 2), conv_prelu(outputs, outputs))
            )
            inputs = outputs

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        levels = []
        for pyramid in self.children():
            x = pyramid(x)
            levels.append(x)
        return levels


class Residual(nn.Module):
    """Five convolutions; the last SKIP channels pass through two of them alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_prelu(channels, channels), conv_prelu(SKIP, SKIP)
        self.conv3, self.conv4 = conv_prelu(channels, channels), conv_prelu(SKIP, SKIP)
        self.conv5, self.prelu = nn.Conv2d(channels, channels, 3, 1, 1), nn.PReLU(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for whole, side in ((self.conv1, self.conv2), (self.conv3, self.conv4)):
            y = whole(y)
            y = torch.cat([y[:, :-SKIP], side(y[:, -SKIP:])], 1)
        return self.prelu(x + self.conv5(y))


class Decoder(nn.Module):
    """Convolutions that end at twice the size."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.convblock = nn.Sequential(
            conv_prelu(inputs, hidden), Residual(hidden), nn.ConvTranspose2d(hidden, outputs, 4, 2, 1)
        )

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        return self.convblock(torch.cat(parts, 1))


class Update(nn.Module):
    """Corrections to a level's features and flow, from the correlations at 1/8 of the frame."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.convc1 = nn.Conv2d(2 * LEVELS * (2 * RADIUS + 1) ** 2, 64, 1)
        self.convf1, self.convf2 = nn.Conv2d(4, 40, 7, padding=3), nn.Conv2d(40, 20, 3, padding=1)
        self.conv = nn.Conv2d(84, 68, 3, padding=1)
        self.gru = self._pair(68 + 4 + channels, 76)
        self.feat_head, self.flow_head = self._pair(76, channels), self._pair(76, 4)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, 76, 3, 1, 1), nn.LeakyReLU(0.1), nn.Conv2d(76, outputs, 3, 1, 1))

    def forward(
        self, features: torch.Tensor, flow: torch.Tensor, corr: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.factor > 1:
            features = scaled(features, 1 / self.factor)
        corr = F.leaky_relu(self.convc1(corr), 0.1)
        moved = F.leaky_relu(self.convf2(F.leaky_relu(self.convf1(flow), 0.1)), 0.1)
        both = F.leaky_relu(self.conv(torch.cat([corr, moved], 1)), 0.1)
        hidden = self.gru(torch.cat([both, flow, features], 1))
        features, flow = self.feat_head(hidden), self.flow_head(hidden)
        if self.factor > 1:
            features, flow = scaled(features, self.factor), self.factor * scaled(flow, self.factor)
        return features, flow


def pyramid(corr: torch.Tensor) -> list[torch.Tensor]:
    """Correlations [B, N, h, w] of N places with all places of the other frame, and halved: [B * N, 1, h', w'] each."""
    levels = [corr.flatten(0, 1).unsqueeze(1)]
    while len(levels) < LEVELS:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def lookup(levels: list[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """Correlations around places [B, 2, h, w], (x, y): [B, LEVELS * (2 RADIUS + 1)^2, h, w].

    The windows are read with x and y exchanged, as in RAFT, whose convolutions learned that order.
    """
    batch, _, height, width = places.shape
    reach = torch.arange(-RADIUS, RADIUS + 1, device=places.device, dtype=places.dtype)
    window = torch.stack(torch.meshgrid(reach, reach, indexing="ij"), -1)  # added to (x, y)
    centres = places.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    found = []
    for level, corr in enumerate(levels):
        sides = torch.tensor([corr.shape[3] - 1, corr.shape[2] - 1], device=places.device, dtype=places.dtype)
        grid = 2 * (centres / 2**level + window) / sides - 1
        found.append(F.grid_sample(corr, grid, align_corners=True).view(batch, height, width, -1))
    return torch.cat(found, -1).permute(0, 3, 1, 2)


class AmtS(nn.Module):
    """Two frames [B, 3, H, W] of 0 to 1, sides multiples of 16 and at least LEAST, to the one in their middle."""

    def __init__(self) -> None:
        super().__init__()
        c1, c2, c3, c4 = CHANNELS
        self.feat_encoder, self.encoder = Features(), Encoder()
        self.decoder4 = Decoder(2 * c4 + 1, 2 * c4, c3 + 4)
        self.decoder3 = Decoder(3 * c3 + 4, 3 * c3, c2 + 4)
        self.decoder2 = Decoder(3 * c2 + 4, 3 * c2, c1 + 4)
        self.decoder1 = Decoder(3 * c1 + 4, 3 * c1, 8 * FLOWS)
        self.update4, self.update3, self.update2 = Update(c3, 1), Update(c2, 2), Update(c1, 4)
        self.comb_block = nn.Sequential(*conv_prelu(3 * FLOWS, 6 * FLOWS), nn.Conv2d(6 * FLOWS, 3, 3, 1, 1))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        mean = torch.cat([first, second], 2).mean((1, 2, 3), keepdim=True)
        first, second = first - mean, second - mean
        a, b = self.feat_encoder(torch.cat([first, second])).chunk(2)
        batch, channels, h, w = a.shape
        corr = torch.einsum("bcn,bcm->bnm", a.flatten(2), b.flatten(2)) / channels**0.5
        ways = (pyramid(corr.view(batch, -1, h, w)), pyramid(corr.transpose(1, 2).reshape(batch, -1, h, w)))
        y, x = torch.meshgrid(torch.arange(h, device=a.device), torch.arange(w, device=a.device), indexing="ij")
        here = torch.stack([x, y]).to(a.dtype)
        context = list(zip(self.encoder(first), self.encoder(second)))

        half = torch.full_like(context[3][0][:, :1], 0.5)
        out = self.decoder4(*context[3], half)
        flow, features = out[:, :4], out[:, 4:]
        for update, (f0, f1), decoder in (
            (self.update4, context[2], self.decoder3),
            (self.update3, context[1], self.decoder2),
            (self.update2, context[0], self.decoder1),
        ):
            small = flow if update.factor == 1 else scaled(flow, 1 / update.factor) / update.factor
            to0, to1 = small.chunk(2, 1)  # from the middle; doubled it leads from one frame to the other
            seen = torch.cat([lookup(ways[0], here + 2 * to1), lookup(ways[1], here + 2 * to0)], 1)
            more_features, more_flow = update(features, small, seen)
            features, flow = features + more_features, flow + more_flow
            to0, to1 = flow.chunk(2, 1)
            out = decoder(features, warped(f0, to0), warped(f1, to1), flow)
            if decoder is not self.decoder1:
                flow, features = out[:, :4] + 2 * scaled(flow, 2), out[:, 4:]
        return self.merged(first, second, mean, 2 * scaled(flow, 2), out)

    def merged(
        self, first: torch.Tensor, second: torch.Tensor, mean: torch.Tensor, flow: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """The frame that three pairs of flow, with their masks and residuals, make of both frames."""
        batch, _, height, width = first.shape
        to0, to1, mask, residual = out.split([2 * FLOWS, 2 * FLOWS, FLOWS, 3 * FLOWS], 1)
        coarse0, coarse1 = flow.chunk(2, 1)
        to0, to1 = to0 + coarse0.repeat(1, FLOWS, 1, 1), to1 + coarse1.repeat(1, FLOWS, 1, 1)
        each = (batch * FLOWS, -1, height, width)
        mask = torch.sigmoid(mask).reshape(each)
        from0 = warped(first.repeat_interleave(FLOWS, 0), to0.reshape(each))
        from1 = warped(second.repeat_interleave(FLOWS, 0), to1.reshape(each))
        frames = mask * from0 + (1 - mask) * from1 + mean.repeat_interleave(FLOWS, 0) + residual.reshape(each)
        frames = frames.view(batch, FLOWS, 3, height, width)
        return (frames.mean(1) + self.comb_block(frames.flatten(1, 2))).clamp(0, 1)


def load(path: Path) -> nn.Module:
    """AMT-S. Raises ValueError: the file holds another network."""
    return filled(AmtS, read(path), path, "AMT-S")
