"""Processes that run one world together: rank 0 is steered, and the others do what it does.

Every rank opens the same world. Each call of one on rank 0 is told to the others before it is carried out, with all of
its arguments, and they make the same call on theirs. So a block's actions and prompt reach every rank with that block,
and forks, rewinds and resets are made alike everywhere; what the ranks do for each other within a call is the business
of attention (inferix_kernels.distributed). Only rank 0 writes files and serves a page.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from inferix_kernels import OutOfPages, Policy
from inferix_kernels._check import check_device, check_word
from inferix_kernels.distributed import ProcessGroupTransport, TokenShard
from inferix_kernels.distributed.transport import Message, Transport
from inferix_kernels.store import Shard

from .decode.contract import Model
from .finite import NotFinite
from .launcher import launched_rank
from .sharing import PARALLEL, Sharing

PATIENCE = 1e5  # seconds that a rank waits for what is done next: a world may be left alone for a day
LENGTH = 8  # bytes of a message's length, which goes ahead of it


class _Call(NamedTuple):
    """What the other ranks are told to do.

    Attributes:
        dropped: numbers of worlds that nobody on rank 0 has any more.
        world: the number of the world that is called.
        name: of a method of World, or module:function of a function whose first argument is the world.
    """

    dropped: list[int]
    world: int
    name: str
    arguments: tuple[tuple[Any, ...], dict[str, Any]]


class _End(NamedTuple):
    result: Any


class Ranks:
    """The group, seen from one rank. One world is opened over it, and forks of that one.

    Args:
        transport: of the group.
        parallel: how they share attention, one of PARALLEL: by name, or "auto", as the planner has it
            by what all ranks measure.

    Attributes:
        sharing: what was chosen, once a world is opened.

    Raises:
        ValueError: `parallel` is none of these.
    """

    def __init__(self, transport: Transport, parallel: str = "auto"):
        check_word("parallel", parallel, PARALLEL)
        self.transport, self.parallel, self._ended = transport, parallel, False
        self.sharing: Sharing | None = None
        self._numbers = itertools.count()
        self._number: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._worlds: dict[int, Any] = {}  # held by those who follow alone
        self._dropped: list[int] = []
        self._turn, self._inside, self._failed = threading.RLock(), False, False
        self._agreed: Exception | None = None  # that all ranks know of

    @property
    def leads(self) -> bool:
        return self.transport.rank == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """What leaves the context as an exception ends all ranks, with its message; else rank 0 has ended with them."""
        try:
            with self.transport:
                if error is not None:
                    raise error
                self.end()
        finally:
            if isinstance(self.transport, ProcessGroupTransport):
                dist.destroy_process_group()

    def place(self, model: Model, policy: Policy) -> tuple[Model, Shard]:
        """The model as this rank runs it, and what its store holds.

        Raises:
            ValueError: the world can't be shared so, or nothing fits.
        """
        self.sharing = Sharing.of(self.transport, self.parallel, model, policy, self.share)
        sharing = self.sharing
        return model.on_rank(TokenShard(sharing.group), sharing.attention, sharing.branch), sharing.shard

    def add(self, world: Any) -> None:
        """A world that was opened, forked or loaded: at the same place of the same order on every rank."""
        number = self._number[world] = next(self._numbers)
        if self.leads:
            weakref.finalize(world, self._dropped.append, number).atexit = False
        else:
            self._worlds[number] = world

    @contextlib.contextmanager
    def together(self, world: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
        """A call of a world that is about to be made on rank 0. One at a time, over all worlds of the group."""
        with self._turn:
            if not self.leads or self._inside:  # what a call calls is made by every rank for itself
                yield
                return
            method = function.__qualname__.startswith("World.")
            name = function.__name__ if method else f"{function.__module__}:{function.__qualname__}"
            dropped = [self._dropped.pop() for _ in range(len(self._dropped))]  # others may add to it meanwhile
            self.share((self._failed, _Call(dropped, self._number[world], name, (args, kwargs))))
            self._inside, self._failed = True, True
            sent = self.transport.sent
            try:
                yield
                self._failed = False
            except Exception as error:
                if not self._on_all(error, sent):
                    self.transport.__exit__(type(error), error, error.__traceback__)  # the others wait for this rank
                raise
            finally:
                self._inside = False

    def _on_all(self, error: Exception, sent: int) -> bool:
        """Does every rank raise this in the same place? Before the ranks have sent each other anything in a call they
        only do what all of them do; and what they make, and the pages that they have, are the same.

        Args:
            sent: bytes that this rank had sent when the call began.
        """
        return self.transport.sent == sent or error is self._agreed or isinstance(error, (NotFinite, OutOfPages))

    def follow(self) -> Any:
        """Make the calls that are made on rank 0, until it is done.

        Returns:
            What rank 0 has ended with.

        Raises:
            RuntimeError: a call raised an exception here that it did not raise there, or the other way round.
            PeerLost: a rank is gone.
        """
        with _left_to_rank_0():
            return self._followed()

    def _followed(self) -> Any:
        error: Exception | None = None
        name = ""
        while True:
            failed, call = self.share(None)
            if failed != (error is not None):
                here, there = f"on rank {self.transport.rank}", "on rank 0"
                first, then = (there, here) if failed else (here, there)
                raise RuntimeError(f"{name} failed {first}, and not {then}: {error}") from error
            if isinstance(call, _End):
                return call.result
            for number in call.dropped:
                del self._worlds[number]
            name, sent = call.name, self.transport.sent
            error = self._make(call)
            if error is not None and not self._on_all(error, sent):
                what = f"{type(error).__name__}: {error}"
                raise RuntimeError(f"{name} failed on rank {self.transport.rank}: {what}") from error

    def _make(self, call: _Call) -> Exception | None:
        world = self._worlds[call.world]
        module, _, name = call.name.rpartition(":")
        function = getattr(importlib.import_module(module) if module else type(world), name)
        args, kwargs = call.arguments
        try:
            function(world, *args, **kwargs)
        except Exception as error:  # a bad argument, a block that is not finite: raised there too, and handled there
            return error
        return None

    def end(self, result: Any = None) -> None:
        """On rank 0: nothing more is to come, and the others' `follow` returns the result. Once is enough."""
        with self._turn:
            if self.leads and not self._ended:
                self._ended = True
                self.share((self._failed, _End(result)))

    def on_first(self, function: Callable[[], None]) -> None:
        """Rank 0 alone makes this call, within one that all make. If it raises an exception, all raise one with its
        words."""
        error: Exception | None = None
        if self.leads:
            try:
                function()
            except Exception as raised:
                error = raised
        said = self.share(None if error is None else str(error))
        if said is not None:
            self._agreed = error or ValueError(said)
            raise self._agreed

    def collect(self, blob: Tensor, sizes: Sequence[int]) -> list[Tensor] | None:
        """Blobs of the first ranks, on rank 0; None on the others.

        Args:
            blob: this rank's, on the CPU.
            sizes: bytes of each.
        """
        transport, rank = self.transport, self.transport.rank
        transport.at("what rank 0 saves", -1, -1)
        blob = blob.to(transport.device)
        if rank:
            transport.post([Message(0, blob)] if rank < len(sizes) else [], []).wait()
            return None
        others = [torch.empty(size, dtype=torch.uint8, device=transport.device) for size in sizes[1:]]
        transport.post([], [Message(i, other) for i, other in enumerate(others, 1)]).wait()
        return [blob, *others]

    def share(self, value: Any) -> Any:
        """What rank 0 gives, on every rank. It is pickled, as torch.distributed does: the ranks trust each other.

        Raises:
            PeerLost: as Ticket.wait.
        """
        transport, others = self.transport, range(1, self.transport.size)
        transport.at("what rank 0 does next", -1, -1)
        if self.leads:
            body = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(transport.device)
            for blob in (_length(len(body)).to(transport.device), body):
                transport.post([Message(rank, blob) for rank in others], []).wait(PATIENCE)
            return value
        length = torch.empty(LENGTH, dtype=torch.uint8, device=transport.device)
        transport.post([], [Message(0, length)]).wait(PATIENCE)
        body = torch.empty(int.from_bytes(length.tolist(), "little"), dtype=torch.uint8, device=transport.device)
        transport.post([], [Message(0, body)]).wait()
        return pickle.loads(body.cpu().numpy().tobytes())


def join(device: str | None = None, parallel: str = "auto") -> Ranks | None:
    """The processes that torchrun has started, this one among them; None: it runs alone.

    Args:
        device: "cpu" or "cuda"; None: a GPU, if there is one. Of several each process takes its own.
        parallel: as for Ranks.
    """
    if launched_rank() is None:
        return None
    on_gpu = check_device("device", device or ("cuda" if torch.cuda.is_available() else "cpu")).type == "cuda"
    if on_gpu:  # never run on a GPU
        torch.cuda.set_device(dist.get_node_local_rank())
    # NCCL ends a process in which a message waits for longer than its group's timeout.
    patience = timedelta(seconds=PATIENCE) if on_gpu else None
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=patience)
    return Ranks(ProcessGroupTransport(device="cuda" if on_gpu else "cpu"), parallel)


@contextlib.contextmanager
def _left_to_rank_0() -> Iterator[None]:
    """Ctrl-C in a terminal, and what ends torchrun, reach every process: rank 0 ends the others, once it has finished
    what it has begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _length(size: int) -> Tensor:
    return torch.tensor(list(size.to_bytes(LENGTH, "little")), dtype=torch.uint8)
