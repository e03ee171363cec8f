"""A run on a GPU that is there for minutes: stages in the order of what is most wanted, each in its time.

    python -m benchmarks gpu --out gpu_run --minutes 7.5
    python -m benchmarks gpu --out gpu_run --minutes 4      # goes on, on another machine too that has the folder

plan.py names the stages. A stage is commands that run side by side, in processes of their own: one that hangs is ended
when its time is up, and one that can't even be ended is left behind. What a stage has left in the folder is not done
again. Rows are on disk as they come, and the summary after every stage, so that the run may be cut off at any moment.

Files in the folder, eight at most and 16 MiB each, for people: summary.md, rates.png, sweep.png, log.txt, profile.txt,
tests.txt; for the next call: state.json; for benchmarks/records: run.jsonl. Never run on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from inferix_kernels.files import atomic_write, unwritable

from .ledger import ROOT, fingerprints
from .processes import Process, how, search_path

LOG_BYTES = 8 << 20
FINISH = 12.0  # seconds kept for the plots
POLL = 0.2  # seconds
NO_TESTS = 5  # pytest's exit code when it had nothing to run
# Of pytest: a test failed; of run: a kernel of ours is wrong. Both are findings, not to be looked for again.
SAID_NO = 1
AGAIN = 3
STOPPED = -100  # the command had its whole time
CUT = -101  # there was less time than it was to have
NOT_STARTED = -102


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A command.

    Attributes:
        fine: exit codes that mean it is done.
        output: the file its output goes to besides the log.
        always: it is asked for because it is needed, whatever an earlier call has done, on another machine perhaps.
    """

    name: str
    command: Sequence[str]
    fine: tuple[int, ...] = (0,)
    output: str = ""
    always: bool = False


class Stage(NamedTuple):
    """Commands that run side by side.

    Attributes:
        cap: seconds it may take.
        least: seconds below which it is not begun.
        lacks: why it can't be done on this machine; empty if it can.
    """

    name: str
    jobs: tuple[Job, ...]
    cap: float
    least: float = 10.0
    lacks: str = ""


class Command(Protocol):
    """A job at work; processes.Process is one."""

    def wait(self, seconds: float) -> int | None: ...

    def kill(self) -> bool: ...

    def output(self, most: int) -> str: ...


def start(job: Job) -> Command:
    """Raises OSError."""
    path = os.pathsep.join(filter(None, [str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    given = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PATH": search_path()}
    return Process(job.command, ROOT, {**os.environ, **given})


@dataclasses.dataclass
class Run:
    """A folder and what has been done in it.

    Attributes:
        stages: made one by one, so that a stage may depend on what those before it have left.
        dry: it is a run on the CPU, at shapes for tests.
        summarize: what summary.md holds, given the run.
        plots: the stage that draws, of what there is.
        clock, start: of time and processes; tests have others.
        device: its name; a folder holds what one device did.
    """

    out: Path
    stages: Callable[[], Iterator[Stage]]
    dry: bool = False
    summarize: Callable[[Run], str] = lambda run: run.stage_table()
    plots: Callable[[], Stage | None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    start: Callable[[Job], Command] = start
    device: str = ""

    def __post_init__(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.out, error, "--out") from None
        self.jobs_done = self._jobs_done()
        self.left_out: dict[str, str] = {}

    def _jobs_done(self) -> dict[str, dict[str, Any]]:
        """What an earlier call left. Raises ValueError: it was of other sources or another device, or is no state."""
        if not self.state.exists():
            return {}
        try:
            state = json.loads(self.state.read_text())
            jobs, of = dict(state["jobs"]), (state["kernels"], state["dry"], state["device"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--out: {str(self.state)!r} must be what an earlier call left, got {error!r}") from None
        if of != (fingerprints(), self.dry, self.device):
            raise ValueError(f"--out {self.out} holds a run of other sources or another device: choose a new folder")
        return jobs

    @property
    def state(self) -> Path:
        return self.out / "state.json"

    def go(self, minutes: float) -> int:
        """Work until all stages are done or the minutes are over. 0: all are well, 1: not all, 3: call again."""
        ends, whole = self.clock() + 60 * minutes - FINISH, True
        for stage in self.stages():
            left = [job for job in stage.jobs if job.always or not self.jobs_done.get(job.name, {}).get("done")]
            seconds = min(stage.cap, ends - self.clock())
            if stage.lacks:
                self._leave_out(stage.name, stage.lacks)
            elif not left:
                self._say(f"{stage.name}: done before")
            elif seconds < stage.least:
                whole = False
                self._leave_out(stage.name, f"{max(0.0, seconds):.0f} s were left, and it needs {stage.least:.0f}")
            else:
                self._do(stage, left, seconds)
                whole = whole and all(self.jobs_done[job.name]["done"] for job in left)
        if drawing := self.plots():
            seconds = max(drawing.least, ends + FINISH - self.clock())
            self._do(drawing, drawing.jobs, min(drawing.cap, seconds))
            for job in drawing.jobs:  # what is drawn may be drawn again
                self.jobs_done.pop(job.name)
        self._keep()
        self._say(self.stage_table())
        if not whole:
            return AGAIN
        return int(any(_words(entry) != "well" for entry in self.jobs_done.values()))

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        self._say(f"{name}: left out: {why}")

    def _do(self, stage: Stage, jobs: Sequence[Job], seconds: float) -> None:
        """Run the jobs side by side, for at most this many seconds, and keep the outcome of each as it ends."""
        self._say(f"{stage.name}: at most {seconds:.0f} s")
        started = self.clock()
        at_work: dict[Job, Command] = {}
        for job in jobs:
            try:
                at_work[job] = self.start(job)
            except OSError as error:
                self._ended(job, NOT_STARTED, f"[not started: {error}]", 0.0)
        while at_work and self.clock() < started + seconds:
            for job, command in list(at_work.items()):
                code = command.wait(min(POLL, started + seconds - self.clock()))
                if code is not None:
                    del at_work[job]
                    self._ended(job, code, command.output(LOG_BYTES), self.clock() - started)
        for job, command in at_work.items():
            code = STOPPED if seconds >= stage.cap else CUT
            left_behind = "" if command.kill() else "\n[it can't be ended, and is left behind]"
            self._ended(job, code, command.output(LOG_BYTES) + left_behind, self.clock() - started)

    def _ended(self, job: Job, code: int, output: str, seconds: float) -> None:
        self._log("log.txt", f"\n===== {job.name}: {' '.join(job.command)}\n{output}\n[{_words_of(code)}]\n")
        if job.output:
            self._log(job.output, f"\n===== {job.name}\n{output}\n")
        if code == SAID_NO and only_packages_missing(output):
            code = 0
        last = (output.strip().splitlines() or [""])[-1][:100]
        self.jobs_done[job.name] = entry = {"done": code in job.fine, "code": code, "seconds": seconds, "last": last}
        self._say(f"  {job.name}: {_words(entry)}, {seconds:.0f} s: {last}")
        self._keep()

    def _keep(self) -> None:
        """State and summary, whole or as they were: a run that is cut off now has both."""
        of = {"kernels": fingerprints(), "dry": self.dry, "device": self.device}
        state = {**of, "jobs": self.jobs_done, "left out": self.left_out}
        self._write(self.state, json.dumps(state, indent=1) + "\n")
        self._write(self.out / "summary.md", self.summarize(self))

    def _log(self, name: str, text: str) -> None:
        path = self.out / name
        whole = (path.read_text(errors="replace") if path.exists() else "") + text
        self._write(path, whole.encode()[-LOG_BYTES:].decode(errors="replace"))

    def _write(self, path: Path, text: str) -> None:
        """A full disk is said, and does not end the run: what can't be kept is shown."""
        try:
            with atomic_write(path, "--out") as part:
                part.write_text(text)
        except ValueError as error:
            self._say(f"{error}; this goes on, and what it should hold is lost or stands above")

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def stage_table(self) -> str:
        from .table import markdown

        body = [
            [name, _words(entry), f"{entry['seconds']:.0f}", entry["last"].replace("|", "/")]
            for name, entry in self.jobs_done.items()
        ]
        body += [[name, "left out", "", why] for name, why in self.left_out.items()]
        return markdown(["what", "state", "seconds", "its last line, or why"], body, left=4)


def only_packages_missing(output: str) -> bool:
    """Did pytest complain of nothing but test files that import what is not installed here, as for video files?"""
    errors = [line for line in output.splitlines() if line.startswith("E   ")]
    return bool(errors) and all("ModuleNotFoundError" in line for line in errors) and " failed" not in output


def _words(entry: dict[str, Any]) -> str:
    if entry["code"] in (0, NO_TESTS):
        return "well"
    return _words_of(entry["code"]) + ("" if entry["done"] else ", to do again")


def _words_of(code: int) -> str:
    return {
        STOPPED: "stopped: its time was up",
        CUT: "stopped: no time left",
        NOT_STARTED: "not started",
    }.get(code) or how(code)
