"""What a rented GPU's minutes are spent on, simulated on machines that lack something; and what the summary says."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import __main__ as cli
from benchmarks import isolated
from benchmarks.harness import gpu, plan, processes, rows, summary
from benchmarks.harness.gpu import AGAIN, Run
from benchmarks.harness.ledger import ROOT
from benchmarks.harness.measure import Settings
from benchmarks.harness.rows import Document, Row
from inferix_kernels.sass import KINDS
from tests.benchmarks.rented import HEADER, NEVER, Machine, a_row


@pytest.fixture
def h200(monkeypatch):
    """A machine with everything. Set `h200["extension"]` to what loads."""
    here = {"extension": "with CUDA", "hopper": "", "tools": {"nvcc", "ncu", "compute-sanitizer"}}
    monkeypatch.setattr(plan, "extension", lambda older=False: here["extension"])
    monkeypatch.setattr(plan, "without_hopper", lambda: here["hopper"])
    monkeypatch.setattr(plan.shutil, "which", lambda name, path: name if name in here["tools"] else None)
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
    later = [stage.name for stage in plan.Plan(tmp_path).later()]
    assert later[:4] == ["proof", "speed of peers that compile", "memcheck", "racecheck"]
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
            without_cases = set(wanted) <= {"e2e", "page_table"}
            assert without_cases or isolated.jobs_of(wanted, args.shapes, settings, args.ops), wanted
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_takes_its_kind_of_page_and_no_other(kind):
    assert list(plan.PROBES) == list(KINDS)

    def chosen(name):
        words = re.sub(r"\b(?!and\b|not\b|or\b)(\w+)", lambda word: repr(word[0] in name), plan.PROBES[kind])
        return eval(words)

    assert [other for other in KINDS if chosen(f"test_3_accumulate[{other}]")] == [kind]
    assert [other for other in KINDS if chosen(f"test_1_tma_brings_a_key_tile[gpu-{other}-64-128]")] == [kind]


def test_probes_that_hang_and_a_contender_that_hangs_leave_time_for_the_block(h200, tmp_path):
    hung = {f"probe {kind}": {"lasts": NEVER} for kind in plan.PROBES}
    here = Machine(**hung, **{"speed of Hopper": {"lasts": NEVER}, "first block": {"lasts": 70}})
    assert acted(here, tmp_path).go(plan.FIRST) == AGAIN
    assert here.clock.now <= 60 * plan.FIRST
    assert {"block compiled", "block triton", "other shapes, peers and Triton", "counters of compiled"} <= set(
        here.started
    )


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
    assert {"speed of peers and Triton", "block triton", "other shapes, peers and Triton"} <= set(here.started)
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
            "speed of peers and Triton": {"lasts": 50, "does": measures("sdpa-flash")},
            "speed of Hopper": {"lasts": 20, "does": measures("ours-compiled")},
            "block compiled": {"lasts": 35},
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
    assert not {"speed of Hopper", "speed of peers and Triton", "block compiled", "first block"} & set(second.started)
    assert {"block triton", "other shapes, peers and Triton", "counters of compiled", "memcheck"} <= set(second.started)
    text = (tmp_path / "summary.md").read_text()
    assert "sdpa-flash" in text and "ours-compiled" in text
    assert {row.contender for row in Document.load(record).rows} == {"sdpa-flash", "ours-compiled"}


def test_sources_of_a_machine_whose_clock_is_ahead_are_not_newer_than_what_is_built(h200, tmp_path, monkeypatch):
    ahead, old = tmp_path / "a.cu", tmp_path / "b.cu"
    for path, when in ((ahead, 2**33), (old, 1)):
        path.write_text("")
        os.utime(path, (when, when))
    monkeypatch.setattr(plan, "sources", lambda: [ahead, old])
    assert not list(plan.Plan(tmp_path).build())
    assert old.stat().st_mtime == 1 < ahead.stat().st_mtime <= time.time()


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
    Path(Spec.origin).write_text("has_cuda = True")
    hangs = subprocess.TimeoutExpired("python", 20)
    with monkeypatch.context() as patch:
        patch.setattr(plan.subprocess, "run", mock.Mock(side_effect=hangs))
        assert plan.extension() == ""
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert plan.extension() == ""


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
    assert "cp run.jsonl benchmarks/records/nvidia-h200/2026-11-30-abc-" in text


def test_a_record_that_cannot_be_read_is_named_in_the_summary(tmp_path):
    (tmp_path / "run.jsonl").write_text("{}\n")
    assert "must begin with schema 1" in summary.summary(Machine().run(tmp_path, []))


def test_the_run_needs_no_package_that_a_rented_machine_may_lack():
    """What a machine with torch, Triton and pytest has is enough, for the whole model too."""
    lacking = ("av", "aiohttp", "aiortc", "diffusers", "transformers", "tokenizers", "ftfy", "hypothesis", "jsonschema")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking!r}))\n"
        "sys.path.insert(0, 'python')\n"
        "from benchmarks import __main__, block, e2e, families\n"
        "from benchmarks import isolated\n"
        "from benchmarks.harness import plan\n"
        "from benchmarks.harness.measure import Settings\n"
        "for name in families.FAMILIES: families.family(name)\n"
        "model, condition = e2e.load(Settings(model='self-forcing'))\n"
        "print(model.layers, len(list(families.cases('attention', ['smoke'], 'cuda'))))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "4 2\n", result.stderr
