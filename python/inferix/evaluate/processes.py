"""Independent pieces of work, several at a time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue
from typing import TypeVar

import torch

T = TypeVar("T")
DIED = "the process that did it died (killed, or out of memory)"


def each_done(work: Callable[[T], str], tasks: Sequence[T], jobs: int) -> Iterator[tuple[T, str]]:
    """Do every task, and give each with what `work` said of it as soon as it is done.

    Args:
        work: a function that another process can import; what it raises ends all.
        jobs: processes; 1: this one. They share its threads; each begins afresh, as a forked one would inherit torch's
            own threads in an unknown state. Of the task of one that dies DIED is said, and another takes its place.

    Example:
        >>> sorted(each_done(str, [1, 2, 3], jobs=1))
        [(1, '1'), (2, '2'), (3, '3')]
    """
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            yield task, work(task)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")

    def begun() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,))

    # A pool whose process dies loses all of its tasks: so each process is a pool of its own, lent to a task at a time.
    idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()

    def do(task: T) -> str:
        pool = idle.get()
        try:
            return pool.submit(work, task).result()
        except BrokenProcessPool:
            pool = begun()
            return DIED
        finally:
            idle.put(pool)

    for _ in range(jobs):
        idle.put(begun())
    with ThreadPoolExecutor(jobs) as waiting:
        try:
            of = {waiting.submit(do, task): task for task in tasks}
            for future in as_completed(of):
                yield of[future], future.result()
        finally:  # after an error or Ctrl-C what has not begun does not begin
            waiting.shutdown(cancel_futures=True)
            while not idle.empty():
                idle.get().shutdown()
