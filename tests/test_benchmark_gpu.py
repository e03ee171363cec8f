"""Minutes of a rented GPU, acted out: stages that hang, contenders that take their process along, disks that are full.

Time is a number that fake commands move on, so that nothing here waits or depends on how busy this machine is.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import machine
import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import families
from benchmarks.harness import commands, gpu, isolated, plan, processes, rows, summary
from benchmarks.harness.case import Case, Contender, Limit, Prepared
from benchmarks.harness.gpu import AGAIN, Job, Run, Stage
from benchmarks.harness.isolated import Lost
from benchmarks.harness.ledger import ROOT, fingerprints
from benchmarks.harness.measure import Settings
from benchmarks.harness.rows import Document, Row

NEVER = float("inf")
HEADER = {
    "date": "2026-11-30T12:00:00+00:00", "device": "NVIDIA H200", "architecture": "sm_90", "commit": "abc", "note": "",
    "dirty": False, "kernels": fingerprints(), "settings": {"threads": 1, "timer": "graph", "cold": True},
    "software": {"torch": "2.11.0"},
}  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Command:
    """Takes so many seconds of the clock, then does something and ends."""

    def __init__(self, clock, lasts=1.0, code=0, said="", does=None, can_be_ended=True):
        self.clock, self.ends, self.code, self.said, self.does = clock, clock.now + lasts, code, said, does
        self.can_be_ended = can_be_ended

    def wait(self, seconds):
        self.clock.now = max(self.clock.now, min(self.clock.now + seconds, self.ends))
        if self.clock.now < self.ends:
            return None
        if self.does:
            self.does()
        return self.code

    def kill(self):
        self.clock.now += 0.0 if self.can_be_ended else processes.GRACE
        return self.can_be_ended

    def output(self, most):
        return self.said


class Machine:
    """Starts fake commands: by the name of a job, what they take and do."""

    def __init__(self, **script):
        self.clock, self.script, self.started = Clock(), script, []

    def __call__(self, job):
        self.started.append(job.name)
        given = self.script.get(job.name, {})
        if isinstance(given, OSError):
            raise given
        return Command(self.clock, **given)

    def run(self, out, stages, **more):
        return Run(out, lambda: iter(stages), clock=self.clock, start=self, **more)


def stage(name, cap=60.0, least=10.0, lacks="", **job):
    return Stage(name, (Job(name, ["x"], **job),), cap, least, lacks)


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


# The plan.


@pytest.fixture
def h200(monkeypatch):
    """A machine with everything. Set `h200["extension"]` to what loads."""
    here = {"extension": "with CUDA", "hopper": "", "tools": {"nvcc", "ncu", "compute-sanitizer"}}
    monkeypatch.setattr(plan, "extension", lambda older=False: here["extension"])
    monkeypatch.setattr(plan, "without_hopper", lambda: here["hopper"])
    monkeypatch.setattr(plan.shutil, "which", lambda name: name if name in here["tools"] else None)
    monkeypatch.setattr(plan, "no_command", lambda name: "")
    return here


def acted(machine, out):
    """A run of the real plan on a fake machine."""
    return Run(out, plan.Plan(out).stages, False, summary.summary, lambda: None, machine.clock, machine)


def test_the_caps_of_the_first_call_fit_it(h200, tmp_path):
    first = list(plan.Plan(tmp_path).first_call())
    assert sum(stage.cap for stage in first) <= 60 * plan.FIRST - gpu.FINISH
    order = [stage.name for stage in first]
    assert order.index("speed of peers and Triton") < order.index("speed of Hopper") < order.index("block compiled")
    assert order[0] == "build" and order[-1] == "counters of compiled"
    names = [job.name for stage in plan.Plan(tmp_path).stages() for job in stage.jobs]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("dry", [True, False])
def test_every_command_of_the_plan_is_one_that_there_is(h200, tmp_path, dry):
    h200["extension"] = ""
    jobs = [job for stage in plan.Plan(tmp_path, dry).stages() for job in stage.jobs]
    parsed = []
    for job in jobs:
        if "benchmarks" in job.command:
            parsed.append(cli.parser().parse_args(list(job.command[job.command.index("benchmarks") + 1 :])))
        assert all(Path(ROOT, word).exists() for word in job.command if word.endswith(".py")), job
    assert {args.device for args in parsed} == {"cpu" if dry else "cuda"}
    for args in parsed:
        wanted = getattr(args, "families", [])
        if getattr(args, "isolate", False):
            settings = Settings(args.device, backends=args.backends, formats=args.formats)
            assert isolated.jobs_of(wanted, args.shapes, settings, args.ops), wanted
    if not dry:
        timed = {name for args in parsed for name in getattr(args, "families", []) if args.rounds}
        assert timed >= {"attention", "block", "kv_pages", "qkv", "linear", "e2e", "page_table"}


def test_every_contender_that_was_asked_for_is_in_the_first_call(h200, tmp_path):
    wanted = set()
    for stage in plan.Plan(tmp_path).first_call():
        for job in stage.jobs:
            if "--resume" in job.command:
                args = cli.parser().parse_args(list(job.command[3:]))
                settings = Settings("cuda", backends=args.backends, formats=args.formats)
                for other in isolated.jobs_of(args.families, args.shapes, settings, args.ops):
                    wanted.add((other.shape, other.contender.name, other.contender.format))
    ours = {("ours-compiled", f) for f in ("bf16", "int8", "i8f8", "fp8", "int4", "int8+bf16")}
    ours |= {("ours-compiled-8bit", f) for f in ("i8f8", "fp8")} | {("ours-triton-8bit", "i8f8")}
    ours |= {("ours-triton", f) for f in ("bf16", "int8", "i8f8", "int8+bf16", "int8+fp32")}
    peers = {(name, "bf16") for name in ("sdpa-flash", "sdpa-cudnn", "flash-attn-3", "flash-attn-3-split4")}
    for shape in (plan.SHAPE, *plan.OTHERS):
        assert {(shape, *who) for who in ours | peers} <= wanted
    assert (plan.SHAPE, "flex", "bf16") in wanted and len(plan.OTHERS) == 4


@pytest.mark.parametrize("kind", machine.KINDS)
def test_a_probe_takes_its_kind_of_page_and_no_other(kind):
    assert list(plan.PROBES) == list(machine.KINDS)

    def chosen(name):
        words = re.sub(r"\b(?!and\b|not\b|or\b)(\w+)", lambda word: repr(word[0] in name), plan.PROBES[kind])
        return eval(words)

    assert [other for other in machine.KINDS if chosen(f"test_3_accumulate[{other}]")] == [kind]
    assert [other for other in machine.KINDS if chosen(f"test_1_tma_brings_a_key_tile[gpu-{other}-64-128]")] == [kind]


def test_probes_that_hang_and_a_contender_that_hangs_leave_time_for_the_block(h200, tmp_path):
    hung = {f"probe {kind}": {"lasts": NEVER} for kind in plan.PROBES}
    here = Machine(**hung, **{"speed of Hopper": {"lasts": NEVER}, "first calls": {"lasts": 70}})
    assert acted(here, tmp_path).go(plan.FIRST) == AGAIN
    assert here.clock.now <= 60 * plan.FIRST
    assert {"block compiled", "block triton", "speed at other shapes", "counters of compiled"} <= set(here.started)


def test_everything_hangs_and_the_time_is_kept(h200, tmp_path):
    class Hung(dict):
        def get(self, name, default=None):
            return {"lasts": NEVER, "can_be_ended": False}

    for minutes in (plan.FIRST, 4, 0.5):
        here = Machine()
        here.script = Hung()
        acted(here, tmp_path / str(minutes)).go(minutes)
        overtime = len(here.started) * processes.GRACE  # a bound of its own, for each that can't be ended
        assert here.clock.now <= 60 * minutes + overtime and here.started


def test_a_build_that_fails_leaves_triton_and_the_peers(h200, tmp_path):
    h200["extension"] = ""
    here = Machine(build={"lasts": 40, "code": 1, "said": "inferix: the build of inferix_kernels._C failed, see above"})
    run = acted(here, tmp_path)
    assert run.go(plan.FIRST) == AGAIN
    assert {"speed of peers and Triton", "block triton", "speed at other shapes"} <= set(here.started)
    assert not {"speed of Hopper", "block compiled", "probe bf16"} & set(here.started)
    assert run.left_out["speed of Hopper"] == "the extension is not built with CUDA"
    assert "the build of inferix_kernels._C failed" in (tmp_path / "summary.md").read_text()


def test_a_gpu_without_hopper_is_measured_without_it(h200, tmp_path):
    h200["hopper"], h200["extension"] = "needs a Hopper GPU (sm_90), and this is sm_80", ""
    built = next(job for job in plan.Plan(tmp_path).build())
    assert built.command[-1] == "80"
    here = Machine()
    run = acted(here, tmp_path)
    run.go(plan.FIRST)
    assert run.left_out["probes"] == "needs a Hopper GPU (sm_90), and this is sm_80"
    assert {"build", "speed of peers and Triton", "block triton"} <= set(here.started)


def test_without_nvcc_what_loads_is_taken(h200, tmp_path):
    h200["tools"], h200["extension"] = set(), "without CUDA"
    run = acted(Machine(), tmp_path)
    run.go(plan.FIRST)
    assert run.left_out["probes"] == "the extension is not built with CUDA: there is no nvcc on PATH"
    assert run.left_out["counters of compiled"].startswith("the extension") and "build" not in run.jobs_done


def test_the_second_call_goes_on_where_the_first_was_cut_short_on_another_machine(h200, tmp_path):
    """The folder alone comes along: the extension is built again, and nothing that was learned is asked again."""
    record = tmp_path / "run.jsonl"

    def measures(contender):
        return lambda: rows.append(record, HEADER, [a_row(contender)])

    def built():
        h200["extension"] = "with CUDA"

    h200["extension"] = ""
    first = Machine(
        build={"lasts": 80, "does": built},
        **{
            "speed of peers and Triton": {"lasts": 60, "does": measures("sdpa-flash")},
            "speed of Hopper": {"lasts": 20, "does": measures("ours-compiled")},
            "block compiled": {"lasts": 30},
        },
    )
    assert acted(first, tmp_path).go(minutes=3.5) == AGAIN
    assert first.clock.now <= 3.5 * 60 and "block triton" not in first.started
    h200["extension"] = ""
    second = Machine(
        build={"lasts": 80, "does": built}, **{"block triton": {"lasts": 40}, "memcheck": {"lasts": NEVER}}
    )
    assert acted(second, tmp_path).go(minutes=4) == AGAIN
    assert second.clock.now <= 4 * 60 and second.started[0] == "build"
    assert not {"speed of Hopper", "speed of peers and Triton", "block compiled", "first calls"} & set(second.started)
    assert {"block triton", "speed at other shapes", "counters of compiled", "memcheck"} <= set(second.started)
    text = (tmp_path / "summary.md").read_text()
    assert "sdpa-flash" in text and "ours-compiled" in text
    assert {row.contender for row in Document.load(record).rows} == {"sdpa-flash", "ours-compiled"}


def test_what_loads_decides_whether_there_is_an_extension(tmp_path, monkeypatch):
    class Spec:
        origin = str(tmp_path / "_C.py")

    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: Spec)
    Path(Spec.origin).write_text("has_cuda = True")
    assert plan.extension() == "with CUDA"
    Path(Spec.origin).write_text("has_cuda = False # and as long")
    assert plan.extension() == "without CUDA"
    os.utime(Spec.origin, (0, 0))
    assert plan.extension() == "" and plan.extension(older=True) == "without CUDA"
    Path(Spec.origin).write_text("import no_such_library")
    assert plan.extension() == ""
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert plan.extension() == ""


# What it says.


def a_row(contender="ours-compiled", format="bf16", tflops=600.0, **more):
    flops = 4.0 * 4680 * 32760 * 12 * 128
    given = {"flops": flops, "seconds": [flops / 1e12 / tflops] * 5, "nbytes": 1, "kernel": "cuda/attention"} | more
    return Row(
        "attention", "paged_attention", plan.SHAPE, contender, format, "cuda", given.pop("status", "ok"), **given
    )


def test_the_summary_puts_figures_beside_what_was_predicted(tmp_path):
    block = Row("block", "full window", "self-forcing", "ours-compiled", "int8+bf16", "cuda", "ok", seconds=[0.5])
    block.metrics = {"block ms": 500.0, "SM MHz": 1755.0}
    given = [
        a_row(metrics={"SM MHz": 1755.0, "power W": 690.0, "temperature C": 61.0}),
        a_row("ours-compiled-8bit", "i8f8", 650.0),
        a_row("ours-triton", status="wrong", seconds=[], note="error 1.0"),
        a_row("flash-attn-3", tflops=580.0), a_row("flash-attn-3-split2", tflops=600.0),
        a_row("flash-attn-3-split4", tflops=640.0),
        a_row("sage", "int8", status="absent", seconds=[], note="pip install sage"),
        block,
    ]  # fmt: skip
    Document(HEADER, given).save(tmp_path / "run.jsonl")
    text = summary.summary(Machine().run(tmp_path, []))
    lines = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in text.splitlines() if "|" in line}
    assert ">= 560 TFLOP/s (modelled): reached" in lines["ours-compiled", "bf16"]
    assert "1755 SM MHz, 690 power W, 61 temperature C" in lines["ours-compiled", "bf16"]
    assert ">= 690 TFLOP/s (modelled): MISSED" in lines["ours-compiled-8bit", "i8f8"]
    assert "✗ WRONG" in lines["ours-triton", "bf16"] and ">= 320 TFLOP/s (modelled) " in lines["ours-triton", "bf16"]
    assert ("flash-attn-3-split4", "bf16") in lines and ("flash-attn-3-split2", "bf16") not in lines
    assert "<= 420 ms (modelled): MISSED" in lines["ours-compiled", "int8+bf16"]
    assert "Not here: sage (pip install sage)" in text
    assert "cp run.jsonl benchmarks/records/nvidia-h200/2026-11-30-abc.jsonl" in text


def test_a_record_that_cannot_be_read_is_named_in_the_summary(tmp_path):
    (tmp_path / "run.jsonl").write_text("{}\n")
    assert "must begin with schema 1" in summary.summary(Machine().run(tmp_path, []))


# Contenders in processes of their own. `cases` is what the workers measure too: see `worker`.


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


QUICK = Settings(rounds=2, seconds=1)


def test_one_that_dies_is_wrong_or_spoils_the_gpu_takes_no_other_along(fake_cases):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_benchmark_gpu as t; t.worker()"
    started = []

    def start():
        started.append(isolated.WorkerProcess([sys.executable, "-c", code]))
        return started[-1]

    jobs = isolated.jobs_of(["attention"], ["tiny"], QUICK)
    found = [row for rows in isolated.measure(jobs, QUICK, 600.0, start) for row in rows if not row.peak]
    assert [(row.contender, row.status) for row in found] == [
        ("gone", "absent"), ("ours-first", "ok"), ("ours-dies", "failed"), ("ours-wrong", "wrong"),
        ("peer-spoils", "failed"), ("ours-last", "ok"),
    ]  # fmt: skip
    notes = {row.contender: row.note for row in found}
    assert notes["ours-dies"] == "first call: its process ended: SIGSEGV" and "illegal memory" in notes["peer-spoils"]
    assert [len(row.seconds) for row in found] == [0, 2, 0, 0, 0, 2]
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
    done = {"rows": [rows.compact(a_row("ours-last", seconds=[]))], "lost": False}
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
    Document(HEADER, [done, absent]).save(path)
    words = ["run", "attention", "--isolate", "--resume", "--shapes", "smoke", "--ops", "paged_attention"]
    words += ["--backends", "ours,sdpa", "--formats", "int8,bf16", "--device", "cpu"]
    assert cli.main([*words, "--json", str(path)]) == 0
    assert asked == [[("ours-compiled", "bf16"), ("sdpa", "bf16")]]
    assert cli.main(words) == 2 and "--resume must come with --isolate and --json" in capsys.readouterr().err


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


def test_the_run_needs_no_package_that_a_rented_machine_may_lack():
    """What a machine with torch, Triton and pytest has is enough, for the whole model too."""
    lacking = ("av", "aiohttp", "aiortc", "diffusers", "transformers", "tokenizers", "ftfy", "hypothesis", "jsonschema")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking!r}))\n"
        "sys.path.insert(0, 'python')\n"
        "from benchmarks import __main__, block, e2e, families\n"
        "from benchmarks.harness import isolated, plan\n"
        "from benchmarks.harness.measure import Settings\n"
        "for name in families.FAMILIES: families.family(name)\n"
        "model, condition = e2e.load(Settings(model='self-forcing'))\n"
        "print(model.layers, len(list(families.cases('attention', ['smoke'], 'cuda'))))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "4 2\n", result.stderr
