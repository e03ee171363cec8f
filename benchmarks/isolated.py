"""Contenders in a process of their own: one that faults, hangs or spoils the context takes no other's result along.

`measure` starts a worker and hands it one contender after the other; when it is lost, the contender that it was at has
failed, and another worker goes on with the next. Requests and answers are JSON lines.

    request [family, shape, number of the case, number of the contender]
    answers {"ready"}, and for each request {"begun", "rows": the machine's peaks}, {"checked"}, {"rows", "lost"}
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from . import families
from .harness import isa
from .harness.case import Case, Contender
from .harness.measure import Alone, Machine, Settings, row_of
from .harness.processes import gone, how
from .harness.rows import Row

# Seconds, or the patience if it is more, for a worker to import torch and reach the GPU, and for a case's inputs and
# reference.
START = 60.0
COMMAND = (sys.executable, "-m", "benchmarks.isolated")


class Job(NamedTuple):
    family: str
    shape: str
    case_number: int
    number: int
    case: Case
    contender: Contender

    @property
    def request(self) -> list[Any]:
        return [self.family, self.shape, self.case_number, self.number]

    @property
    def key(self) -> tuple[str, ...]:
        return row_of(self.case, self.contender, "").key[:3]


class Lost(Exception):
    """The worker can't go on; the message says how it ended."""


class Worker(Protocol):
    def send(self, request: Any) -> None: ...

    def receive(self, seconds: float) -> dict[str, Any]:
        """Raises Lost."""

    def stop(self) -> None: ...


class WorkerProcess:
    """In the group of its parent, so that what ends a stage ends it too."""

    def __init__(self, command: Sequence[str] = COMMAND):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def send(self, request: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died, as `receive` will say
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            raise Lost(f"took more than {seconds:.0f} s") from None
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        raise Lost(f"its process ended: {how(self.process.poll())}")

    def stop(self) -> None:
        self.process.kill()
        if not gone(self.process):
            print(f"benchmarks: process {self.process.pid} can't be killed, and is left behind", file=sys.stderr)


def jobs_of(names: Sequence[str], shapes: Sequence[str], settings: Settings, ops: Sequence[str] = ()) -> list[Job]:
    """Every contender that the settings want, case by case; peers first: they are the measure, and known to work."""
    return [
        Job(name, shape, case_number, number, case, contender)
        for name in names
        for shape in shapes
        for case_number, case in enumerate(families.cases(name, [shape], settings.device))
        if not ops or case.op in ops
        for number, contender in sorted(enumerate(case.contenders), key=lambda pair: pair[1].name.startswith("ours"))
        if settings.wants(contender)
    ]


def measure(
    jobs: Sequence[Job],
    settings: Settings,
    patience: float,
    start: Callable[[], Worker] = WorkerProcess,
) -> Iterator[list[Row]]:
    """Rows of each contender as it is done, with those of the machine's peaks before a case's first.

    Args:
        patience: seconds for a contender's first call, in which it compiles, and for its timing beyond the settings'
            seconds; one that takes longer has failed.
    """
    for job in jobs:
        if job.contender.absent:
            row = row_of(job.case, job.contender, settings.device)
            yield [dataclasses.replace(row, status="absent", note=job.contender.absent)]
    pending = [job for job in jobs if not job.contender.absent]
    while pending:
        with contextlib.closing(_turn(pending, settings, patience, start)) as turn:
            yield from turn


def _turn(
    pending: list[Job], settings: Settings, patience: float, start: Callable[[], Worker]
) -> Generator[list[Row], None, None]:
    """One worker, for as long as it lasts; takes what is done off `pending`."""
    worker, slow = start(), max(START, patience)
    stage, told = "start", pending[:]  # who has failed if the worker is lost now
    try:
        worker.send(dataclasses.asdict(settings))
        worker.receive(slow)
        while pending:
            job = pending[0]
            same_case = [other for other in pending if other.case.name == job.case.name]
            stage, told = "inputs and reference", same_case
            worker.send(job.request)
            yield _rows(worker.receive(slow))
            stage, told = "first call", [job]
            worker.receive(patience)
            stage = "timing"
            answer = worker.receive(settings.seconds + patience)
            pending.pop(0)
            yield _rows(answer)
            if answer["lost"]:
                return
    except Lost as reason:
        pending[:] = [job for job in pending if job not in told]
        note = f"{stage}: {reason}"
        for job in told:
            row = row_of(job.case, job.contender, settings.device)
            yield [dataclasses.replace(row, status="failed", note=note)]
    finally:
        worker.stop()


def _rows(answer: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in answer["rows"]]


def serve() -> None:
    """The worker's side."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what anything prints must not get among the answers
    for answer in _answers(sys.stdin):
        print(json.dumps(answer), file=answers, flush=True)


def _answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    import torch

    given: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(next(lines)).items()
    }
    settings = Settings(**given)
    isa.hold(settings.isa)
    machine = Machine(torch.device(settings.device), settings.small)
    yield {"ready": True}
    alone: Alone | None = None
    for line in lines:
        family, shape, case_number, number = json.loads(line)
        case = list(families.cases(family, [shape], settings.device))[case_number]
        fresh = alone is None or alone.case.name != case.name
        if alone is None or fresh:
            alone = None  # its operands are let go before there are others
            alone = Alone(case, settings, machine, [c for c in case.contenders if settings.wants(c)])
        yield {"begun": True, "rows": [dataclasses.asdict(row) for row in alone.peaks if fresh]}
        contender = case.contenders[number]
        row, prepared = alone.check(contender)
        yield {"checked": row.status}
        if prepared is not None and settings.rounds:
            alone.time(row, contender, prepared)
        prepared = None
        lost = row.status == "failed" and not _usable(settings.device)
        yield {"rows": [dataclasses.asdict(row)], "lost": lost}


def _usable(device: str) -> bool:
    """A kernel that faulted leaves a context in which every later call fails."""
    import torch

    try:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.ones(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    serve()
