"""Independent pieces of work, several at a time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

T = TypeVar("T")


def each_done(work: Callable[[T], str], tasks: Sequence[T], jobs: int) -> Iterator[tuple[T, str]]:
    """Do every task, and give each with what `work` said of it as soon as it is done.

    Args:
        work: a function that another process can import; what it raises ends all.
        jobs: processes; 1: this one. They share its threads; each begins afresh, as a forked one would inherit torch's
            own threads in an unknown state.

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
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,))
    with pool:
        try:
            of = {pool.submit(work, task): task for task in tasks}
            for future in as_completed(of):
                yield of[future], future.result()
        except BaseException:  # Ctrl-C too: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
