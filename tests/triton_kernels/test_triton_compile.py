"""Kernels compiled ahead of time for GPUs that are not here, and the choice of their tiles."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inferix_kernels import Unsupported
from inferix_kernels.__main__ import OPS, main
from inferix_kernels.triton_kernels import aot, config, tune
from inferix_kernels.triton_kernels.launch import Case
from tests.triton_kernels import triton_mode  # noqa: F401

# The richest kernels on every architecture; `python -m inferix_kernels compile` does all, in minutes.
CASES = ["qkv_prologue i8f8 from bf16, Wan", "linear e4m3 many rows, gate"]
OTHERS = {
    80: ["kv_commit int4 from i8f8", "linear int8 many rows, gate"],
    90: ["kv_gather int4", "quantize_rows e4m3 adaLN"],
}


# Runs what comes in, and answers with what it printed and with what went wrong.
ELSEWHERE = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    said, error = io.StringIO(), ""
    with contextlib.redirect_stdout(said):
        try:
            exec(json.loads(line), {})
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([said.getvalue(), error]), flush=True)
"""


@pytest.fixture(scope="module")
def elsewhere():
    """Runs code in a process that does not interpret, since none can both interpret and compile; returns what it
    prints. One process for all: it takes seconds to start."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, pipe = [sys.executable, "-c", ELSEWHERE], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:

        def run(code):
            print(json.dumps(code), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, f"the process ended with {process.wait()}"
            said, error = json.loads(answer)
            assert not error, said + error
            return said

        yield run


@pytest.fixture(scope="module")
def compile_ahead(elsewhere):
    """compile_ahead(architectures, cases): the rows that the command gives."""

    def compiled(architectures, cases):
        words = ["compile", *cases, "--json", "--arch", *map(str, architectures)]
        said = elsewhere(  # 0: nothing spills, ptxas has nothing to say
            f"from inferix_kernels.__main__ import main\nstatus = main({words!r})\nassert status == 0, status"
        )
        return [aot.Compilation(**row) for row in json.loads(said)]

    return compiled


@pytest.fixture(scope="module")
def richest(compile_ahead):
    return compile_ahead(aot.ARCHITECTURES, CASES)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_the_richest_kernels_compile_and_spill_nothing(architecture, richest):
    rows = {row.kernel: row for row in richest if row.architecture == architecture}
    products = rows.pop("linear_kernel", None)
    assert (products is None) == (architecture == 80)
    if products is not None:
        instruction = {90: "wgmma", 100: "tcgen05"}.get(architecture, "mma")
        assert products.tensor_core.split()[0] == instruction and products.shared > 0
    else:
        assert rows.pop("").unsupported == "linear: e4m3 codes need sm_89 or later, this is sm_80; int8 codes run here"
    assert set(rows) == {"norm_stats_kernel", "prologue_kernel"}
    for row in richest:
        assert row.sound and row.spilled == 0 and row.registers <= 255
        assert not row.kernel or row.instructions > row.loads > 0
        assert bool(row.followed) == row.tensor_core.startswith("wgmma")


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_kernels_compile_and_spill_nothing(architecture, compile_ahead):
    rows = compile_ahead([architecture], OTHERS[architecture])
    assert len(rows) == 2 and all(row.kernel and row.sound for row in rows)
    assert architecture == 90 or rows[1].tensor_core == "mma m16n8k32 s8"


ATTENTION = {
    80: ["paged_attention bf16+int8+int4"],
    90: [
        "paged_attention bf16 bfloat16 q, D 128",
        "paged_attention i8f8 bfloat16 q, D 128",
        "latent_attention latent8",
    ],
    120: ["paged_attention i8f8 bfloat16 q, D 128"],
}
INSTRUCTIONS = {80: {"mma bf16"}, 90: {"wgmma bf16", "wgmma s8", ""}, 120: {"mma bf16", "mma s8"}}  # "": float32


@pytest.mark.parametrize("architecture", ATTENTION)
def test_attention_compiles_and_spills_nothing(architecture, compile_ahead):
    rows = compile_ahead([architecture], ATTENTION[architecture])
    kernels = [row for row in rows if row.kernel in ("attention_kernel", "latent_kernel")]
    assert all(row.sound and row.shared <= (232448 if architecture == 90 else 101376) for row in rows)
    assert all(bool(row.followed) == row.tensor_core.startswith("wgmma") for row in rows)
    assert {re.sub(r"m\d+n\d+k\d+ ", "", row.tensor_core) for row in kernels} == INSTRUCTIONS[architecture]
    assert (architecture == 90) == any(row.kernel == "combine_kernel" for row in rows)  # where lists are split


def test_amd_compiles_and_has_no_e4m3_of_ours_on_gfx942(compile_ahead):
    rows = compile_ahead(["gfx942"], ["paged_attention bf16 bfloat16 q, D 256", "linear e4m3 many rows, gate"])
    attention, linear = rows
    assert attention.sound and attention.shared <= 64 << 10 and attention.tensor_core.startswith("mfma")
    assert linear.unsupported == "linear: e4m3 codes need sm_89 or later, this is gfx942; int8 codes run here"


def test_merging_in_place_reads_everything_before_it_writes(elsewhere):
    """Threads of a program read the same lse: without a barrier one might read what another has written already."""
    programs = elsewhere("""
from inferix_kernels.triton_kernels.launch import compile_only
from inferix_kernels.triton_kernels.merge import cases
for case in cases():
    with compile_only(90) as kernels:
        case.call()
    print(kernels[0].asm["ptx"].replace(chr(10), " "))
""").splitlines()
    assert len(programs) == 2
    for ptx in programs:
        before, after = ptx.rsplit("bar.sync", 1)
        assert "ld.global" in before and "st.global" not in before
        assert "st.global" in after and "ld.global" not in after


def test_every_kernel_has_cases_and_every_case_a_configuration():
    cases = list(aot.all_cases())
    assert {case.op for case in cases} == set(OPS) & set(vars(sys.modules["inferix_kernels.triton_kernels"]))
    for architecture in aot.ARCHITECTURES:
        table = json.loads((config.FOLDER / f"sm_{architecture}.json").read_text())
        for case in cases:
            e4m3_too_early = case.op == "linear" and case.format == "e4m3" and architecture < 89
            assert case.op not in table or case.shape in table[case.op] or e4m3_too_early


def test_a_hazard_of_a_kernel_is_a_warning(elsewhere):
    """As compiled: one product, and a wait that is not there."""
    said = elsewhere("""
from unittest import mock
from inferix_kernels import sass
from inferix_kernels.triton_kernels import aot
disassemble = sass.disassemble
def without_waits(*given):
    return disassemble(*given).replace("WARPGROUP.DEPBAR", "NOP")
with mock.patch.object(sass, "disassemble", without_waits):
    (row,) = aot.compile_ahead([90], ["linear int8 many rows, GELU"])
print(row.followed, row.sound, row.warning)
""")
    followed, sound, warning = said.split(maxsplit=2)
    assert (
        int(followed) > 0 and sound == "False" and re.search(r"(reads|writes) [AD] \(R\d+.* of \| \w+: IGMMA", warning)
    )


def test_too_much_shared_memory_is_a_warning():
    assert aot._warning(89, 101376, "") == aot._warning(90, 232448, "") == ""
    assert aot._warning(89, 101377, "") == "more shared memory than the 101376 bytes that a program may have"


PTX = {
    "wgmma m64n128k32 s8": "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%r1}, %rd1, %rd2, p;",
    "wgmma m64n64k16 bf16": "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1};",
    "mma m16n8k32 e4m3": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 { %r1 };",
    "mma m16n8k32 s8": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1};",
    "tcgen05 i8": "tcgen05.mma.cta_group::1.kind::i8 [ %r1 + 0 ], %rd1, %rd2;",
    "": "fma.rn.f32 %f1, %f2, %f3;",
}


@pytest.mark.parametrize("instruction", PTX)
def test_the_tensor_core_instruction_is_read_off_the_ptx(instruction):
    assert aot.tensor_core(f"add.s32 %r1;\n{PTX[instruction]}\nret;") == instruction


ROWS = [
    aot.Compilation("linear", "int8", "many rows", 80, "linear_kernel", 200, 0, 4096, "mma m16n8k32 s8"),
    aot.Compilation("linear", "int8", "few rows", 80, "linear_kernel", 90, 0, 4096, "mma m16n8k32 s8"),
    aot.Compilation("linear", "e4m3", "many rows", 80, unsupported="needs sm_89"),
    aot.Compilation("linear", "e4m3", "many rows", 90, "linear_kernel", 255, 16, 4096, "wgmma m64n128k32 e4m3"),
]


def test_the_tables_say_what_spills_and_what_can_not_be():
    text = list(aot.table(ROWS))
    assert len(text) == 5 and text[3].endswith("needs sm_89") and "wgmma" in text[4]
    assert [row.sound for row in ROWS] == [True, True, True, False]
    assert not ROWS[0]._replace(warning="C7510").sound
    assert aot.markdown(ROWS).splitlines()[2] == (
        "| `linear` | `int8` `e4m3` | 90 to 200, mma s8, no `e4m3` | 255, wgmma e4m3, "
        "**e4m3, many rows: 16 bytes spilled** |"
    )


def test_the_table_of_registers_has_every_case():
    """Its numbers are made by `python -m inferix_kernels compile --markdown`, in minutes."""
    text = Path(__file__).parents[2].joinpath("docs/kernels-triton.md").read_text()
    table = text.split("<!-- made by: python -m inferix_kernels compile --markdown -->")[1].split("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    assert rows[0] == ["op", "formats", *(f"sm_{architecture}" for architecture in aot.ARCHITECTURES)]
    formats: dict[str, dict[str, None]] = {}
    for case in aot.all_cases():
        formats.setdefault(f"`{case.op}`", {})[f"`{case.format}`"] = None
    assert [row[:2] for row in rows[2:]] == [[op, " ".join(names)] for op, names in formats.items()]
    assert "spilled" not in table


def test_the_command_says_what_it_can_not_do(capsys):
    assert main(["compile", "--arch", "90", "90a"]) == 2
    assert "Triton's architectures are numbers, as 90, or gfx942, gfx950: no 90a" in capsys.readouterr().err
    assert main(["compile", "--arch", "90a", "--json"]) == 2
    assert "--arch 90a must be alone" in capsys.readouterr().err
    assert main(["compile", "--arch", "75a"]) == 2
    assert "the extension holds no kernels for sm_75a" in capsys.readouterr().err
    assert main(["compile", "nothing"]) == 2
    assert "no case begins with 'nothing'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["compile", "linear int8 many rows, GELU", "--arch", "90"]) == 2
        assert "Triton compiles nothing in its interpreter" in capsys.readouterr().err
        assert main(["tune"]) == 2
        assert "tune measures on a GPU, and there is none here" in capsys.readouterr().err


def test_an_architecture_without_a_file_takes_the_one_before(monkeypatch):
    for architecture, name in (
        (80, "sm_80"),
        (86, "sm_89"),
        (90, "sm_90"),
        (103, "sm_100"),
        (121, "sm_120"),
        (None, "sm_89"),
    ):
        monkeypatch.setattr(config, "architecture", lambda device, architecture=architecture: architecture)
        assert config.file_of(torch.device("cpu")).stem == name
    monkeypatch.setattr(config, "architecture", lambda device: 75)
    with pytest.raises(Unsupported, match="need sm_80 or later, this is sm_75"):
        config.file_of(torch.device("cpu"))


def test_files_are_written_as_they_are_shipped(tmp_path):
    for file in config.FOLDER.glob("sm_*.json"):
        config.write(tmp_path / file.name, json.loads(file.read_text()))
        assert (tmp_path / file.name).read_text() == file.read_text()


def test_the_tuner_keeps_what_takes_the_least_time_in_all(monkeypatch):
    """A clock that likes tiles of 64 rows where M is small and of 128 elsewhere, and a GPU with little memory."""
    tiles, cpu = [], torch.device("cpu")

    def call(shape):
        return lambda: tiles.append(config.config("linear", shape, cpu))

    def clock(run):
        run()
        tile = tiles[-1]
        if tile["n"] * tile["k"] * tile["stages"] > 65536:
            raise tune.TooMuch("shared memory")
        return abs(tile["m"] - (64 if "small" in shapes[run] else 128)) + abs(tile["n"] - 256) + tile["warps"]

    calls = {shape: [call(shape), call(shape)] for shape in ("small", "large")}
    shapes = {run: shape for shape, runs in calls.items() for run in runs}
    cases = [Case("linear", "int8", "", run, shape) for shape, runs in calls.items() for run in runs]
    shipped = {"any": {"m": 32, "n": 256, "k": 64, "tall": 8, "warps": 8, "stages": 2}}
    found = tune.best("linear", cases, clock, shipped)
    assert list(found) == ["small", "large"]
    for shape, m in (("small", 64), ("large", 128)):
        assert (found[shape]["m"], found[shape]["n"], found[shape]["warps"]) == (m, 256, m // 16)  # sums in registers
        assert found[shape]["n"] * found[shape]["k"] * found[shape]["stages"] <= 65536
    assert not config._trials


def test_the_tuner_keeps_what_is_shipped_unless_beaten_and_passes_over_what_the_gpu_can_not():
    def refused():
        raise Unsupported("needs sm_89")

    cases = [
        Case("paged_attention", "int8", "", lambda: None, "floats"),
        Case("paged_attention", "fp8", "", refused, "8 bits"),
        Case("paged_attention", "i8f8", "", refused, "floats"),
    ]
    shipped = {"floats": {"m": 32, "n": 16, "warps": 4, "stages": 1}, "8 bits": {"m": 64}}
    times = iter([1.0, *[2.0] * 1000])
    assert tune.best("paged_attention", cases, lambda call: next(times), shipped) == {"floats": shipped["floats"]}

    def fails(call):
        raise tune.TritonError("too large")

    assert tune.best("paged_attention", cases, fails, shipped) == {"floats": shipped["floats"]}

    def breaks(call):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        tune.best("paged_attention", cases, breaks, shipped)


def test_a_tuned_file_goes_before_the_architectures(tmp_path, monkeypatch):
    own, gpu = tmp_path / "a_gpu.json", torch.device("cuda", 0)
    monkeypatch.setattr(config, "own_file", lambda device: own)
    monkeypatch.setattr(config, "architecture", lambda device: 90)
    monkeypatch.setattr(config, "_table", functools.cache(config._table.__wrapped__))  # whose contents go with the test
    assert config.file_of(gpu).stem == "sm_90"
    rows = {"any": {"numbers": 1024, "numbers_per_thread": 8}}
    config.write(own, {"linear": {"any": {"m": 16}}, "quantize_rows": rows})
    assert config.config("linear", "whatever", gpu) == {"m": 16}
    assert config.rows_and_warps("quantize_rows", 256, gpu) == (4, 4)
