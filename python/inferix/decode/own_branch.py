"""Predictions of a guided world that ranks make in groups, each under a conditioning of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from inferix_kernels.distributed.transport import Transport, as_blob


class OwnBranch:
    """This rank's group makes one of the predictions.

    Args:
        transport: of the ranks that make the same tokens of the other predictions; its rank is the branch.
    """

    def __init__(self, transport: Transport):
        self.transport, self.index = transport, transport.rank

    def all(self, predicted: Tensor) -> list[Tensor]:
        """This rank's prediction -> those of all branches, in their order."""
        mine = predicted.contiguous()
        parts = [mine if i == self.index else torch.empty_like(mine) for i in range(self.transport.size)]
        self.transport.at("predictions", -1, -1)
        self.transport.all_gather(as_blob(mine), [as_blob(part) for part in parts]).wait()
        return parts
