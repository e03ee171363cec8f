"""Processes of one gloo group, forked from this one: which must have one thread, and no GPU in use."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from inferix_kernels.distributed import ProcessGroupTransport

LIMIT = 60.0  # seconds, after which a process hangs
ENDED = "ended"


class Group:
    """Processes that run `function(rank, send)` within a process group; what each sends comes back by `receive`.

    Args:
        hosted: the group's store is in rank 0's process; else in one of its own, as with torchrun. It is never in this
            one: what is forked beside a thread of C++ may find a lock that nobody will open.
    """

    def __init__(self, size: int, function: Callable[[int, Callable[[Any], None]], None], hosted: bool = False):
        listening = socket.create_server(("127.0.0.1", 0))
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe(duplex=False) for _ in range(size)]

        def work(rank: int) -> None:
            for receiver, sender in pipes:
                receiver.close()
                if sender is not pipes[rank][1]:
                    sender.close()
            serves = hosted and rank == 0
            with contextlib.suppress(BrokenPipeError):
                store = _store(listening, size, serves)
                if not serves:
                    listening.close()
                timeout = timedelta(seconds=LIMIT)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
                function(rank, pipes[rank][1].send)

        def serve() -> None:
            for receiver, sender in pipes:
                receiver.close()
                sender.close()
            store = _store(listening, size, True)
            while store is not None:
                signal.pause()

        self.processes = [context.Process(target=_alone, args=(work, rank), daemon=True) for rank in range(size)]
        self._others = [] if hosted else [context.Process(target=_alone, args=(serve,), daemon=True)]
        for process in self.processes + self._others:
            process.start()
        listening.close()
        for _, sender in pipes:
            sender.close()
        self.open: dict[Connection, int] = {pipe: rank for rank, (pipe, _) in enumerate(pipes)}

    def receive(self, timeout: float) -> list[tuple[int, Any]]:
        """(rank, what it sent) of all that has come, after at most so many seconds; ENDED: no more will come."""
        found = []
        for pipe in wait(list(self.open), timeout):
            assert isinstance(pipe, Connection)
            try:
                found.append((self.open[pipe], pipe.recv()))
            except EOFError:
                found.append((self.open.pop(pipe), ENDED))
        return found

    def close(self) -> None:
        for process in self.processes + self._others:
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)  # one that is stopped, too
            process.join()
        for pipe in self.open:
            pipe.close()


def run_processes(size: int, function: Callable[[ProcessGroupTransport], Any], **options: Any) -> list[Any]:
    """What the function returns for each rank's transport, a process each, as `run_ranks` does of threads."""

    def work(rank: int, send: Callable[[Any], None]) -> None:
        try:
            with ProcessGroupTransport(**options) as transport:
                result = function(transport)
            send((result, None))
        except BaseException as error:
            send((None, error))

    group, results = Group(size, work), {}
    try:
        while group.open:
            came = group.receive(LIMIT)
            assert came, f"ranks {sorted(group.open.values())} hang"
            results |= {rank: said for rank, said in came if said is not ENDED}
    finally:
        group.close()
    assert len(results) == size, f"ranks {sorted(set(range(size)) - results.keys())} ended without a word"
    for _, error in results.values():
        if error is not None:
            raise error
    return [results[rank][0] for rank in range(size)]


def _store(listening: socket.socket, size: int, serves: bool) -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1",
        listening.getsockname()[1],
        size,
        is_master=serves,
        timeout=timedelta(seconds=LIMIT),
        wait_for_workers=False,
        master_listen_fd=listening.detach() if serves else None,
    )


def _alone(function: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # it would look up the machine's name
    function(*args)
    os._exit(0)  # as after a loss the group can not be taken down in order
