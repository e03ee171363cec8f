"""A transport that is as late as the protocol allows, and shows what was read too early.

A message moves only when its sender and its receiver wait for it. Until then what is received is full of 0xFF bytes:
NaN in every floating-point format, -1 in int8. So a wait that is missing, one buffer where two are needed, and a blob
that is written before its wait give wrong results on every run, where a real transport gives them on some.
"""

from collections.abc import Sequence

from inferix_kernels.distributed import Message, Ticket, Transport
from inferix_kernels.distributed.in_process import InProcess, in_process_group

POISON = 0xFF


class Lazy(InProcess):
    """Attributes:
    unwaited: tickets whose wait has not been called. A schedule leaves none.
    """

    def __init__(self, inner: InProcess):
        super().__init__(inner.hub, inner.rank, inner.size, inner.device, inner.deadline)
        self.unwaited: list[LazyTicket] = []

    def _begin(self, sends: Sequence[Message], receives: Sequence[Message]) -> Ticket:
        for message in receives:
            message.blob.fill_(POISON)
        ticket = LazyTicket(self, sends, receives)
        self.unwaited.append(ticket)
        return ticket

    def start(self, ticket: "LazyTicket") -> None:
        """All up to this one, in the order in which they were posted, whichever is waited for first."""
        for earlier in self.unwaited:
            if earlier.inner is None:
                self.where, now = earlier.where, self.where
                earlier.inner = super()._begin(earlier.sends, earlier.receives)
                self.where = now
            if earlier is ticket:
                break


class LazyTicket:
    def __init__(self, transport: Lazy, sends: Sequence[Message], receives: Sequence[Message]):
        self.transport, self.sends, self.receives = transport, sends, receives
        self.where = transport.where
        self.inner: Ticket | None = None

    def wait(self, deadline: float | None = None) -> None:
        if self in self.transport.unwaited:
            self.transport.start(self)
            self.transport.unwaited.remove(self)
        assert self.inner is not None
        self.inner.wait(deadline)


def lazy(size: int, device: str = "cpu", deadline: float = 20.0) -> list[Transport]:
    """Transports for `run_ranks`."""
    return [Lazy(transport) for transport in in_process_group(size, device, deadline=deadline)]
