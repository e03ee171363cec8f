"""Numbers that are no numbers are an error, and not black or white pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class NotFinite(ValueError):
    """A block that holds NaN or infinity; says where they first appear. Its world has ended."""


def to_bytes(pictures: Tensor) -> np.ndarray:
    """Pictures in [-1, 1], what lies outside being cut off, as uint8 on the host.

    Raises:
        NotFinite: a number is NaN or infinite, which would look like black or white. It is known with the pictures:
            a GPU is waited for once.
    """
    finite = torch.isfinite(pictures).all()
    made: np.ndarray = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    if not finite:
        raise NotFinite("pictures are not finite: the decoder of pictures made NaN or infinity of latents")
    return made
