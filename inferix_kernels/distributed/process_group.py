"""Ranks that are processes: over a process group of torch.distributed, handed in or its default one."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._check import check_device
from .faults import FailureDetector, Loss, PeerLost, Where
from .transport import DEADLINE, Message, Transport, check_deadline

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}  # by device
_ENDING = 0x1F00  # the tag of a message that nobody sends


class ProcessGroupTransport(Transport):
    """A rank's end of a process group: gloo on a CPU, NCCL on GPUs (never run on a GPU).

    Made and closed by all ranks of the group, best by `with`: an exception that leaves it ends the others' waits, with
    its message. A process that ends without closing it is lost. After a loss this transport and its group are of no
    more use: the ranks that are left make a new group, of any size.

    Args:
        group: of torch.distributed; None: its default one.
        device: this rank's.
        store: of torch.distributed, for this group's heartbeats alone; None: the group's own.
        deadline: seconds of a wait that is given none.

    Raises:
        ValueError: there is no group, this process is not in it, or its backend is not the device's.
        PeerLost: a rank did not come within the deadline.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from inferix_kernels.distributed import ProcessGroupTransport
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mine, received = torch.ones(3, dtype=torch.uint8), torch.empty(3, dtype=torch.uint8)
        >>> with ProcessGroupTransport(deadline=10) as transport:
        ...     transport.all_gather(mine, [received]).wait()
        >>> received.tolist()
        [1, 1, 1]
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        *,
        store: dist.Store | None = None,
        deadline: float = DEADLINE,
    ):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"group must be a process group, got {group!r} before torch.distributed was initialized")
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("group must have this process among its ranks, got one of others")
        device = torch.empty(0, device=check_device("device", device)).device  # with its index
        super().__init__(rank, dist.get_world_size(group), device, deadline)
        _check_backend(group, device, rank)
        group = group if group is not None else dist.group.WORLD
        assert group is not None
        self.group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._under_way: list[_Ticket] = []  # on GPUs
        if device.type == "cuda":
            dist.barrier(group, device_ids=[device.index])  # NCCL's first call must be everybody's (pytorch #74701)
        store = dist.distributed_c10d._get_process_group_store(group) if store is None else store
        self.detector = FailureDetector(store, rank, self.size, deadline, self._end_waits, self._late)
        self.detector.start()

    def __enter__(self) -> ProcessGroupTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, PeerLost):
            self.detector.tell(Loss((self.rank,), f"it raised {type(error).__name__}: {error}"[:2000]))
        self.detector.close(orderly=error is None)

    def close(self) -> None:
        """To be called by every rank: returns when all have, so that none ends while another still reads from it.

        Raises:
            PeerLost: a rank was lost before.
        """
        self.detector.close(orderly=True)

    def at(self, op: str, layer: int, block: int) -> None:
        """`Transport.at`; on GPUs, where no wait holds up the host, this is where a loss is seen at the latest.

        Raises:
            PeerLost
        """
        super().at(op, layer, block)
        self.check(self.where)

    def check(self, where: Where, began: float | None = None) -> None:
        """Raise PeerLost if a rank is known to be lost."""
        if (loss := self.detector.loss) is not None:
            raise PeerLost(loss.ranks, *where, 0.0 if began is None else time.monotonic() - began, loss.reason)

    def _begin(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Ticket:
        self.check(self.where)
        pairs = [(dist.isend, m) for m in sends] + [(dist.irecv, m) for m in receives]
        peers = [m.peer for _, m in pairs]
        ops = [dist.P2POp(op, m.blob, self._ranks[m.peer], self.group) for op, m in pairs]
        try:
            works = dist.batch_isend_irecv(ops) if ops else []
        except RuntimeError as error:
            raise self.detector.lost(self.where, peers, time.monotonic(), broken=True) from error
        ticket = _Ticket(self, peers, works, [m.blob for _, m in pairs])
        if self.device.type == "cuda":
            self._under_way = [t for t in self._under_way if not t.is_done()] + [ticket]
        return ticket

    def _late(self) -> list[int]:
        """Never run on a GPU."""
        tickets = [t for t in self._under_way if not t.is_done()]
        self.detector.waits = (
            tuple(peer for t in tickets for peer in t.peers) if self._under_way else self.detector.waits
        )
        return [peer for t in tickets if time.monotonic() > t.due for peer in t.peers]

    def _end_waits(self) -> None:
        """Those of other threads, that are under way."""
        if self.device.type == "cuda":
            self.group.abort()
            return
        # Nothing in gloo ends a wait from outside, but one whose time is over closes all connections of its group.
        for peer in range(self.size):
            if peer != self.rank:
                with contextlib.suppress(RuntimeError):
                    nothing: Any = dist.irecv(torch.empty(1), self._ranks[peer], self.group, _ENDING)
                    nothing.wait(timedelta(milliseconds=1))


class _Ticket:
    """works: one for each peer; of NCCL, one for all."""

    def __init__(
        self, transport: ProcessGroupTransport, peers: Sequence[int], works: Sequence[Any], blobs: Sequence[Tensor]
    ):
        self.peers, self.posted = peers, time.monotonic()
        self.due = self.posted + transport.deadline  # on GPUs; until a wait says otherwise
        self._transport, self._where = transport, transport.where
        self._works, self._blobs = works, blobs  # which are not let go before they have been sent
        self._waited = 0  # how many works are done

    def is_done(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def wait(self, deadline: float | None = None) -> None:
        """`Ticket.wait`."""
        transport = self._transport
        limit = transport.deadline if deadline is None else check_deadline(deadline)
        if transport.device.type == "cuda":
            transport.check(self._where, self.posted)
            self.due = time.monotonic() + limit
            for work in self._works:
                work.wait()  # the current stream does
            return
        began = time.monotonic()
        detector = transport.detector
        detector.waits = tuple(self.peers[self._waited :])
        try:
            for work in self._works[self._waited :]:
                left = began + limit - time.monotonic()
                work.wait(timedelta(milliseconds=max(1, math.ceil(1e3 * left))))  # gloo counts whole ones
                self._waited += 1
        except RuntimeError as error:
            late = time.monotonic() >= began + limit
            missing = self.peers[self._waited :] if late else self.peers[self._waited : self._waited + 1]
            raise detector.lost(self._where, missing, began, broken=not late) from error
        finally:
            detector.waits = ()


def _check_backend(group: dist.ProcessGroup | None, device: torch.device, rank: int) -> None:
    pairs = dict(pair.split(":") for pair in str(dist.get_backend_config(group)).split(","))
    want, got = BACKENDS.get(device.type), pairs.get(device.type)
    if want is None:
        raise ValueError(f"device must be of type cpu or cuda, got {device} on rank {rank}")
    if got != want:
        raise ValueError(f"group must have the backend {want} for {device}, got {got} on rank {rank}")
