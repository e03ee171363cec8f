"""Tokens of every frame, cut among ranks: what a network does outside of attention, each rank does for its own.

Of the n tokens of a frame rank r of P has those from n * r // P to n * (r + 1) // P. So each rank has its share of
every frame and block, and what differs from frame to frame (modulation by noise level) stays as it is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .transport import Transport


def cuts(tokens: int, ranks: int) -> list[int]:
    """Where a frame of so many tokens is cut: rank r has tokens cuts[r] to cuts[r + 1] - 1.

    Example:
        >>> from inferix_kernels.distributed import cuts
        >>> cuts(tokens=10, ranks=4)
        [0, 2, 5, 7, 10]
    """
    return [tokens * rank // ranks for rank in range(ranks + 1)]


class WholeFrames:
    """Of one rank: it has all tokens.

    Example:
        >>> import torch
        >>> from inferix_kernels.distributed import WholeFrames
        >>> x = torch.randn(3, 10, 8)  # [frames, tokens, channels]
        >>> WholeFrames().own(x) is x and WholeFrames().whole(x, 10) is x
        True
    """

    def own(self, x: Tensor) -> Tensor:
        return x

    def whole(self, x: Tensor, tokens: int) -> Tensor:
        return x


class TokenShard(WholeFrames):
    """Of one of several ranks: its tokens of every frame.

    Args:
        transport: of the group.

    Example:
        >>> import torch
        >>> from inferix_kernels.distributed import TokenShard, in_process_group, run_ranks
        >>> x = torch.randn(3, 10, 8)  # [frames, tokens, channels], the same on each rank
        >>> def double(transport):  # what a network does with each token by itself
        ...     shard = TokenShard(transport)
        ...     return shard.whole(shard.own(x) * 2, tokens=10)
        >>> [bool((y == 2 * x).all()) for y in run_ranks(in_process_group(4), double)]
        [True, True, True, True]
    """

    def __init__(self, transport: Transport):
        self.transport = transport

    def own(self, x: Tensor) -> Tensor:
        """[..., n, C] of all tokens of each frame -> this rank's."""
        at, rank = cuts(x.shape[-2], self.transport.size), self.transport.rank
        return x[..., at[rank] : at[rank + 1], :].contiguous()

    def whole(self, x: Tensor, tokens: int) -> Tensor:
        """[..., own tokens, C] -> [..., tokens, C] of all ranks, on each of them: one exchange.

        Raises:
            ValueError: x has not this rank's tokens. PeerLost: as Ticket.wait.
        """
        at, rank, rest = cuts(tokens, self.transport.size), self.transport.rank, (*x.shape[:-2], x.shape[-1])
        if x.shape[-2] != at[rank + 1] - at[rank]:
            raise ValueError(
                f"x must have {at[rank + 1] - at[rank]} tokens of each frame, those of rank {rank} of {tokens}, "
                f"got {x.shape[-2]}"
            )
        made = x.new_empty(tokens, *rest)  # a rank's tokens are one blob
        parts = [made[first:end] for first, end in pairwise(at)]
        parts[rank].copy_(x.movedim(-2, 0))
        blobs = [as_bytes(part) for part in parts]
        self.transport.all_gather(blobs[rank], blobs).wait()
        return made.movedim(0, -2).contiguous()


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, a view: uint8 [bytes]."""
    import torch

    return x.view(-1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)
