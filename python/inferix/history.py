"""The pictures of a world: decoded beside its next block, and the way back to earlier ones."""

from __future__ import annotations

import copy
from concurrent.futures import Future, wait

import numpy as np
import torch
from torch import Tensor

from inferix_kernels import profile

from .beside import Beside
from .decode.contract import PictureStream
from .finite import NotFinite


class Coming:
    """The pictures of one block, which are decoded while its world goes on; see `World.advance`.

    Any thread may wait for them. The next block's are not begun before these are done.

    Example:
        >>> coming = world.advance(action="up", prompt="desert night")
        >>> following = world.advance(action="left")  # made while the pictures of `coming` are decoded
        >>> coming.result().shape, following.result().shape
        ((3, 96, 96, 3), (3, 96, 96, 3))
    """

    def __init__(self, job: Future[np.ndarray], frames: str):
        self._job, self._frames, self._told = job, frames, False

    def result(self) -> np.ndarray:
        """Wait for the pictures: uint8 [pictures, height, width, 3], or float32 [frames, ...] without a VAE.

        Raises:
            NotFinite: the decoder of pictures made NaN or infinity. The world has ended: its next call raises this as
                well, and gives its pages back.
        """
        try:
            self.wait()
            return self._job.result()
        except NotFinite:
            raise NotFinite(f"{self._frames} are not finite, first in what the decoder of pictures gives") from None
        finally:
            self._told = self._job.done()

    def done(self) -> bool:
        """`result` does not have to wait."""
        return self._job.done()

    def wait(self) -> None:
        """Return when they are done, whatever became of them."""
        if not self._job.done():
            with profile.timed("wait for pictures"):
                wait([self._job])

    @property
    def spoiled(self) -> bool:
        """They are not finite, as far as is known."""
        return self._job.done() and issubclass(type(self._job.exception()), NotFinite)

    def check(self) -> None:
        """Wait for them, and raise what nobody has been told so far; NotFinite, which ends a world, in any case."""
        self.wait()
        if not self._told or self.spoiled:
            self.result()


class Pictures:
    """One world's picture stream, and what it was before each block that `rewind` may take back.

    Pictures are decoded in a thread of their own, one block at a time. Whatever else concerns the stream waits for the
    block under way.

    Args:
        stream: of a world that begins.
        undo: latent frames that can be taken back besides the last block. Of a stream that looks back, the state before
            each of these blocks is kept; with 0, such a stream can not be rewound.
        device: where the stream computes.

    Attributes:
        coming: those of the last block; None: none has been begun.
        gpu: the device, if that is what it is; else None.
    """

    def __init__(self, stream: PictureStream, undo: int, device: torch.device | str = "cpu"):
        self._stream, self.undo, self._device = stream, undo, torch.device(device)
        self.gpu = self._device if self._device.type == "cuda" else None
        self._kept: list[tuple[int, PictureStream]] = []  # (frames made, the stream as it was then)
        self._beside = Beside("inferix-pictures", device)
        self.coming: Coming | None = None

    @property
    def stream(self) -> PictureStream:
        """The stream, behind the last block that was begun."""
        self._beside.wait()
        return self._stream

    @stream.setter
    def stream(self, stream: PictureStream) -> None:
        self._beside.wait()
        self._stream = stream

    def begin(self, latents: Tensor, before: int, frames: str) -> Coming:
        """Begin to decode the next block, once the one before is done.

        Args:
            latents: [frames, *latent_shape] of the block.
            before: frames that the world had before it.
            frames: names the block in an error.
        """
        stream = self.stream
        if self.undo and stream.looks_back:
            self._kept = [(at, kept) for at, kept in self._kept if before - self.undo <= at < before]
            self._kept.append((before, stream.fork()))

        def decode() -> np.ndarray:
            with profile.timed("pictures", self.gpu):
                return stream(latents)

        self.coming = Coming(self._beside.submit(decode), frames)
        return self.coming

    def __call__(self, latents: Tensor) -> np.ndarray:
        """Pictures of latents, by a stream that does not look back: uint8 [pictures, height, width, 3]."""
        return self.stream(latents)

    def check(self, wait: bool = True) -> None:
        """Raise what became of the pictures under way, if nobody has been told; see Coming.check.

        Args:
            wait: for them to be done; else only look.
        """
        if self.coming is not None and (wait or self.coming.done()):
            self.coming.check()

    @property
    def spoiled(self) -> bool:
        """The last block's pictures are known not to be finite: the world has ended."""
        return self.coming is not None and self.coming.spoiled

    @property
    def can_rewind(self) -> bool:
        """Without a look back, always; else with an `undo`."""
        return self.undo > 0 or not self._stream.looks_back

    def reaches(self, frames: int, now: int) -> bool:
        """Can `rewind` go back to where there were so many frames? There are `now`."""
        return not self._stream.looks_back or frames == now or any(at == frames for at, _ in self._kept)

    def rewind(self, frames: int) -> None:
        """Go back to where there were so many frames."""
        self._beside.wait()
        kept = dict(self._kept)
        if frames in kept:
            self.stream = kept[frames].fork()
        self._kept = [(at, stream) for at, stream in self._kept if at < frames]

    def restart(self, latents: Tensor) -> Tensor:
        """A new rollout begins with these, the last latents; there is no way back to before it."""
        self.check()
        stream, self._kept = self.stream, []
        begun = self._beside.submit(lambda: stream.restart(latents)).result()
        if begun.is_cuda:  # made in another stream than it is used in
            begun.record_stream(torch.cuda.current_stream(begun.device))
        return begun

    def fork(self) -> Pictures:
        """Those of another world with the same past."""
        other = copy.copy(self)
        other._stream, other._beside, other.coming = self.stream.fork(), Beside("inferix-pictures", self._device), None
        return other
