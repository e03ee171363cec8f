"""Rotary tables of tokens that lie in a grid of several axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inferix_kernels.uploads import upload


def spread(axes: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """(cos, sin) of every token, put together on a device.

    Args:
        axes: [places, pairs, 2] for each axis, of its own channel pairs, on the host: an angle depends on the place
            along one axis alone.

    Returns:
        [tokens, pairs of all axes, 2]: the places of the last axis follow each other.
    """
    shape = [len(axis) for axis in axes]
    sent = upload(torch.cat([axis.flatten() for axis in axes]), device).split([axis.numel() for axis in axes])
    parts = []
    for i, (numbers, axis) in enumerate(zip(sent, axes)):
        places = [size if i == j else 1 for j, size in enumerate(shape)]
        parts.append(numbers.view(*places, *axis.shape[1:]).expand(*shape, -1, -1))
    return torch.cat(parts, -2).flatten(0, len(shape) - 1)
