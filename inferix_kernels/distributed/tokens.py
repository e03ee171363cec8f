"""Tokens of every frame, cut among ranks: what a network does outside of attention, each rank does for its own.

Of the n tokens of a frame rank r of P has those from n * r // P to n * (r + 1) // P. So each rank has its share of
every frame and block, and what differs from frame to frame (modulation by noise level) stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .wire import rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from .transport import Transport


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
        own = rows_of(x.shape[-2], self.transport.size, self.transport.rank)
        return x[..., own.start : own.stop, :].contiguous()

    def whole(self, x: Tensor, tokens: int) -> Tensor:
        """[..., own tokens, C] -> [..., tokens, C] of all ranks, on each of them: one exchange.

        Raises:
            ValueError: x has not this rank's tokens. PeerLost: as Ticket.wait.
        """
        from .transport import as_blob

        rank, size = self.transport.rank, self.transport.size
        rows = [rows_of(tokens, size, each) for each in range(size)]
        if x.shape[-2] != len(rows[rank]):
            raise ValueError(
                f"x must have {len(rows[rank])} tokens of each frame, those of rank {rank} of {tokens}, "
                f"got {x.shape[-2]}"
            )
        made = x.new_empty(tokens, *x.shape[:-2], x.shape[-1])  # a rank's tokens are one blob
        parts = [made[each.start : each.stop] for each in rows]
        parts[rank].copy_(x.movedim(-2, 0))
        blobs = [as_blob(part) for part in parts]
        self.transport.all_gather(blobs[rank], blobs).wait()
        return made.movedim(0, -2).contiguous()
