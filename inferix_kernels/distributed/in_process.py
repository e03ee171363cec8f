"""Ranks that are threads of one process, over one device: schedules run, and their overlap shows, on one machine.

A message is a copy from one rank's blob to another's. On a CPU each rank has a link, a thread that copies what the
rank sends, one message after another and, if wanted, at a link's pace. On a GPU the copies run on a stream of the
receiving rank, between events (never run on a GPU).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from .._check import check_counts, check_device
from .faults import PeerLost, Where
from .presets import check_figure
from .transport import DEADLINE, Message, Transport, check_deadline

R = TypeVar("R")


class _Half:
    """One side of a message: posted by one rank, done when the other rank's half has met it and was copied."""

    def __init__(self, peer: int, blob: Tensor):
        self.peer, self.blob = peer, blob
        self.met = self.done = False
        self.ready = _event(blob.device)  # to be read or written
        self.copied: torch.cuda.Event | None = None


class Hub:
    """Where the halves of messages meet: what the transports of one group share.

    Attributes:
        gigabytes_per_second: of what each rank sends, 10^9 bytes; None: as fast as memory is.
        latency: seconds from the moment when both sides have posted a message until its first byte is there.
    """

    def __init__(self, size: int, device: torch.device, gigabytes_per_second: float | None, latency: float):
        self.device = device
        self.gigabytes_per_second, self.latency = gigabytes_per_second, latency
        self.changed = threading.Condition(threading.RLock())
        self.failed: dict[int, BaseException] = {}  # rank -> what it raised; guarded by `changed`, as all below
        self._waiting: dict[tuple[int, int, str], deque[_Half]] = defaultdict(deque)  # sender, receiver, side
        self._links = [_Link(self, rank) for rank in range(size)] if device.type == "cpu" else []
        self._streams = [torch.cuda.Stream(device) for _ in range(size)] if device.type == "cuda" else []

    def post(self, rank: int, sends: Sequence[_Half], receives: Sequence[_Half]) -> None:
        with self.changed:
            for half in sends:
                self._meet(rank, half.peer, "receives", half, "sends")
            for half in receives:
                self._meet(half.peer, rank, "sends", half, "receives")

    def _meet(self, sender: int, receiver: int, other_side: str, half: _Half, side: str) -> None:
        others = self._waiting[sender, receiver, other_side]
        if not others:
            self._waiting[sender, receiver, side].append(half)
            return
        other = others.popleft()
        send, receive = (half, other) if side == "sends" else (other, half)
        if len(send.blob) != len(receive.blob):
            error = ValueError(
                f"blob must have as many bytes on both sides, got {len(send.blob)} on rank {sender},"
                f" which sends it, and {len(receive.blob)} on rank {receiver}"
            )
            self.fail(sender, error)
            raise error
        send.met = receive.met = True
        if self._streams:
            self._launch(send, receive, self._streams[receiver])
        else:
            self._links[sender].carry(send, receive)

    def fail(self, rank: int, error: BaseException) -> None:
        """Ends all waits."""
        with self.changed:
            self.failed.setdefault(rank, error)
            self.changed.notify_all()

    def _launch(self, send: _Half, receive: _Half, stream: torch.cuda.Stream) -> None:
        """The copy on a GPU, after what both sides had launched when they posted it."""
        with torch.inference_mode(), torch.cuda.stream(stream):  # blobs may be from either mode
            for half in (send, receive):
                assert half.ready is not None
                stream.wait_event(half.ready)
            receive.blob.copy_(send.blob, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        for half in (send, receive):
            half.copied, half.done = copied, True
        self.changed.notify_all()


class _Link:
    """Copies what one rank sends, on a thread that ends with the hub."""

    def __init__(self, hub: Hub, rank: int):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"link {rank}")
        self._hub, self._rank = weakref.proxy(hub), rank
        self._free = 0.0  # when the last byte of the message before has left

    def carry(self, send: _Half, receive: _Half) -> None:
        self._thread.submit(self._carry, send, receive, time.monotonic())

    def _carry(self, send: _Half, receive: _Half, met: float) -> None:
        hub = self._hub
        try:
            with torch.inference_mode():  # which the blobs may be from
                receive.blob.copy_(send.blob)
        except BaseException as error:
            hub.fail(self._rank, error)
            raise
        self._free = max(self._free, met)
        if hub.gigabytes_per_second is not None:
            self._free += len(send.blob) / (hub.gigabytes_per_second * 1e9)
        time.sleep(max(0.0, self._free + hub.latency - time.monotonic()))
        with hub.changed:
            send.done = receive.done = True
            hub.changed.notify_all()


class _Ticket:
    def __init__(self, hub: Hub, halves: Sequence[_Half], where: Where, deadline: float):
        self._hub, self._halves, self._where, self._deadline = hub, halves, where, deadline

    def wait(self, deadline: float | None = None) -> None:
        """`Ticket.wait`."""
        hub, began = self._hub, time.monotonic()
        limit = self._deadline if deadline is None else check_deadline(deadline)
        with hub.changed:
            done = hub.changed.wait_for(lambda: hub.failed or all(half.done for half in self._halves), limit)
            missing = [half for half in self._halves if not half.done]
            if missing:
                waited = time.monotonic() - began
                if not done:
                    late = {half.peer for half in missing if not half.met}
                    reason = "it has not posted its side" if late else "the message is still under way"
                    raise PeerLost(late or {half.peer for half in missing}, *self._where, waited, reason)
                rank, error = next(iter(hub.failed.items()))
                raise PeerLost([rank], *self._where, waited, f"{type(error).__name__}: {error}") from error
        for half in self._halves:
            if half.copied is not None:
                torch.cuda.current_stream(hub.device).wait_event(half.copied)


class InProcess(Transport):
    """One of the transports that `in_process_group` makes."""

    def __init__(self, hub: Hub, rank: int, size: int, device: torch.device, deadline: float):
        super().__init__(rank, size, device, deadline)
        self.hub = hub

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, PeerLost):
            self.hub.fail(self.rank, error)

    def _begin(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Ticket:
        outgoing, incoming = ([_Half(*message) for message in messages] for messages in (sends, receives))
        self.hub.post(self.rank, outgoing, incoming)
        return _Ticket(self.hub, [*outgoing, *incoming], self.where, self.deadline)


def in_process_group(
    size: int,
    device: torch.device | str = "cpu",
    *,
    gigabytes_per_second: float | None = None,
    latency: float = 0.0,
    deadline: float = DEADLINE,
) -> list[InProcess]:
    """The transports of `size` ranks, each to be used by one thread.

    Args:
        gigabytes_per_second: the pace at which each rank sends, 10^9 bytes a second; None: as fast as memory is.
        latency: seconds that a message takes, besides. Both on a CPU alone.
        deadline: seconds of a wait that is given none.

    Example:
        >>> from inferix_kernels.distributed import in_process_group
        >>> [transport.rank for transport in in_process_group(3, gigabytes_per_second=50, latency=20e-6)]
        [0, 1, 2]
    """
    check_counts({"size": size})
    device = check_device("device", device)
    device = torch.empty(0, device=device).device  # with its index
    if gigabytes_per_second is not None:
        check_figure("gigabytes_per_second", gigabytes_per_second)
    check_figure("latency", latency, zero=True)
    if device.type != "cpu" and (gigabytes_per_second is not None or latency):
        raise ValueError(f"gigabytes_per_second and latency must be left out on a GPU, got them for {device}")
    hub = Hub(size, device, gigabytes_per_second, latency)
    return [InProcess(hub, rank, size, device, deadline) for rank in range(size)]


def run_ranks(transports: Sequence[InProcess], function: Callable[[InProcess], R]) -> list[R]:
    """`function` of each rank's transport, in a thread each; what they return, by rank. If one raises, the others'
    waits end with its message, and it is raised here.

    Example:
        >>> from inferix_kernels.distributed import in_process_group, run_ranks
        >>> run_ranks(in_process_group(3), lambda transport: transport.rank ** 2)
        [0, 1, 4]
    """
    if not transports:
        raise ValueError("transports must be those of a group, got none")
    results: dict[int, R] = {}

    def run(transport: InProcess) -> None:
        try:
            results[transport.rank] = function(transport)
        except BaseException as error:
            transport.hub.fail(transport.rank, error)

    threads = [threading.Thread(target=run, args=(t,), name=f"rank {t.rank}", daemon=True) for t in transports]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as interrupt:  # Ctrl-C ends the ranks' waits too
        transports[0].hub.fail(transports[0].rank, interrupt)
        raise
    for error in transports[0].hub.failed.values():  # the first is what the others ended by
        raise error
    return [results[transport.rank] for transport in transports]


def _event(device: torch.device) -> torch.cuda.Event | None:
    """Of all that the current stream was given so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
