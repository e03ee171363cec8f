"""Timesteps as a network takes them: numbers on its device, where each is sent once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inferix_kernels.uploads import upload

from .contract import Adapter, Model


class Timesteps:
    """The timesteps of one model: those of its adapter from the start, others when they are first asked for."""

    def __init__(self, model: Model):
        self._device = model.device
        self._made: dict[float, Tensor] = {}
        self._send(known(model.adapter))

    def __call__(self, t: float) -> Tensor:
        """0-d float64 on the model's device."""
        if t not in self._made:
            self._send([t])
        return self._made[t]

    def _send(self, times: Sequence[float]) -> None:
        sent = upload(torch.tensor(times, dtype=torch.float64), self._device)
        self._made.update(zip(times, sent.unbind()))


def known(adapter: Adapter) -> list[float]:
    """All that blocks of such a model are given, one at a time."""
    steps = [*adapter.steps(first=True), *adapter.steps(first=False)]
    return list(dict.fromkeys([adapter.context_time, *(t for _, t in steps)]))
