"""A whole run on a GPU machine in one call: build, tests, every family at its reference shapes, sweeps, a summary.

Each stage is a process of its own, since a kernel that faults takes its process with it. What a stage has left in the
folder is not done again, so that a run that was cut off goes on when it is called again.

files in the folder: run.jsonl (rows), state.json (stages), log.txt, tests.txt, rates.png, sweep.png, summary.md
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .evidence import evidence, table
from .ledger import ROOT, fingerprints
from .rows import Document
from .table import markdown

LOG_BYTES = 8 << 20
NO_TESTS = 5  # pytest's exit code when it had nothing to run
# Of pytest: a test failed; of run: a kernel of ours is wrong. Both are findings, not to be looked for again.
SAID_NO = 1
AGAIN = 3
# Most wanted first: a run may end before it comes to the last.
PLAN = (
    ("attention", "wan1.3b-480p"),
    ("kv_pages", "wan1.3b-480p"),
    ("qkv", "wan1.3b-480p"),
    ("linear", "wan1.3b-480p"),
    ("e2e", "-"),
    ("attention", "wan14b-480p"),
    ("attention", "magi-4.5b"),
    ("kv_pages", "magi-4.5b"),
    ("linear", "wan14b-480p"),
    ("page_table", "-"),
)


class Stage(NamedTuple):
    """A command, the file its output goes to besides the log, and the exit codes that mean it is done."""

    name: str
    command: list[str]
    output: str = ""
    fine: tuple[int, ...] = (0,)


@dataclasses.dataclass
class Run:
    """A folder and what has been done in it.

    Attributes:
        dry: go through every stage on the CPU, at shapes for tests.
        tests: what pytest is given.
    """

    out: Path
    dry: bool = False
    tests: Sequence[str] = ("tests",)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = json.loads(self.state.read_text()) if self.state.exists() else {}
        if state and (state["kernels"], state["dry"]) != (fingerprints(), self.dry):
            raise ValueError(f"--out {self.out} holds a run of other sources or another device: choose a new folder")
        self.stages_done: dict[str, dict[str, Any]] = state.get("stages", {})

    @property
    def state(self) -> Path:
        return self.out / "state.json"

    def stages(self) -> Iterator[Stage]:
        python, device = sys.executable, "cpu" if self.dry else "cuda"
        if (not self.dry and shutil.which("nvcc")) or importlib.util.find_spec("inferix_kernels._C") is None:
            yield Stage("build", [python, "setup.py", "build_ext", "--inplace"])
        yield Stage("env", [python, "-m", "benchmarks", "env", "--device", device])
        yield Stage("kernels", [python, "-m", "inferix_kernels"])
        pytest = [python, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", *self.tests]
        yield Stage("tests", pytest, "tests.txt", (0, SAID_NO, NO_TESTS))
        measure = ["--device", device, "--json", str(self.out / "run.jsonl")]
        quick = ["--rounds", "3", "--seconds", "2", "--blocks", "3"] if self.dry else ["--seconds", "20"]
        model = ["--model", "self-forcing"]
        seen = set()
        for family, shape in PLAN:
            shape = "smoke" if self.dry else shape
            if (family, shape) not in seen:
                seen.add((family, shape))
                shapes = [] if shape == "-" else ["--shapes", shape]
                run = [python, "-m", "benchmarks", "run", family, *shapes, *measure, *quick, *model]
                yield Stage(f"{family} {shape}", run, fine=(0, SAID_NO))
        sweep = [python, "-m", "benchmarks", "sweep", "--shape", "smoke" if self.dry else "wan1.3b-480p-frame"]
        yield Stage("sweep", [*sweep, *measure, *quick[:4]], fine=(0, SAID_NO))

    def go(self, minutes: float) -> int:
        """Work until all stages are done or the minutes are over. 0: all are well, 1: not all, 3: call again."""
        ends, whole = time.monotonic() + 60 * minutes, True
        for stage in self.stages():
            if self.stages_done.get(stage.name, {}).get("done"):
                print(f"{stage.name}: done before", flush=True)
                continue
            left = ends - time.monotonic()
            if left <= 0:
                print(f"{stage.name}: no time left", flush=True)
                whole = False
                continue
            self.stages_done[stage.name] = entry = self._do(stage, left)
            self._save()
            whole = whole and entry["done"]
            print(f"{stage.name}: {_state(entry)}, {entry['seconds']:.0f} s", flush=True)
        self._finish()
        if not whole:
            return AGAIN
        return int(any(_state(entry) != "well" for entry in self.stages_done.values()))

    def _do(self, stage: Stage, seconds: float) -> dict[str, Any]:
        path = os.pathsep.join(filter(None, [str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        started = time.monotonic()
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, code = process.communicate(timeout=seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            output, code = process.communicate()[0] + "\n[stopped: no time left]\n", -1
        self._log(f"\n===== {stage.name}: {' '.join(stage.command)}\n{output}[exit code {code}]\n")
        if stage.output:
            (self.out / stage.output).write_text(output[-LOG_BYTES:])
        last = output.strip().splitlines()[-1:] or [""]
        if code == SAID_NO and only_packages_missing(output):
            code = 0
        return {"done": code in stage.fine, "code": code, "seconds": time.monotonic() - started, "last": last[0][:200]}

    def _log(self, text: str) -> None:
        path = self.out / "log.txt"
        whole = (path.read_text() if path.exists() else "") + text
        path.write_text(whole[-LOG_BYTES:])

    def _save(self) -> None:
        state = {"kernels": fingerprints(), "dry": self.dry, "stages": self.stages_done}
        self.state.write_text(json.dumps(state, indent=1) + "\n")

    def _finish(self) -> None:
        """The summary and the plots, from what there is."""
        parts = ["# Benchmarks in one call", "", self._stage_table()]
        rows = self.out / "run.jsonl"
        if rows.exists():
            document = Document.load(rows)
            parts += ["", table([line for line in evidence([document]) if line.state != "never"]), "", _short(document)]
            for name, words in (("rates.png", ["report", "--plot"]), ("sweep.png", ["report", "--plot-sweep"])):
                stage = [sys.executable, "-m", "benchmarks", *words, str(self.out / name), "--records", str(rows)]
                self._do(Stage(name, stage), 120)
        (self.out / "summary.md").write_text("\n".join(parts) + "\n")
        print("\n".join(parts))

    def _stage_table(self) -> str:
        body = [
            [name, _state(entry), entry["last"].replace("|", ""), f"{entry['seconds']:.0f}"]
            for name, entry in self.stages_done.items()
        ]
        return markdown(["stage", "state", "its last line", "seconds"], body, left=3)


def only_packages_missing(output: str) -> bool:
    """Did pytest complain of nothing but test files that import what is not installed here, as for video files?"""
    errors = [line for line in output.splitlines() if line.startswith("E   ")]
    return bool(errors) and all("ModuleNotFoundError" in line for line in errors) and " failed" not in output


def _state(entry: dict[str, Any]) -> str:
    if not entry["done"]:
        return f"to do again (exit code {entry['code']})"
    return "well" if entry["code"] in (0, NO_TESTS) else f"exit code {entry['code']}"


def _short(document: Document) -> str:
    """Of every case the fastest of ours and the fastest peer."""
    from .measure import best_peer
    from .show import rate
    from .table import time_of

    body = []
    for case in dict.fromkeys(row.case for row in document.rows if row.family != "sweep"):
        rows = [row for row in document.rows if row.case == case]
        ours = min((row for row in rows if row.ours and row.seconds), key=lambda row: row.median, default=None)
        for row in filter(None, (ours, best_peer(rows))):
            body.append([case, row.contender, row.format, time_of(row.median), rate(row) if row.nbytes else ""])
        wrong = [f"{row.contender} {row.format}" for row in rows if row.status in ("wrong", "failed")]
        body += [[case, ", ".join(wrong), "", "WRONG or failed", ""]] if wrong else []
    return markdown(["case", "fastest", "format", "median", "rate"], body, left=3)
