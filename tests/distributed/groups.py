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
        hosted: the group's store is in rank 0's process; else in this one, as with torchrun.
    """

    def __init__(self, size: int, function: Callable[[int, Callable[[Any], None]], None], hosted: bool = False):
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        self._store = None if hosted else _store(port, size, listening.detach())
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        fd = listening.fileno()
        self.processes = [
            context.Process(target=_rank, args=(rank, size, port, fd, function, pipes), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        if hosted:
            listening.close()
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
        for process in self.processes:
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)  # one that is stopped, too
            process.join()
        for pipe in self.open:
            pipe.close()
        self._store = None


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


def _store(port: int, size: int, listening: int | None) -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1",
        port,
        size,
        is_master=listening is not None,
        timeout=timedelta(seconds=LIMIT),
        wait_for_workers=False,
        master_listen_fd=listening,
    )


def _rank(rank: int, size: int, port: int, fd: int, function: Callable, pipes: list) -> None:
    torch.set_num_threads(1)
    for other, (receiver, sender) in enumerate(pipes):
        receiver.close()
        if other != rank:
            sender.close()
    with contextlib.suppress(BrokenPipeError):
        store = _store(port, size, fd if rank == 0 and fd >= 0 else None)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT))
        function(rank, pipes[rank][1].send)
    os._exit(0)  # as after a loss the group can not be taken down in order
