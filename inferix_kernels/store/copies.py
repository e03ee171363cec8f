"""Copies of frames between the device and host memory, some of which are still under way."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from ..layout import as_bytes
from .slots import Slot


class Copies:
    """Starts copies and waits for them: on a GPU on a stream of their own.

    Attributes:
        moving: slots of both sides with a copy under way: no one else's until it has landed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.moving: list[Slot] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, pairs: Sequence[tuple[Slot, Slot]], to_host: bool) -> None:
        """Start to copy whole frames between slots on the device and in host memory: (device, host) of each."""
        for device, host in pairs:
            device.arriving = device.arriving or not to_host
            self.moving += [device, host]
        self._transfer(pairs, to_host)

    def land(self) -> None:
        """The copies under way are waited for. This moves nothing: a slot in a copy is free after it if no one else
        has it, and what has arrived can be read.

        On a GPU the current stream waits; the host does not.
        """
        if not self.moving:
            return
        self._wait()
        for slot in self.moving:
            slot.arriving = False
        self.moving.clear()

    def _transfer(self, pairs: Sequence[tuple[Slot, Slot]], to_host: bool) -> None:
        """The copies, on the copy stream where there is one."""
        if self._stream is not None and pairs:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            for device, host in [pair for pair in pairs if pair[0].own]:
                for layer in range(len(device.pool.layers)):
                    ends = device.pool.slot(layer, device.index), host.pool.slot(layer, host.index)
                    source, target = ends if to_host else ends[::-1]
                    for field, tensor in source.tensors.items():
                        as_bytes(target.tensors[field]).copy_(as_bytes(tensor), non_blocking=True)

    def _wait(self) -> None:
        """What is launched from here on comes after the copies that were started."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
