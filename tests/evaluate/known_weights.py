"""Weights that anybody can make again: numbers from a hash of their place, so that outputs can be recorded."""

import hashlib

import numpy as np
import torch


def hashed(name: str, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """float32 of this shape, uniform between -1 and 1 (splitmix64 of the index and a hash of the name)."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) / 2**52 - 1).float().view(tuple(shape))


def fill(shapes: dict[str, torch.Size], gain: float = 1.0) -> dict[str, torch.Tensor]:
    """A tensor for each name: matrices of deviation gain / sqrt(inputs), tables of about 1, biases near 0."""
    state = {}
    for name, shape in shapes.items():
        value = hashed(name, shape)
        if len(shape) == 1:  # of norms, PReLU and biases
            value = 0.1 * value + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("weight"):
            value = gain * value * (3 / value[0].numel()) ** 0.5
        state[name] = value
    return state


def picture(height: int, width: int) -> torch.Tensor:
    """float32 [3, height, width] of 0 to 1: waves and a little noise."""
    y, x = torch.meshgrid(torch.arange(height) / 37, torch.arange(width) / 53, indexing="ij")
    waves = torch.stack([torch.sin(x + 2 * y), torch.cos(3 * x - y), torch.sin(x * y)])
    return (0.5 + 0.4 * waves + 0.1 * hashed("picture", waves.shape)).clamp(0, 1)
