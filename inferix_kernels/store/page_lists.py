"""Lists of pages for the kernels, made of whole frames: a frame's pages follow each other, from its first one on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..layout import PageList


class PageLists:
    """Makes page lists on one device. Frames are given by their first pages, as pool pages or as page ids.

    Attributes:
        pages_per_frame: a frame begins on a page boundary; its last page may be partly valid.
    """

    def __init__(self, frame_tokens: int, page_size: int, device: torch.device):
        self.device, self.pages_per_frame = device, -(-frame_tokens // page_size)
        lens = [page_size] * (self.pages_per_frame - 1)
        lens += [frame_tokens - sum(lens)]
        self._lens = torch.tensor(lens, dtype=torch.int32, device=device)  # of as many frames as were asked for
        self._lens_of: dict[int, Tensor] = {}  # views of it
        self._steps = np.arange(self.pages_per_frame, dtype=np.int32)

    def of(self, starts: Iterable[int]) -> PageList:
        """The tokens of whole frames, given by the first page of each."""
        frames = list(starts)
        (ids,) = self.upload([frames])
        return PageList(ids, self.lens(len(frames)))

    def upload(self, frames: Sequence[Sequence[int]], others: Sequence[Sequence[int]] = ()) -> tuple[Tensor, ...]:
        """int32 tensors on the device, in one copy: the pages of each group of frames, and plain lists."""
        firsts = np.fromiter(chain(*frames), np.int32)
        pages = (firsts[:, None] + self._steps).ravel()
        packed = np.concatenate([pages, np.fromiter(chain(*others), np.int32)])
        sizes = [len(group) * self.pages_per_frame for group in frames] + [len(group) for group in others]
        return torch.split_with_sizes(torch.from_numpy(packed).to(self.device), sizes)

    def lens(self, frames: int) -> Tensor:
        """Valid tokens of each page of so many frames, [frames * pages_per_frame] int32 on the device."""
        if frames not in self._lens_of:
            pages = frames * self.pages_per_frame
            if pages > len(self._lens):
                self._lens = self._lens[: self.pages_per_frame].repeat(2 * frames)
            self._lens_of[frames] = self._lens[:pages]
        return self._lens_of[frames]
