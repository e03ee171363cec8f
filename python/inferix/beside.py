"""Work beside that of the calling thread: one job at a time, in a thread and, on a GPU, in a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Beside:
    """Runs jobs in the order in which they come, at most one at a time; the thread begins with the first one.

    On a GPU a job begins where the calling thread's stream stood when it was submitted, and is done when the device has
    done it; what it was given must be held until then. This has never run on a GPU.

    Args:
        name: of the thread.
        device: where the jobs compute; None: on the host.

    Example:
        >>> beside = Beside("sums")
        >>> job = beside.submit(lambda: sum(range(4)))
        >>> job.result()
        6
    """

    def __init__(self, name: str, device: torch.device | str | None = None):
        self._name, self._device = name, device
        self._thread: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._job: Future[Any] | None = None

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Begin a job, once the one before is done, whatever became of it."""
        self.wait()
        if self._thread is None:
            self._begin()
        assert self._thread is not None
        ready = None
        if self._stream is not None:
            import torch

            ready = torch.cuda.current_stream(self._stream.device).record_event()
        future = self._thread.submit(self._run, job, ready)
        self._job = future
        return future

    def wait(self) -> None:
        """Return when no job is under way."""
        if self._job is not None:
            wait([self._job])

    def _begin(self) -> None:
        self._thread = ThreadPoolExecutor(1, self._name)
        if self._device is not None:
            import torch

            device = torch.device(self._device)
            if device.type == "cuda":
                # Of two streams that both have work the device serves this one first: its jobs are short, and awaited.
                self._stream = torch.cuda.Stream(device, priority=-1)

    def _run(self, job: Callable[[], T], ready: torch.cuda.Event | None) -> T:
        if self._stream is None:
            return job()
        import torch

        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            try:
                return job()
            finally:
                self._stream.synchronize()
