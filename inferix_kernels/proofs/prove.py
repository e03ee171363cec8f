"""Runs the cases on the device that is here, in processes of their own, and stores the outcomes.

A kernel that waits for ever, or takes its process with it, is an outcome like any other: one process runs the kernels
of one backend and format in turn and writes each outcome as it comes. What it was at when it ended is wrong, and
another process goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from .._dispatch import Unsupported
from ..layout import KV_FORMATS
from . import stored
from .cases import Wrong, kernels_of
from .stored import RIGHT, Proof

SECONDS = 55.0  # of a whole proof
CAP = 30.0  # without a word of one process, which imports torch, or compiles one of Triton's kernels: then it hangs
POLL = 0.5
NO_TIME = "no time was left"
PROCESSES = 8  # at a time, if there are as many cores
# On a CPU nothing is held back until it is proved, and Triton's interpreter would take minutes.
BACKENDS = {"cpu": ("compiled",), "cuda": ("compiled", "triton")}


class Job(NamedTuple):
    """What one process proves, in order."""

    backend: str
    format: str
    kernels: tuple[str, ...]


Outcomes = dict[str, dict[str, str]]  # by backend and kernel, as proofs.Proof has them


def prove_in_process(job: Job, device: str, write: Callable[[str, str], None]) -> None:
    """Run a job's kernels here, up to one that raises; write(kernel, "") before each, write(kernel, outcome) after."""
    cases = kernels_of(job.format)
    torch.zeros(1, device=device).add_(1).item()  # a GPU that can't be reached says nothing against the first kernel
    for name in job.kernels:
        write(name, "")
        try:
            cases[name](job.backend, device)
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()  # a kernel that fails does so here
            outcome = RIGHT
        except Unsupported as error:
            outcome = f"unsupported: {error}"
        except Wrong as error:
            outcome = f"wrong: {error}"
        except (torch.OutOfMemoryError, OSError) as error:  # of who else is on the GPU, or of Triton's cache
            outcome = f"not reached: {''.join(str(error).splitlines()[:1])}"
        except Exception as error:  # of a launch, of a compiler: whatever it is, this kernel does not work here
            first = "".join(str(error).splitlines()[:1])
            write(name, f"wrong: {type(error).__name__}: {first}")
            return  # after a fault a GPU refuses all that follows in this process
        write(name, outcome)


def jobs(device: str) -> Iterator[Job]:
    """Most wanted first: our own kernels before Triton's, what a world on a GPU keeps by default before the rest."""
    order = ("bf16", "int8", "i8f8", "fp8", "int4", "fp16", "fp32")
    for backend in BACKENDS[torch.device(device).type]:
        for format in sorted(KV_FORMATS, key=lambda name: order.index(name) if name in order else len(order)):
            yield Job(backend, format, tuple(kernels_of(format)))


def prove(
    device: str,
    seconds: float = SECONDS,
    said: Callable[[str], None] = lambda line: None,
    program: Sequence[str] = (sys.executable, "-m", "inferix_kernels.proofs.prove"),
) -> Outcomes:
    """Run every job in a process of its own, some at a time.

    Args:
        device: "cuda", "cuda:1", or "cpu" for the CPU kernels.
        seconds: of all; what it leaves no time for is "not reached".
        said: called with a line for every outcome.
        program: that runs a job; see `main`.
    """
    ends = time.monotonic() + seconds
    outcomes: Outcomes = {backend: {} for backend in BACKENDS[torch.device(device).type]}

    def run(job: Job) -> None:
        while job.kernels:
            found = _run_process(job, device, ends, program)
            for name, outcome in found.items():
                outcomes[job.backend][name] = outcome
                said(f"{job.backend}: {name}: {outcome}")
            job = job._replace(kernels=tuple(name for name in job.kernels if name not in found))

    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        list(pool.map(run, jobs(device)))
    return outcomes


def _run_process(job: Job, device: str, ends: float, program: Sequence[str]) -> dict[str, str]:
    """Outcomes of one process: of all kernels, or of those up to the one at which it ended."""
    if time.monotonic() >= ends:
        return dict.fromkeys(job.kernels, f"not reached: {NO_TIME}")
    with tempfile.TemporaryDirectory() as folder:
        results, errors = Path(folder, "results"), Path(folder, "errors")
        with results.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                [*program, job.backend, job.format, device, *job.kernels], stdout=out, stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            ended = _wait(process, results, ends)
        lines = [json.loads(line) for line in results.read_text().splitlines() if line.endswith("]")]
        last = "".join(errors.read_text(errors="replace").strip().splitlines()[-1:])
    found = {name: outcome for name, outcome in lines if outcome}
    left = [name for name in job.kernels if name not in found]
    why = f"{ended}: {last}" if last else ended
    if left and [left[0], ""] in lines:  # it was at this one
        found[left[0]] = f"not reached: {NO_TIME}" if ended.startswith(NO_TIME) else f"wrong: {why}"
    elif not found:  # it did not come to the first
        found = dict.fromkeys(left, f"not reached: {why}")
    return found  # if some are left, for another process to go on with


def _wait(process: subprocess.Popen, results: Path, ends: float, cap: float = CAP) -> str:
    """How the process ended; one that hangs is killed with what it has started, and left if even that does not help.

    It hangs if it writes nothing for `cap` seconds. When all the time is over that may be a slow compiler's fault, and
    says nothing against a kernel: NO_TIME.
    """
    written, until = -1, 0.0
    while True:
        if (size := results.stat().st_size) > written:
            written, until = size, time.monotonic() + cap
        try:
            code = process.wait(max(0.0, min(POLL, ends - time.monotonic(), until - time.monotonic())))
        except subprocess.TimeoutExpired:
            if (now := time.monotonic()) < min(ends, until):
                continue
            os.killpg(process.pid, signal.SIGKILL)
            why = "no result in time" if now >= until else NO_TIME
            return why if gone(process) else f"{why}, and the process can not be killed"
        if code < 0:
            return f"the process ended by signal {signal.Signals(-code).name}"
        return f"the process ended with {code}"


def gone(process: subprocess.Popen) -> bool:
    """Has a killed process ended, a little later?"""
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        return False
    return True


def command(device: str = "cuda", seconds: float = SECONDS) -> int:
    """Prove the kernels on a device and store it: 0 if none is wrong, 1 if one is, 2 if nothing is proved or kept.

    Raises:
        ValueError: device is none of a machine's, or a GPU that is not here.
    """
    named = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if named is None:
        raise ValueError(
            f"device to prove kernels on must be cpu, cuda or cuda:N, a device that is here, got {device!r}"
        )
    kind, index = torch.device(device).type, int(named[1] or 0)
    if kind != "cpu":
        if not torch.cuda.is_available():
            say(f"prove: no GPU that torch can use: {no_gpu()}")
            return 2
        if index and index >= torch.cuda.device_count():
            raise ValueError(f"device must be one of the {torch.cuda.device_count()} GPUs that are here, got {device}")
        identity = stored.identity(torch.device("cuda", index))
        print(", ".join(f"{name} {value}" for name, value in identity._asdict().items()))
    outcomes = prove(device, seconds, lambda line: print(line, flush=True))
    every = [outcome for found in outcomes.values() for outcome in found.values()]
    counts = {state: sum(o.startswith(state) for o in every) for state in (RIGHT, "wrong", *stored.NEUTRAL)}
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    if kind == "cpu":
        print("nothing is stored: on a CPU `auto` needs no proof")
    else:
        try:
            print(f"stored: {stored.save(Proof(identity, outcomes))}")
        except ValueError as error:
            say(f"prove: {error}: this GPU stays unproved, and `auto` takes Triton's kernels first")
            return 2
    return int(counts["wrong"] > 0)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def no_gpu() -> str:
    """Why torch has no GPU, in one line: CUDA's own words, of a driver that is too old for instance."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} was built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return "".join(str(error).splitlines()[:1])
    return "none is visible"


def main() -> None:
    """One job, in a process that `prove` has started: backend, format, device, kernels."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("backend", "format", "device"):
        parser.add_argument(name)
    parser.add_argument("kernels", nargs="+")
    options = parser.parse_args()
    job = Job(options.backend, options.format, tuple(options.kernels))
    prove_in_process(job, options.device, lambda *line: print(json.dumps(line), flush=True))


if __name__ == "__main__":
    main()
