"""What one of several processes holds of the worlds that they make together: all heads or some, all frames or some."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .._check import check_counts, check_index


@dataclasses.dataclass(frozen=True)
class Shard:
    """One rank's part of the same worlds.

    Ranks that follow each other, `heads` of them, make a group: each holds another part of the heads. With frames > 1
    each group holds other frames of the past: slot i of a pool belongs to group i % frames. The tokens of each frame of
    a pass are cut evenly among all ranks, anywhere: a rank does on its own rows whatever is not attention.

    Every page table is the same on every rank, and every edit of one is to be made on every rank.

    Attributes:
        rank, ranks: this process, of how many.
        heads: into how many parts the heads are cut; a divisor of ranks.
        frames: into how many parts the past's frames are cut: 1, or all groups, ranks // heads.

    Raises:
        ValueError: it is none of that.

    Example:
        >>> shard = Shard(rank=5, ranks=8, heads=4)  # two groups of four
        >>> shard.group, shard.head_rank, shard.rows(1560)
        (1, 1, slice(975, 1170, None))
    """

    rank: int = 0
    ranks: int = 1
    heads: int = 1
    frames: int = 1

    def __post_init__(self) -> None:
        check_counts({"shard.ranks": self.ranks, "shard.heads": self.heads, "shard.frames": self.frames})
        check_index("shard.rank", self.rank, self.ranks)
        if self.ranks % self.heads:
            raise ValueError(f"shard.heads must divide the {self.ranks} ranks, got {self.heads} on rank {self.rank}")
        if self.frames not in (1, self.groups):
            raise ValueError(
                f"shard.frames must be 1 or {self.groups}, the groups of ranks, got {self.frames} on rank {self.rank}"
            )

    @property
    def whole(self) -> bool:
        """Does a rank hold all heads of all frames?"""
        return self.heads == self.frames == 1

    @property
    def groups(self) -> int:
        return self.ranks // self.heads

    @property
    def group(self) -> int:
        return self.rank // self.heads

    @property
    def head_rank(self) -> int:
        """Which part of the heads it holds."""
        return self.rank % self.heads

    @property
    def frame_rank(self) -> int:
        """Which part of the frames it holds."""
        return self.group % self.frames

    @property
    def group_ranks(self) -> range:
        """The ranks of its group, by their part of the heads."""
        return range(self.group * self.heads, (self.group + 1) * self.heads)

    @property
    def alike(self) -> range:
        """The ranks of all groups that hold the same heads, by group."""
        return range(self.head_rank, self.ranks, self.heads)

    def rows(self, tokens: int, rank: int | None = None) -> slice:
        """Of a frame of so many tokens, those of a rank, by default this one.

        Example:
            >>> [Shard(rank, 3).rows(10) for rank in range(3)]
            [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
        """
        rank = self.rank if rank is None else rank
        return slice(tokens * rank // self.ranks, tokens * (rank + 1) // self.ranks)

    def own(self, x: Tensor, frame_tokens: int) -> Tensor:
        """This rank's rows of a tensor that has one for each token of some frames.

        Example:
            >>> Shard(rank=1, ranks=2).own(torch.arange(10), frame_tokens=5).tolist()
            [2, 3, 4, 7, 8, 9]
        """
        return x.unflatten(0, (-1, frame_tokens))[:, self.rows(frame_tokens)].flatten(0, 1)

    def share(self, name: str, heads: int) -> int:
        """How many of so many heads a rank holds.

        Raises:
            ValueError: they can't be cut into equal parts.
        """
        if heads % self.heads:
            raise ValueError(f"{name} must be a multiple of shard.heads={self.heads}, got {heads} on rank {self.rank}")
        return heads // self.heads
