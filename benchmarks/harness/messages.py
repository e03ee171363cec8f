"""The two halves of a schedule, each by itself: its work, with messages that are there at once, and its messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from inferix_kernels.distributed import Message, Ticket, Transport
from inferix_kernels.distributed.agreement import DIGESTS

FILL = 0x3C  # what has come: in every format of pages, and of scales, numbers of a usual size


class Posted(NamedTuple):
    """Sizes of messages: (peer, bytes)."""

    sends: Sequence[tuple[int, int]]
    receives: Sequence[tuple[int, int]]


class Waited(NamedTuple):
    """Attributes:
    post: for the messages of which post, counted from 0.
    """

    post: int


class Silent(Transport):
    """Sends nothing, and nobody waits. Ranks that ask each other whether they agree are told that they do.

    Attributes:
        log: what was posted and waited for; None: not wanted.
    """

    def __init__(self, like: Transport):
        super().__init__(like.rank, like.size, like.device)
        self.log: list[Posted | Waited] | None = []
        self._seen: set[tuple[int, int]] = set()
        self._count = 0

    def stop(self) -> list[Posted | Waited]:
        """The log so far; there is none from here on."""
        log, self.log = self.log, None
        return log or []

    def _begin(self, sends: Sequence[Message], receives: Sequence[Message]) -> Ticket:
        for message in receives:
            blob = message.blob
            if len(blob) == DIGESTS and sends:
                blob.copy_(sends[0].blob)
            elif (blob.data_ptr(), len(blob)) not in self._seen:
                self._seen.add((blob.data_ptr(), len(blob)))
                blob.fill_(FILL)
        if self.log is not None:
            self.log.append(Posted(*([(peer, len(blob)) for peer, blob in each] for each in (sends, receives))))
        self._count += 1
        return _There(self, self._count - 1)


class _There:
    def __init__(self, transport: Silent, index: int):
        self._transport, self._index = transport, index

    def wait(self, deadline: float | None = None) -> None:
        if self._transport.log is not None:
            self._transport.log.append(Waited(self._index))


def replay(transport: Transport, log: Sequence[Posted | Waited]) -> Callable[[], None]:
    """What posts messages of the same sizes in the same order, and waits for them as it was done then."""

    def messages(sizes: Sequence[tuple[int, int]]) -> list[Message]:
        return [Message(peer, torch.zeros(size, dtype=torch.uint8, device=transport.device)) for peer, size in sizes]

    steps = [step if isinstance(step, Waited) else (messages(step.sends), messages(step.receives)) for step in log]

    def call() -> None:
        tickets: list[Ticket] = []
        for step in steps:
            if isinstance(step, Waited):
                tickets[step.post].wait()
            else:
                tickets.append(transport.post(*step))

    return call
