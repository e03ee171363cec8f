"""The harness: right before fast, cold before warm, everybody's turn; and what its commands print."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import attention, e2e, families, profiler, shapes, stream, sweep
from benchmarks.harness import clocks, measure, show, timing
from benchmarks.harness.case import EXACT, Case, Contender, Error, Limit, Prepared, error_of
from benchmarks.harness.measure import Contest, Machine, Settings, measure_case
from benchmarks.harness.rows import Document, Row
from benchmarks.harness.series import BYTES
from inferix.profile import overhead
from inferix_kernels import Unsupported

MACHINE = Machine(torch.device("cpu"), small=True)
QUICK = Settings(rounds=2, seconds=1, model="self-forcing", blocks=3)
LIMIT = Limit.of(6e-3)


def a_case(*contenders, reference=lambda x: x * 2):
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    return Case("family", "op", "shape", lambda device: x, reference, contenders)


def contender(name, call, format="bf16", **more):
    return Contender(name, format, lambda x: Prepared(lambda: call(x)), 1e6, 1000, LIMIT, **more)


@pytest.fixture(scope="module")
def rows():
    """Of a run of all families: the smoke test of CI. FlexAttention is left out, it compiles for half a minute; so are
    Triton, which is an interpreter here, all browsers but one, each of which takes ten seconds to start, and most of
    what the profiler repeats.
    """
    backends = ("ours-compiled", "ours-reference", "ours-torch", "torch", "sdpa", "gather-sdpa")
    settings = dict.fromkeys(families.FAMILIES, dataclasses.replace(QUICK, backends=backends))
    settings["host"] = settings["arrivals"] = QUICK
    settings["parallel"] = dataclasses.replace(QUICK, rounds=1, formats=("int8",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CASES", stream.CASES[:1])
        patch.setattr(profiler, "SPANS", 1000)
        patch.setattr(overhead, "ENOUGH", 2)
        patch.setattr(overhead, "span_cost", functools.partial(overhead.span_cost, count=1000, repeats=1))
        found = {name: families.run([name], ["smoke"], settings[name], MACHINE) for name in families.FAMILIES}
        return {name: [row for rows in cases for row in rows] for name, cases in found.items()}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_right_and_timed(rows, family):
    found = rows[family]
    assert {row.status for row in found} == {"ok"}, [(row.contender, row.format, row.note) for row in found]
    assert all(row.seconds or row.metrics for row in found)
    assert all(row.share > 0 for row in found if row.flops and not row.peak)


def test_a_wrong_kernel_is_shown_as_failing_and_not_timed():
    calls = []

    def one_row_wrong(x):
        calls.append("wrong")
        out = x * 2
        out[500] = 0
        return out

    case = a_case(contender("ours-right", lambda x: x * 2), contender("ours-wrong", one_row_wrong))
    right, wrong, *peaks = measure_case(case, QUICK, MACHINE)
    assert right.status == "ok" and len(right.seconds) == 2
    assert wrong.status == "wrong" and not wrong.seconds and "worst row" in wrong.note
    assert len(calls) == 2  # one call to compile, one to check
    assert all(peak.peak and len(peak.seconds) == 2 for peak in peaks)
    table = "\n".join(show.tables([right, wrong, *peaks]))
    assert "✗ WRONG" in table and "ours-wrong, bf16: error" in table


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_kernel_that_leaves_one_bad_number_is_wrong(bad):
    def call(x):
        out = x * 2
        out[999, 63] = bad
        return out

    (row,) = measure_case(a_case(contender("ours", call)), QUICK, MACHINE)
    assert row.status == "wrong"


def test_a_peer_that_refuses_raises_or_is_absent_is_listed_with_its_reason():
    def refuse(x):
        raise Unsupported("no such head width")

    def fail(x):
        raise RuntimeError("CUDA error\nand more")

    case = a_case(
        contender("peer-a", refuse), contender("peer-b", fail), contender("peer-c", fail, absent="pip install c==1")
    )
    found = measure_case(case, QUICK, MACHINE)
    assert [(row.status, row.note) for row in found] == [
        ("unsupported", "no such head width"),
        ("failed", "RuntimeError: CUDA error"),
        ("absent", "pip install c==1"),
    ]
    assert "not on this machine: peer-c bf16 (pip install c==1)" in "\n".join(show.tables(found))


def test_the_error_of_one_row_is_not_averaged_away():
    want = torch.ones(10_000, 8)
    got = want.clone()
    got[17] = 0
    error = error_of(got, want)
    assert error.relative < 0.011 and error.worst > 0.9
    assert not error.within(Limit.of(2e-2))
    assert error_of(want, want.clone()) == Error(0, 0, 0) and error_of(want, want).within(EXACT)
    nan = error_of((want, want * torch.nan), (want, want))
    assert not nan.within(Limit.of(1.0))
    with pytest.raises(ValueError, match="must have the reference's shape"):
        error_of(want[1:], want)


def test_attention_is_compared_in_every_row_or_where_that_is_too_much_all_over():
    for sizes in ("192x576x4x64", "468x3276x12x128", "33x150x4/2x32"):
        inputs = attention.make_inputs(shapes.find_shape(sizes), torch.device("cpu"))
        assert inputs.rows().tolist() == list(range(len(inputs.q)))
    few = dataclasses.replace(inputs, segments=((20, 0, 5), (13, 5, 10)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES", 4 * 33 * 150 * 4 // 2 // 8)
        rows, plan, every = few.rows(), few.plan(few.every), few.every
    assert every > 1 and len(rows) == plan.q_indptr[-1] and (rows[: plan.q_indptr[1]] < 20).all()
    assert len(set(rows.tolist())) == len(rows) and (rows[plan.q_indptr[1] :] >= 20).all()
    out = torch.zeros_like(inputs.q)
    out[-1] = torch.inf
    assert attention.sampled(out, inputs).isnan().any()


def test_contenders_take_turns_in_changing_order_on_cold_caches(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "RETRIES", 1)  # else a busy machine has a turn taken again
    monkeypatch.setattr(MACHINE, "flush", lambda: order.append("flush"))
    case = a_case(*(contender(name, lambda x, name=name: order.append(name) or x * 2) for name in ("a", "b", "c")))
    contest = Contest(case, QUICK, MACHINE)
    order.clear()
    for _ in range(12):
        contest.round()
    named = [name for name in order if name != "flush"]
    rounds = [tuple(named[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(set(rounds)) > 2
    assert all(order[i - 1] == "flush" for i, name in enumerate(order) if name != "flush")


def test_a_short_call_that_the_scheduler_disturbed_is_measured_again(monkeypatch):
    samples = iter([timing.Sample(1e-3, True), timing.Sample(1e-4)])
    entrant = measure._Entrant(Row(*"abcdef", "ok"), lambda: next(samples), lambda: None)
    assert measure._sample(entrant, QUICK, MACHINE) == timing.Sample(1e-4)


def test_a_call_that_no_graph_captures_is_timed_by_events_and_says_so(monkeypatch):
    def refused(calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(timing.TIMERS["cpu"], "graph", refused)
    monkeypatch.setattr(timing, "event", lambda calls: lambda: timing.Sample(1e-3))
    case = a_case(contender("ours", lambda x: x * 2))
    alone = measure.Alone(case, dataclasses.replace(QUICK, timer="graph"), MACHINE, case.contenders)
    row, prepared = alone.check(case.contenders[0])
    alone.time(row, case.contenders[0], prepared)
    assert row.status == "ok" and row.seconds == [1e-3, 1e-3] and row.share > 0
    assert row.note == "timed by events: not timed by graph: operation not permitted when stream is capturing"


def test_clock_power_and_heat_are_read_by_whatever_answers(monkeypatch):
    said = {"SM MHz": 1755.0, "power W": 690.5, "temperature C": 61.0}

    class Refuses(Exception):
        pass

    def refuse():
        raise Refuses

    library = types.ModuleType("pynvml")
    vars(library).update(
        NVMLError=Refuses,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda gpu, kind: 1755,
        nvmlDeviceGetPowerUsage=lambda gpu: 690500,
        nvmlDeviceGetTemperature=lambda gpu, kind: 61,
    )
    monkeypatch.setattr(clocks, "_uuid", lambda: "GPU-1")
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert clocks.now("cuda") == said and clocks.now("cpu") == {}
    smi = subprocess.CompletedProcess([], 0, "1755, 690.5, 61\n")
    monkeypatch.setattr(clocks.subprocess, "run", lambda *_, **__: smi)
    library.nvmlInit = refuse
    assert clocks.now("cuda") == said
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert clocks.now("cuda") == said
    smi.stdout = "[N/A], 690.5, 61\n"
    assert clocks.now("cuda") == {}


def test_cold_operands_that_rotate_do_not_fit_the_cache():
    assert timing.copies_needed("graph", True, nbytes=10 << 20, cache=60 << 20) == 18
    assert timing.copies_needed("graph", True, nbytes=1 << 30, cache=60 << 20) == 1
    assert timing.copies_needed("graph", False, 1, 60 << 20) == timing.copies_needed("wall", True, 1, 60 << 20) == 1
    assert MACHINE.cache >= 1 << 20 and Machine(torch.device("cpu")).copied >= 2 * MACHINE.cache


def test_settings_choose_contenders_by_name_and_format():
    ours = contender("ours-compiled", None, format="int8")
    assert Settings(backends=("ours",), formats=("int8",)).wants(ours)
    assert not Settings(backends=("our",)).wants(ours) and not Settings(formats=("int4",)).wants(ours)


@pytest.mark.parametrize("text", ["468x3276x12x128", "192x2304x24/8x128", "192x1536x8960"])
def test_a_shape_is_asked_for_by_its_numbers(text):
    shape = shapes.find_shape(text)
    assert shape.numbers == text and shape.queries == int(text.split("x")[0])


@pytest.mark.parametrize("text", ["", "tin", "1x2", "0x2x3", "0x8x1x16", "8x4x1x16", "4x8x3/2x16"])
def test_a_shape_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="shape must"):
        shapes.find_shape(text)


def test_sweeps_fit_what_grows():
    def line(cost):
        xs = [1, 2, 4, 8, 16]
        rows = [Row("sweep", "kv", "s", "ours", "int8", "cpu", "ok", metrics={"x": x}) for x in xs]
        for row in rows:
            noise = torch.rand(9, generator=torch.Generator().manual_seed(int(row.metrics["x"])))
            row.seconds = [cost(row.metrics["x"]) * (1 + 0.02 * float(n)) for n in noise]
        (series,) = sweep.series(rows)
        return series.exponent()

    for exponent in (0.0, 1.0, 2.0):
        fitted, low, high = line(lambda x, e=exponent: 1e-3 * x**e)
        assert low - 0.03 <= exponent <= high + 0.03 and abs(fitted - exponent) < 0.03


@pytest.mark.parametrize("axis", [*sweep.AXES, sweep.BLOCKS])
def test_every_point_of_a_sweep_is_right(axis):
    shape = shapes.SHAPES["smoke"]
    found = sweep.run_axis(axis, shape, QUICK, MACHINE)
    assert {row.status for row in found} == {"ok"}, [(row.contender, row.note) for row in found if row.status != "ok"]
    for line in sweep.series(found):
        assert line.x == sorted(line.x) and len(line.x) >= 4
    assert "exponent" in sweep.table(found)


def test_kv_bytes_are_flat_with_a_window():
    window, everything = sweep.series(sweep.run_axis(sweep.BLOCKS, shapes.SHAPES["smoke"], QUICK, MACHINE))
    held = [[row.metrics[BYTES] for row in line.rows] for line in (window, everything)]
    assert len(set(held[0][2:])) == 1
    assert held[1] == [held[1][0] * n for n in range(1, 25)]


def test_the_loop_on_another_attention_is_shown_as_wrong(monkeypatch):
    gather = e2e.GatherAttention.__call__
    monkeypatch.setattr(e2e.GatherAttention, "__call__", lambda *a, **k: tuple(1.1 * x for x in gather(*a, **k)))
    *ours, baseline = e2e.run(QUICK, [])
    assert len(ours) == 2 and baseline.metrics
    assert all(row.status == "wrong" and not row.metrics and not row.seconds for row in ours)


def test_the_loop_is_split_into_its_parts(rows):
    fused, separate, baseline, beside = rows["e2e"]
    assert "clean pass ms" not in fused.metrics and separate.metrics["clean pass ms"] > 0
    for row in (fused, separate, baseline):
        assert row.metrics["first frame ms"] > 0 and row.metrics["KV MiB"] > 0 and row.metrics["window full %"] == 100
    assert abs(fused.error["relative"]) < 1e-3
    assert beside.metrics.keys() == {"decode beside", "decode after"} and min(beside.metrics.values()) > 0


def test_run_writes_rows_tables_a_plot_and_what_ci_reads(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install 'inferix-kernels[bench]'")
    files = [str(tmp_path / name) for name in ("out.json", "out.png", "github.json")]
    command = ["run", "attention", "--shapes", "smoke", "--rounds", "2", "--formats", "int8,fp32", "--device", "cpu"]
    command += ["--backends", "ours,sdpa", "--json", files[0], "--plot", files[1], "--github", files[2]]
    assert cli.main(command) == 0
    document = Document.load(tmp_path / "out.json")
    ours = {"ours-compiled", "ours-compiled-8bit", "ours-compiled-exact"}
    assert {row.contender for row in document.rows if not row.peak} == ours | {"sdpa"}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    for entry in json.loads((tmp_path / "github.json").read_text()):
        assert entry.keys() == {"name", "unit", "value", "range", "extra"} and entry["value"] > 0
    out = capsys.readouterr().out
    assert "### attention/paged_attention/smoke" in out and re.search(r"\| ours-compiled +\| int8", out)


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.main(["run", "attention", "--device", "cpu", "--plot", "x.png"]) == 2
    assert "pip install 'inferix-kernels[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["run", "atention"], "family must be one of"),
        (["run", "--shapes", "huge"], "shape must be one of"),
        (["run", "attention", "--shapes", "192x128x512"], "is of linear layers: family must be linear, got attention"),
        (["run", "--timer", "graph"], "--timer must be one of wall, cpu on cpu"),
        (["run", "--rounds", "-1"], "must not be negative"),
        (["report", "evidence"], "files must be there, to be made anew, got evidence"),
        (["sweep", "time"], "axis must be one of"),
        (["compare", "nowhere.json", "nowhere.json"], "must hold a run of the benchmarks"),
        (["gpu", "--out", "nowhere"], "torch finds no GPU here: The driver is too old; --dry-run goes"),
        (["gpu", "--out", "nowhere", "--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["run", "--isolate", "--patience", "0"], "--patience must be above 0 seconds, got 0"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(words, message, capsys, monkeypatch):
    def too_old():
        raise RuntimeError("The driver is too old\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert cli.main([*words, *(["--device", "cpu"] if words[0] in ("run", "sweep") else [])]) == 2
    assert message in capsys.readouterr().err


def test_list_names_what_is_not_here_and_how_to_get_it(capsys):
    assert cli.main(["list", "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert "pip install flashinfer-python==" in out and "sdpa-cudnn" in out and "ours-triton" in out


def test_the_same_cases_run_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark", reason="pip install 'inferix-kernels[bench]'")
    from benchmarks import test_kernels

    class Config:
        def getoption(self, name):
            return {"--shapes": ("smoke",), "--device": "cpu"}[name]

    class Benchmark:
        group, extra_info = "", {}

        def pedantic(self, call, setup, rounds):
            setup()
            call()
            self.rounds = rounds

    pairs = list(test_kernels.found(Config()))
    assert {case.family for case, _ in pairs} >= {"attention", "kv_pages", "qkv"}
    for case, contender in pairs[::9]:
        benchmark = Benchmark()
        test_kernels.test_kernel(benchmark, MACHINE, case, contender)
        assert benchmark.rounds and benchmark.group == case.name and "error" in benchmark.extra_info


def test_without_the_extension_it_says_what_it_measures(monkeypatch, capsys):
    """As in a clone whose sources lie in the way of what was installed."""
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "inferix_kernels._C" else find(name)
    )
    assert cli.main(["env"]) == 0
    assert "has no extension: on a CPU the reference is measured for ours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cost", "low", "high", "note"),
    [
        (0.12, 0.05, 0.19, "all goals met"),
        (0.12, -0.3, 0.5, "unsure: level block, % 0.12 (-0.3 to 0.5), goal 0.2"),
        (0.67, 0.21, 0.98, "missed: level block, % 0.67 (0.21 to 0.98), goal 0.2"),
    ],
)
def test_a_goal_is_met_or_missed_by_the_whole_interval(cost, low, high, note):
    measured = {"level block, %": cost, "at least, %": low, "at most, %": high}
    row = Row("profiler", "block", "tiny", "ours", "-", "cpu", "ok", metrics=measured)
    assert profiler._judged(row).note == note
