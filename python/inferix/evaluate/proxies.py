"""Metrics without weights. Each stands where a published one needs a network, and says only what its formula says.

They show that something drifts and in which direction, not what people think of it. docs/quality.md has a table of
which of them moves for which fault. `background` and `subject` are off unless named: a picture without understanding
does not tell a moving camera from another place.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from .metric import metric
from .weights import WeightsDir

LUMA = (0.299, 0.587, 0.114)  # BT.601
SMALL = (27, 48)  # what TransNetV2 looks for cuts at
REACH, PATCH, LONG_SIDE = 4, 9, 208  # of motion: how far it looks, the side of what must agree, and of the picture
AROUND, CUT_LEAST, CUT_TIMES = 8, 12.0, 4.0  # of cuts: see cut_frames


@metric("clarity", kind="proxy", better="same")
def clarity(frames: np.ndarray, weights: WeightsDir) -> float:
    """Mean over frames of ln(1 + variance of the Laplacian of the luma): blur lowers it, noise raises it.

    The focus measure of Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000, with the
    4-neighbour Laplacian, over pixels that have four neighbours.
    """
    return float(np.mean([np.log1p(_laplacian(_luma(frame)).var()) for frame in frames]))


@metric("motion", kind="proxy", least=3)
def motion(frames: np.ndarray, weights: WeightsDir) -> float:
    """(255 - mean |odd frame - its prediction|) / 255, predicted from the even frames: VBench's motion smoothness.

    VBench (arXiv 2311.17982) predicts by the network AMT-S. Here symmetric block matching does, on luma of at most 208
    pixels: about each pixel, of all displacements up to 4 pixels, forth in the frame before and back in the frame
    after, the one at which these two agree best over 9x9 pixels; the prediction is their mean.
    """
    luma = _shrunk(frames)
    odd = luma[1 : len(luma) - 1 : 2]
    predicted = _halfway(luma[: 2 * len(odd) : 2], luma[2 : 2 * len(odd) + 2 : 2])
    return float((255 - (odd - predicted).abs().mean()) / 255)


@metric("dynamic", kind="proxy", better="same", least=2)
def dynamic(frames: np.ndarray, weights: WeightsDir) -> float:
    """Mean |difference| of consecutive frames, of 255: a video that freezes falls to 0, one that flickers rises.

    VBench's temporal flickering (arXiv 2311.17982) is (255 - this) / 255.
    """
    return float(np.mean([np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(frames)]))


@metric("colourfulness", kind="proxy", better="same")
def colourfulness(frames: np.ndarray, weights: WeightsDir) -> float:
    """Mean over frames of Hasler and Süsstrunk's colourfulness: over-saturation raises it.

    With rg = R - G and yb = (R + G) / 2 - B: sqrt(var rg + var yb) + 0.3 sqrt((mean rg)^2 + (mean yb)^2). "Measuring
    colourfulness in natural images", SPIE 5007, 2003.
    """
    return float(np.mean([_colourfulness(frame) for frame in frames]))


@metric("contrast", kind="proxy", better="same")
def contrast(frames: np.ndarray, weights: WeightsDir) -> float:
    """Mean over frames of the standard deviation of the luma, of 255."""
    return float(np.mean([_luma(frame).std() for frame in frames]))


@metric("exposure", kind="proxy", better="same")
def exposure(frames: np.ndarray, weights: WeightsDir) -> float:
    """Mean luma, of 255: a video that darkens or burns out."""
    return float(np.mean([_luma(frame).mean() for frame in frames]))


@metric("background", kind="proxy", embeds=True, least=2, default=False)
def background(frames: np.ndarray, weights: WeightsDir) -> np.ndarray:
    """Consistency of where colours lie: embeddings are frames averaged over 6x8 cells, less their mean colour."""
    cells = interpolate(_planes(frames), (6, 8), mode="area").flatten(2)
    return np.asarray((cells - cells.mean(2, keepdim=True)).flatten(1))


@metric("subject", kind="proxy", embeds=True, least=2, default=False)
def subject(frames: np.ndarray, weights: WeightsDir) -> np.ndarray:
    """Consistency of outlines: embeddings are 8 directions of the luma's gradient, by its size, in 4x4 cells.

    Histograms of oriented gradients (Dalal and Triggs, CVPR 2005) of a few large cells, a length of 1 each.
    """
    luma = _shrunk(frames)
    dy, dx = luma[:, 2:, 1:-1] - luma[:, :-2, 1:-1], luma[:, 1:-1, 2:] - luma[:, 1:-1, :-2]
    size, turn = torch.hypot(dx, dy), torch.atan2(dy, dx) % torch.pi
    bins = (turn / torch.pi * 8).long().clamp(max=7)
    planes = torch.stack([size * (bins == i) for i in range(8)], 1)
    cells = interpolate(planes, (4, 4), mode="area").flatten(2)
    return np.asarray(torch.nn.functional.normalize(cells, dim=1).flatten(1))


@metric("cuts", kind="proxy", better="lower", sees="video", size=SMALL)
def cuts(frames: np.ndarray, weights: WeightsDir) -> float:
    """How many times the picture changes at once, as at a false cut where two blocks meet; see `cut_frames`."""
    return float(len(cut_frames(frames)))


def cut_frames(frames: np.ndarray) -> list[int]:
    """The frames, uint8 [T, h, w, 3], that begin something new.

    Those whose mean |difference| to the frame before is at least 12 of 255 and 4 times the median of those of the 8
    frames before and the 8 after. A pan, noise or shaking raises the median with it; a swift fade is taken for none.
    """
    change = np.array([np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(frames)])
    found = []
    for i, here in enumerate(change):
        near = np.concatenate([change[max(0, i - AROUND) : i], change[i + 1 : i + 1 + AROUND]])
        if here >= CUT_LEAST and len(near) and here >= CUT_TIMES * np.median(near):
            found.append(i + 1)
    return found


def _luma(frame: np.ndarray) -> np.ndarray:
    return frame @ np.array(LUMA, np.float32)


def _laplacian(luma: np.ndarray) -> np.ndarray:
    if min(luma.shape) < 3:
        raise ValueError(f"needs pictures of at least 3x3 pixels, got {luma.shape[1]}x{luma.shape[0]}")
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return np.asarray(around - 4 * luma[1:-1, 1:-1])


def _colourfulness(frame: np.ndarray) -> float:
    red, green, blue = np.moveaxis(frame.astype(np.float32), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.sqrt(rg.var() + yb.var()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def _planes(frames: np.ndarray) -> Tensor:
    """float32 [T, 3, H, W]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float()


def _shrunk(frames: np.ndarray) -> Tensor:
    """Luma, float32 [T, h, w]: by the whole factor that brings the longer side to at most LONG_SIDE."""
    luma = torch.from_numpy(frames @ np.array(LUMA, np.float32))
    factor = -(-max(luma.shape[1:]) // LONG_SIDE)
    return avg_pool2d(luma[:, None], factor)[:, 0]


def _halfway(before: Tensor, after: Tensor) -> Tensor:
    """The frames between two [T, h, w], by symmetric block matching. Beyond its edge a frame goes on as at its edge."""
    height, width = before.shape[1:]
    border, half = REACH + PATCH // 2, PATCH // 2
    before, after = (pad(each[:, None], (border,) * 4, mode="replicate")[:, 0] for each in (before, after))
    best = torch.full((len(before), height, width), torch.inf)
    found = torch.empty_like(best)
    for dy in range(-REACH, REACH + 1):
        for dx in range(-REACH, REACH + 1):
            a, b = (
                frames[:, REACH + y : frames.shape[1] - REACH + y, REACH + x : frames.shape[2] - REACH + x]
                for frames, y, x in ((before, -dy, -dx), (after, dy, dx))
            )
            apart = _sums(_sums((a - b).abs_(), 1), 2)
            apart += 0.1 * (abs(dy) + abs(dx))  # where several agree alike, the shortest way
            closer = apart < best
            best = torch.where(closer, apart, best)
            middle = (a + b)[:, half : half + height, half : half + width]
            found = torch.where(closer, middle, found)
    return found / 2


def _sums(x: Tensor, dim: int) -> Tensor:
    """Of each PATCH neighbours along a dimension, in a few additions: of 2, of 4, of 8, and one more."""
    n = x.shape[dim]
    total, count = x, 1
    while 2 * count <= PATCH:
        size = total.shape[dim] - count
        total, count = total.narrow(dim, 0, size) + total.narrow(dim, count, size), 2 * count
    size = n - PATCH + 1
    total = total.narrow(dim, 0, size)
    for more in range(count, PATCH):
        total = total + x.narrow(dim, more, size)
    return total
