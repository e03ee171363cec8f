"""Contenders in processes of their own: one that dies, hangs or spoils the GPU takes no other's result along.

`cases` is what real workers measure here too: see `worker`.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import families, isolated
from benchmarks.harness import environment, rows
from benchmarks.harness.case import Case, Contender, Limit, Prepared
from benchmarks.harness.ledger import fingerprints
from benchmarks.harness.measure import Settings
from benchmarks.harness.rows import Document, Row
from benchmarks.isolated import Lost


def draw(device):
    return torch.randn(100, 16, generator=torch.Generator().manual_seed(0))


def contender(name, call):
    return Contender(name, "bf16", lambda x: Prepared(lambda: call(x)), 1e6, 1000, Limit.of(6e-3))


def dies(x):
    os.kill(os.getpid(), signal.SIGSEGV)


def spoils(x):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def double(x):
    return x * 2


def cases(name, shapes, device):
    broken = [contender("ours-dies", dies), contender("ours-wrong", torch.zeros_like), contender("peer-spoils", spoils)]
    mine = [contender("ours-first", double), *broken, contender("ours-last", double)]
    yield Case(name, "op", shapes[0], draw, double, [*mine, Contender("gone", "bf16", None, 0, 0, None, absent="pip")])  # type: ignore


def worker():
    """A worker whose GPU can't be used after a failure."""
    families.cases, isolated._usable = cases, lambda device: False
    isolated.serve()


@pytest.fixture
def fake_cases(monkeypatch):
    monkeypatch.setattr(families, "cases", cases)
    monkeypatch.setattr(isolated, "START", 600.0)


QUICK = Settings(rounds=2, seconds=1, small=True)


def test_one_that_dies_is_wrong_or_spoils_the_gpu_takes_no_other_along(fake_cases):
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from {__name__} import worker; worker()"
    started = []

    def start():
        started.append(isolated.WorkerProcess([sys.executable, "-c", code]))
        return started[-1]

    jobs = isolated.jobs_of(["attention"], ["tiny"], QUICK)
    found = [row for rows in isolated.measure(jobs, QUICK, 600.0, start) for row in rows if not row.peak]
    assert [(row.contender, row.status) for row in found] == [
        ("gone", "absent"), ("peer-spoils", "failed"), ("ours-first", "ok"), ("ours-dies", "failed"),
        ("ours-wrong", "wrong"), ("ours-last", "ok"),
    ]  # fmt: skip
    notes = {row.contender: row.note for row in found}
    assert notes["ours-dies"] == "first call: its process ended: SIGSEGV" and "illegal memory" in notes["peer-spoils"]
    assert [len(row.seconds) for row in found] == [0, 0, 2, 0, 0, 2]
    assert len(started) == 3 and all(each.process.returncode is not None for each in started)


class Script:
    """A worker that answers as it is told; None: nothing comes."""

    def __init__(self, answers):
        self.answers, self.waited = answers, []

    def send(self, request):
        pass

    def receive(self, seconds):
        self.waited.append(seconds)
        answer = self.answers.pop(0) if self.answers else None
        if answer is None:
            raise Lost(f"took more than {seconds:.0f} s")
        return answer

    def stop(self):
        pass


def test_a_peer_whose_first_call_takes_too_long_is_dropped_by_name(fake_cases):
    first, *_, second = [job for job in isolated.jobs_of(["f"], ["tiny"], QUICK) if not job.contender.absent]
    done = {"rows": [rows.compact(Row(*"abcdef", "ok"))], "lost": False}
    begun = {"begun": True, "rows": []}
    workers = [Script([{"ready": True}, begun, None]), Script([{"ready": True}, begun, {"checked": "ok"}, done])]
    slow, patient = list(workers)
    found = list(isolated.measure([first, second], QUICK, 20.0, lambda: workers.pop(0)))
    assert slow.waited == [isolated.START, isolated.START, 20.0]
    assert [row.note for given in found for row in given][:1] == ["first call: took more than 20 s"]
    assert found[-1][0].status == "ok" and patient.waited[2] == 20.0


def test_a_worker_that_cannot_start_or_make_the_inputs_fails_once_for_all_it_concerns(fake_cases):
    jobs = isolated.jobs_of(["f"], ["tiny", "smoke"], QUICK)
    jobs = [job for job in jobs if not job.contender.absent]
    workers = [Script([None])]
    found = [row for rows in isolated.measure(jobs, QUICK, 20.0, lambda: workers.pop(0)) for row in rows]
    assert len(found) == len(jobs) and {row.note for row in found} == {f"start: took more than {isolated.START:.0f} s"}
    workers = [Script([{"ready": True}, None]), Script([None])]
    found = [row for rows in isolated.measure(jobs, QUICK, 20.0, lambda: workers.pop(0)) for row in rows]
    assert [row.note.split(":")[0] for row in found] == ["inputs and reference"] * 5 + ["start"] * 5


def test_a_worker_that_says_nothing_is_not_waited_for():
    silent = isolated.WorkerProcess([sys.executable, "-c", "import sys; sys.stdin.read()"])
    with pytest.raises(Lost, match="took more than 0 s"):
        silent.receive(0.0)
    silent.stop()
    assert silent.process.returncode == -signal.SIGKILL


def test_what_is_in_the_record_is_not_measured_again(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(jobs, settings, patience):
        asked.append([(job.contender.name, job.contender.format) for job in jobs])
        return iter(())

    monkeypatch.setattr(isolated, "measure", measure)
    path = tmp_path / "run.jsonl"
    done = Row("attention", "paged_attention", "smoke", "ours-compiled", "int8", "cpu", "failed")
    absent = Row("attention", "paged_attention", "smoke", "sdpa", "bf16", "cpu", "absent")
    Document({"kernels": fingerprints(), "device": environment.device_name("cpu")}, [done, absent]).save(path)
    words = ["run", "attention", "--isolate", "--resume", "--shapes", "smoke", "--ops", "paged_attention"]
    words += ["--backends", "ours,sdpa", "--formats", "int8,bf16", "--device", "cpu"]
    assert cli.main([*words, "--json", str(path)]) == 0
    others = [("ours-compiled-8bit", "int8"), ("ours-compiled-exact", "int8")]
    assert asked == [[("sdpa", "bf16"), ("ours-compiled", "bf16"), *others]]
    assert cli.main(words) == 2 and "--resume must come with --isolate and --json" in capsys.readouterr().err
    Document({"kernels": fingerprints(), "device": "NVIDIA H100"}, [done]).save(path)
    assert cli.main([*words, "--json", str(path)]) == 2
    assert "holds a run on NVIDIA H100: choose a new file" in capsys.readouterr().err
