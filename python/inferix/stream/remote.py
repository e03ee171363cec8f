"""The worker process as the server sees it: requests that can be awaited, and a crash as an exception."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from ..launcher import launched_rank
from . import worker

START = 120.0  # seconds for the process to be there, on a machine that is busy
ENDING = 20.0  # seconds for ranks to make a block, and to end together: after 30 torchrun kills them
SILENCE = 10.0  # seconds without a heartbeat: it is stopped, or stuck


class Refused(ValueError):
    """A request that the worlds can't follow; nothing has changed."""


class Broken(RuntimeError):
    """The worker is of no further use; the message says what happened, perhaps with a traceback."""

    @property
    def line(self) -> str:
        return last_line(str(self))


def last_line(text: str) -> str:
    """What a traceback ends with; a text of one line is that line."""
    return (text.strip().splitlines() or [""])[-1]


class Remote:
    """Runs `opener` in a new process and talks to the worlds there.

    Args:
        opener: makes the first world; it, and what it holds, must be picklable.
    """

    def __init__(self, opener: Callable[[], Any]):
        self.description: dict[str, Any] = {}
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {0: self._loop.create_future()}
        self._reason: str | None = None
        self._asked: dict[int, float] = {}  # when; without `prepare`, which runs at the same time as the rest
        self._heard = time.monotonic() + START  # of the process
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=worker.serve, args=(theirs, opener), daemon=True, name=worker.PROCESS)
        # Inherited: Ctrl-C must not end the worker in the middle of its imports, with a traceback.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._reader = threading.Thread(target=self._read, daemon=True, name="inferix-replies")
        self._reader.start()

    async def opened(self) -> dict[str, Any]:
        """Wait until the world is there; what `Stage.describe` says."""
        self.description = await self._waiting[0]
        return self.description

    async def call(self, name: str, /, **arguments: Any) -> Any:
        """Ask the stage for something.

        Raises:
            Refused: it can't be done; nothing has changed.
            Broken: it failed, or the process is gone.
        """
        if self._reason is not None:
            raise Broken(self._reason)
        number = next(self._numbers)
        future = self._waiting[number] = self._loop.create_future()
        if name != "prepare":
            self._asked[number] = time.monotonic()
        try:
            self._connection.send((number, name, arguments))
        except OSError:
            self._fail("the worker process has ended")
        return await future

    def hangs(self, limit: float) -> str | None:
        """Why the process counts as stuck: it says nothing any more, or works on a request for more than `limit`
        seconds. None: it does not, or is of no further use already."""
        now = time.monotonic()
        if self._reason is not None:
            return None
        if now - self._heard > SILENCE:
            return f"the worker process says nothing for {now - self._heard:.0f} s"
        if self._asked and now - min(self._asked.values()) > limit:
            return f"the worker process has been at one request for {now - min(self._asked.values()):.0f} s"
        return None

    def kill(self, reason: str) -> None:
        """End the process at once. What was asked of it raises Broken, with this reason."""
        if self._reason is None:
            self._reason = reason
            self._process.kill()

    async def close(self) -> None:
        """End the process, whatever it is doing; one of several ranks, which wait for it, once its block is made."""
        alive_yet = self._reason is None
        self._reason = self._reason or "the worker process was closed"
        if launched_rank() is not None and alive_yet:
            with contextlib.suppress(OSError):
                self._connection.send((0, worker.END, {}))
            await asyncio.to_thread(self._process.join, ENDING)
        if self._process.is_alive():
            self._process.terminate()
            await asyncio.to_thread(self._process.join, 0.5)
            if self._process.is_alive():
                self._process.kill()
                await asyncio.to_thread(self._process.join, 1.0)
        await asyncio.to_thread(self._reader.join, 1.0)
        self._connection.close()
        if not self._process.is_alive():
            self._process.close()
        self._fail(self._reason)  # not cancelled: that would end who waits, without a word to those who asked them

    def _read(self) -> None:
        """In a thread: blocks are megabytes, and reading them must not hold up the loop."""
        try:
            while True:
                message = self._connection.recv()
                self._heard = time.monotonic()
                if message is not None:
                    self._loop.call_soon_threadsafe(self._answer, *message)
        except (EOFError, OSError):
            self._process.join(1.0)
            code = self._process.exitcode
            how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            with contextlib.suppress(RuntimeError):  # the loop may be closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._fail, f"the worker process {how}")

    def _answer(self, number: int, result: Any, error: tuple[str, str] | None) -> None:
        self._asked.pop(number, None)
        future = self._waiting.pop(number, None) if number else self._waiting[0]
        if future is None or future.done():
            return
        if error is None:
            future.set_result(result)
            return
        kind, text = error
        if kind == worker.BROKEN or number == 0:
            self._reason = text
        future.set_exception(Refused(text) if kind == worker.REFUSED and number else Broken(text))

    def _fail(self, reason: str) -> None:
        self._reason = self._reason or reason
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Broken(self._reason))
                future.exception()  # is known, even if nobody waits for it
