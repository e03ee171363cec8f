"""Frames as the published tools give them to their networks: resized without antialiasing, in float, never rounded.

VBench's transforms (vbench/utils.py, vbench/imaging_quality.py) over torchvision 0.2x: the shorter side goes to `size`
exactly, the longer one to its share, rounded down.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def planes(frames: np.ndarray) -> torch.Tensor:
    """uint8 [T, H, W, 3] to float32 [T, 3, H, W], 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()


def sides(pixels: torch.Tensor) -> tuple[int, int]:
    """(height, width) of [T, 3, H, W]."""
    return pixels.shape[2], pixels.shape[3]


def resized(pixels: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """[T, 3, H, W] at another (height, width), without antialiasing."""
    if sides(pixels) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode=mode, align_corners=False)


def shorter_side(sides: tuple[int, int], size: int) -> tuple[int, int]:
    """(height, width) with the shorter side at `size`.

    Example:
        >>> shorter_side((480, 832), 224)
        (224, 388)
    """
    height, width = sides
    return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)


def normalized(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """[T, 3, H, W] of 0 to 255: to 0 to 1, less the mean, over the deviation of each channel."""
    shape = (1, 3, 1, 1)
    return (pixels / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def for_clip(frames: np.ndarray, size: int = 224) -> torch.Tensor:
    """uint8 [T, H, W, 3] to CLIP's input [T, 3, size, size]: bicubic, the middle cut out."""
    pixels = planes(frames)
    pixels = resized(pixels, shorter_side(sides(pixels), size), "bicubic")
    top, left = (round((side - size) / 2) for side in sides(pixels))
    return normalized(pixels[:, :, top : top + size, left : left + size], CLIP_MEAN, CLIP_STD)


def for_dino(frames: np.ndarray, size: int = 224) -> torch.Tensor:
    """uint8 [T, H, W, 3] to DINO's input [T, 3, h, w], the shorter side `size`: bilinear, nothing cut off."""
    pixels = planes(frames)
    return normalized(resized(pixels, shorter_side(sides(pixels), size), "bilinear"), IMAGENET_MEAN, IMAGENET_STD)


def for_musiq(frames: np.ndarray, longest: int = 512) -> torch.Tensor:
    """uint8 [T, H, W, 3] to MUSIQ's input [T, 3, h, w] of 0 to 1, the longer side at most `longest`: bilinear."""
    pixels = planes(frames)
    height, width = sides(pixels)
    if max(height, width) > longest:
        scale = longest / max(height, width)
        pixels = resized(pixels, (int(scale * height), int(scale * width)), "bilinear")
    return pixels / 255
