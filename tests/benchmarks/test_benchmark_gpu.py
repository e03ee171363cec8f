"""Minutes of a rented GPU, simulated: stages that hang, processes that can't be ended, disks that are full."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from benchmarks import __main__ as cli
from benchmarks import commands, families
from benchmarks.harness import gpu, processes
from benchmarks.harness.gpu import AGAIN, Job, Run, Stage
from benchmarks.harness.ledger import ROOT
from benchmarks.harness.rows import Document
from tests.benchmarks.rented import NEVER, Machine, a_row, stage


def test_each_stage_is_done_once_and_a_second_call_goes_on_after_a_failure(tmp_path, capsys):
    first = Machine(second={"code": 1, "said": "no\nsecond!"}, third={"said": "third!"})
    stages = [stage("first"), stage("second"), stage("third", output="tests.txt")]
    assert first.run(tmp_path, stages).go(minutes=0) == AGAIN and not first.started
    assert first.run(tmp_path, stages).go(minutes=5) == AGAIN
    second = Machine()
    assert second.run(tmp_path, stages).go(minutes=5) == 0
    assert first.started == ["first", "second", "third"] and second.started == ["second"]
    assert "third!" in (tmp_path / "tests.txt").read_text() and "second!" in (tmp_path / "log.txt").read_text()
    assert "| second | well" in (tmp_path / "summary.md").read_text() and len(list(tmp_path.iterdir())) <= 8
    with pytest.raises(ValueError, match="choose a new folder"):
        second.run(tmp_path, stages, dry=True)


def test_a_stage_that_hangs_costs_its_cap_and_no_more(tmp_path):
    here = Machine(hang={"lasts": NEVER, "said": "still here"})
    stages = [stage("hang", cap=30), stage("finding", cap=30, fine=(0, gpu.STOPPED)), stage("next")]
    here.script["finding"] = {"lasts": NEVER}
    assert here.run(tmp_path, stages).go(minutes=5) == AGAIN
    assert here.clock.now == pytest.approx(61) and here.started == ["hang", "finding", "next"]
    done = json.loads((tmp_path / "state.json").read_text())["jobs"]
    assert [done[name]["done"] for name in here.started] == [False, True, True]
    assert (
        "still here" in (tmp_path / "log.txt").read_text() and "its time was up" in (tmp_path / "log.txt").read_text()
    )


def test_a_process_that_cannot_be_ended_is_left_behind(tmp_path):
    here = Machine(stuck={"lasts": NEVER, "can_be_ended": False})
    here.run(tmp_path, [stage("stuck", cap=30), stage("next")]).go(minutes=5)
    assert here.started == ["stuck", "next"] and here.clock.now == pytest.approx(30 + processes.GRACE + 1)
    assert "left behind" in (tmp_path / "log.txt").read_text()


def test_a_real_process_is_ended_with_what_it_started_or_left_behind(monkeypatch):
    child = "import subprocess, sys; print('at work', flush=True); subprocess.run(['sleep', '600'])"
    process = processes.Process([sys.executable, "-c", child], ROOT, os.environ)
    while "at work" not in process.output(100):
        assert process.wait(0.05) is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda *_: None)
        assert not process.kill(grace=0)
    assert process.kill(grace=60) and process.process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        while True:  # the child is its own process: it ends as the kernel comes to it
            os.killpg(process.process.pid, 0)


def test_jobs_of_a_stage_run_side_by_side_and_one_that_cannot_start_stops_none(tmp_path):
    here = Machine(a={"lasts": 20}, b=OSError(2, "no such file"), c={"lasts": 25, "code": 3}, d={"lasts": NEVER})
    side = Stage("side", tuple(Job(name, ["x"]) for name in "abcd"), 30)
    run = here.run(tmp_path, [side])
    assert run.go(minutes=5) == AGAIN and here.clock.now == pytest.approx(30)
    said = [run.jobs_done[name] for name in "abcd"]
    assert [entry["code"] for entry in said] == [0, gpu.NOT_STARTED, 3, gpu.STOPPED]
    assert [round(entry["seconds"]) for entry in said] == [20, 0, 25, 30]


def test_what_does_not_fit_or_is_not_here_is_left_out_by_name(tmp_path, capsys):
    here = Machine()
    stages = [stage("long", least=200), stage("ncu", lacks="ncu is not here"), stage("short")]
    run = here.run(tmp_path, stages)
    assert run.go(minutes=1) == AGAIN and here.started == ["short"]
    assert run.left_out == {"long": "48 s were left, and it needs 200", "ncu": "ncu is not here"}
    text = (tmp_path / "summary.md").read_text()
    assert (
        re.search(r"\| ncu +\| left out \| +\| ncu is not here", text) and "long: left out" in capsys.readouterr().out
    )
    assert Machine().run(tmp_path / "b", [stage("ncu", lacks="not here"), stage("short")]).go(minutes=1) == 0


def test_a_full_disk_is_said_and_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def full(path, argument="path"):
        raise ValueError(f"{argument}: no space left: {str(path)!r}")

    here = Machine()

    def fill():
        monkeypatch.setattr(gpu, "atomic_write", full)

    here.script["fills"] = {"does": fill}
    run = here.run(tmp_path, [stage("before"), stage("fills"), stage("after")])
    assert run.go(minutes=5) == 0 and here.started == ["before", "fills", "after"]
    assert "--out: no space left" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "state.json").read_text())["jobs"]) == ["before"]  # whole, as it last was


def test_plots_that_hang_have_a_bound_of_their_own(tmp_path):
    for minutes, ends in ((10, 1 + 24), (0.2 + 2 / 60, 1 + 13)):  # its cap, or what is left of the time
        here = Machine(plot={"lasts": NEVER})
        run = here.run(tmp_path / str(ends), [stage("one", least=1)], plots=lambda: stage("plot", cap=24, least=12))
        assert run.go(minutes) == 0 and here.clock.now == pytest.approx(ends)


def test_a_folder_that_cannot_be_gone_on_with_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out: cannot write .*file"):
        Machine().run(tmp_path / "file", [])
    for text in ("", "[]", "{}", '{"jobs": 3, "kernels": {}, "dry": false}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(ValueError, match=r"--out: .*state.json' must be what an earlier call left"):
            Machine().run(tmp_path, [])


@pytest.mark.parametrize("other", [{"device": "NVIDIA H100"}, {"dry": True}])
def test_a_folder_of_another_device_is_not_gone_on_with(tmp_path, other):
    Machine().run(tmp_path, [stage("one")], device="NVIDIA H200").go(5)
    before = (tmp_path / "state.json").read_text()
    with pytest.raises(ValueError, match="other sources or another device: choose a new folder"):
        Machine().run(tmp_path, [], **({"device": "NVIDIA H200"} | other))
    assert (tmp_path / "state.json").read_text() == before
    assert Machine().run(tmp_path, [stage("one")], device="NVIDIA H200").go(5) == 0


def test_rows_that_a_full_disk_refuses_are_shown_and_the_next_are_measured(tmp_path, monkeypatch, capsys):
    append = commands.append
    calls = []

    def sometimes(path, header, given):
        calls.append(given)
        if len(calls) == 2:
            raise ValueError(f"--json: no space left: {str(path)!r}")
        append(path, header, given)

    monkeypatch.setattr(commands, "append", sometimes)
    path = tmp_path / "run.jsonl"
    words = ["run", "page_table", "formats", "--device", "cpu", "--rounds", "1", "--json", str(path), "--isolate"]
    monkeypatch.setattr(
        families, "run_whole", lambda *_: iter([[a_row("ours-a")], [a_row("ours-b")], [a_row("ours-c")]])
    )
    assert cli.main(words) == 1  # what is not in the file is no success
    out, err = capsys.readouterr()
    assert all(name in out for name in ("ours-a", "ours-b", "ours-c"))
    assert "no space left" in err and "1 rows are not in it" in err
    assert [row.contender for row in Document.load(path).rows] == ["ours-a", "ours-c"]


def test_test_files_that_lack_a_package_are_told_from_tests_that_fail(tmp_path):
    (tmp_path / "test_a.py").write_text("import no_such_package\n")
    (tmp_path / "test_b.py").write_text("def test_b():\n    pass\n")
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    tests = Stage("tests", (Job("tests", [*pytest_, str(tmp_path)], (0, 1), "tests.txt"),), 600)
    run = Run(tmp_path / "out", lambda: iter([tests]), dry=True)
    assert run.go(11) == 0 and run.jobs_done["tests"]["code"] == 0
    (tmp_path / "test_b.py").write_text("def test_b():\n    import no_such_package\n")
    run = Run(tmp_path / "again", lambda: iter([tests]), dry=True)
    assert run.go(11) == 1 and run.jobs_done["tests"]["code"] == 1


def test_a_sample_of_tests_is_every_so_many_one(tmp_path):
    (tmp_path / "test_a.py").write_text("import pytest\n@pytest.mark.parametrize('i', range(50))\ndef test(i): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.sample_tests"]
    result = subprocess.run([*command, "--every", "20", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "3 passed, 47 deselected" in result.stdout, result.stdout + result.stderr
