"""How kernels are proved on a device: the cases, and the processes that they run in."""

import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

from inferix_kernels import compiled
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.proofs import cases, prove, stored
from inferix_kernels.proofs.stored import RIGHT

# The cases


@pytest.mark.parametrize("format", KV_FORMATS)
def test_the_kernels_of_a_cpu_are_right(format):
    said: dict[str, str] = {}
    prove.prove_in_process(prove.Job("compiled", format, tuple(cases.kernels_of(format))), "cpu", said.__setitem__)
    assert said == dict.fromkeys(cases.kernels_of(format), RIGHT)


def _nothing(*args, **kwargs):
    pass


def _zeroed(q, pools, plan, *, out, lse, **options):
    compiled_attention(q, pools, plan, out=out, lse=lse, **options)
    out[-1] = 0  # one row of many
    return out, lse


def _other_bits(q, pools, plan, *, out, lse, **options):
    compiled_attention(q, pools, plan, out=out, lse=lse, **options)
    out[0, 0, 0] += 1e-3 * next(_other_bits.calls)
    return out, lse


def _fault(*args, **kwargs):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


compiled_attention = compiled.paged_attention


@pytest.mark.parametrize(
    "op, fake, said",
    [
        ("kv_append", _nothing, "k is not, bit for bit, the reference's"),
        ("kv_commit", _nothing, "k is not, bit for bit, the reference's"),
        ("kv_gather", lambda *args, out: [x.fill_(torch.nan) for x in out], "k is off by nan"),
        ("paged_attention", _zeroed, "out is off by"),
        ("paged_attention", _other_bits, "not the same bits in every run"),
        ("paged_attention", _fault, "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_kernel_that_is_not_right_is_found(monkeypatch, op, fake, said):
    _other_bits.calls = iter(range(100))
    monkeypatch.setattr(compiled, op, fake)
    found: dict[str, str] = {}
    name = stored.kernel(op, "int8")
    prove.prove_in_process(prove.Job("compiled", "int8", (name,)), "cpu", found.__setitem__)
    assert found[name].startswith("wrong: ") and said in found[name] and "\n" not in found[name]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), OSError(28, "No space left")])
def test_a_machine_that_is_full_says_nothing_against_a_kernel(monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(compiled, "kv_append", full)
    found: dict[str, str] = {}
    prove.prove_in_process(prove.Job("compiled", "int8", ("kv_append int8",)), "cpu", found.__setitem__)
    assert found == {"kv_append int8": f"not reached: {str(error).splitlines()[0]}"}


# The processes. What they run is acted: `program` says which kernel it is at, then does what the test wants.

ACT = """
import json, os, signal, sys, time
from pathlib import Path
marker, act, backend, format, device, *kernels = sys.argv[1:]
for name in kernels:
    print(json.dumps([name, ""]), flush=True)
    if name.startswith("kv_commit"):
        Path(marker).write_text(str(os.getpid()))
        exec(act)
    print(json.dumps([name, "right"]), flush=True)
"""
HANGS = "while True: time.sleep(60)"


@pytest.fixture
def run_job(tmp_path, monkeypatch):
    """All int8 kernels in acted processes; for one that hangs its time is over as soon as it does, or all the time."""
    waiting, marker = prove._wait, tmp_path / "marker"

    def run(act: str, all_is_over: bool = False) -> dict[str, str]:
        def wait(process, results, ends):
            at_it = str(process.pid)
            while process.poll() is None and not (marker.exists() and marker.read_text() == at_it):
                time.sleep(0.01)
            if process.poll() is not None or act != HANGS:
                return waiting(process, results, ends)
            return waiting(process, results, 0.0 if all_is_over else ends, 600.0 if all_is_over else 0.0)

        monkeypatch.setattr(prove, "_wait", wait)
        monkeypatch.setattr(prove, "jobs", lambda device: [prove.Job("compiled", "int8", names)])
        names = tuple(cases.kernels_of("int8"))
        return prove.prove("cpu", 600, program=(sys.executable, "-c", ACT, str(marker), act))["compiled"]

    return run


@pytest.mark.parametrize(
    "act, said",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "wrong: the process ended by signal SIGSEGV"),
        ("sys.exit(3)", "wrong: the process ended with 3"),
        ("raise MemoryError('no room')", "wrong: the process ended with 1: MemoryError: no room"),
        (HANGS, "wrong: no result in time"),
    ],
)
def test_what_ends_a_process_is_that_kernels_outcome_and_the_rest_is_still_proved(run_job, act, said):
    outcomes = run_job(act)
    assert outcomes.pop(stored.kernel("kv_commit", "int8")) == said
    assert len(outcomes) == 5 and set(outcomes.values()) == {RIGHT}


def test_a_kernel_that_the_end_of_all_time_cuts_off_is_not_called_wrong(run_job):
    """It may have been compiling: `auto` would never take it again."""
    outcomes = run_job(HANGS, all_is_over=True)
    assert outcomes.pop(stored.kernel("kv_commit", "int8")) == "not reached: no time was left"
    assert len(outcomes) == 5 and set(outcomes.values()) == {RIGHT}


def test_a_process_has_its_time_for_each_kernel_not_for_all(tmp_path):
    """Eight kernels that Triton compiles for seconds each are no kernel that hangs."""
    results, waits = tmp_path / "results", []

    class Slow:
        def wait(self, seconds):
            waits.append(seconds)
            results.write_text("x" * len(waits))
            if len(waits) < 8:
                raise subprocess.TimeoutExpired("slow", seconds)
            return 0

    results.touch()
    clock = iter(range(0, 10**6, 5))  # 5 s at each look
    with mock.patch.object(prove.time, "monotonic", lambda: float(next(clock))):
        assert prove._wait(Slow(), results, 10**6, cap=25.0) == "the process ended with 0"
    assert len(waits) == 8


def test_a_process_that_can_not_be_killed_is_left_alone(run_job, monkeypatch):
    left = []
    monkeypatch.setattr(prove.os, "killpg", lambda group, number: left.append(group))
    outcomes = run_job(HANGS)
    monkeypatch.undo()
    os.killpg(left[0], signal.SIGKILL)
    assert outcomes[stored.kernel("kv_commit", "int8")] == "wrong: no result in time, and the process can not be killed"
    assert outcomes[stored.kernel("paged_attention", "int8")] == RIGHT


def test_a_process_that_does_not_begin_proves_nothing(monkeypatch):
    monkeypatch.setattr(prove, "jobs", lambda device: [prove.Job("compiled", "int8", ("kv_append int8",))])
    found = prove.prove("cpu", 600, program=(sys.executable, "-c", "raise SystemExit('no module named torch')"))
    assert found == {"compiled": {"kv_append int8": "not reached: the process ended with 1: no module named torch"}}


def test_a_gpu_that_can_not_be_reached_proves_nothing(monkeypatch):
    busy = mock.Mock(side_effect=RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"))
    monkeypatch.setattr(prove.torch, "zeros", busy)
    said: list[tuple[str, str]] = []
    with pytest.raises(RuntimeError, match="busy"):  # the process ends with it, before it has named a kernel
        prove.prove_in_process(prove.Job("compiled", "int8", ("kv_append int8",)), "cuda", lambda *x: said.append(x))
    assert not said


def test_what_there_is_no_time_for_is_not_reached():
    found = prove.prove("cpu", 0)["compiled"]
    assert len(found) == 43 and set(found.values()) == {"not reached: no time was left"}


def test_a_job_in_a_process_of_its_own(monkeypatch):
    job = prove.Job("compiled", "bf16", ("kv_append bf16", "merge_attention bf16"))
    monkeypatch.setattr(prove, "jobs", lambda device: [job])
    assert prove.prove("cpu", 600) == {"compiled": dict.fromkeys(job.kernels, RIGHT)}
