"""Lists of pages for the kernels, made of whole frames: a frame's pages follow each other, from its first one on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..layout import PageList
from ..uploads import upload

# int32 numbers in 128 bytes. Triton compiles a kernel for addresses that are multiples of 16 and another for the rest.
ALIGNED = 32


class Packed:
    """Several int32 lists in one piece of memory on a device, each with a place of its own: one copy fills all.

    Args:
        sizes: numbers that each list has room for.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device):
        *self._starts, self._size = accumulate((-(-size // ALIGNED) * ALIGNED for size in sizes), initial=0)
        self._device = device
        self._memory: Tensor | None = None

    def write(self, lists: Sequence[np.ndarray]) -> list[Tensor]:
        """The lists on the device: where those before them were, if there were any."""
        packed = np.zeros(self._size, np.int32)
        for start, numbers in zip(self._starts, lists):
            packed[start : start + len(numbers)] = numbers
        with torch.inference_mode(False):  # or whoever is not in that mode could not write to it later
            memory = self._memory = upload(torch.from_numpy(packed), self._device, self._memory)
        return [memory[start : start + len(numbers)] for start, numbers in zip(self._starts, lists)]


class PageLists:
    """Makes page lists on one device. Frames are given by their first pages, as pool pages or as page ids.

    Attributes:
        pages_per_frame: a frame begins on a page boundary; its last page may be partly valid.
    """

    def __init__(self, frame_tokens: int, page_size: int, device: torch.device):
        self.device, self.pages_per_frame = device, -(-frame_tokens // page_size)
        lens = [page_size] * (self.pages_per_frame - 1)
        self._lengths = np.array([*lens, frame_tokens - sum(lens)], np.int32)  # of as many frames as were asked for
        self._lens = torch.from_numpy(self._lengths).to(device)  # as these
        self._lens_of: dict[int, Tensor] = {}  # views of it
        self._steps = np.arange(self.pages_per_frame, dtype=np.int32)

    def of(self, starts: Iterable[int]) -> PageList:
        """The tokens of whole frames, given by the first page of each."""
        frames = list(starts)
        (ids,) = self.upload([self.pages(frames)])
        return PageList(ids, self.lens(len(frames)))

    def pages(self, frames: Sequence[int]) -> np.ndarray:
        """All pages of these frames, on the host."""
        return (np.fromiter(frames, np.int32, len(frames))[:, None] + self._steps).ravel()

    def lengths(self, pages: int) -> np.ndarray:
        """Valid tokens of each of the first pages of whole frames, on the host."""
        if pages > len(self._lengths):
            self._lengths = np.resize(self._lengths, 2 * pages)  # which repeats them
        return self._lengths[:pages]

    def upload(self, lists: Sequence[np.ndarray], into: Packed | None = None) -> list[Tensor]:
        """int32 lists on the device, in one copy: in memory of their own, or where those before them were."""
        if into is not None:
            return into.write(lists)
        sent = upload(torch.from_numpy(np.concatenate(lists)), self.device)
        return list(torch.split_with_sizes(sent, [len(numbers) for numbers in lists]))

    def lens(self, frames: int) -> Tensor:
        """Valid tokens of each page of so many frames, [frames * pages_per_frame] int32 on the device."""
        if frames not in self._lens_of:
            pages = frames * self.pages_per_frame
            if pages > len(self._lens):
                self._lens = self._lens[: self.pages_per_frame].repeat(2 * frames)
            self._lens_of[frames] = self._lens[:pages]
        return self._lens_of[frames]
